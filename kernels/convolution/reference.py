"""The three linear maps of a convolution in plain PyTorch: the definition, for dense, grouped and depthwise weights.

`padding` is (top, left), and `size` the (height, width) of the result: they determine where the windows lie. The
padding at the other end, an output_padding or a crop follow from them.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg._dtypes import accumulator
from fastseg._layout import image_format


def dilated_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    size: Sequence[int],
    relu: bool,
) -> Tensor:
    """output[n, k, y, x] = sum over c, r, s of weight[k, c, r, s] input[n, c, y sh - top + r dh, x sw - left + s dw]

    input (N, C, H, W), weight (K, C / groups, R, S), bias (K,), residual (N, K, *size) -> (N, K, *size)
    """
    dtype = accumulator(input.dtype)
    spare = [max(pair) for pair in zip(stride, dilation)]  # so that the padding is never negative
    needed = [(size[i] - 1) * stride[i] + dilation[i] * (weight.shape[2 + i] - 1) + 1 for i in (0, 1)]
    ends = [needed[i] - padding[i] - input.shape[2 + i] + spare[i] for i in (0, 1)]
    padded = F.pad(input.to(dtype), (padding[1], ends[1], padding[0], ends[0]))[:, :, : needed[0], : needed[1]]
    output = F.conv2d(padded, weight.to(dtype), None, stride, 0, dilation, groups)
    return _finish(output, bias, residual, relu, input)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    size: Sequence[int],
    relu: bool,
) -> Tensor:
    """The transpose of `dilated_conv2d` with respect to its input, which has `size`.

    input (N, K, H, W), weight (K, C / groups, R, S), bias (C,), residual (N, C, *size) -> (N, C, *size)
    """
    dtype = accumulator(input.dtype)
    output = F.conv_transpose2d(input.to(dtype), weight.to(dtype), None, stride, 0, 0, groups, dilation)
    spare = [max(pair) for pair in zip(stride, dilation)]  # more than any output_padding
    output = F.pad(output, (0, spare[1], 0, spare[0]))
    output = output[:, :, padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]]
    return _finish(output, bias, residual, relu, input)


def conv2d_grad_weight(
    input: Tensor,
    grad_output: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    kernel_size: Sequence[int],
    channels_last: bool,
) -> Tensor:
    """The transpose of `dilated_conv2d` with respect to its weight.

    input (N, C, H, W), grad_output (N, K, OH, OW) -> (K, C / groups, *kernel_size)
    """
    dtype = accumulator(input.dtype)
    out_channels, *size = grad_output.shape[1:]
    spare = [max(pair) for pair in zip(stride, dilation)]
    needed = [(size[i] - 1) * stride[i] + dilation[i] * (kernel_size[i] - 1) + 1 for i in (0, 1)]
    ends = [needed[i] - padding[i] - input.shape[2 + i] + spare[i] for i in (0, 1)]
    padded = F.pad(input.to(dtype), (padding[1], ends[1], padding[0], ends[0]))[:, :, : needed[0], : needed[1]]
    if tuple(kernel_size) == (1, 1):  # oneDNN writes past its buffer at a stride, see ops/convolution/routes.py
        padded, stride = padded[:, :, :: stride[0], :: stride[1]], (1, 1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    weight_shape = (out_channels, input.shape[1] // groups, *kernel_size)
    grad_weight = torch.ops.aten.convolution_backward(
        grad_output.to(dtype), padded, padded.new_empty(weight_shape), None, stride, (0, 0), dilation, False, (0, 0),
        groups, (False, True, False),
    )[1]  # fmt: skip
    return grad_weight.to(input.dtype).contiguous(memory_format=layout)


def _finish(output: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool, like: Tensor) -> Tensor:
    """The epilogue, in the dtype and memory format of `like`."""
    if bias is not None:
        output = output + bias.to(output.dtype).view(-1, 1, 1)
    if residual is not None:
        output = output + residual
    output = output.relu() if relu else output
    return output.to(like.dtype).contiguous(memory_format=image_format(like))
