"""Greedy non-maximum suppression of masks in plain PyTorch: the definition of the op."""

import torch
from torch import Tensor

from fastseg.kernels.pack_masks.reference import unpack_masks


def mask_nms(
    words: Tensor, area: Tensor, order: Tensor, labels: Tensor | None, iou_threshold: float, max_output: int | None
) -> tuple[Tensor, Tensor]:
    """words: int32 [N, H, words]; order: int64 [N], best first; labels: int64 [N]. Gives the kept masks in that order,
    int64 [max_output or N], padded with -1, and their number.
    """
    count = words.shape[0]
    pixels = unpack_masks(words, words.shape[2] * 32, torch.float64).flatten(1)
    common = pixels @ pixels.T
    union = area.unsqueeze(1) + area - common
    suppresses = torch.where(union > 0, common / union, 0.0) > iou_threshold
    if labels is not None:
        suppresses = suppresses & (labels.unsqueeze(1) == labels)
    suppresses = suppresses[order][:, order]
    kept = torch.ones(count, dtype=torch.bool, device=words.device)
    place = torch.arange(count, device=words.device)
    for i in range(count):
        kept = kept & ~(suppresses[i] & kept[i] & (place > i))
    found = order[torch.argsort(~kept, stable=True)]
    number = kept.sum()
    room = count if max_output is None else max_output
    keep = torch.cat([found, found.new_full((room,), -1)])[:room]
    place = torch.arange(room, device=words.device)
    number = number.clamp(max=room)
    return torch.where(place < number, keep, -1), number
