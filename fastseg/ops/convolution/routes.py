"""Which convolutions `auto` leaves to stock PyTorch: the `Stock` rows of the three maps.

On the CPU torch's dense convolution reaches the peak of the machine unless

* many taps are in the padding: torch's weight gradient multiplies them, and its forward is slow in NCHW;
* the dtype is a half type that the processor cannot multiply: torch takes many times as long as for fp32;
* a transposed convolution has few channels and a large stride.

A strided 1x1 convolution of fewer than 16 channels_last channels is refused: oneDNN's weight gradient writes past its
buffer (https://github.com/uxlfoundation/oneDNN/issues/6035, torch 2.13 and 2.14).

On a GPU ours is faster (predicted, not measured) in the first case, and for all transposed convolutions of a large
stride.
"""

from functools import lru_cache

import torch

from fastseg import _private_api as private
from fastseg._backend import ALWAYS, Stock
from fastseg._dtypes import HALF
from fastseg._layout import image_format
from fastseg.kernels.convolution import torch_calls

# Skipping the taps in the padding is faster than stock up to this share of taps inside the image.
MAX_VISITED_SHARE = 0.7
MAX_VISITED_SHARE_WIDE = 0.8  # from WIDE input channels on; not for NCHW on the CPU, where sums are made in parts
WIDE = 1024


@lru_cache(maxsize=1024)
def visited_share(extent: int, out_extent: int, taps: int, stride: int, padding: int, dilation: int) -> float:
    """Along one axis of a convolution, the share of (output, tap) pairs inside the input."""
    inside = 0
    for tap in range(taps):
        offset = tap * dilation - padding
        first = max(0, -(offset // stride))  # ceil(-offset / stride)
        last = min(out_extent, (extent - 1 - offset) // stride + 1)
        inside += max(0, last - first)
    return inside / (taps * out_extent)


def _skips(input, big, small, channels: int, kernel_size, stride, padding, dilation) -> bool:
    """True if enough taps of a convolution from a map of size `big` to one of size `small` are in the padding."""
    if 2 * padding[0] < kernel_size[0] and 2 * padding[1] < kernel_size[1]:
        return False  # few taps can be in the padding
    share = 1.0
    for axis in (0, 1):
        numbers = kernel_size[axis], stride[axis], padding[axis], dilation[axis]
        # torch.compile warns of caches, and a program asks only once
        share_of = visited_share.__wrapped__ if torch.compiler.is_compiling() else visited_share
        share *= share_of(big[axis], small[axis], *numbers)
    wide = channels >= WIDE and not (input.is_cpu and image_format(input) is torch.contiguous_format)
    return share <= (MAX_VISITED_SHARE_WIDE if wide else MAX_VISITED_SHARE)


def _half_in_software(dtype: torch.dtype) -> bool:
    return dtype in HALF and not private.multiplies_halves(dtype)


def _class(input, skips: bool) -> str:
    if _half_in_software(input.dtype):
        return "half types without hardware"
    return "many taps in the padding" if skips else "any other"


def class_of_convolution(input, weight, stride, padding, dilation, size):
    sizes = input.shape[2:], size
    return _class(input, _skips(input, *sizes, weight.shape[1], weight.shape[2:], stride, padding, dilation))


def class_of_transposed(input, weight, stride, padding, dilation, size):
    sizes = size, input.shape[2:]
    return _class(input, _skips(input, *sizes, weight.shape[1], weight.shape[2:], stride, padding, dilation))


def class_of_grad_weight(input, grad_output, stride, padding, dilation, kernel_size):
    sizes = input.shape[2:], grad_output.shape[2:]
    return _class(input, _skips(input, *sizes, input.shape[1], kernel_size, stride, padding, dilation))


def _refuses(input, kernel_size, stride, seen_channels: int) -> str | None:
    """seen_channels: in a group of the map that has the stride, the larger one."""
    if tuple(kernel_size) != (1, 1) or max(stride) == 1 or seen_channels >= 16:
        return None
    if not input.is_cpu or input.dtype != torch.float32 or image_format(input) is torch.contiguous_format:
        return None
    return "oneDNN's gradient of a strided 1x1 weight of fewer than 16 channels writes past its buffer (oneDNN #6035)"


def refuses_map(input, weight, stride):
    return _refuses(input, weight.shape[2:], stride, weight.shape[1])


def refuses_grad_weight(input, kernel_size, stride, groups):
    return _refuses(input, kernel_size, stride, input.shape[1] // groups)


def _limits():
    return {"many taps in the padding": 1 << 18, "half types without hardware": 1 << 10, "any other": ALWAYS}


def convolution_on_gpu(input, weight, stride, padding, dilation, size):
    return not _skips(input, input.shape[2:], size, weight.shape[1], weight.shape[2:], stride, padding, dilation)


def transposed_on_gpu(input, weight, stride, padding, dilation, size):
    if min(stride) >= 4:
        return False
    return not _skips(input, size, input.shape[2:], weight.shape[1], weight.shape[2:], stride, padding, dilation)


_NARROW = "depthwise, NCHW, fp32, strided, rows too short for lanes, from 16K elements on"
_UNDILATED = "depthwise, channels_last, fp32, without dilation, from 64K elements on"


def _is_strided_narrow(input, stride, scale: int) -> bool:
    """scale: elements in a row of the input for one element in a row of the map without stride."""
    least = 7 * scale if max(stride) <= 4 and stride[0] == stride[1] else 16  # other strides are computed row by row
    is_narrow = max(stride) > 1 and input.shape[3] < least and input.dtype == torch.float32
    return is_narrow and image_format(input) is torch.contiguous_format


def class_of_depthwise(input, stride, dilation):
    """Small calls are never left to stock, which is slower.

    For large ones stock is faster if our rows do not fill a vector, or in channels_last without dilation.
    """
    elements = input.numel()
    if elements < 1 << 14:
        return None
    if _is_strided_narrow(input, stride, stride[1]):
        return _NARROW
    if elements < 1 << 16 or input.dtype != torch.float32 or max(dilation) > 1:
        return None
    return _UNDILATED if image_format(input) is torch.channels_last else None


def class_of_depthwise_transposed(input, stride):
    return _NARROW if input.numel() >= 1 << 14 and _is_strided_narrow(input, stride, 1) else None


DENSE = (
    Stock(
        torch_calls.dilated_conv2d,
        below=_limits(),
        which=class_of_convolution,
        refuses=refuses_map,
        on_gpu=convolution_on_gpu,
        compiles_to_itself=True,
    ),
    Stock(
        torch_calls.conv_transpose2d,
        below=_limits(),
        which=class_of_transposed,
        refuses=refuses_map,
        on_gpu=transposed_on_gpu,
        compiles_to_itself=True,
    ),
    Stock(torch_calls.conv2d_grad_weight, below=_limits(), which=class_of_grad_weight, refuses=refuses_grad_weight),
)
DEPTHWISE = (
    Stock(torch_calls.dilated_conv2d, below=dict.fromkeys((_NARROW, _UNDILATED), ALWAYS), which=class_of_depthwise),
    Stock(torch_calls.conv_transpose2d, below={_NARROW: ALWAYS}, which=class_of_depthwise_transposed),
    Stock(torch_calls.conv2d_grad_weight, below={"depthwise": 0}),
)
UPSAMPLING = tuple(
    Stock(run, below={"few channels, a large stride": 0})
    for run in (torch_calls.dilated_conv2d, torch_calls.conv_transpose2d, torch_calls.conv2d_grad_weight)
)
