"""2-D max unpooling; drop-in for torch.nn.functional.max_unpool2d, which also takes one-byte indices.

    output[indices[i]] = input[i], zero elsewhere; of equal indices in a plane the last one counts

Indices come in the two formats of `fastseg.ops.max_pool2d`. The gradient is the gradient of the output at
every index (`max_unpool2d_backward`), as in torch also where indices repeat.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastseg import _check
from fastseg._op import FLOATING, STOCK_BELOW, Backend, Op, few_for_auto
from fastseg.kernels.max_unpool2d import reference
from fastseg.ops._pool import (
    GEOMETRY,
    INDEX_DTYPES,
    PoolNative,
    allocate_scatter,
    empty,
    fake_scatter,
    is_channels_last,
    pair,
)
from fastseg.ops._pool_indices import PoolIndices, offsets_of
from fastseg.ops.max_pool2d import max_pool2d_backward

__all__ = ["max_unpool2d"]

_NAME = "max_unpool2d"
STOCK_BELOW["max_unpool2d: NCHW, int64 indices"] = 1 << 20
STOCK_BELOW["max_unpool2d: channels_last, int64 indices"] = 1 << 17
_HALVES = (torch.float16, torch.bfloat16)
_UNKNOWN_GEOMETRY = ([], [], [], [])  # of int64 indices, which say themselves where they point


# ---- forward ----


def check(input, indices, kernel_size, stride, padding, dilation, size, channels_last):
    _check.dtype(_NAME, "input", input, FLOATING)
    _check.dtype(_NAME, "indices", indices, INDEX_DTYPES)
    if input.dim() != 4 or 0 in input.shape[1:]:
        raise RuntimeError(
            f"fastseg.ops.{_NAME}: input has shape {tuple(input.shape)}; allowed: (N, C, rows, columns) or "
            "(C, rows, columns), empty in N only"
        )
    _check.shape(_NAME, "indices", indices, input.shape, "the shape of input")
    _check.same_device(_NAME, "indices", indices, "input", input)
    if size[0] < 0 or size[1] < 0:
        raise ValueError(f"fastseg.ops.{_NAME}: output_size={tuple(size)}; allowed: 0 or more")


_forward_native = PoolNative(
    f"_max_unpool2d_forward(Tensor input, Tensor indices, {GEOMETRY}, Tensor(a!) output) -> ()",
    allocate_scatter,
)


def save(ctx, inputs, output):
    _, indices, *ctx.geometry, _, ctx.channels_last, _ = inputs
    ctx.save_for_backward(indices)


def backward(ctx, grad_output):
    (indices,) = ctx.saved_tensors
    grad_input = max_unpool2d_backward(grad_output, indices, *ctx.geometry, ctx.channels_last)
    return grad_input, *[None] * 7


_op = Op(
    "max_unpool2d",
    f"(Tensor input, Tensor indices, {GEOMETRY}, SymInt[] size, bool channels_last) -> Tensor",
    check=check,
    fake=fake_scatter,
    save=save,
    backward=backward,
    backends=[
        Backend("cpu", _forward_native, dtypes=FLOATING),
        Backend("cuda", _forward_native, dtypes=FLOATING),
        Backend("reference", reference.max_unpool2d),
    ],
)


# ---- backward ----


def check_backward(grad_output, indices, kernel_size, stride, padding, dilation, channels_last):
    name = "max_unpool2d_backward"
    _check.dtype(name, "grad_output", grad_output, FLOATING)
    _check.dtype(name, "indices", indices, INDEX_DTYPES)
    _check.shape(name, "grad_output", grad_output, ("N", "C", "H", "W"))
    _check.shape(name, "indices", indices, (*grad_output.shape[:2], "rows", "columns"))
    _check.same_device(name, "indices", indices, "grad_output", grad_output)


def fake_backward(grad_output, indices, kernel_size, stride, padding, dilation, channels_last):
    return empty(grad_output, indices.shape, channels_last)


def _allocate_backward(grad_output, indices, kernel_size, stride, padding, dilation, channels_last):
    geometry = kernel_size, stride, padding, dilation
    grad_input = fake_backward(grad_output, indices, *geometry, channels_last)
    return [grad_output, indices], geometry, channels_last, [grad_input]


_backward_native = PoolNative(
    f"_max_unpool2d_backward(Tensor grad_output, Tensor indices, {GEOMETRY}, Tensor(a!) grad_input) -> ()",
    _allocate_backward,
)


def save_backward(ctx, inputs, output):
    grad_output, indices, *geometry, _, _ = inputs
    ctx.geometry = geometry if indices.dtype == torch.uint8 else _UNKNOWN_GEOMETRY
    ctx.size, ctx.channels_last = grad_output.shape[2:], is_channels_last(grad_output)
    ctx.save_for_backward(indices)


def double_backward(ctx, grad_grad_input):
    (indices,) = ctx.saved_tensors
    gradient = max_pool2d_backward(grad_grad_input, indices, *ctx.geometry, ctx.size, ctx.channels_last)
    return gradient, *[None] * 6


max_unpool2d_backward = Op(
    "max_unpool2d_backward",
    f"(Tensor grad_output, Tensor indices, {GEOMETRY}, bool channels_last) -> Tensor",
    check=check_backward,
    fake=fake_backward,
    save=save_backward,
    backward=double_backward,
    backends=[
        Backend("cpu", _backward_native, dtypes=FLOATING),
        Backend("cuda", _backward_native, dtypes=FLOATING),
        Backend("reference", reference.max_unpool2d_backward),
    ],
)


# ---- the public function ----


def _size(input: Tensor, kernel_size, stride, padding, output_size: Sequence[int] | None) -> tuple[int, int]:
    """(H, W) of the output by torch's rule: the smallest input of the pool, or `output_size` less than a stride off."""
    extents = zip(input.shape[-2:], kernel_size, stride, padding)
    default = [(extent - 1) * step + kernel - 2 * pad for extent, kernel, step, pad in extents]
    if output_size is None:
        return default[0], default[1]
    given = list(output_size)
    if len(given) not in (2, 4):
        raise ValueError(f"fastseg.ops.{_NAME}: output_size={given}; allowed: (H, W) or (N, C, H, W)")
    for axis, extent, usual, step in zip("HW", given[-2:], default, stride):
        if not usual - step < extent < usual + step:
            raise ValueError(
                f"fastseg.ops.{_NAME}: output_size={given}; "
                f"allowed for {axis}: {usual - step + 1} to {usual + step - 1}"
            )
    return given[-2], given[-1]


def _stock_is_faster(backend, input) -> bool:
    """Whether "auto" leaves a call with int64 indices to stock PyTorch, which gives the same output.

    Not where its threads would share a plane: then either of two that write to one index may come last.
    """
    channels_last = input.dim() == 4 and is_channels_last(input)
    layout = "channels_last" if channels_last else "NCHW"
    if not few_for_auto(backend, input, STOCK_BELOW[f"max_unpool2d: {layout}, int64 indices"]):
        return False
    handed_out = input.shape[0] if channels_last else input.shape[:-2].numel()
    return not torch.compiler.is_compiling() and handed_out % torch.get_num_threads() == 0


def max_unpool2d(
    input: Tensor,
    indices: Tensor | PoolIndices,
    kernel_size: int | Sequence[int] | None = None,
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    output_size: Sequence[int] | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Puts pooled values back where they came from; drop-in for torch.nn.functional.max_unpool2d.

    Args:
        input: (N, C, rows, columns) or (C, rows, columns), empty in N only; float32, float16, bfloat16 or
            float64; contiguous, channels_last or any other strides.
        indices: int64 of the shape of `input`, positions `y * W + x` in the plane of the output, as torch's
            pooling returns them; or `fastseg.ops.PoolIndices`. These mean the same positions as their
            `to_flat()`; where the output has the size of the pool's input they are used as they are, every
            output is then written once.
        kernel_size, stride, padding: as in torch, they give the default size of the output and nothing else.
            None with `PoolIndices` only: the pool's own, and its input's size as default.
        output_size: (H, W) or (N, C, H, W) of the output, less than a stride away from the default size.
        backend: "auto", "cpu", "cuda" or "reference". "auto" leaves small CPU tensors with int64 indices to torch's
            function, which is as fast there, if its threads share no plane.

    Returns:
        (N, C, H, W) or (C, H, W) in the memory format of `input`, zero where no index points. Where several
        point, the last in the plane is written, on every device and run. Differentiable any number of times
        with respect to `input`.

    Raises:
        RuntimeError: on CPU an index outside the plane of the output (forward and backward; checked in 64
            bits; on GPU, where raising would stall the stream, it is passed over); shapes, dtypes or devices
            that do not fit.
        ValueError: an `output_size` out of bounds.
        TypeError: arguments of other types.
    """
    _check.tensor(_NAME, "input", input)
    compact = isinstance(indices, PoolIndices)
    if not compact:
        _check.tensor(_NAME, "indices", indices)
        allowed = INDEX_DTYPES[:1]  # uint8 stands for offsets only inside a PoolIndices
        _check.dtype(_NAME, "indices", indices, allowed)
        if _stock_is_faster(backend, input):
            try:
                return functional.max_unpool2d(input, indices, kernel_size, stride, padding, output_size)
            except (RuntimeError, TypeError, ValueError):
                pass  # What follows takes it, or says what is wrong.
    default_size = None
    if kernel_size is not None:
        kernel_size = pair(_NAME, "kernel_size", kernel_size)
        stride = kernel_size if stride is None else pair(_NAME, "stride", stride)
        padding = pair(_NAME, "padding", padding)
    elif compact:
        reach = zip(indices.kernel_size, indices.dilation)
        kernel_size = [(kernel - 1) * dilation + 1 for kernel, dilation in reach]
        (_, stride, padding, _), default_size = indices.geometry, indices.input_size
    else:
        raise TypeError(
            f"fastseg.ops.{_NAME}: kernel_size is None; allowed: int, or two of them (None with PoolIndices)"
        )
    if output_size is None and default_size is not None:
        size = default_size
    else:
        size = _size(input, kernel_size, stride, padding, output_size)
    geometry = kernel_size, stride, padding, [1, 1]  # of int64 indices: where the CUDA kernel expects them
    if compact and indices.is_compact and tuple(size) == tuple(indices.input_size):
        indices, geometry = offsets_of(indices), indices.geometry
    elif compact:
        indices = indices.to_flat()
    if input.device.type == "cpu" and input.dtype in _HALVES and torch.is_autocast_enabled("cpu"):
        input = input.float()  # torch's autocast has max_unpool2d in fp32, on CPU only
    single = input.dim() == 3
    channels_last = not single and is_channels_last(input)
    if single:
        _check.shape(_NAME, "indices", indices, input.shape, "the shape of input")
        input, indices = input.contiguous().unsqueeze(0), indices.unsqueeze(0)
    output = _op(input, indices, *geometry, size, channels_last, backend=backend)
    return output.squeeze(0) if single else output
