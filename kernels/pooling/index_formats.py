"""The two formats of pooling indices, and how one becomes the other.

    int64   flat: y * W + x of the maximum in the plane of the pool's input, as torch has it
    uint8   compact: kh * KW + kw of the maximum in its window

`kernel_size`, `stride`, `padding` and `dilation` are pairs for height and width, `size` is the plane's (H, W).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def window_corners(rows: int, columns: int, stride, padding, device) -> tuple[Tensor, Tensor]:
    """(y, x) of the first tap of every window, padding counted, as (rows, 1) and (1, columns)."""
    top = torch.arange(rows, device=device)[:, None] * stride[0] - padding[0]
    left = torch.arange(columns, device=device)[None, :] * stride[1] - padding[1]
    return top, left


def flat_from_offsets(offsets: Tensor, size: Sequence[int], kernel_size, stride, padding, dilation) -> Tensor:
    """int64 positions y * W + x in planes of `size` (H, W), for offsets (..., rows, columns) in their windows."""
    y, x = _pixels(offsets, kernel_size, stride, padding, dilation)
    return y * size[1] + x


def offsets_from_flat(
    indices: Tensor, size: Sequence[int], kernel_size, stride, padding, dilation
) -> tuple[Tensor, Tensor]:
    """(uint8 offsets in their windows, whether each index is a tap of its window), for int64 positions."""
    top, left = window_corners(*indices.shape[-2:], stride, padding, indices.device)
    down = indices.div(size[1], rounding_mode="floor") - top
    right = indices.remainder(size[1]) - left
    inside = (indices >= 0) & (indices < size[0] * size[1])
    inside &= (down % dilation[0] == 0) & (right % dilation[1] == 0)
    kh, kw = down // dilation[0], right // dilation[1]
    inside &= (kh >= 0) & (kh < kernel_size[0]) & (kw >= 0) & (kw < kernel_size[1])
    return (kh * kernel_size[1] + kw).to(torch.uint8), inside


def positions(indices: Tensor, size: Sequence[int], kernel_size, stride, padding, dilation) -> Tensor:
    """int64 positions in planes of `size`, from indices of either format; -1 for an offset that is no pixel."""
    if indices.dtype == torch.int64:
        return indices
    y, x = _pixels(indices, kernel_size, stride, padding, dilation)
    inside = (indices < kernel_size[0] * kernel_size[1]) & (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
    return torch.where(inside, y * size[1] + x, -1)


def _pixels(offsets: Tensor, kernel_size, stride, padding, dilation) -> tuple[Tensor, Tensor]:
    top, left = window_corners(*offsets.shape[-2:], stride, padding, offsets.device)
    tap = offsets.long()
    return top + tap // kernel_size[1] * dilation[0], left + tap % kernel_size[1] * dilation[1]
