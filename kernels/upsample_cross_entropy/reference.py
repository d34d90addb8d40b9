"""Plain PyTorch: upsample, then the softmax statistics of `cross_entropy_dice`. The definition of the op.

Gradients are explicit formulas, transposed through torch's own bilinear backward, so that they differentiate once more.
Shapes: input (N, C, h, w), target, pixel_weight, losses (N, H, W), weight (C,).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg._bilinear import interpolate
from fastseg._dtypes import accumulator
from fastseg._layout import in_layout_of
from fastseg.kernels.cross_entropy_dice import reference as at_full_resolution
from fastseg.kernels.cross_entropy_dice.arithmetic import mean_or_nan


def upsample_cross_entropy(
    input, target, weight, pixel_weight, scale_factors, align_corners, ignore_index, label_smoothing, mean,
    zero_if_empty, with_gradient, dtype,
):  # fmt: skip
    """(loss () of `dtype`, count () fp64, the denominator of a mean, count * its gradient in the accumulator's dtype).

    count is 1 for a sum. A gradient that is not wanted is empty.
    """
    options = scale_factors, align_corners, ignore_index, label_smoothing
    *_, numerator, denominator = upsample_softmax_statistics(input, target, weight, pixel_weight, *options, True)
    own = accumulator(input.dtype)
    gradient = input.new_empty(0, dtype=own)
    if with_gradient:
        one = torch.ones(target.shape, dtype=own, device=input.device)
        gradient = upsample_cross_entropy_pixels_backward(input.to(own), target, weight, pixel_weight, one, *options)
    if mean:
        return mean_or_nan(numerator, denominator, zero_if_empty).to(dtype), denominator, gradient
    return numerator.to(dtype), torch.ones_like(denominator), gradient


def upsample_cross_entropy_dice(
    input, target, weight, pixel_weight, scale_factors, align_corners, ignore_index, label_smoothing, squared,
    ce_weight, dice_weight, smooth, include_background, per_image, zero_if_empty, with_gradient, dtype,
):  # fmt: skip
    """(loss () of `dtype`, 1 () fp64, the loss's gradient in the accumulator's dtype, empty if not wanted)."""
    call = target, weight, pixel_weight
    options = scale_factors, align_corners, ignore_index, label_smoothing, squared
    dice_options = ce_weight, dice_weight, smooth, include_background, per_image, zero_if_empty
    sums = upsample_softmax_statistics(input, *call, *options)
    loss, unit = at_full_resolution.loss_of_sums(*sums, *dice_options, dtype), torch.ones_like(sums[-1])
    own = accumulator(input.dtype)
    if not with_gradient:
        return loss, unit, input.new_empty(0, dtype=own)
    gradients = at_full_resolution.loss_of_sums_backward(*sums, unit, *dice_options)
    return loss, unit, upsample_softmax_statistics_backward(input.to(own), *call, *gradients, *options)


def upsample_cross_entropy_pixels(
    input, target, weight, pixel_weight, scale_factors, align_corners, ignore_index, label_smoothing
):
    """Losses (N, H, W) in the accumulator dtype."""
    logits = _upsampled(input, target, scale_factors, align_corners)
    label = target.long()
    if input.device.type != "cpu":  # a label out of range counts as ignored: raising would need a host sync
        label = torch.where((label >= 0) & (label < input.size(1)), label, ignore_index)
    losses = F.cross_entropy(
        logits, label, weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    return losses if pixel_weight is None else losses * pixel_weight


def upsample_cross_entropy_pixels_backward(
    input, target, weight, pixel_weight, grad_losses, scale_factors, align_corners, ignore_index, label_smoothing
):
    """A gradient per pixel acts as another pixel weight."""
    share = grad_losses if pixel_weight is None else grad_losses * pixel_weight
    none = torch.zeros(input.shape[:2], dtype=torch.float64, device=input.device)
    return upsample_softmax_statistics_backward(
        input,
        target,
        weight,
        share,
        none,
        none,
        none.new_ones(()),
        scale_factors,
        align_corners,
        ignore_index,
        label_smoothing,
        True,
    )


def upsample_softmax_statistics(
    input, target, weight, pixel_weight, scale_factors, align_corners, ignore_index, label_smoothing, squared
):
    """(intersection, prediction, truth): (N, C) fp64; (numerator, denominator): () fp64."""
    logits = _upsampled(input, target, scale_factors, align_corners)
    return at_full_resolution.softmax_statistics(
        logits, target, weight, pixel_weight, ignore_index, label_smoothing, squared
    )


def upsample_softmax_statistics_backward(
    input,
    target,
    weight,
    pixel_weight,
    grad_intersection,
    grad_prediction,
    grad_numerator,
    scale_factors,
    align_corners,
    ignore_index,
    label_smoothing,
    squared,
):
    """Gradient of `input`, in its dtype."""
    logits = _upsampled(input, target, scale_factors, align_corners)
    gradient = at_full_resolution.softmax_statistics_backward(
        logits,
        target,
        weight,
        pixel_weight,
        grad_intersection,
        grad_prediction,
        grad_numerator,
        ignore_index,
        label_smoothing,
        squared,
    )
    scales = (None, None) if scale_factors is None else scale_factors
    source, output = ([int(size) for size in sizes] for sizes in (input.shape, logits.shape[2:]))  # takes no symbols
    transposed = torch.ops.aten.upsample_bilinear2d_backward(
        gradient.contiguous(), output, source, align_corners, *scales
    )
    return in_layout_of(input, transposed.to(input.dtype))


def _upsampled(input, target, scale_factors, align_corners) -> Tensor:
    return interpolate(input.to(accumulator(input.dtype)), target.shape[1:], scale_factors, align_corners)
