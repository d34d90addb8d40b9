"""max_pool2d, its indices in both formats and its gradient in plain PyTorch: the definition of the op.

Everything is (N, C, H, W); `kernel_size`, `stride`, `padding` and `dilation` are pairs for height and width. The two
formats of the indices, told apart by their dtype, are those of kernels/pooling/index_formats.py.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg._layout import image_format
from fastseg.kernels.pooling.index_formats import offsets_from_flat, positions, window_corners


def max_pool2d(
    input: Tensor, kernel_size, stride, padding, dilation, ceil_mode: bool, compact: bool
) -> tuple[Tensor, Tensor]:
    """(maxima, their indices): from torch's own function; its indices are converted to the compact format."""
    layout = image_format(input)
    if not input.is_floating_point():
        input = input.contiguous()  # in channels_last torch counts pixels in the input's dtype, which overflows
    steps = [
        min(step, 2**31 - 1) for step in stride
    ]  # torch has 32 bits; with larger strides there is one window anyway
    output, indices = F.max_pool2d(
        input, kernel_size, steps, padding, dilation, ceil_mode=ceil_mode, return_indices=True
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
    return output.contiguous(memory_format=layout), indices.contiguous(memory_format=layout)


def max_pool2d_backward(
    grad_output: Tensor, indices: Tensor, kernel_size, stride, padding, dilation, size: Sequence[int]
) -> Tensor:
    """Every gradient is added at its index, but skipped if the index is no pixel of its window or the window has no
    pixel. With an empty `kernel_size`, int64 indices need only lie in the plane."""
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
    return planes.unflatten(2, (height, width)).contiguous(memory_format=image_format(indices))
