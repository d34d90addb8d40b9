"""Bilinear upsampling; drop-in for torch.nn.functional.interpolate(mode="bilinear").

    output[n, c, Y, X] = sum over the four neighbours (y, x) of weight(Y, y) weight(X, x) input[n, c, y, x]

The gradient is gathered: each of its elements sums over the outputs that read the element
(`upsample_bilinear2d_backward`). It is linear, too: its own gradient is `upsample_bilinear2d`.

`bilinear_conv_transpose2d` is the same with zeros around the input instead of its border: the transposed convolution of
every channel with the bilinear kernel of Long, Shelhamer, Darrell (2015), of 2 stride or 2 stride - 1 taps. It runs on
the kernels of the upsampling.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg import _check
from fastseg import _private_api as private
from fastseg._backend import ALWAYS, Stock, rows
from fastseg._bilinear import output_size_and_scales
from fastseg._dtypes import FLOATING, FLOATING_GPU
from fastseg._layout import empty_image, image_format
from fastseg._op import Op
from fastseg.kernels.upsample_bilinear2d import reference

_NAME = "upsample_bilinear2d"
_LARGEST = 1 << 30


# channels_last: the memory format of the output; that of the gradient follows the input.


def outputs(input, size, channels_last):
    return empty_image(input, *size, torch.channels_last if channels_last else torch.contiguous_format)


def outputs_backward(grad_output, size, channels_last):
    return outputs(grad_output, size, channels_last)


def _check_image(op, name, value):
    if value.dtype not in FLOATING:
        _check.dtype(op, name, value, FLOATING)
    shape = value.shape
    if len(shape) != 4 or not (shape[1] and shape[2] and shape[3]):
        raise RuntimeError(
            f"fastseg.ops.{op}: {name} has shape {tuple(shape)}; allowed: (N, C, H, W) with C, H and W of at least 1"
        )


def _check_size(op, size):
    if len(size) != 2 or size[0] < 1 or size[1] < 1:
        raise ValueError(f"fastseg.ops.{op}: size={tuple(size)}; allowed: two positive numbers")


# --- interpolation ---


def check(input, size):
    _check_image(_NAME, "input", input)
    _check_size(_NAME, size)


def backward(shape_input, scales, align_corners, channels_last, grad_output, backend):
    size = shape_input[2:]
    return {
        "input": upsample_bilinear2d_backward(grad_output, size, scales, align_corners, channels_last, backend=backend)
    }


def stock(input, size, scales, align_corners):
    scale_height, scale_width = (None, None) if scales is None else scales
    return private.upsample_bilinear2d(input, size, align_corners, scale_height, scale_width)


def stock_class(input, size, channels_last):
    layout = "channels_last" if channels_last else "NCHW"
    if input.requires_grad and torch.is_grad_enabled():
        if channels_last:
            return None
        layout += ", differentiated"
    _, _, height, width = input.shape
    growth = size[0] * size[1] / (height * width)
    return f"{layout}{'' if growth <= 1 else ', larger' if growth <= 4 else ', over 4 times larger'}"


def stock_refuses(input, channels_last):
    if channels_last and input.numel() == 0:
        return "torch loses the memory format of an empty batch"
    if channels_last and input.requires_grad and torch.is_grad_enabled():
        return "torch's gradient has the memory format of the output's gradient, not that of the input"
    return None


upsample_bilinear2d_op = Op(
    "upsample_bilinear2d(Tensor input, SymInt[] size, float[]? scales, bool align_corners, bool channels_last)"
    " -> Tensor output",
    check=check,
    outputs=outputs,
    backward=backward,
    internal=True,
    backends=rows(
        reference.upsample_bilinear2d,
        stock=Stock(
            stock,
            below={
                "NCHW": 1 << 13,
                "NCHW, larger": 1 << 10,
                "NCHW, over 4 times larger": 1 << 7,
                "NCHW, differentiated": 1 << 14,
                "NCHW, differentiated, larger": 1 << 11,
                "NCHW, differentiated, over 4 times larger": 1 << 8,
                "channels_last": ALWAYS,
                "channels_last, larger": 1 << 12,
                "channels_last, over 4 times larger": 1 << 9,
            },
            which=stock_class,
            refuses=stock_refuses,
        ),
        cpu=FLOATING_GPU,
        triton="upsample_bilinear2d.triton.upsample",
    ),
)


def check_backward(grad_output, size):
    _check_image("upsample_bilinear2d_backward", "grad_output", grad_output)
    _check_size("upsample_bilinear2d_backward", size)


def double_backward(shape_grad_output, scales, align_corners, channels_last, grad_grad_input, backend):
    size = shape_grad_output[2:]
    options = scales, align_corners, channels_last
    return {"grad_output": upsample_bilinear2d_op(grad_grad_input, size, *options, backend=backend)}


upsample_bilinear2d_backward = Op(
    "upsample_bilinear2d_backward(Tensor grad_output, SymInt[] size, float[]? scales, bool align_corners,"
    " bool channels_last) -> Tensor grad_input",
    check=check_backward,
    outputs=outputs_backward,
    backward=double_backward,
    internal=True,
    backends=rows(
        reference.upsample_bilinear2d_backward,
        cpu=FLOATING_GPU,
        triton="upsample_bilinear2d.triton.upsample_backward",
    ),
)


# --- transposed convolution ---

_GEOMETRY = "int[] kernel_size, int[] stride, int[] padding, SymInt[] size, bool channels_last"


def _check_kernel(op, kernel_size, stride, padding):
    for axis in (0, 1):
        if stride[axis] < 1 or kernel_size[axis] not in (2 * stride[axis], 2 * stride[axis] - 1):
            raise ValueError(
                f"fastseg.ops.{op}: kernel_size={tuple(kernel_size)} with stride={tuple(stride)}; "
                "allowed: 2 stride or 2 stride - 1, and a stride of at least 1"
            )
        if abs(padding[axis]) >= _LARGEST:
            raise ValueError(f"fastseg.ops.{op}: padding={tuple(padding)}; allowed: less than 2^30")


def check_conv_transpose(input, kernel_size, stride, padding, size):
    _check_image("bilinear_conv_transpose2d", "input", input)
    _check_kernel("bilinear_conv_transpose2d", kernel_size, stride, padding)
    _check_size("bilinear_conv_transpose2d", size)


def backward_conv_transpose(shape_input, kernel_size, stride, padding, channels_last, grad_output, backend):
    geometry = kernel_size, stride, padding, shape_input[2:], channels_last
    return {"input": bilinear_conv_transpose2d_backward(grad_output, *geometry, backend=backend)}


bilinear_conv_transpose2d = Op(
    f"bilinear_conv_transpose2d(Tensor input, {_GEOMETRY}) -> Tensor output",
    check=check_conv_transpose,
    outputs=outputs,
    backward=backward_conv_transpose,
    backends=rows(
        reference.bilinear_conv_transpose2d, cpu=FLOATING_GPU, triton="upsample_bilinear2d.triton.conv_transpose"
    ),
)


def check_conv_transpose_backward(grad_output, kernel_size, stride, padding, size):
    name = "bilinear_conv_transpose2d_backward"
    _check_image(name, "grad_output", grad_output)
    _check_kernel(name, kernel_size, stride, padding)
    _check_size(name, size)


def double_backward_conv_transpose(
    shape_grad_output, kernel_size, stride, padding, channels_last, grad_grad_input, backend
):
    geometry = kernel_size, stride, padding, shape_grad_output[2:], channels_last
    return {"grad_output": bilinear_conv_transpose2d(grad_grad_input, *geometry, backend=backend)}


bilinear_conv_transpose2d_backward = Op(
    f"bilinear_conv_transpose2d_backward(Tensor grad_output, {_GEOMETRY}) -> Tensor grad_input",
    check=check_conv_transpose_backward,
    outputs=outputs_backward,
    backward=double_backward_conv_transpose,
    internal=True,
    backends=rows(
        reference.bilinear_conv_transpose2d_backward,
        cpu=FLOATING_GPU,
        triton="upsample_bilinear2d.triton.conv_transpose_backward",
    ),
)


def upsample_bilinear2d(
    input: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Bilinear interpolation; drop-in for torch.nn.functional.interpolate with mode="bilinear".

    Args:
        input: (N, C, h, w), empty in N only; float32, float16, bfloat16 or float64; contiguous, channels_last or any
            other strides. Half types are interpolated in float32.
        size: output size, one integer or (H, W); each axis may be larger or smaller than the input's, or equal.
        scale_factor: instead of size, one number or one each for height and width; sampling then uses
            1/scale_factor, as torch does.
        align_corners: whether the centres of the corner pixels of input and output coincide; None is False.
        recompute_scale_factor: with scale_factor only: sample at input size / output size instead of 1/scale_factor.
        backend: "auto", "cpu", "triton" or "reference". "auto" leaves small CPU tensors to torch's function, which is
            as fast there, and all channels_last ones that do not grow and are not differentiated.

    Returns:
        (N, C, H, W) in the dtype and memory format of the input. Differentiable any number of times; the gradient
        is the same on every run and has the memory format of the input.

    Raises:
        ValueError: size and scale_factor are both or neither given, or not positive; recompute_scale_factor with size.
        RuntimeError: input is not four-dimensional, has no channels or pixels, or has another dtype.
        TypeError: arguments of other types.
    """
    if not isinstance(input, Tensor):
        _check.tensor(_NAME, "input", input)
    if align_corners is None:
        align_corners = False
    elif type(align_corners) is not bool:
        _check.booleans(_NAME, align_corners=align_corners)
    _check_image(_NAME, "input", input)
    out_size, scales = output_size_and_scales(_NAME, input, size, scale_factor)
    if out_size is None:
        raise ValueError(f"fastseg.ops.{_NAME}: size and scale_factor: neither given; allowed: one of them")
    if recompute_scale_factor is not None and type(recompute_scale_factor) is not bool:
        _check.booleans(_NAME, recompute_scale_factor=recompute_scale_factor)
    if recompute_scale_factor:
        if scales is None:
            raise ValueError(
                f"fastseg.ops.{_NAME}: recompute_scale_factor=True with size; allowed: with scale_factor only"
            )
        scales = None
    channels_last = image_format(input) is torch.channels_last
    return upsample_bilinear2d_op(input, out_size, scales, align_corners, channels_last, backend=backend)
