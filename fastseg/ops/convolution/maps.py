"""A convolution and its two transposes as ops: three linear maps, each other's derivatives.

    dilated_conv2d      y = conv(x, w)        derivatives: conv_transpose2d in x, conv2d_grad_weight in w
    conv_transpose2d    x = conv^T(y, w)      derivatives: dilated_conv2d in y, conv2d_grad_weight in w
    conv2d_grad_weight  w = (x, y) -> w       derivatives: conv_transpose2d in x, dilated_conv2d in y

So derivatives of any order run on the same kernels. `DENSE` and `DEPTHWISE` are these three for any groups, and for one
channel per group. padding is (top, left); `size`, the (height, width) of the result, determines the padding at the
bottom and right.

The epilogue of the first two, in this order: bias (K,), residual (N, K, *size), relu.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastseg import _check
from fastseg._backend import Backend, Stock
from fastseg._dtypes import FLOATING, FLOATING_GPU
from fastseg._layout import image_format
from fastseg._op import Op
from fastseg.kernels.convolution import cpu, reference
from fastseg.ops.convolution import routes

_WINDOWS = "int[] stride, int[] padding, int[] dilation, int groups"
_MAP = f"(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, {_WINDOWS}, SymInt[] size, bool relu)"


class Maps(NamedTuple):
    forward: Op
    transposed: Op
    grad_weight: Op


def check(op: str, input, weight, bias, residual, stride, padding, dilation, groups, size, in_per_group, out_channels):
    """For the first two maps; in_per_group, out_channels: the sizes of `weight` with these meanings."""
    if input.dtype not in FLOATING:
        _check.dtype(op, "input", input, FLOATING)
    if weight.dtype != input.dtype:
        _check.dtype(op, "weight", weight, (input.dtype,))
    if weight.device != input.device:
        _check.same_device(op, "weight", weight, "input", input)
    shape = input.shape
    if len(shape) != 4 or 0 in shape[1:]:
        raise RuntimeError(
            f"fastseg.ops.{op}: input has shape {tuple(shape)}; allowed: (N, C, H, W) or (C, H, W), empty in N only"
        )
    if groups < 1:
        raise RuntimeError(f"fastseg.ops.{op}: groups={groups}; allowed: 1 or more")
    if weight.dim() != 4 or 0 in weight.shape or weight.shape[0] % groups or shape[1] != in_per_group * groups:
        sizes = f"weight has shape {tuple(weight.shape)} and groups={groups} for {shape[1]} channels of input"
        raise RuntimeError(f"fastseg.ops.{op}: {sizes}; allowed: {_WEIGHTS[op]}")
    if min(*stride, *dilation) < 1 or min(padding) < 0:
        given = f"stride={tuple(stride)}, padding={tuple(padding)}, dilation={tuple(dilation)}"
        raise RuntimeError(f"fastseg.ops.{op}: {given}; allowed: stride and dilation from 1, padding from 0")
    if bias is not None:
        _check.argument(op, "bias", bias, (input.dtype,), (out_channels,), "one per channel", like=("input", input))
    if residual is not None:
        wanted = shape[0], out_channels, *size
        _check.argument(op, "residual", residual, (input.dtype,), wanted, "as the output", like=("input", input))


_WEIGHTS = {
    "dilated_conv2d": "(K, C / groups, R, S), with K and C multiples of groups",
    "conv_transpose2d": "(C, K / groups, R, S), with C a multiple of groups",
}


def check_convolution(input, weight, bias, residual, stride, padding, dilation, groups, size):
    in_per_group = weight.shape[1] if weight.dim() == 4 else 0
    epilogue = bias, residual
    check(
        "dilated_conv2d",
        input,
        weight,
        *epilogue,
        stride,
        padding,
        dilation,
        groups,
        size,
        in_per_group,
        weight.shape[0],
    )


def check_transposed(input, weight, bias, residual, stride, padding, dilation, groups, size):
    fits = weight.dim() == 4 and groups > 0
    out_channels, in_per_group = (weight.shape[1] * groups, weight.shape[0] // groups) if fits else (0, 0)
    epilogue = bias, residual
    check(
        "conv_transpose2d",
        input,
        weight,
        *epilogue,
        stride,
        padding,
        dilation,
        groups,
        size,
        in_per_group,
        out_channels,
    )


def check_grad_weight(input, grad_output, stride, padding, dilation, groups):
    name = "conv2d_grad_weight"
    _check.argument(name, "input", input, FLOATING, ("N", "C", "H", "W"))
    wanted = input.shape[0], "K", "OH", "OW"
    _check.argument(name, "grad_output", grad_output, (input.dtype,), wanted, like=("input", input))
    if groups < 1 or input.shape[1] % groups or grad_output.shape[1] % groups:
        raise RuntimeError(f"fastseg.ops.{name}: groups={groups}; allowed: a divisor of both numbers of channels")
    if min(*stride, *dilation) < 1 or min(padding) < 0:
        given = f"stride={tuple(stride)}, padding={tuple(padding)}, dilation={tuple(dilation)}"
        raise RuntimeError(f"fastseg.ops.{name}: {given}; allowed: stride and dilation from 1, padding from 0")


def outputs_grad_weight(input, grad_output, groups, kernel_size, channels_last):
    shape = grad_output.shape[1], input.shape[1] // groups, *kernel_size
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)


def _is_channels_last(weight: Tensor) -> bool:
    return not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def define(
    prefix: str,
    forward: Sequence[Backend | Stock],
    transposed: Sequence[Backend | Stock],
    grad_weight: Sequence[Backend | Stock],
    nchw: bool = False,
) -> Maps:
    """Defines the three ops, with `prefix` before their names, from these tables of backends.

    nchw: the kernels take contiguous images only; otherwise results have the memory format of `input`.
    """

    def layout_of(image: Tensor) -> torch.memory_format:
        return torch.contiguous_format if nchw else image_format(image)

    def image(like: Tensor, channels: int, size: Sequence[int]) -> Tensor:
        shape = like.shape[0], channels, *size
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout_of(like))

    def backward_of(adjoint: Callable[[], Op], swapped: bool) -> Callable[..., dict[str, Tensor]]:
        """swapped: for the transposed map, whose input is the argument grad_output of `conv2d_grad_weight`."""

        def backward(
            input, weight, output, grad_output, stride, padding, dilation, groups, relu, needs_input, needs_weight,
            needs_bias, needs_residual, backend,
        ):  # fmt: skip
            windows, found = (stride, padding, dilation, groups), {}
            grad = torch.ops.aten.threshold_backward(grad_output, output, 0) if relu else grad_output
            grad = grad.contiguous(memory_format=layout_of(input))
            if needs_input:
                size = input.shape[2:]
                found["input"] = adjoint()(grad, weight, None, None, *windows, size, False, backend=backend)
            if needs_weight:
                pair = (grad, input) if swapped else (input, grad)
                last = _is_channels_last(weight)
                found["weight"] = maps.grad_weight(*pair, *windows, weight.shape[2:], last, backend=backend)
            if needs_bias:
                found["bias"] = grad.sum((0, 2, 3))
            if needs_residual:
                found["residual"] = grad
            return found

        return backward

    def backward_grad_weight(
        input, grad_output, grad_grad_weight, stride, padding, dilation, groups, needs_input, needs_grad_output,
        backend,
    ):  # fmt: skip
        windows, found, weight = (stride, padding, dilation, groups), {}, grad_grad_weight
        if needs_input:
            size = input.shape[2:]
            found["input"] = maps.transposed(grad_output, weight, None, None, *windows, size, False, backend=backend)
        if needs_grad_output:
            size = grad_output.shape[2:]
            found["grad_output"] = maps.forward(input, weight, None, None, *windows, size, False, backend=backend)
        return found

    maps = Maps(
        Op(
            f"{prefix}dilated_conv2d{_MAP} -> Tensor output",
            check=check_convolution,
            outputs=lambda input, weight, size: image(input, weight.shape[0], size),
            backward=backward_of(lambda: maps.transposed, swapped=False),
            saved_if={"output": "relu"},
            contiguous=("input", "weight") if nchw else (),
            image_layout=() if nchw else ("input",),
            backends=forward,
        ),
        Op(
            f"{prefix}conv_transpose2d{_MAP} -> Tensor output",
            check=check_transposed,
            outputs=lambda input, weight, groups, size: image(input, weight.shape[1] * groups, size),
            backward=backward_of(lambda: maps.forward, swapped=True),
            saved_if={"output": "relu"},
            contiguous=("input", "weight") if nchw else (),
            image_layout=() if nchw else ("input",),
            backends=transposed,
        ),
        Op(
            f"{prefix}conv2d_grad_weight(Tensor input, Tensor grad_output, {_WINDOWS}, int[] kernel_size,"
            " bool channels_last) -> Tensor grad_weight",
            check=check_grad_weight,
            outputs=outputs_grad_weight,
            backward=backward_grad_weight,
            contiguous=("input", "grad_output") if nchw else (),
            image_layout=() if nchw else ("input", "grad_output"),
            backends=grad_weight,
        ),
    )
    return maps


def _table(cpu: Backend, stock: Stock, triton: str, definition: Callable) -> list[Backend | Stock]:
    on_gpu = Backend("triton", f"convolution.{triton}", dtypes=FLOATING_GPU)
    return [stock, cpu, on_gpu, Backend("reference", definition)]


_GEMM = "triton.dilated_conv2d", "triton.conv_transpose2d", "triton_weight.conv2d_grad_weight"
_GATHER = tuple(f"triton_depthwise.{name}" for name in ("dilated_conv2d", "conv_transpose2d", "conv2d_grad_weight"))
_DEFINITIONS = reference.dilated_conv2d, reference.conv_transpose2d, reference.conv2d_grad_weight
_ON_TORCH = [
    Backend("cpu", run, dtypes=FLOATING) for run in (cpu.dilated_conv2d, cpu.conv_transpose2d, cpu.conv2d_grad_weight)
]


def _native() -> list[Backend]:
    return [Backend("cpu", dtypes=FLOATING) for _ in range(3)]


# Any groups; one channel per group; one group, strides of 8, 16 or 32 columns and few channels.
DENSE = define("", *map(_table, _ON_TORCH, routes.DENSE, _GEMM, _DEFINITIONS))
DEPTHWISE = define("depthwise_", *map(_table, _native(), routes.DEPTHWISE, _GATHER, _DEFINITIONS))
UPSAMPLING = define("upsampling_", *map(_table, _native(), routes.UPSAMPLING, _GEMM, _DEFINITIONS), nchw=True)


def maps_of(input: Tensor, weight: Tensor, small_channels: int, big_channels: int, stride, dilation, groups) -> Maps:
    """The ops for a convolution from `big_channels` to `small_channels`, or for its transpose."""
    if 1 < groups == small_channels == big_channels:
        return DEPTHWISE
    if stride[1] in (8, 16, 32) and groups == 1 and dilation == [1, 1]:
        if small_channels <= 64 and big_channels <= 64 and weight.shape[3] > stride[1]:
            return DENSE if image_format(input) is torch.channels_last else UPSAMPLING
    return DENSE
