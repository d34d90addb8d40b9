"""The sums for Dice loss and cross-entropy, from one read of the logits.

Per image n and class c, with p = softmax(input) over dim 1, one-hot truth y, over the pixels V that are not ignored,

    intersection = sum_V p y        prediction = sum_V p^2 (squared) or sum_V p        truth = sum_V y
    numerator, denominator          of the cross-entropy, a weighted mean over the whole batch

`softmax_statistics_backward` turns the gradients of the statistics into the gradient of the logits in one pass:

    dz = p (h - sum_k p_k h_k) + cross-entropy part,  h = 2 p dP (or dP) + y dI

It computes the softmax again: a stored fp32 logsumexp would lose digits of large logits.
"""

import torch

from fastseg import _check
from fastseg._backend import rows
from fastseg._dtypes import FLOATING, LABELS, accumulator
from fastseg._layout import empty_as
from fastseg._op import THROUGH_REFERENCE, Op
from fastseg.kernels.cross_entropy_dice import reference

_INPUTS = "Tensor input, Tensor target, Tensor? weight, Tensor? pixel_weight"
_OPTIONS = "int ignore_index, float label_smoothing, bool squared"
_MAX_CLASSES_TRITON = 4096  # fit in the registers of a block


def check(input, target, weight, pixel_weight, label_smoothing):
    """input (N, C, ...), target (N, ...), weight (C,), pixel_weight (N, ...)."""
    name = "softmax_statistics"
    _check.argument(name, "input", input, FLOATING, input.shape if input.dim() > 1 else ("N", "C", "..."))
    maps = input.shape[:1] + input.shape[2:]
    _check.argument(name, "target", target, LABELS, maps, like=("input", input))
    for argument, value, shape in (("weight", weight, input.shape[1:2]), ("pixel_weight", pixel_weight, maps)):
        if value is not None:
            _check.argument(name, argument, value, (accumulator(input.dtype),), shape, like=("input", input))
    _check.in_range(name, "label_smoothing", label_smoothing, 0.0, 1.0)


def outputs(input):
    return empty_sums(input, input.shape[:2])


def empty_sums(input, shape):
    """Uninitialised statistics: three sums of `shape`, numerator and denominator, all fp64."""
    sums = input.new_empty(shape, dtype=torch.float64)
    total = input.new_empty((), dtype=torch.float64)
    return sums, torch.empty_like(sums), torch.empty_like(sums), total, torch.empty_like(total)


def backward(
    input, target, weight, pixel_weight, grad_intersection, grad_prediction, grad_numerator,
    ignore_index, label_smoothing, squared, backend,
):  # fmt: skip
    grad_input = softmax_statistics_backward(
        input, target, weight, pixel_weight, grad_intersection, grad_prediction, grad_numerator,
        ignore_index, label_smoothing, squared, backend=backend,
    )  # fmt: skip
    return {"input": grad_input}


def refuses_triton(input):
    if input.shape[1] <= _MAX_CLASSES_TRITON:
        return None
    return f"{input.shape[1]} classes; at most {_MAX_CLASSES_TRITON} fit in the registers of a block"


softmax_statistics = Op(
    f"softmax_statistics({_INPUTS}, {_OPTIONS}) -> "
    "(Tensor intersection, Tensor prediction, Tensor truth, Tensor numerator, Tensor denominator)",
    check=check,
    outputs=outputs,
    backward=backward,
    internal=True,
    contiguous=("target", "weight", "pixel_weight"),
    backends=rows(
        reference.softmax_statistics,
        triton="cross_entropy_dice.triton.softmax_statistics",
        refuses_triton=refuses_triton,
    ),
)


def check_gradients(name, sums_shape, grad_intersection, grad_prediction, grad_numerator):
    """Checks the gradients of the statistics: fp64, of shape `sums_shape` and ()."""
    for argument, value, shape in (
        ("grad_intersection", grad_intersection, sums_shape),
        ("grad_prediction", grad_prediction, sums_shape),
        ("grad_numerator", grad_numerator, ()),
    ):
        _check.argument(name, argument, value, (torch.float64,), shape)


def check_backward(
    input, target, weight, pixel_weight, grad_intersection, grad_prediction, grad_numerator, label_smoothing
):
    check(input, target, weight, pixel_weight, label_smoothing)
    name = "softmax_statistics_backward"
    check_gradients(name, input.shape[:2], grad_intersection, grad_prediction, grad_numerator)


softmax_statistics_backward = Op(
    f"softmax_statistics_backward({_INPUTS}, Tensor grad_intersection, Tensor grad_prediction, Tensor grad_numerator,"
    f" {_OPTIONS}) -> Tensor grad_input",
    check=check_backward,
    outputs=lambda input: empty_as(input),
    backward=THROUGH_REFERENCE,
    internal=True,
    contiguous=("target", "weight", "pixel_weight", "grad_intersection", "grad_prediction"),
    backends=rows(
        reference.softmax_statistics_backward,
        triton="cross_entropy_dice.triton.softmax_statistics_backward",
        refuses_triton=refuses_triton,
    ),
)
