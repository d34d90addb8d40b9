"""Cross-entropy and Dice loss of bilinearly upsampled logits, optionally with its gradient, in one call.

For the CPU and a single process, where calls dominate on small inputs. Elsewhere the op of the statistics and then
`loss_of_sums` run.
"""

import torch

from fastseg._early_gradient import scaled_mean
from fastseg._op import Op
from fastseg.kernels.upsample_cross_entropy import reference
from fastseg.ops.cross_entropy_dice.loss_of_sums import OPTIONS as DICE_OPTIONS
from fastseg.ops.cross_entropy_dice.loss_of_sums import loss_of_sums_backward
from fastseg.ops.upsample_cross_entropy.common import CONTIGUOUS, INPUTS, SAMPLING, backends, check
from fastseg.ops.upsample_cross_entropy.loss import outputs
from fastseg.ops.upsample_cross_entropy.statistics import (
    upsample_softmax_statistics,
    upsample_softmax_statistics_backward,
)


def backward(
    input, target, weight, pixel_weight, unit, gradient, grad_loss, scale_factors, align_corners, ignore_index,
    label_smoothing, squared, ce_weight, dice_weight, smooth, include_background, per_image, zero_if_empty,
    with_gradient, backend,
):  # fmt: skip
    if with_gradient and not torch.is_grad_enabled():
        return {"input": scaled_mean(gradient, grad_loss, unit, input.dtype)}
    call = input, target, weight, pixel_weight
    options = scale_factors, align_corners, ignore_index, label_smoothing, squared
    sums = upsample_softmax_statistics(*call, *options, backend=backend)
    gradients = loss_of_sums_backward(
        *sums, grad_loss, ce_weight, dice_weight, smooth, include_background, per_image, zero_if_empty, backend=backend
    )
    return {"input": upsample_softmax_statistics_backward(*call, *gradients, *options, backend=backend)}


# The gradient is stored times `unit`, so that its cross-entropy part is rounded only once, at the end.
upsample_cross_entropy_dice_op = Op(
    f"upsample_cross_entropy_dice({INPUTS}, {SAMPLING}, bool squared, {DICE_OPTIONS}, bool with_gradient,"
    " ScalarType dtype) -> (Tensor loss, Tensor unit, Tensor gradient)",
    check=check,
    outputs=outputs,
    backward=backward,
    internal=True,
    contiguous=CONTIGUOUS,
    backends=backends("dice_loss", reference.upsample_cross_entropy_dice),
)
