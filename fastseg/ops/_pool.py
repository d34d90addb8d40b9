"""What max_pool2d and max_unpool2d share: geometry, memory layouts, and the C++ entry points.

C++ sees (N, C, H, W) tensors in one layout, contiguous or channels_last, and writes into outputs allocated here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fastseg import _check
from fastseg._first_op import NativeOp
from fastseg.kernels.max_pool2d.reference import in_layout

INDEX_DTYPES = (torch.int64, torch.uint8)
MOST_COMPACT_TAPS = 255
GEOMETRY = "int[] kernel_size, int[] stride, int[] padding, int[] dilation"


def pair(op: str, name: str, value: int | Sequence[int]) -> list[int]:
    """One int, or a sequence of one or two, as [height, width]."""
    if type(value) is int:
        return [value, value]
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    try:
        values = [_check.integer(entry) for entry in values]
    except TypeError as error:
        given = f"{name}={value!r}, {type(value).__name__}"
        raise TypeError(f"fastseg.ops.{op}: {given}; allowed: int, or two of them") from error
    if len(values) not in (1, 2):
        raise RuntimeError(f"fastseg.ops.{op}: {name}={value!r}; allowed: one int, or one each for height and width")
    return [values[0], values[-1]]


def check_geometry(op: str, kernel_size, stride, padding, dilation):
    for name, values, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if min(values) < least:
            raise RuntimeError(f"fastseg.ops.{op}: {name}={tuple(values)}; allowed: {least} or more")
    for kernel, pad in zip(kernel_size, padding):
        if pad > kernel // 2:
            raise RuntimeError(
                f"fastseg.ops.{op}: padding={tuple(padding)}; allowed: at most half of "
                f"kernel_size={tuple(kernel_size)}"
            )


def is_channels_last(tensor: Tensor) -> bool:
    """Whether torch would answer an op on this (N, C, H, W) tensor in channels_last."""
    if tensor.numel() == 0:  # suggest_memory_format takes every empty tensor for contiguous
        return tensor.is_contiguous(memory_format=torch.channels_last)
    if tensor.is_contiguous():  # the usual case, told without the work in Python below
        return False
    return suggest_memory_format(tensor) == torch.channels_last


def empty(like: Tensor, shape: Sequence[int], channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def fake_scatter(values, indices, kernel_size, stride, padding, dilation, size, channels_last):
    """The output of an op that puts `values` (N, C, rows, columns) where `indices` point in planes of `size`."""
    return empty(values, (*values.shape[:2], *size), channels_last)


def allocate_scatter(values, indices, kernel_size, stride, padding, dilation, size, channels_last):
    """What `PoolNative` wants of such an op."""
    geometry = kernel_size, stride, padding, dilation
    output = fake_scatter(values, indices, *geometry, size, channels_last)
    return [values, indices], geometry, channels_last, [output]


class PoolNative(NativeOp):
    """A C++ entry point `<name>(inputs, geometry, outputs)`: brings the inputs into one layout, allocates the outputs.

    allocate: takes what the op takes and gives (the tensors that C++ reads, the lists of its geometry,
        channels_last, the outputs).
    """

    def __init__(self, schema: str, allocate):
        super().__init__(schema)
        self.allocate = allocate

    def __call__(self, *args):
        inputs, geometry, channels_last, outputs = self.allocate(*args)
        if outputs[0].numel() > 0:
            super().__call__(*(in_layout(tensor, channels_last) for tensor in inputs), *geometry, *outputs)
        return outputs if len(outputs) > 1 else outputs[0]
