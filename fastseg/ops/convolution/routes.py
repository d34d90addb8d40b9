"""Where stock PyTorch is faster: the `Stock` rows of the convolutions."""

import torch

from fastseg._backend import Stock
from fastseg._layout import image_format
from fastseg.kernels.convolution import torch_calls

_ALL = 1 << 62  # classes in which stock is faster at every size
_STRIDED_NARROW = "NCHW, fp32, strided, rows of less than 16, from 16K elements on"
_LARGE_FORWARD = "channels_last, fp32, without dilation, not differentiated, from 64K elements on"


def _is_strided_narrow(input, stride):
    is_narrow = max(stride) > 1 and input.shape[3] < 16 and input.dtype == torch.float32
    return is_narrow and image_format(input) is torch.contiguous_format


def depthwise_class(input, weight, stride, dilation):
    """Small calls are ours everywhere: one of stock's costs 45 to 70 us, one of ours 20.

    On large ones stock is faster where our rows do not fill a vector, and where oneDNN's forward in channels_last is as
    fast as memory.
    """
    elements = input.numel()
    if type(elements) is not int or elements < 1 << 14:
        return None
    if _is_strided_narrow(input, stride):
        return _STRIDED_NARROW
    if elements < 1 << 16 or input.dtype != torch.float32 or max(dilation) > 1:
        return None
    differentiated = (input.requires_grad or weight.requires_grad) and torch.is_grad_enabled()
    return None if differentiated or image_format(input) is torch.contiguous_format else _LARGE_FORWARD


def depthwise_transposed_class(input, stride):
    elements = input.numel()
    if type(elements) is not int or elements < 1 << 14:
        return None
    return _STRIDED_NARROW if _is_strided_narrow(input, stride) else None


CONVOLUTION = Stock(torch_calls.dilated_conv2d, below={"any": 0})
TRANSPOSED = Stock(torch_calls.conv_transpose2d, below={"any": 0})
GRAD_WEIGHT = Stock(torch_calls.conv2d_grad_weight, below={"any": 0})
DEPTHWISE = Stock(
    torch_calls.dilated_conv2d, below={_STRIDED_NARROW: _ALL, _LARGE_FORWARD: _ALL}, which=depthwise_class
)
DEPTHWISE_TRANSPOSED = Stock(
    torch_calls.conv_transpose2d, below={_STRIDED_NARROW: _ALL}, which=depthwise_transposed_class
)
DEPTHWISE_GRAD_WEIGHT = Stock(torch_calls.conv2d_grad_weight, below={"any": 0})
