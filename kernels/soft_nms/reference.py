"""soft_nms in plain PyTorch: the definition of the op."""

import torch
from torch import Tensor

from fastseg._dtypes import accumulator
from fastseg.kernels.nms.reference import overlap


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    gaussian: bool,
    sigma: float,
    min_score: float,
    most: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decayed scores of the boxes picked, padded to (most,) with 0, their indices, padded with -1, and their number."""
    dtype = accumulator(boxes.dtype)
    scores = scores.to(dtype)
    weights = _weights(boxes.to(dtype), idxs, iou_threshold, gaussian, sigma)
    indices = scores.new_full((most,), -1, dtype=torch.int64)
    picked_scores = scores.new_zeros(most)
    waiting = ~(scores.double() < min_score)  # NaN waits
    for rank in range(min(most, len(scores))):
        # NaN is the greatest score; of equal scores the first is picked.
        best = torch.where(waiting, scores, -1).argmax()
        found = waiting[best]
        indices[rank] = torch.where(found, best, -1)
        picked_scores[rank] = torch.where(found, scores[best], 0)
        waiting[best] = False
        scores = torch.where(weights[best] == 0, 0, scores * weights[best])  # also for an infinite score
        waiting &= ~(scores.double() < min_score)
    return picked_scores, indices, (indices >= 0).sum()


def _weights(boxes: Tensor, idxs: Tensor | None, iou_threshold: float, gaussian: bool, sigma: float) -> Tensor:
    """(N, N): the factors by which a picked box multiplies the scores of the others."""
    overlaps = overlap(boxes, boxes).nan_to_num(0)
    if gaussian:
        weights = torch.exp(-overlaps.double().square() / sigma).to(boxes.dtype)
    else:
        weights = torch.where(overlaps.double() > iou_threshold, 1 - overlaps, 1)
    return weights if idxs is None else torch.where(idxs[:, None] == idxs, weights, 1)
