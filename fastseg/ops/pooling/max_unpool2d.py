"""2-D max unpooling; drop-in for torch.nn.functional.max_unpool2d that also takes one-byte indices.

    output[indices[i]] = input[i], zero elsewhere; the last of equal indices in a plane counts

Indices have the two formats of `fastseg.ops.max_pool2d`. The gradient is the gradient of the output at
every index (`max_unpool2d_backward`), as in torch also for indices that repeat.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg import _check
from fastseg import _private_api as private
from fastseg._backend import Stock, rows
from fastseg._dtypes import FLOATING, HALF
from fastseg._layout import empty_image, image_format
from fastseg._op import Op
from fastseg.kernels.max_unpool2d import reference
from fastseg.ops.pooling.geometry import (
    GEOMETRY,
    INDEX_DTYPES,
    check_indices,
    refuse_planes,
    unpooled_size,
)
from fastseg.ops.pooling.indices import PoolIndices, offsets_of
from fastseg.ops.pooling.max_pool2d import max_pool2d_backward

_NAME = "max_unpool2d"
_UNKNOWN_GEOMETRY = ([], [], [], [])  # for int64 indices, which need none


# The ops take (N, C, rows, columns) and pairs of numbers; the public function makes them.


def check(input, indices, size):
    if input.dtype not in FLOATING:
        _check.dtype(_NAME, "input", input, FLOATING)
    shape = input.shape
    if len(shape) != 4 or not (shape[1] and shape[2] and shape[3]):
        refuse_planes(_NAME, shape, "rows, columns")
    check_indices(_NAME, indices, "input", input)
    height, width = size
    if height < 1 or width < 1:
        raise RuntimeError(f"fastseg.ops.{_NAME}: the output would be {height}x{width}; allowed: at least 1x1")


def outputs(input, size):
    return empty_image(input, *size, image_format(input))


def backward(indices, kernel_size, stride, padding, dilation, grad_output, backend):
    geometry = kernel_size, stride, padding, dilation
    return {"input": max_unpool2d_backward(grad_output, indices, *geometry, backend=backend)}


def stock(input, indices, size):
    return private.max_unpool2d(input, indices, size)


def stock_class(input):
    if not input.is_contiguous() and input.dim() == 4 and input.stride(1) == 1:
        return "channels_last"
    return "NCHW, differentiated" if input.requires_grad and torch.is_grad_enabled() else "NCHW"


def stock_refuses(input, indices):
    if indices.dtype != torch.int64:
        return "torch has no compact indices"
    images, channels = input.shape[:2]
    planes = images * channels
    if not input.is_contiguous() and image_format(input) is torch.channels_last:
        if input.requires_grad and torch.is_grad_enabled():
            return "torch's gradient is never in channels_last"
        planes = images
    if planes % torch.get_num_threads():
        return "torch's threads would share a plane: two of them may write to the same index in any order"
    if torch.are_deterministic_algorithms_enabled():
        return "torch calls its function nondeterministic"
    return None


max_unpool2d_op = Op(
    f"max_unpool2d(Tensor input, Tensor indices, {GEOMETRY}, SymInt[] size) -> Tensor output",
    check=check,
    outputs=outputs,
    backward=backward,
    image_layout=("input", "indices"),
    backends=rows(
        reference.max_unpool2d,
        stock=Stock(
            stock,
            below={"NCHW": 1 << 17, "NCHW, differentiated": 1 << 18, "channels_last": 1 << 16},
            which=stock_class,
            refuses=stock_refuses,
        ),
        cuda=FLOATING,
    ),
)


def check_backward(grad_output, indices):
    name = "max_unpool2d_backward"
    _check.dtype(name, "grad_output", grad_output, FLOATING)
    _check.shape(name, "grad_output", grad_output, ("N", "C", "H", "W"))
    _check.dtype(name, "indices", indices, INDEX_DTYPES)
    _check.shape(name, "indices", indices, (*grad_output.shape[:2], "rows", "columns"))
    _check.same_device(name, "indices", indices, "grad_output", grad_output)


def outputs_backward(grad_output, indices):
    return empty_image(grad_output, *indices.shape[2:], image_format(indices))


def double_backward(shape_grad_output, indices, kernel_size, stride, padding, dilation, grad_grad_input, backend):
    compact = indices.dtype == torch.uint8
    geometry = (kernel_size, stride, padding, dilation) if compact else _UNKNOWN_GEOMETRY
    size = shape_grad_output[2:]
    return {"grad_output": max_pool2d_backward(grad_grad_input, indices, *geometry, size=size, backend=backend)}


max_unpool2d_backward = Op(
    f"max_unpool2d_backward(Tensor grad_output, Tensor indices, {GEOMETRY}) -> Tensor grad_input",
    check=check_backward,
    outputs=outputs_backward,
    backward=double_backward,
    internal=True,
    image_layout=("indices", "grad_output"),
    backends=rows(reference.max_unpool2d_backward, cuda=FLOATING),
)


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
    """Writes pooled values to the positions of their maxima; drop-in for torch.nn.functional.max_unpool2d.

    Args:
        input: (N, C, rows, columns) or (C, rows, columns), empty in N only; float32, float16, bfloat16 or
            float64; contiguous, channels_last or any other strides.
        indices: int64 of the shape of `input`, positions `y * W + x` in the plane of the output, as torch's
            pooling returns them; or `fastseg.ops.PoolIndices`, which mean the same positions as their
            `to_flat()`. If the output has the size of the pool's input, these are not converted, and every
            output is written once.
        kernel_size, stride, padding: as in torch, they give the default size of the output and nothing else.
            None, with `PoolIndices` only: those of the pool, and the size of its input as default.
        output_size: (H, W) or (N, C, H, W) of the output, less than a stride away from the default size.
        backend: "auto", "cpu", "cuda" or "reference". "auto" leaves small CPU tensors with int64 indices to torch's
            function, which is as fast there, if no two of its threads share a plane.

    Returns:
        (N, C, H, W) or (C, H, W) in the memory format of `input`, zero at positions without an index. Of several
        values for one position, the last in the plane is written, on every device and run. Differentiable any
        number of times with respect to `input`.

    Raises:
        RuntimeError: on CPU an index outside the plane of the output (forward and backward; checked in 64
            bits; on GPU, where a check would stall the stream, it is skipped); shapes, dtypes or devices that
            do not fit.
        ValueError: an `output_size` out of bounds.
        TypeError: arguments of other types.
    """
    _check.tensor(_NAME, "input", input)
    compact = isinstance(indices, PoolIndices)
    if not compact:
        _check.tensor(_NAME, "indices", indices)
        if indices.dtype != torch.int64:  # uint8 means offsets only inside a PoolIndices
            _check.dtype(_NAME, "indices", indices, (torch.int64,))
    shape = input.shape
    single = len(shape) == 3
    if not single and len(shape) != 4:
        refuse_planes(_NAME, shape, "rows, columns")
    if indices.shape != shape:
        _check.shape(_NAME, "indices", indices, shape, "the shape of input")
    default_size = None
    if kernel_size is not None:
        kernel_size = _check.pair(_NAME, "kernel_size", kernel_size)
        stride = kernel_size if stride is None else _check.pair(_NAME, "stride", stride)
        padding = _check.pair(_NAME, "padding", padding)
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
        size = unpooled_size(_NAME, shape, kernel_size, stride, padding, output_size)
    geometry = kernel_size, stride, padding, [1, 1]  # for int64 indices: the CUDA kernel expects these here
    if compact and indices.is_compact and tuple(size) == tuple(indices.input_size):
        indices, geometry = offsets_of(indices), indices.geometry
    elif compact:
        indices = indices.to_flat()
    if input.dtype in HALF and input.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        input = input.float()  # torch's autocast runs max_unpool2d in fp32, on CPU only
    if single:
        input, indices = input.contiguous().unsqueeze(0), indices.unsqueeze(0)
    if indices.stride() != input.stride() and not private.in_functional_transform():
        # The gradient gets its memory format from the indices.
        indices = indices.contiguous(memory_format=image_format(input))
    output = max_unpool2d_op(input, indices, *geometry, size=size, backend=backend)
    return output.squeeze(0) if single else output
