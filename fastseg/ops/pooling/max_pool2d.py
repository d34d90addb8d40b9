"""2-D max pooling with indices; drop-in for torch.nn.functional.max_pool2d and max_pool2d_with_indices.

    output[y, x] = max over (kh, kw) of input[y sh - ph + kh dh, x sw - pw + kw dw]

The dtype of the indices says which format they have: int64 `y * W + x` in the plane of the input, as in torch,
or uint8 `kh * KW + kw` in the window. The gradient needs only the indices:

    max_pool2d_backward    adds every gradient at its index; its own gradient is
    max_unpool2d_backward  the gradient at every index; its own gradient is max_pool2d_backward again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg import _check
from fastseg import _private_api as private
from fastseg._backend import ALWAYS, Stock, rows
from fastseg._dtypes import FLOATING, HALF
from fastseg._layout import empty_image, image_format
from fastseg._op import REGISTRY, Op
from fastseg.kernels.max_pool2d import reference
from fastseg.ops.pooling.geometry import (
    GEOMETRY,
    MAX_COMPACT_TAPS,
    check_geometry,
    check_indices,
    pooled_size,
    refuse_planes,
)
from fastseg.ops.pooling.indices import PoolIndices

_NAME = "max_pool2d"
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)  # run by torch, on the CPU only
_POOLED = (*FLOATING, *_INTEGERS)


# The ops take (N, C, H, W) and pairs of numbers; the public function makes them.
# compact: the indices are uint8. return_indices: the caller gets them; the gradient needs them in any case.


def check(input, kernel_size, stride, padding, dilation, ceil_mode, compact):
    if input.dtype not in _POOLED:
        _check.dtype(_NAME, "input", input, _POOLED)
    shape = input.shape
    if len(shape) != 4 or not (shape[1] and shape[2] and shape[3]):
        refuse_planes(_NAME, shape, "H, W")
    check_geometry(_NAME, kernel_size, stride, padding, dilation)
    taps = kernel_size[0] * kernel_size[1]
    if compact and taps > MAX_COMPACT_TAPS:
        raise RuntimeError(
            f"fastseg.ops.{_NAME}: kernel_size={tuple(kernel_size)} has {taps} taps; allowed with "
            f"index_format='compact': at most {MAX_COMPACT_TAPS}"
        )
    down = shape[2] + 2 * padding[0] - dilation[0] * (kernel_size[0] - 1)
    right = shape[3] + 2 * padding[1] - dilation[1] * (kernel_size[1] - 1)
    if down > 0 and right > 0:
        return  # at least one window fits
    rows, columns = pooled_size(shape, kernel_size, stride, padding, dilation, ceil_mode)
    if rows < 1 or columns < 1:
        raise RuntimeError(
            f"fastseg.ops.{_NAME}: input of shape {tuple(shape)} gives an output of {rows}x{columns}; "
            "allowed: at least 1x1"
        )


def outputs(input, kernel_size, stride, padding, dilation, ceil_mode, compact):
    rows, columns = pooled_size(input.shape, kernel_size, stride, padding, dilation, ceil_mode)
    output = empty_image(input, rows, columns, image_format(input))
    return output, torch.empty_like(output, dtype=torch.uint8 if compact else torch.int64)


def backward(shape_input, indices, kernel_size, stride, padding, dilation, grad_output, backend):
    geometry = kernel_size, stride, padding, dilation
    return {"input": max_pool2d_backward(grad_output, indices, *geometry, size=shape_input[2:], backend=backend)}


def stock(input, kernel_size, stride, padding, ceil_mode, return_indices):  # it refuses dilation
    if kernel_size[0] == kernel_size[1] and stride[0] == stride[1] and padding[0] == padding[1]:
        kernel_size, stride, padding = kernel_size[0], stride[0], padding[0]  # torch parses an int faster than a list
    dtype = input.dtype
    if dtype in HALF and input.requires_grad:
        input = input.float()  # torch adds the gradients of overlapping windows in the precision of the input
    if return_indices:
        output, indices = private.max_pool2d_with_indices(input, kernel_size, stride, padding, 1, ceil_mode)
    else:
        output, indices = torch.max_pool2d(input, kernel_size, stride, padding, 1, ceil_mode), None
    return output if output.dtype == dtype else output.to(dtype), indices


def is_differentiated(input):
    return input.requires_grad and torch.is_grad_enabled()


def is_fused(input, return_indices):
    """The maximum alone; the compiler's gradient is slower than ours."""
    return not return_indices and not is_differentiated(input)


def stock_class(input, kernel_size, stride, padding, return_indices):
    if not input.is_floating_point():
        return "integers"
    differentiated = is_differentiated(input)
    if input.is_contiguous() or input.dim() != 4 or input.stride(1) != 1:
        return "NCHW, differentiated" if differentiated else "NCHW"
    if not differentiated:
        return "channels_last"
    if return_indices and (*kernel_size, *stride, *padding) != (2, 2, 2, 2, 0, 0):
        return "channels_last, differentiated, int64 indices of other than 2x2 windows"
    return "channels_last, differentiated"


def stock_refuses(input, stride, dilation, return_indices, compact):
    if return_indices and compact:
        return "torch has no compact indices"
    if dilation[0] > 1 or dilation[1] > 1:
        return "torch's index of a dilated window without a pixel is outside the plane, and its backward writes there"
    if stride[0] >= 2**31 or stride[1] >= 2**31:
        return "torch takes strides below 2^31"
    if input.numel() == 0:
        return "torch loses the memory format of an empty batch"
    if not input.is_floating_point() and image_format(input) is torch.channels_last:
        return "torch counts the pixels of channels_last planes in the dtype of the input"
    return None


max_pool2d_op = Op(
    f"max_pool2d(Tensor input, {GEOMETRY}, bool ceil_mode, bool return_indices, bool compact)"
    " -> (Tensor output, Tensor indices)",
    check=check,
    outputs=outputs,
    backward=backward,
    image_layout=("input",),
    backends=rows(
        reference.max_pool2d,
        stock=Stock(
            stock,
            below={
                "NCHW": 1 << 14,
                "NCHW, differentiated": 1 << 15,
                "channels_last": 1 << 17,
                "channels_last, differentiated": 1 << 20,
                "channels_last, differentiated, int64 indices of other than 2x2 windows": 1 << 22,
                "integers": ALWAYS,  # no other backend takes them
            },
            which=stock_class,
            refuses=stock_refuses,
            fused=is_fused,
        ),
        cuda=FLOATING,
    ),
)


def check_backward(grad_output, indices):
    name = "max_pool2d_backward"
    _check.dtype(name, "grad_output", grad_output, FLOATING)
    _check.shape(name, "grad_output", grad_output, ("N", "C", "rows", "columns"))
    check_indices(name, indices, "grad_output", grad_output)


def outputs_backward(grad_output, indices, size):
    return empty_image(grad_output, *size, image_format(indices))


def double_backward(indices, kernel_size, stride, padding, dilation, grad_grad_input, backend):
    unpool_backward = REGISTRY["max_unpool2d_backward"]  # not imported: its module imports this one
    geometry = kernel_size, stride, padding, dilation
    return {"grad_output": unpool_backward(grad_grad_input, indices, *geometry, backend=backend)}


max_pool2d_backward = Op(
    f"max_pool2d_backward(Tensor grad_output, Tensor indices, {GEOMETRY}, SymInt[] size) -> Tensor grad_input",
    check=check_backward,
    outputs=outputs_backward,
    backward=double_backward,
    internal=True,
    image_layout=("indices", "grad_output"),
    backends=rows(reference.max_pool2d_backward, cuda=FLOATING),
)


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
        stride: None or an empty sequence means `kernel_size`.
        padding: of -inf on both sides, at most half of `kernel_size`.
        dilation: distance between the taps of a window.
        ceil_mode: also windows that end outside the padded input, if they start inside the input or before it.
        return_indices: return (output, indices).
        index_format: "flat": int64 `y * W + x` in the plane of the input, identical to torch's. "compact":
            `fastseg.ops.PoolIndices`, one byte per element, for kernels of up to 255 taps.
        backend: "auto", "cpu", "cuda" or "reference". "auto" leaves small CPU tensors to torch's function, which is
            as fast there, except with compact indices.

    Returns:
        (N, C, rows, columns) or (C, rows, columns) in the memory format of the input; with `return_indices` also
        the indices. The first of equal maxima counts, NaN is above every number, and the last NaN counts.
        Differentiable any number of times.

    Raises:
        RuntimeError: shapes, sizes, dtypes or devices not listed above, as torch does.
        TypeError, ValueError: arguments of other types, an unknown `index_format`.
    """
    if not isinstance(input, Tensor):
        _check.tensor(_NAME, "input", input)
    if index_format != "flat":
        _check.one_of(_NAME, "index_format", index_format, ("flat", "compact"))
    if type(ceil_mode) is not bool or type(return_indices) is not bool:
        _check.booleans(_NAME, ceil_mode=ceil_mode, return_indices=return_indices)
    kernel_size = _check.pair(_NAME, "kernel_size", kernel_size)
    without_stride = stride is None or (isinstance(stride, Sequence) and len(stride) == 0)
    stride = kernel_size if without_stride else _check.pair(_NAME, "stride", stride)
    padding, dilation = _check.pair(_NAME, "padding", padding), _check.pair(_NAME, "dilation", dilation)
    if return_indices:
        compact = index_format == "compact"
    else:
        compact = kernel_size[0] * kernel_size[1] <= MAX_COMPACT_TAPS  # sufficient for the gradient
    single = input.dim() == 3
    images = input.contiguous().unsqueeze(0) if single else input
    output, indices = max_pool2d_op(
        images, kernel_size, stride, padding, dilation, ceil_mode, return_indices, compact, backend=backend
    )
    if single:
        output = output.squeeze(0)
    if not return_indices:
        return output
    if single:
        indices = indices.squeeze(0)
    if compact:
        indices = PoolIndices._of_pool(indices, input.shape[-2:], kernel_size, stride, padding, dilation)
    return output, indices
