"""Bilinear upsampling of low-resolution logits fused with cross-entropy and Dice loss: no full-resolution logits.

    z = interpolate(input, (H, W), mode="bilinear"),  p = softmax(z) over C,  V = pixels whose label y is not ignored
    losses[n, y, x] = v ((1 - s) w_y (lse(z) - z_y) + s/C sum_c w_c (lse(z) - z_c))   0 outside V; s = label smoothing
    numerator = sum_V losses,  denominator = sum_V v w_y,  mean = numerator / denominator
    Dice: the statistics of `fastseg.ops.cross_entropy_dice`, per image and class

Shapes: input (N, C, h, w), target and pixel_weight v (N, H, W), weight w (C,). `scale_factors` is None, or
torch's two scale factors if the caller gave them (torch then samples at 1/scale_factor instead of h/H).
The gradient at the source grid is the transposed interpolation of v (p - onehot), gathered without atomics.
Sources: torch.nn.functional.interpolate and cross_entropy; V-Net (squared Dice).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg import _check
from fastseg._bilinear import output_size_and_scales
from fastseg._dtypes import FLOATING, FLOATING_GPU, LABELS, accumulator, loss_dtype
from fastseg._reduction import MEAN, NONE, reduction_number
from fastseg.ops.cross_entropy_dice.loss_of_sums import check_dice, cross_entropy_dice_of
from fastseg.ops.upsample_cross_entropy.common import reject_empty
from fastseg.ops.upsample_cross_entropy.dice import upsample_cross_entropy_dice_op
from fastseg.ops.upsample_cross_entropy.loss import upsample_cross_entropy_op
from fastseg.ops.upsample_cross_entropy.pixels import upsample_cross_entropy_pixels
from fastseg.ops.upsample_cross_entropy.statistics import upsample_softmax_statistics

__all__ = ["upsample_cross_entropy", "upsample_cross_entropy_dice"]


def _op_arguments(name, input, target, size, scale_factor, weight, pixel_weight, label_smoothing):
    """((input, target, weight, pixel_weight) for the ops, scale factors or None, the label smoothing)."""
    _check.argument(name, "input", input, FLOATING, ("N", "C", "h", "w"))
    output_size, scale_factors = output_size_and_scales(name, input, size, scale_factor)
    maps = (input.shape[0], *(output_size or ("H", "W")))
    like = ("input", input)
    _check.argument(name, "target", target, LABELS, maps, "N, and the size of the upsampled logits", like=like)
    if 0 in input.shape[1:] or 0 in target.shape[1:]:
        reject_empty(name, input, target)
    if type(label_smoothing) is not float:
        label_smoothing = _check.number(name, "label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        _check.in_range(name, "label_smoothing", label_smoothing, 0.0, 1.0)
    if weight is not None:
        weight = _constant(name, "weight", weight, input.shape[1:2], input)
    if pixel_weight is not None:
        pixel_weight = _constant(name, "pixel_weight", pixel_weight, target.shape, input)
    if input.shape[1] == 1:
        label_smoothing = 0.0  # the loss of a single class and its gradient stay exactly 0
    return (input, target, weight, pixel_weight), scale_factors, label_smoothing


def _constant(name, argument, value, shape, input):
    """Weights in the accumulator dtype."""
    _check.argument(name, argument, value, FLOATING, shape, like=("input", input))
    _check.constant(name, argument, value)
    return value.to(accumulator(input.dtype))


def _in_one_call(input: Tensor) -> bool:
    """True if one call of C++ computes the loss and its gradient."""
    return input.device.type == "cpu" and input.dtype in FLOATING_GPU


def upsample_cross_entropy(
    input: Tensor,
    target: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    align_corners: bool = False,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    pixel_weight: Tensor | None = None,
    zero_if_empty: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of bilinearly upsampled logits, without storing the upsampled logits.

    Equals F.cross_entropy(F.interpolate(input, size, scale_factor, mode="bilinear",
    align_corners=align_corners), target, weight, ignore_index=ignore_index, reduction=reduction,
    label_smoothing=label_smoothing), F being torch.nn.functional, with torch's sampling rule on the CPU
    (clamped below 0; 1/scale_factor where that is given). Peak extra memory is at most 4 times `input` and 8
    bytes per output pixel, forward and backward together.

    Args:
        input: low-resolution logits (N, C, h, w) in fp32, fp16, bf16 or fp64, contiguous, channels_last or strided.
        target: labels (N, H, W), in int64, int32 or uint8.
        size: (H, W) or one number for both; by default the size of `target`. Both up- and downsampling work.
        scale_factor: instead of `size`, one factor or (vertical, horizontal).
        align_corners: the centres of the corner pixels coincide; otherwise the corners of the images do.
        weight: (C,) floating class weights. A constant.
        ignore_index: label of pixels that do not count, for any logits; any integer, None for none.
        reduction: "none": losses (N, H, W); "mean": sum v w_y loss / sum v w_y; "sum".
        label_smoothing: in [0, 1], as in torch.
        pixel_weight: floating weights v (N, H, W) of the losses, for instance U-Net's map. A constant.
        zero_if_empty: 0 instead of NaN for the mean over no pixel. The gradient is zero in both cases.
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        The loss in the dtype of `input` (fp32 for half types under autocast). Twice differentiable in `input`.
        The backward needs the arguments unchanged: after an in-place change PyTorch raises.

    Raises:
        IndexError: on CPU, a label outside [0, C) that is not `ignore_index`. (On a GPU such a pixel does not count.)
        RuntimeError, ValueError, TypeError: a dtype, shape, device or option not listed above.
    """
    name = "upsample_cross_entropy"
    reduced = reduction_number(name, reduction)
    ignore_index = _check.label(name, "ignore_index", ignore_index)
    if type(align_corners) is not bool or type(zero_if_empty) is not bool:
        _check.booleans(name, align_corners=align_corners, zero_if_empty=zero_if_empty)
    tensors, scale_factors, label_smoothing = _op_arguments(
        name, input, target, size, scale_factor, weight, pixel_weight, label_smoothing
    )
    options = scale_factors, align_corners, ignore_index, label_smoothing
    if reduced == NONE:
        losses = upsample_cross_entropy_pixels(*tensors, *options, backend=backend)
        return losses.to(loss_dtype(input))
    # On the CPU the forward also computes the gradient, from the same probabilities; it is as small as `input`.
    with_gradient = _in_one_call(input) and input.requires_grad and torch.is_grad_enabled()
    loss, _, _ = upsample_cross_entropy_op(
        *tensors, *options, mean=reduced == MEAN, zero_if_empty=zero_if_empty, with_gradient=with_gradient,
        dtype=loss_dtype(input), backend=backend,
    )  # fmt: skip
    return loss


def upsample_cross_entropy_dice(
    input: Tensor,
    target: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    align_corners: bool = False,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    ce_weight: float = 1.0,
    dice_weight: float = 1.0,
    pixel_weight: Tensor | None = None,
    include_background: bool = True,
    squared: bool = True,
    smooth: float = 1e-6,
    per_image: bool = False,
    zero_if_empty: bool = False,
    process_group=None,
    backend: str = "auto",
) -> Tensor:
    """`fastseg.ops.cross_entropy_dice` of bilinearly upsampled logits, without storing the upsampled logits.

    Equals cross_entropy_dice(F.interpolate(input, size, scale_factor, mode="bilinear",
    align_corners=align_corners), target, ...): one pass over the labels gives the Dice sums per image and class and
    the two sums of the cross-entropy, a second one the gradient. Peak extra memory as for `upsample_cross_entropy`.

    Args:
        input, target, size, scale_factor, align_corners, weight, ignore_index, label_smoothing, pixel_weight, backend:
            see `upsample_cross_entropy`.
        ce_weight, dice_weight, include_background, squared, smooth, per_image, zero_if_empty, process_group:
            see `cross_entropy_dice`.

    Returns:
        The loss, a scalar in `input`'s dtype (fp32 for half types under autocast). Twice differentiable in `input`.
        The backward needs the arguments unchanged: after an in-place change PyTorch raises.

    Raises:
        IndexError: on CPU, a label outside [0, C) that is not `ignore_index`. (On a GPU such a pixel does not count.)
        RuntimeError, ValueError, TypeError: a dtype, shape, device or option not listed above.
    """
    name = "upsample_cross_entropy_dice"
    ignore_index = _check.label(name, "ignore_index", ignore_index)
    _check.booleans(
        name, align_corners=align_corners, include_background=include_background, squared=squared,
        per_image=per_image, zero_if_empty=zero_if_empty,
    )  # fmt: skip
    tensors, scale_factors, label_smoothing = _op_arguments(
        name, input, target, size, scale_factor, weight, pixel_weight, label_smoothing
    )
    ce_weight, dice_weight, smooth = _check.numbers(name, ce_weight=ce_weight, dice_weight=dice_weight, smooth=smooth)
    check_dice(name, input.size(1), include_background, smooth)
    options = scale_factors, align_corners, ignore_index, label_smoothing, squared
    dtype = loss_dtype(input)
    if process_group is None and _in_one_call(input):
        loss, _, _ = upsample_cross_entropy_dice_op(
            *tensors, *options, ce_weight=ce_weight, dice_weight=dice_weight, smooth=smooth,
            include_background=include_background, per_image=per_image, zero_if_empty=zero_if_empty,
            with_gradient=input.requires_grad and torch.is_grad_enabled(), dtype=dtype, backend=backend,
        )  # fmt: skip
        return loss
    statistics = upsample_softmax_statistics(*tensors, *options, backend=backend)
    return cross_entropy_dice_of(
        statistics,
        ce_weight,
        dice_weight,
        smooth,
        include_background,
        per_image,
        zero_if_empty,
        process_group,
        dtype,
        backend,
    )
