"""Computes the loss from the sums of the kernels, a few fp64 numbers per image and class.

Per image n and class c over the valid pixels, with probabilities p and one-hot truth y,

    intersection = sum p y        prediction = sum p^2 (squared) or sum p (linear)        truth = sum y^2 or sum y

and dice = (2 intersection + smooth) / (prediction + truth + smooth). The op `loss_of_sums` needs one launch, plain
PyTorch dozens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg import _check
from fastseg._backend import rows
from fastseg._op import THROUGH_REFERENCE, Op
from fastseg.kernels.cross_entropy_dice import reference
from fastseg.kernels.cross_entropy_dice.arithmetic import dice_per_class, mean_or_nan

_SUMS = "Tensor intersection, Tensor prediction, Tensor truth, Tensor numerator, Tensor denominator"
_SUM_NAMES = ("intersection", "prediction", "truth", "numerator", "denominator")
OPTIONS = (
    "float ce_weight, float dice_weight, float smooth, bool include_background, bool per_image, bool zero_if_empty"
)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose backward is the same all-reduce: the gradient of the sum of the ranks' losses."""

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


def check(intersection, prediction, truth, numerator, denominator):
    """intersection, prediction, truth (N, C), numerator and denominator (): all fp64."""
    name = "loss_of_sums"
    _check.shape(name, "intersection", intersection, ("N", "C"))
    sums = intersection.shape
    for argument, value, shape in (
        ("intersection", intersection, sums),
        ("prediction", prediction, sums),
        ("truth", truth, sums),
        ("numerator", numerator, ()),
        ("denominator", denominator, ()),
    ):
        _check.argument(name, argument, value, (torch.float64,), shape, like=("intersection", intersection))


def backward(
    intersection, prediction, truth, numerator, denominator, grad_loss,
    ce_weight, dice_weight, smooth, include_background, per_image, zero_if_empty, backend,
):  # fmt: skip
    gradients = loss_of_sums_backward(
        intersection, prediction, truth, numerator, denominator, grad_loss,
        ce_weight, dice_weight, smooth, include_background, per_image, zero_if_empty, backend=backend,
    )  # fmt: skip
    return dict(zip(("intersection", "prediction", "numerator"), gradients))


loss_of_sums = Op(
    f"loss_of_sums({_SUMS}, {OPTIONS}, ScalarType dtype) -> Tensor loss",
    check=check,
    outputs=lambda intersection, dtype: intersection.new_empty((), dtype=dtype),
    backward=backward,
    internal=True,
    contiguous=_SUM_NAMES,
    backends=rows(reference.loss_of_sums, cpu=None, triton="cross_entropy_dice.triton_loss.loss_of_sums"),
)


def outputs_backward(intersection, numerator):
    gradient = intersection.new_empty(intersection.shape)
    return gradient, torch.empty_like(gradient), torch.empty_like(numerator)


loss_of_sums_backward = Op(
    f"loss_of_sums_backward({_SUMS}, Tensor grad_loss, {OPTIONS})"
    " -> (Tensor grad_intersection, Tensor grad_prediction, Tensor grad_numerator)",
    check=check,
    outputs=outputs_backward,
    backward=THROUGH_REFERENCE,
    internal=True,
    contiguous=_SUM_NAMES,
    backends=rows(
        reference.loss_of_sums_backward,
        cpu=None,
        triton="cross_entropy_dice.triton_loss.loss_of_sums_backward",
    ),
)


def cross_entropy_dice_of(
    statistics: Sequence[Tensor],
    ce_weight: float,
    dice_weight: float,
    smooth: float,
    include_background: bool,
    per_image: bool,
    zero_if_empty: bool,
    process_group,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """ce_weight * cross-entropy + dice_weight * Dice loss, () of `dtype`.

    statistics: intersection, prediction, truth (N, C) and the numerator and denominator () of the cross-entropy.
    """
    if process_group is None or not per_image:
        if process_group is not None:
            *sums, numerator, denominator = statistics
            batch = [values.sum(0, keepdim=True) for values in sums]
            statistics = sum_over_ranks((*batch, numerator, denominator), process_group)
        options = ce_weight, dice_weight, smooth, include_background, per_image, zero_if_empty
        return loss_of_sums(*statistics, *options, dtype, backend=backend)
    # The ranks add up the quotients of their images and the numbers of quotients.
    *sums, numerator, denominator = statistics
    losses = dice_per_class(*counted(sums, include_background), smooth)
    count = torch.full_like(numerator, losses.numel())
    total, count, numerator, denominator = sum_over_ranks((losses.sum(), count, numerator, denominator), process_group)
    loss = torch.zeros_like(numerator)
    for weight, term in zip((ce_weight, dice_weight), ((numerator, denominator), (total, count))):
        if weight:
            loss = loss + weight * mean_or_nan(*term, zero_if_empty)
    return loss.to(dtype)


def counted(sums: Sequence[Tensor], include_background: bool) -> list[Tensor]:
    """(intersection, prediction, truth) of the classes that count, (N, C')."""
    return [values if include_background else values[:, 1:] for values in sums]


def check_dice(name: str, classes: int, include_background: bool, smooth: float) -> None:
    if not include_background and classes < 2:
        raise ValueError(f"fastseg.ops.{name}: include_background=False leaves none of {classes} classes")
    if not smooth >= 0:
        raise ValueError(f"fastseg.ops.{name}: smooth={smooth!r}; allowed: 0 and above")
