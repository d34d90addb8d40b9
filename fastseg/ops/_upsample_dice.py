"""The ops behind upsample_cross_entropy_dice: the statistics, and the loss that is made of them in one call.

Shapes and formulas: fastseg/ops/upsample_cross_entropy.py. The loss as one op is for the CPU and a single process,
where a small input feels every call; elsewhere `loss_of_sums` follows the statistics.
"""

from collections.abc import Callable

import torch

from fastseg import _check
from fastseg._first_op import Op, native
from fastseg.kernels.cross_entropy_dice import reference as reference_of_sums
from fastseg.kernels.upsample_cross_entropy import reference
from fastseg.ops._dice import OPTIONS as DICE_OPTIONS
from fastseg.ops._dice import loss_of_sums_backward, triton_loss_of_sums, triton_loss_of_sums_backward
from fastseg.ops._upsample_softmax import (
    OPTIONS,
    TENSORS,
    backends,
    check,
    empty_or_gradient,
    fake_gradient,
    laid_out,
    scale_in_backward,
    triton,
)
from fastseg.ops.cross_entropy_dice import accumulator

_statistics_native = native(
    f"_upsample_softmax_statistics({TENSORS}, {OPTIONS}, bool squared) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_statistics_backward_native = native(
    f"_upsample_softmax_statistics_backward({TENSORS}, Tensor grad_intersection, Tensor grad_prediction,"
    f" Tensor grad_numerator, {OPTIONS}, bool squared) -> Tensor"
)
_LOSS = f"({TENSORS}, {OPTIONS}, bool squared, {DICE_OPTIONS}, bool with_gradient, ScalarType dtype)"
_loss_native = native(f"_upsample_cross_entropy_dice_loss{_LOSS} -> (Tensor, Tensor, Tensor)")


# --- checks and shapes ---


def check_statistics_backward(
    input, target, weight, pixel_weight, grad_intersection, grad_prediction, grad_numerator, *options
):
    check(input, target, weight, pixel_weight, *options)
    name = "upsample_softmax_statistics_backward"
    for argument, value, shape in (
        ("grad_intersection", grad_intersection, tuple(input.shape[:2])),
        ("grad_prediction", grad_prediction, tuple(input.shape[:2])),
        ("grad_numerator", grad_numerator, ()),
    ):
        _check.shape(name, argument, value, shape)
        _check.dtype(name, argument, value, (torch.float64,))


def fake_statistics(input, *_):
    sums = [input.new_empty(input.shape[:2], dtype=torch.float64) for _ in range(3)]
    return *sums, *(input.new_empty((), dtype=torch.float64) for _ in range(2))


def fake_loss(input, *arguments):
    with_gradient, dtype = arguments[-2:]
    loss, unit = input.new_empty((), dtype=dtype), input.new_empty((), dtype=torch.float64)
    return loss, unit, empty_or_gradient(input, with_gradient)


# --- autograd ---


def save_statistics(ctx, inputs, output):
    *tensors, scale_factors, align_corners, ignore_index, label_smoothing, squared, _backend = inputs
    ctx.options = scale_factors, align_corners, ignore_index, label_smoothing, squared
    ctx.mark_non_differentiable(output[2], output[4])
    ctx.save_for_backward(*tensors)


def backward_statistics(ctx, grad_intersection, grad_prediction, _truth, grad_numerator, _denominator):
    gradients = grad_intersection, grad_prediction, grad_numerator
    return upsample_softmax_statistics_backward(*ctx.saved_tensors, *gradients, *ctx.options), *[None] * 8


def save_loss(ctx, inputs, output):
    tensors, ctx.options, ctx.dice_options = inputs[:4], inputs[4:9], inputs[9:15]
    _, unit, gradient = output
    ctx.mark_non_differentiable(unit, gradient)
    ctx.set_materialize_grads(False)  # no zeros of the gradient's size
    ctx.save_for_backward(*tensors, unit, gradient)


def backward_loss(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 17
    *tensors, unit, gradient = ctx.saved_tensors
    grad_input = scale_in_backward(tensors[0], gradient, grad_loss, unit)
    if grad_input is None:  # not made in the forward, or to be differentiated once more
        statistics = upsample_softmax_statistics(*tensors, *ctx.options)
        gradients = loss_of_sums_backward(*statistics, grad_loss, *ctx.dice_options)
        grad_input = upsample_softmax_statistics_backward(*tensors, *gradients, *ctx.options)
    return grad_input, *[None] * 16


# --- the loss where C++ does not make it ---


def _loss_by(statistics: Callable, statistics_backward: Callable, of_sums: Callable, of_sums_backward: Callable):
    """A backend from those of the two steps. Gives the loss, a unit, and unit * its gradient, which may be empty."""

    def run(input, *arguments):
        *rest, with_gradient, dtype = arguments
        constants, options, dice_options = rest[:3], rest[3:8], rest[8:]
        sums = statistics(input, *constants, *options)
        loss, unit = of_sums(*sums, *dice_options, dtype), torch.ones_like(sums[-1])
        if not with_gradient:
            return loss, unit, empty_or_gradient(input, False)
        gradients = of_sums_backward(*sums, unit, *dice_options)
        return loss, unit, statistics_backward(input.to(accumulator(input)), *constants, *gradients, *options)

    return run


_statistics_backward_reference = laid_out(reference.upsample_softmax_statistics_backward)

upsample_softmax_statistics = Op(
    "upsample_softmax_statistics",
    f"({TENSORS}, {OPTIONS}, bool squared) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=check,
    fake=fake_statistics,
    save=save_statistics,
    backward=backward_statistics,
    backends=backends(_statistics_native, triton("statistics"), reference.upsample_softmax_statistics),
)
upsample_softmax_statistics_backward = Op(
    "upsample_softmax_statistics_backward",
    f"({TENSORS}, Tensor grad_intersection, Tensor grad_prediction, Tensor grad_numerator, {OPTIONS},"
    " bool squared) -> Tensor",
    check=check_statistics_backward,
    fake=fake_gradient,
    differentiable=True,
    backends=backends(
        _statistics_backward_native, triton("statistics_backward"), _statistics_backward_reference
    ),
)
upsample_cross_entropy_dice_loss = Op(
    "upsample_cross_entropy_dice_loss",
    f"{_LOSS} -> (Tensor loss, Tensor unit, Tensor gradient)",
    check=check,
    fake=fake_loss,
    save=save_loss,
    backward=backward_loss,
    backends=backends(
        _loss_native,
        _loss_by(
            triton("statistics"), triton("statistics_backward"), triton_loss_of_sums, triton_loss_of_sums_backward
        ),
        _loss_by(
            reference.upsample_softmax_statistics, _statistics_backward_reference,
            reference_of_sums.loss_of_sums, reference_of_sums.loss_of_sums_backward,
        ),
    ),
)
