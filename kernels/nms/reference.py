"""nms in plain PyTorch: the definition of the op."""

import torch
from torch import Tensor

from fastseg._dtypes import accumulator


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """IoU of every box (x1, y1, x2, y2) of first (A, 4) with every one of second (B, 4); NaN where both are empty."""
    first = first[:, None]
    size = torch.minimum(first[..., 2:], second[:, 2:]) - torch.maximum(first[..., :2], second[:, :2])
    shared = size.clamp(min=0).prod(-1)
    return shared / (_area(first) + _area(second) - shared)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def nms(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float, most: int) -> tuple[Tensor, Tensor]:
    """Indices of the kept boxes in the order of their scores, padded to (most,) with -1, and their number."""
    order = scores.sort(descending=True, stable=True).indices
    boxes = boxes.to(accumulator(boxes.dtype))[order]
    suppresses = overlap(boxes, boxes).double() > iou_threshold  # a comparison in fp32 would round the threshold
    if idxs is not None:
        suppresses &= idxs[order][:, None] == idxs[order]
    kept = torch.ones_like(order, dtype=torch.bool)
    for rank in range(len(order)):
        kept[rank + 1 :] &= ~(suppresses[rank, rank + 1 :] & kept[rank])
    place = kept.cumsum(0) - 1
    place = torch.where(kept & (place < most), place, most)  # one extra place, for all other boxes
    indices = order.new_full((most + 1,), -1).scatter_(0, place, order)[:most]
    return indices, (indices >= 0).sum()
