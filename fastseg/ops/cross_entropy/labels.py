"""Softmax cross entropy and focal loss against integer labels: one kernel.

With p = softmax(input) over dim 1 and y the label, a pixel's loss is

    weight[y] * pixel_weight * (1 - p_y)^gamma * (-log p_y)        gamma = 0: cross entropy

With label smoothing s it is (1 - s) times this plus s / C times the sum over all classes. Formulas of the gradient,
and why the forward sometimes computes it: kernels/cross_entropy/README.md.
"""

import torch
from torch import Tensor

from fastseg import _check
from fastseg._backend import Stock, rows
from fastseg._dtypes import FLOATING, HALF, LABELS, accumulator, is_autocast
from fastseg._early_gradient import scaled
from fastseg._layout import empty_as, is_channels_last
from fastseg._op import THROUGH_REFERENCE, Op
from fastseg._private_api import stock_cross_entropy
from fastseg._reduction import NONE
from fastseg.kernels.cross_entropy import reference
from fastseg.ops.cross_entropy.common import check_common, check_spatial

_INPUTS = "Tensor input, Tensor target, Tensor? weight, Tensor? pixel_weight"
_OPTIONS = "int ignore_index, int reduction, float label_smoothing, float gamma, bool zero_if_empty, bool inert_ignored"


def check(input, target, weight, pixel_weight, label_smoothing, gamma, inert_ignored):
    """input [N, C, ...], target and pixel_weight [N, ...], weight [C]."""
    op = "focal_loss" if inert_ignored else "cross_entropy"
    if input.dtype not in FLOATING or target.dtype not in LABELS or target.device != input.device:
        _check.dtype(op, "input", input, FLOATING)
        _check.dtype(op, "target", target, LABELS)
        _check.same_device(op, "target", target, "input", input)
    shape = input.shape
    if len(shape) < 2 or not shape[1] or not 0 <= label_smoothing <= 1 or weight is not pixel_weight:  # not both None
        check_common(op, input, weight, pixel_weight, label_smoothing)
    if weight is not None:
        name = "alpha" if inert_ignored else "weight"
        _check.dtype(op, name, weight, (input.dtype, accumulator(input.dtype)))
        if weight.requires_grad:
            raise RuntimeError(f"fastseg.ops.{op}: {name} requires grad; allowed: a constant, with labels as target")
    if target.shape != (shape[0], *shape[2:]):
        check_spatial(op, "target", target, input)
    if not gamma >= 0:
        raise ValueError(f"fastseg.ops.{op}: gamma={gamma!r}; allowed: 0 or more")


def outputs(input, target, reduction, with_gradient):
    """Losses in the accumulator dtype: the public function rounds them. A gradient not requested has no elements."""
    total = input.new_empty((), dtype=accumulator(input.dtype))
    return (
        total.new_empty(target.shape) if reduction == NONE else torch.empty_like(total),
        total,
        empty_as(input) if with_gradient else input.new_empty(0),
    )


def backward(
    input, target, weight, pixel_weight, grad_loss, denominator, gradient,
    ignore_index, reduction, label_smoothing, gamma, zero_if_empty, inert_ignored, with_gradient, backend,
):  # fmt: skip
    if with_gradient and not torch.is_grad_enabled():
        return {"input": scaled(gradient, grad_loss, backend)}
    grad_input = cross_entropy_backward(
        input, target, weight, pixel_weight, grad_loss, denominator, ignore_index, reduction, label_smoothing, gamma,
        zero_if_empty, inert_ignored, backend=backend,
    )  # fmt: skip
    return {"input": grad_input}


def early_gradient(input, reduction):
    """True if the forward also computes the gradient, from the same read of the logits: for a reduced loss.

    Not in fp16, where the gradient must be multiplied by the loss scale before it is rounded.
    """
    return input.requires_grad and reduction != NONE and input.dtype != torch.float16


# --- stock PyTorch, for small calls ---


def stock(input, target, weight, ignore_index, reduction, label_smoothing):
    """Converts half types to fp32, because stock sums in the precision of its input."""
    if input.dtype in HALF:
        input, weight = input.float(), None if weight is None else weight.float()
    return (stock_cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing),)


def stock_refuses(input, target, weight, pixel_weight, gamma, zero_if_empty, inert_ignored):
    if pixel_weight is not None or gamma or zero_if_empty or inert_ignored:
        return "it has no pixel_weight, zero_if_empty or focal loss"
    if target.dtype != torch.int64 or (weight is not None and weight.dtype != input.dtype):
        return "it takes int64 labels and weights of the input's dtype"
    if input.requires_grad and not input.is_contiguous() and is_channels_last(input):
        return "its gradient loses channels_last"
    return None


cross_entropy_op = Op(
    f"cross_entropy({_INPUTS}, {_OPTIONS}, bool with_gradient) -> (Tensor loss, Tensor denominator, Tensor gradient)",
    check=check,
    outputs=outputs,
    backward=backward,
    early_gradient=early_gradient,
    contiguous=("target",),
    accumulated=("weight", "pixel_weight"),
    backends=rows(
        reference.cross_entropy,
        stock=Stock(stock, below={"labels": 1 << 14}, refuses=stock_refuses),
        triton="cross_entropy.triton.forward",
    ),
)

cross_entropy_backward = Op(
    f"cross_entropy_backward({_INPUTS}, Tensor grad_loss, Tensor denominator, {_OPTIONS}) -> Tensor grad_input",
    check=check,
    outputs=lambda input: empty_as(input),
    backward=THROUGH_REFERENCE,
    internal=True,
    contiguous=("target",),
    accumulated=("weight", "pixel_weight", "grad_loss"),
    backends=rows(reference.cross_entropy_backward, triton="cross_entropy.triton.backward"),
)


def loss_of_labels(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pixel_weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    *,
    gamma: float = 0.0,
    zero_if_empty: bool = False,
    inert_ignored: bool = False,
    backend: str,
) -> Tensor:
    """The result of fastseg.ops.cross_entropy and focal_loss, for input (N, C, ...) and a number as reduction."""
    loss = cross_entropy_op(
        input, target, weight, pixel_weight, ignore_index, reduction, label_smoothing, gamma, zero_if_empty,
        inert_ignored, False, backend=backend,
    )[0]  # fmt: skip
    return loss if loss.dtype == input.dtype or is_autocast(input) else loss.to(input.dtype)
