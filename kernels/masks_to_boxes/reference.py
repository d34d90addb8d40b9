"""Area and tight box of packed masks in plain PyTorch: the definition of the op."""

import torch
from torch import Tensor

from fastseg.kernels.pack_masks.reference import unpack_masks


def mask_statistics(words: Tensor) -> tuple[Tensor, Tensor]:
    """words: int32 [N, H, words]. Gives the areas, int64 [N], and boxes x1, y1, x2, y2, int32 [N, 4], whose x2 and y2
    lie one past the last pixel; zeros for an empty mask.
    """
    masks = unpack_masks(words, words.shape[2] * 32, torch.bool)
    area = masks.sum((1, 2))
    x1, x2 = _extent(masks.any(1))
    y1, y2 = _extent(masks.any(2))
    return area, torch.stack([x1, y1, x2, y2], 1).to(torch.int32)


def _extent(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """The first True of each row of [N, extent] and one past the last; zeros for a row without any."""
    extent = occupied.shape[1]
    position = torch.arange(extent, device=occupied.device)
    end = torch.where(occupied, position + 1, 0)
    begin = torch.where(occupied, extent - position, 0)  # largest at the first True
    if extent == 0:
        return end.sum(1), end.sum(1)
    end, begin = end.amax(1), begin.amax(1)
    return torch.where(end > 0, extent - begin, 0), end
