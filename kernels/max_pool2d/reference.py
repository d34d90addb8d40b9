"""max_pool2d, its indices in both formats and its gradient in plain PyTorch: the definition of the op.

Everything is (N, C, H, W); `kernel_size`, `stride`, `padding` and `dilation` are pairs for height and width. Indices
come in two formats, told apart by their dtype:

    int64   flat: y * W + x of the maximum in the plane of the pool's input, as torch has it
    uint8   compact: kh * KW + kw of the maximum in its window
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
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


def in_layout(tensor: Tensor, channels_last: bool) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def max_pool2d(
    input: Tensor, kernel_size, stride, padding, dilation, ceil_mode: bool, compact: bool, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """(maxima, their indices): torch's own function, and the compact form of what it finds."""
    output, indices = F.max_pool2d(
        input, kernel_size, stride, padding, dilation, ceil_mode=ceil_mode, return_indices=True
    )
    if compact:
        geometry = kernel_size, stride, padding, dilation
        offsets, inside = offsets_from_flat(indices, input.shape[-2:], *geometry)
        # Dilated taps may all miss the plane. Like torch's index, the offset is then of the first tap not before it.
        top, left = window_corners(*output.shape[-2:], stride, padding, input.device)
        first_row, first_column = (-top).clamp_min(0), (-left).clamp_min(0)
        kh = (first_row + dilation[0] - 1) // dilation[0]
        kw = (first_column + dilation[1] - 1) // dilation[1]
        indices = torch.where(inside, offsets, (kh * kernel_size[1] + kw).to(torch.uint8))
    return in_layout(output, channels_last), in_layout(indices, channels_last)


def max_pool2d_backward(
    grad_output: Tensor,
    indices: Tensor,
    kernel_size,
    stride,
    padding,
    dilation,
    size: Sequence[int],
    channels_last: bool,
) -> Tensor:
    """Every gradient is added at its index; one whose index is no pixel of its window is passed over, as that of a
    window without a pixel is. Nothing but the plane limits int64 indices with an empty `kernel_size`."""
    height, width = size
    index = positions(indices, size, kernel_size, stride, padding, dilation)
    outside = (index < 0) | (index >= height * width)
    if indices.dtype == torch.int64 and len(kernel_size) > 0:
        outside |= ~offsets_from_flat(indices, size, kernel_size, stride, padding, dilation)[1]
    index, outside = index.flatten(2), outside.flatten(2)
    accumulator = torch.promote_types(grad_output.dtype, torch.float32)
    gradient = grad_output.flatten(2).to(accumulator).masked_fill(outside, 0)
    planes = gradient.new_zeros(*gradient.shape[:2], height * width)
    planes = planes.scatter_add(2, index.masked_fill(outside, 0), gradient).to(grad_output.dtype)
    return in_layout(planes.unflatten(2, (height, width)), channels_last)
