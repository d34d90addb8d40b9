"""Plain PyTorch: upsample, then the softmax statistics of `cross_entropy_dice`. The definition of the op.

Gradients are explicit formulas, transposed through torch's own bilinear backward, so that they differentiate once more.
Shapes: input (N, C, h, w), target, pixel_weight, losses (N, H, W), weight (C,).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg._bilinear import interpolate
from fastseg.kernels.cross_entropy_dice import reference as at_full_resolution


def upsample_cross_entropy_sums(
    input, target, weight, pixel_weight, scale_factors, align_corners, ignore_index, label_smoothing, with_gradient
):
    """(numerator, denominator): () fp64; d numerator / d input in the accumulator dtype, or empty."""
    options = scale_factors, align_corners, ignore_index, label_smoothing
    *_, numerator, denominator = upsample_softmax_statistics(input, target, weight, pixel_weight, *options, True)
    if not with_gradient:
        return numerator, denominator, numerator.new_empty(0, dtype=_accumulator(input))
    one = torch.ones_like(numerator)
    gradient = upsample_cross_entropy_sums_backward(
        input.to(_accumulator(input)), target, weight, pixel_weight, None, one, *options
    )
    return numerator, denominator, gradient


def upsample_cross_entropy_sums_backward(
    input, target, weight, pixel_weight, gradient, grad_numerator,
    scale_factors, align_corners, ignore_index, label_smoothing,
):
    """Made anew from `input`: `gradient` would not differentiate once more."""
    none = grad_numerator.new_zeros(input.shape[:2], dtype=torch.float64)
    return upsample_softmax_statistics_backward(
        input, target, weight, pixel_weight, none, none, grad_numerator,
        scale_factors, align_corners, ignore_index, label_smoothing, True,
    )


def upsample_cross_entropy_pixels(
    input, target, weight, pixel_weight, scale_factors, align_corners, ignore_index, label_smoothing
):
    """Losses (N, H, W) in the accumulator dtype."""
    logits = _upsampled(input, target, scale_factors, align_corners)
    label = target.long()
    if input.device.type != "cpu":  # a label out of range counts for nothing: raising would need a host sync
        label = torch.where((label >= 0) & (label < input.size(1)), label, ignore_index)
    losses = F.cross_entropy(
        logits, label, weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    return losses if pixel_weight is None else losses * pixel_weight


def upsample_cross_entropy_pixels_backward(
    input, target, weight, pixel_weight, grad_losses, scale_factors, align_corners, ignore_index, label_smoothing
):
    """A gradient per pixel acts as one more pixel weight."""
    share = grad_losses if pixel_weight is None else grad_losses * pixel_weight
    none = torch.zeros(input.shape[:2], dtype=torch.float64, device=input.device)
    return upsample_softmax_statistics_backward(
        input, target, weight, share, none, none, none.new_ones(()),
        scale_factors, align_corners, ignore_index, label_smoothing, True,
    )


def upsample_softmax_statistics(
    input, target, weight, pixel_weight, scale_factors, align_corners, ignore_index, label_smoothing, squared
):
    """(intersection, prediction, truth): (N, C) fp64; (numerator, denominator): () fp64."""
    logits = _upsampled(input, target, scale_factors, align_corners)
    return at_full_resolution.softmax_statistics(
        logits.flatten(2), target.flatten(1), weight, _flat(pixel_weight), ignore_index, label_smoothing, squared
    )


def upsample_softmax_statistics_backward(
    input, target, weight, pixel_weight, grad_intersection, grad_prediction, grad_numerator,
    scale_factors, align_corners, ignore_index, label_smoothing, squared,
):
    """Gradient of `input`, in its dtype."""
    logits = _upsampled(input, target, scale_factors, align_corners)
    gradient = at_full_resolution.softmax_statistics_backward(
        logits.flatten(2), target.flatten(1), weight, _flat(pixel_weight),
        grad_intersection, grad_prediction, grad_numerator, ignore_index, label_smoothing, squared,
    )
    scales = (None, None) if scale_factors is None else scale_factors
    source, output = ([int(size) for size in sizes] for sizes in (input.shape, logits.shape[2:]))  # takes no symbols
    transposed = torch.ops.aten.upsample_bilinear2d_backward(
        gradient.reshape(logits.shape), output, source, align_corners, *scales
    )
    return transposed.to(input.dtype)


def _accumulator(input: Tensor) -> torch.dtype:
    return torch.promote_types(input.dtype, torch.float32)


def _upsampled(input, target, scale_factors, align_corners) -> Tensor:
    return interpolate(input.to(_accumulator(input)), target.shape[1:], scale_factors, align_corners)


def _flat(pixel_weight: Tensor | None) -> Tensor | None:
    return None if pixel_weight is None else pixel_weight.flatten(1)
