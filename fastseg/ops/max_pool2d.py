"""2-D max pooling with indices; drop-in for torch.nn.functional.max_pool2d and max_pool2d_with_indices.

    output[y, x] = max over (kh, kw) of input[y sh - ph + kh dh, x sw - pw + kw dw]

The index of each maximum is kept in one of two formats, told apart by dtype: int64 `y * W + x` in the plane
of the input, as torch has it, or uint8 `kh * KW + kw` in its window. The gradient needs nothing but the
indices:

    max_pool2d_backward    adds every gradient at its index; its own gradient is
    max_unpool2d_backward  the gradient at every index, whose own gradient is max_pool2d_backward again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastseg import _check
from fastseg._op import FLOATING, STOCK_BELOW, Backend, Op, few_for_auto
from fastseg.kernels.max_pool2d import reference
from fastseg.ops._pool import (
    GEOMETRY,
    INDEX_DTYPES,
    MOST_COMPACT_TAPS,
    PoolNative,
    check_geometry,
    allocate_scatter,
    empty,
    fake_scatter,
    is_channels_last,
    pair,
)
from fastseg.ops._pool_indices import PoolIndices

__all__ = ["max_pool2d"]

_NAME = "max_pool2d"
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)  # on the CPU, by torch
_POOLED = (*FLOATING, *_INTEGERS)
STOCK_BELOW["max_pool2d: NCHW"] = 1 << 16
STOCK_BELOW["max_pool2d: NCHW, int64 indices"] = 1 << 17
STOCK_BELOW["max_pool2d: channels_last"] = 1 << 21
STOCK_BELOW["max_pool2d: channels_last, int64 indices"] = 1 << 22


# ---- forward ----


def _output_extent(extent: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    span = extent + 2 * padding - dilation * (kernel - 1) - 1
    count = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (count - 1) * stride >= extent + padding:
        count -= 1  # the last window must start inside the input or its left padding
    return count


def _output_shape(input: Tensor, kernel_size, stride, padding, dilation, ceil_mode) -> tuple[int, ...]:
    extents = zip(input.shape[2:], kernel_size, stride, padding, dilation)
    return (*input.shape[:2], *(_output_extent(*extent, ceil_mode) for extent in extents))


def check(input, kernel_size, stride, padding, dilation, ceil_mode, compact, channels_last):
    _check.dtype(_NAME, "input", input, _POOLED)
    if input.dim() != 4 or 0 in input.shape[1:]:
        raise RuntimeError(
            f"fastseg.ops.{_NAME}: input has shape {tuple(input.shape)}; allowed: (N, C, H, W) or (C, H, W), "
            "empty in N only"
        )
    check_geometry(_NAME, kernel_size, stride, padding, dilation)
    taps = kernel_size[0] * kernel_size[1]
    if compact and taps > MOST_COMPACT_TAPS:
        raise RuntimeError(
            f"fastseg.ops.{_NAME}: kernel_size={tuple(kernel_size)} has {taps} taps; allowed with "
            f"index_format='compact': at most {MOST_COMPACT_TAPS}"
        )
    shape = _output_shape(input, kernel_size, stride, padding, dilation, ceil_mode)
    if shape[2] < 1 or shape[3] < 1:
        raise RuntimeError(
            f"fastseg.ops.{_NAME}: input of shape {tuple(input.shape)} gives an output of {shape[2]}x{shape[3]}; "
            "allowed: at least 1x1"
        )


def fake(input, kernel_size, stride, padding, dilation, ceil_mode, compact, channels_last):
    shape = _output_shape(input, kernel_size, stride, padding, dilation, ceil_mode)
    index_dtype = torch.uint8 if compact else torch.int64
    return empty(input, shape, channels_last), empty(input, shape, channels_last, index_dtype)


def _allocate_forward(input, kernel_size, stride, padding, dilation, ceil_mode, compact, channels_last):
    outputs = fake(input, kernel_size, stride, padding, dilation, ceil_mode, compact, channels_last)
    return [input], (kernel_size, stride, padding, dilation), channels_last, outputs


def _slower_forward(input, kernel_size, stride, padding, dilation, ceil_mode, compact, channels_last):
    two_by_two = [*kernel_size, *stride, *padding, *dilation] == [2, 2, 2, 2, 0, 0, 1, 1]
    if not channels_last or compact or two_by_two:
        return None
    return "stock PyTorch, which the reference calls, is as fast in channels_last but for 2x2 windows"


_forward_native = PoolNative(
    f"_max_pool2d_forward(Tensor input, {GEOMETRY}, Tensor(a!) output, Tensor(b!) indices) -> ()",
    _allocate_forward,
)


def save(ctx, inputs, output):
    input, *ctx.geometry, _, _, ctx.channels_last, _ = inputs
    ctx.size = input.shape[2:]
    ctx.save_for_backward(output[1])


def backward(ctx, grad_output, grad_indices):
    (indices,) = ctx.saved_tensors
    grad_input = max_pool2d_backward(grad_output, indices, *ctx.geometry, ctx.size, ctx.channels_last)
    return grad_input, *[None] * 7


_op = Op(
    "max_pool2d",
    f"(Tensor input, {GEOMETRY}, bool ceil_mode, bool compact, bool channels_last) -> (Tensor, Tensor)",
    check=check,
    fake=fake,
    save=save,
    backward=backward,
    backends=[
        Backend("cpu", _forward_native, dtypes=FLOATING, slower=_slower_forward),
        Backend("cuda", _forward_native, dtypes=FLOATING),
        Backend("reference", reference.max_pool2d),
    ],
)


# ---- backward ----


def check_backward(grad_output, indices, kernel_size, stride, padding, dilation, size, channels_last):
    name = "max_pool2d_backward"
    _check.dtype(name, "grad_output", grad_output, FLOATING)
    _check.dtype(name, "indices", indices, INDEX_DTYPES)
    _check.shape(name, "grad_output", grad_output, ("N", "C", "rows", "columns"))
    _check.shape(name, "indices", indices, grad_output.shape)
    _check.same_device(name, "indices", indices, "grad_output", grad_output)


_backward_native = PoolNative(
    f"_max_pool2d_backward(Tensor grad_output, Tensor indices, {GEOMETRY}, Tensor(a!) grad_input) -> ()",
    allocate_scatter,
)


def save_backward(ctx, inputs, output):
    grad_output, indices, *ctx.geometry, _, _, _ = inputs
    ctx.channels_last = is_channels_last(grad_output)
    ctx.save_for_backward(indices)


def double_backward(ctx, grad_grad_input):
    (indices,) = ctx.saved_tensors
    unpool_backward = torch.ops.fastseg.max_unpool2d_backward  # by name: its file imports this one
    return unpool_backward(grad_grad_input, indices, *ctx.geometry, ctx.channels_last), *[None] * 7


max_pool2d_backward = Op(
    "max_pool2d_backward",
    f"(Tensor grad_output, Tensor indices, {GEOMETRY}, SymInt[] size, bool channels_last) -> Tensor",
    check=check_backward,
    fake=fake_scatter,
    save=save_backward,
    backward=double_backward,
    backends=[
        Backend("cpu", _backward_native, dtypes=FLOATING),
        Backend("cuda", _backward_native, dtypes=FLOATING),
        Backend("reference", reference.max_pool2d_backward),
    ],
)


def _stock_is_faster(backend, input, channels_last, return_indices) -> bool:
    """Whether "auto" leaves a call to stock PyTorch, which gives the same output and indices."""
    what = f"max_pool2d: {'channels_last' if channels_last else 'NCHW'}{', int64 indices' if return_indices else ''}"
    return few_for_auto(backend, input, STOCK_BELOW[what])


def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    index_format: str = "flat",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor | PoolIndices]:
    """Max pooling; drop-in for torch.nn.functional.max_pool2d, and with indices for max_pool2d_with_indices.

    Args:
        input: (N, C, H, W) or (C, H, W), empty in N only; float32, float16, bfloat16 or float64 (on CPU
            also integers, without a gradient); contiguous, channels_last or any other strides.
        kernel_size: one int, or one each for height and width; so are `stride`, `padding` and `dilation`.
        stride: None or an empty sequence stands for `kernel_size`.
        padding: of -inf on both sides, at most half of `kernel_size`.
        dilation: distance between the taps of a window.
        ceil_mode: also windows that end outside the padded input, if they start inside the input or before it.
        return_indices: return (output, indices).
        index_format: "flat": int64 `y * W + x` in the plane of the input, identical to torch's. "compact":
            `fastseg.ops.PoolIndices`, one byte per element, for kernels of up to 255 taps.
        backend: "auto", "cpu", "cuda" or "reference". "auto" leaves small CPU tensors to torch's function, which is
            as fast there, but for compact indices.

    Returns:
        (N, C, rows, columns) or (C, rows, columns) in the memory format of the input, with the indices if
        asked for. Of equal maxima the first counts, a NaN is above every number, of NaNs the last counts.
        Differentiable any number of times.

    Raises:
        RuntimeError: shapes, sizes, dtypes or devices not listed above, as torch does.
        TypeError, ValueError: arguments of other types, an unknown `index_format`.
    """
    _check.tensor(_NAME, "input", input)
    _check.one_of(_NAME, "index_format", index_format, ("flat", "compact"))
    channels_last = input.dim() == 4 and is_channels_last(input)
    if index_format == "flat" and _stock_is_faster(backend, input, channels_last, return_indices):
        try:
            return functional.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        except (RuntimeError, TypeError, ValueError):
            pass  # What follows takes it, or says what is wrong.
    kernel_size = pair(_NAME, "kernel_size", kernel_size)
    without_stride = stride is None or (isinstance(stride, Sequence) and len(stride) == 0)
    stride = kernel_size if without_stride else pair(_NAME, "stride", stride)
    padding, dilation = pair(_NAME, "padding", padding), pair(_NAME, "dilation", dilation)
    geometry = kernel_size, stride, padding, dilation
    single = input.dim() == 3
    images = input.contiguous().unsqueeze(0) if single else input
    compact = index_format == "compact"
    if not return_indices:
        compact = kernel_size[0] * kernel_size[1] <= MOST_COMPACT_TAPS  # all that the gradient needs
    output, indices = _op(images, *geometry, bool(ceil_mode), compact, channels_last, backend=backend)
    if single:
        output, indices = output.squeeze(0), indices.squeeze(0)
    if not return_indices:
        return output
    return output, PoolIndices._of_pool(indices, input.shape[-2:], *geometry) if compact else indices
