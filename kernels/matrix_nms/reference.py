"""The decay of scores by Matrix NMS in plain PyTorch: the definition of the op."""

import torch
from torch import Tensor


def matrix_decay(iou: Tensor, order: Tensor, labels: Tensor | None, gaussian: bool, sigma: float) -> Tensor:
    """iou: float32 [N, N]; order: int64 [N], best first; labels: int64 [N]. Gives float32 [N], in that order."""
    overlap = iou[order][:, order].triu(1)
    if labels is not None:
        overlap = torch.where(labels[order].unsqueeze(1) == labels[order], overlap, 0)
    count = iou.shape[0]
    if count == 0:
        return iou.new_ones(0)
    covered = overlap.amax(0).unsqueeze(1)  # c_i, the largest overlap of i with a mask before it
    later = torch.ones_like(overlap, dtype=torch.bool).triu(1)
    if gaussian:
        most = torch.where(later, overlap.square() - covered.square(), 0).amax(0)
        return torch.exp(-sigma * most)
    # A mask that duplicates an earlier one is skipped: the earlier one decays the same masks.
    decay = torch.where(later & (covered < 1), (1 - overlap) / (1 - covered), 1)
    return decay.amin(0)
