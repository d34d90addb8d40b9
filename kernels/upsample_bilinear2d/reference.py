"""Bilinear upsampling and the bilinear transposed convolution in plain PyTorch: the definitions, and their adjoints."""

import torch
from torch import Tensor

from fastseg._bilinear import interpolate
from fastseg._dtypes import accumulator


def upsample_bilinear2d(input: Tensor, size, scales, align_corners: bool) -> Tensor:
    """(N, C, h, w) to (N, C, H, W); half types are interpolated in fp32."""
    return interpolate(input.to(accumulator(input.dtype)), size, scales, align_corners).to(input.dtype)


def upsample_bilinear2d_backward(grad_output: Tensor, size, scales, align_corners: bool) -> Tensor:
    """(N, C, H, W) to (N, C, h, w)."""
    gradient = grad_output.to(accumulator(grad_output.dtype))
    shape = *gradient.shape[:2], *size
    scale_height, scale_width = (None, None) if scales is None else scales
    return torch.ops.aten.upsample_bilinear2d_backward(
        gradient, gradient.shape[2:], shape, align_corners, scale_height, scale_width
    ).to(grad_output.dtype)


def bilinear_conv_transpose2d(input: Tensor, kernel_size, stride, padding, size) -> Tensor:
    """(N, C, h, w) to (N, C, H, W): every channel by the bilinear kernel, which is the product of one per axis."""
    rows, columns = _matrices(input, input.shape[2:], size, kernel_size, stride, padding)
    return (rows @ input.to(rows.dtype) @ columns.mT).to(input.dtype)


def bilinear_conv_transpose2d_backward(grad_output: Tensor, kernel_size, stride, padding, size) -> Tensor:
    """(N, C, H, W) to (N, C, h, w)."""
    rows, columns = _matrices(grad_output, size, grad_output.shape[2:], kernel_size, stride, padding)
    return (rows.mT @ grad_output.to(rows.dtype) @ columns).to(grad_output.dtype)


def _matrices(like: Tensor, source, output, kernel_size, stride, padding) -> list[Tensor]:
    """Per axis (output, source): the weight of element i in output o, max(0, 1 - |i - coordinate(o)|).

    coordinate(o) = (o + padding - centre) / stride, the centre of the kernel being its tap stride - 1 or, of an even
    number of taps, half a tap further on.
    """
    options = {"device": like.device, "dtype": accumulator(like.dtype)}
    matrices = []
    for axis in (0, 1):
        centre = stride[axis] - (1 if kernel_size[axis] % 2 else 0.5)
        coordinate = (torch.arange(output[axis], **options) + (padding[axis] - centre)) / stride[axis]
        distance = (coordinate[:, None] - torch.arange(source[axis], **options)).abs()
        matrices.append((1 - distance).clamp(min=0))
    return matrices
