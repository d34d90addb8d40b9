"""max_unpool2d and its gradient in plain PyTorch: the definition of the op.

Shapes are those of `kernels/max_pool2d/reference.py`, the two formats of `indices` those of
`kernels/pooling/index_formats.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg._check import may_look_at
from fastseg._layout import image_format
from fastseg.kernels.pooling.index_formats import positions


def max_unpool2d(
    input: Tensor,
    indices: Tensor,
    kernel_size,
    stride,
    padding,
    dilation,
    size: Sequence[int],
) -> Tensor:
    """input[i] at indices[i], zeros elsewhere; of equal indices in a plane the last one counts."""
    height, width = size
    index, inside = _checked(indices, size, kernel_size, stride, padding, dilation)
    values = input.flatten(2)
    # `writer`: which element of the plane of `input` is written last at each position, or -1 for none.
    order = torch.arange(index.shape[2], device=index.device).expand_as(index).masked_fill(~inside, -1)
    writer = torch.full((*index.shape[:2], height * width), -1, device=index.device)
    writer = writer.scatter_reduce(2, index, order, "amax")
    written = values.gather(2, writer.clamp_min(0)).masked_fill(writer < 0, 0)
    return written.unflatten(2, (height, width)).contiguous(memory_format=image_format(input))


def max_unpool2d_backward(grad_output: Tensor, indices: Tensor, kernel_size, stride, padding, dilation) -> Tensor:
    """The gradient at every index, as in torch: if indices repeat, each of them gets it."""
    size = grad_output.shape[-2:]
    index, inside = _checked(indices, size, kernel_size, stride, padding, dilation)
    gradient = grad_output.flatten(2).gather(2, index).masked_fill(~inside, 0)
    gradient = gradient.unflatten(2, tuple(indices.shape[-2:]))
    return gradient.contiguous(memory_format=image_format(indices))


def _checked(indices: Tensor, size, kernel_size, stride, padding, dilation) -> tuple[Tensor, Tensor]:
    """(positions in the flattened planes, 0 for those outside; which are inside). On CPU raises if any is outside."""
    index = positions(indices, size, kernel_size, stride, padding, dilation).flatten(2)
    inside = (index >= 0) & (index < size[0] * size[1])
    if may_look_at(inside) and not inside.all():
        raise RuntimeError(
            f"fastseg.ops.max_unpool2d: indices holds a position outside the plane, {index[~inside][0].item()}; "
            f"allowed: 0 to {size[0] * size[1] - 1} in a plane of {size[0]}x{size[1]}"
        )
    return index.masked_fill(~inside, 0), inside
