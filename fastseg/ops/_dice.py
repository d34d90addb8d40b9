"""From the sums that the kernels give to a loss: a few fp64 numbers per image and class.

Per image n and class c over the valid pixels, with probabilities p and one-hot truth y,

    intersection = sum p y        prediction = sum p^2 (squared) or sum p (linear)        truth = sum y^2 or sum y

and dice = (2 intersection + smooth) / (prediction + truth + smooth). The op `loss_of_sums` makes the loss of
them in one launch, which plain PyTorch needs dozens for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg import _check
from fastseg._first_op import Backend, Op, autocasting, native
from fastseg._triton import lazy
from fastseg.kernels.cross_entropy_dice import reference
from fastseg.kernels.cross_entropy_dice.reference import dice_per_class, mean_or_nan

_SUMS = "Tensor intersection, Tensor prediction, Tensor truth, Tensor numerator, Tensor denominator"
OPTIONS = (
    "float ce_weight, float dice_weight, float smooth, bool include_background, bool per_image, bool zero_if_empty"
)
_BACKWARD = f"({_SUMS}, Tensor grad_loss, {OPTIONS}) -> (Tensor, Tensor, Tensor)"

_forward_native = native(f"_loss_of_sums({_SUMS}, {OPTIONS}, ScalarType dtype) -> Tensor")
_backward_native = native(f"_loss_of_sums_backward{_BACKWARD}")


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


def loss_dtype(input: Tensor) -> torch.dtype:
    """The dtype of a loss of `input`: its own, and fp32 for half types under autocast, as stock PyTorch has it."""
    if input.dtype != torch.float64 and autocasting(input):
        return torch.float32
    return input.dtype


def _check_sums(intersection, prediction, truth, numerator, denominator, *others):
    """intersection, prediction, truth (N, C), numerator and denominator (): all fp64."""
    name = "loss_of_sums"
    _check.shape(name, "intersection", intersection, ("N", "C"))
    sums = intersection.shape
    given = (("intersection", intersection, sums), ("prediction", prediction, sums), ("truth", truth, sums),
             ("numerator", numerator, ()), ("denominator", denominator, ()))
    for argument, value, shape in given:
        _check.shape(name, argument, value, shape)
        _check.dtype(name, argument, value, (torch.float64,))
        _check.same_device(name, argument, value, "intersection", intersection)


def _fake(intersection, *others):
    return intersection.new_empty((), dtype=others[-1])


def _fake_backward(intersection, prediction, truth, numerator, *others):
    return tuple(
        torch.empty_like(value, memory_format=torch.contiguous_format)
        for value in (intersection, prediction, numerator)
    )


def _save(ctx, inputs, output):
    (
        *sums, ctx.ce_weight, ctx.dice_weight, ctx.smooth, ctx.include_background, ctx.per_image, ctx.zero_if_empty
    ) = inputs[:11]  # fmt: skip
    ctx.backend = inputs[12]
    ctx.save_for_backward(*sums)


def _backward(ctx, grad_loss):
    options = ctx.ce_weight, ctx.dice_weight, ctx.smooth, ctx.include_background, ctx.per_image, ctx.zero_if_empty
    gradients = loss_of_sums_backward(*ctx.saved_tensors, grad_loss, *options, backend=ctx.backend)
    grad_intersection, grad_prediction, grad_numerator = gradients
    return grad_intersection, grad_prediction, None, grad_numerator, None, *[None] * 7


def _dense(kernel):
    """A backend around a kernel that walks contiguous sums."""

    def run(*args):
        return kernel(*(value.contiguous() if isinstance(value, Tensor) else value for value in args))

    return run


triton_loss_of_sums = _dense(lazy("cross_entropy_dice.triton_loss", "loss_of_sums"))
triton_loss_of_sums_backward = _dense(lazy("cross_entropy_dice.triton_loss", "loss_of_sums_backward"))
loss_of_sums = Op(
    "loss_of_sums",
    f"({_SUMS}, {OPTIONS}, ScalarType dtype) -> Tensor",
    check=_check_sums,
    fake=_fake,
    save=_save,
    backward=_backward,
    backends=[
        Backend("cpu", _dense(_forward_native), refuses=lambda *_: _forward_native.missing("CPU")),
        Backend("triton", triton_loss_of_sums),
        Backend("reference", reference.loss_of_sums),
    ],
)
loss_of_sums_backward = Op(
    "loss_of_sums_backward",
    _BACKWARD,
    check=_check_sums,
    fake=_fake_backward,
    differentiable=True,
    backends=[
        Backend("cpu", _dense(_backward_native), refuses=lambda *_: _backward_native.missing("CPU")),
        Backend("triton", triton_loss_of_sums_backward),
        Backend("reference", reference.loss_of_sums_backward),
    ],
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
    weights = float(ce_weight), float(dice_weight)
    if process_group is None or not per_image:
        if process_group is not None:
            *sums, numerator, denominator = statistics
            batch = [values.sum(0, keepdim=True) for values in sums]
            statistics = sum_over_ranks((*batch, numerator, denominator), process_group)
        options = *weights, float(smooth), include_background, per_image, zero_if_empty
        return loss_of_sums(*statistics, *options, dtype, backend=backend)
    # What the ranks share is the sum of their images' quotients and its number of terms.
    *sums, numerator, denominator = statistics
    losses = dice_per_class(*counted(sums, include_background), smooth)
    count = torch.full_like(numerator, losses.numel())
    total, count, numerator, denominator = sum_over_ranks((losses.sum(), count, numerator, denominator), process_group)
    loss = torch.zeros_like(numerator)
    for weight, term in zip(weights, ((numerator, denominator), (total, count))):
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
