"""Shared by max_pool2d and max_unpool2d: checks of windows and indices, sizes of outputs."""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from fastseg import _check

INDEX_DTYPES = (torch.int64, torch.uint8)
MAX_COMPACT_TAPS = 255
GEOMETRY = "int[] kernel_size, int[] stride, int[] padding, int[] dilation"
_MAX_PIXELS = 2**50  # of a plane: no computer has more memory, and byte counts fit in 64 bits


def check_geometry(op: str, kernel_size, stride, padding, dilation) -> None:
    (kernel_rows, kernel_columns), (rows, columns) = kernel_size, padding
    if 0 <= 2 * rows <= kernel_rows > 0 and 0 <= 2 * columns <= kernel_columns > 0:
        if stride[0] > 0 and stride[1] > 0 and dilation[0] > 0 and dilation[1] > 0:
            return
    for name, values, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if min(values) < least:
            raise RuntimeError(f"fastseg.ops.{op}: {name}={tuple(values)}; allowed: {least} or more")
    raise RuntimeError(
        f"fastseg.ops.{op}: padding={tuple(padding)}; allowed: at most half of kernel_size={tuple(kernel_size)}"
    )


def pooled_size(shape: Sequence[int], kernel_size, stride, padding, dilation, ceil_mode: bool) -> tuple[int, int]:
    """The numbers of windows along height and width of an input (N, C, H, W)."""
    counts = []
    for axis in (0, 1):
        extent, step = shape[2 + axis], stride[axis]
        span = extent + 2 * padding[axis] - dilation[axis] * (kernel_size[axis] - 1) - 1
        if not ceil_mode:
            counts.append(span // step + 1)
            continue
        count = (span + step - 1) // step + 1
        # The last window must start inside the input or its left padding.
        counts.append(count - 1 if (count - 1) * step >= extent + padding[axis] else count)
    return counts[0], counts[1]


def unpooled_size(
    op: str, shape: Sequence[int], kernel_size, stride, padding, output_size: Sequence[int] | None
) -> tuple[int, int]:
    """(H, W) of an unpooling as in torch: the pool's smallest input, or `output_size`, less than a stride away."""
    if min(*kernel_size, *stride) < 1 or min(padding) < 0:
        for name, values, least in (("kernel_size", kernel_size, 1), ("stride", stride, 1), ("padding", padding, 0)):
            if min(values) < least:
                raise RuntimeError(f"fastseg.ops.{op}: {name}={tuple(values)}; allowed: {least} or more")
    height = (shape[-2] - 1) * stride[0] + kernel_size[0] - 2 * padding[0]
    width = (shape[-1] - 1) * stride[1] + kernel_size[1] - 2 * padding[1]
    if type(height) is int and type(width) is int and height * width > _MAX_PIXELS:
        raise RuntimeError(f"fastseg.ops.{op}: the output would be {height}x{width}; allowed: at most 2^50 pixels")
    if output_size is None:
        return height, width
    ints = type(output_size) is torch.Size
    given = output_size if ints else _check.integers(op, "output_size", output_size, "two or four ints, or None")
    if len(given) not in (2, 4):
        raise ValueError(f"fastseg.ops.{op}: output_size={[*given]}; allowed: (H, W) or (N, C, H, W)")
    bounds = ("H", given[-2], height, stride[0]), ("W", given[-1], width, stride[1])
    for axis, extent, usual, step in bounds:
        if not usual - step < extent < usual + step:
            raise ValueError(
                f"fastseg.ops.{op}: output_size={[*given]}; "
                f"allowed for {axis}: {usual - step + 1} to {usual + step - 1}"
            )
    return given[-2], given[-1]


def refuse_planes(op: str, shape: Sequence[int], sizes: str) -> NoReturn:
    raise RuntimeError(
        f"fastseg.ops.{op}: input has shape {tuple(shape)}; allowed: (N, C, {sizes}) or (C, {sizes}), empty in N only"
    )


def check_indices(op: str, indices: Tensor, values_name: str, values: Tensor) -> None:
    """Checks that there is an index for each element of `values`."""
    if indices.dtype not in INDEX_DTYPES:
        _check.dtype(op, "indices", indices, INDEX_DTYPES)
    if indices.shape != values.shape:
        _check.shape(op, "indices", indices, values.shape, f"the shape of {values_name}")
    if indices.device != values.device:
        _check.same_device(op, "indices", indices, values_name, values)
