"""From Dice sums to a loss: plain differentiable arithmetic on a few fp64 numbers per image and class.

The kernels give, per image n and class c over the valid pixels, with probabilities p and one-hot truth y,

    intersection = sum p y        prediction = sum p^2 (squared) or sum p (linear)        truth = sum y^2 or sum y

and dice = (2 intersection + smooth) / (prediction + truth + smooth); autograd differentiates what stands here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose backward is the same all-reduce: the gradient of the sum of what every rank computes from it."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group) -> Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor):
        return _SumOverRanks.apply(grad_total, ctx.group), None


def sum_over_ranks(tensors: Sequence[Tensor], process_group) -> list[Tensor]:
    """Each tensor summed over the ranks of `process_group`, by one all-reduce; unchanged if it is None."""
    if process_group is None:
        return list(tensors)
    total = _SumOverRanks.apply(torch.cat([tensor.reshape(-1) for tensor in tensors]), process_group)
    parts = total.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]


def dice_per_class(intersection: Tensor, prediction: Tensor, truth: Tensor, smooth: float) -> Tensor:
    return 1 - (2 * intersection + smooth) / (prediction + truth + smooth)


def mean_or_nan(total: Tensor, count: Tensor, zero_if_empty: bool) -> Tensor:
    """total / count; for count 0 NaN as in stock PyTorch, or 0 on request."""
    if zero_if_empty:
        count = torch.where(count == 0, torch.ones_like(count), count)
    return total / count


def loss_dtype(input: Tensor) -> torch.dtype:
    """The dtype of a loss of `input`: its own, and fp32 for half types under autocast, as stock PyTorch has it."""
    if input.dtype != torch.float64 and torch.is_autocast_enabled(input.device.type):
        return torch.float32
    return input.dtype


def cross_entropy_dice_of(
    statistics: Sequence[Tensor],
    ce_weight: float,
    dice_weight: float,
    smooth: float,
    per_image: bool,
    zero_if_empty: bool,
    process_group,
) -> Tensor:
    """ce_weight * cross-entropy + dice_weight * Dice loss, in fp64.

    statistics: intersection, prediction, truth (N, C) and the numerator and denominator () of the cross-entropy.
    """
    *sums, numerator, denominator = statistics
    if per_image:  # what the ranks share is the sum of the quotients and their number
        losses = dice_per_class(*sums, smooth)
        sums = [losses.sum(), torch.full_like(numerator, losses.numel())]
    else:
        sums = [values.sum(0) for values in sums]
    *sums, numerator, denominator = sum_over_ranks((*sums, numerator, denominator), process_group)
    loss = torch.zeros_like(numerator)
    if ce_weight:
        loss = loss + ce_weight * mean_or_nan(numerator, denominator, zero_if_empty)
    if dice_weight:
        dice = mean_or_nan(*sums, zero_if_empty) if per_image else dice_per_class(*sums, smooth).mean()
        loss = loss + dice_weight * dice
    return loss
