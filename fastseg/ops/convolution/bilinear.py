"""Transposed convolution by fixed bilinear weights: rows and columns are interpolated one after the other."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastseg import _check
from fastseg import _private_api as private
from fastseg._bilinear import bilinear_taps
from fastseg._layout import image_format
from fastseg.kernels.convolution.torch_calls import finish
from fastseg.ops.upsample_bilinear2d import bilinear_conv_transpose2d

_answers = WeakTensorKeyDictionary()  # by weight: the last result of is_bilinear, and the data version it is for


def is_bilinear(image: Tensor, weight: Tensor, bias: Tensor | None, stride, dilation, groups: int) -> bool:
    """True if `weight` is a constant that upsamples each channel of `image` bilinearly and separately.

    Reads the data of a weight once, and again after a change: for a GPU the host waits then. False while a program is
    traced: the result would become part of the program.
    """
    if weight.requires_grad or bias is not None or dilation != [1, 1] or stride[0] < 2 or stride[1] < 2:
        return False
    channels, per_group, rows, columns = weight.shape
    if rows not in (2 * stride[0], 2 * stride[0] - 1) or columns not in (2 * stride[1], 2 * stride[1] - 1):
        return False
    if channels != image.shape[1] or per_group * groups != channels or groups not in (1, channels):
        return False
    if weight.dtype != image.dtype or weight.device != image.device or weight.is_meta:
        return False
    if torch.compiler.is_compiling():
        return False
    if private.must_dispatch((image, weight)):
        return False
    if weight.is_inference():  # made in inference mode: changes of it are not counted
        return _has_bilinear_taps(weight, channels, groups)
    state = weight._version, weight.data_ptr(), weight.dtype
    found, answer = _answers.get(weight, (None, False))
    if found != state:
        answer = _has_bilinear_taps(weight, channels, groups)
        _answers[weight] = state, answer
    return answer


def _has_bilinear_taps(weight: Tensor, channels: int, groups: int) -> bool:
    expected = _bilinear_weight(channels, groups, weight.shape[2], weight.shape[3], weight.dtype)
    return expected is not None and torch.equal(weight.detach().cpu(), expected)


@lru_cache(maxsize=16)
def _bilinear_weight(channels: int, groups: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor | None:
    """(channels, channels / groups, rows, columns), or None if `dtype` cannot represent the taps exactly."""
    taps = bilinear_taps(rows)[:, None] * bilinear_taps(columns)[None, :]
    if not torch.equal(taps.to(dtype).float(), taps):
        return None
    weight = torch.zeros(channels, channels // groups, rows, columns, dtype=dtype)
    places = torch.arange(channels)
    weight[places, places if groups == 1 else 0] = taps.to(dtype)
    return weight


def separable(image, weight, bias, residual, stride, padding, dilation, groups, size, relu, *, backend, out=None):
    """The op conv_transpose2d for a bilinear weight, without a bias."""
    if residual is not None:
        _check.dtype("conv_transpose2d", "skip", residual, (image.dtype,))
    channels_last = image_format(image) is torch.channels_last
    output = bilinear_conv_transpose2d(image, weight.shape[2:], stride, padding, size, channels_last, backend=backend)
    return finish(output, residual, relu)
