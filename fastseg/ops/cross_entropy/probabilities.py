"""Softmax cross entropy against a distribution over the classes at every pixel: `cross_entropy` with floating targets.

With log p = log_softmax(input) over dim 1, class weights w and smoothing s, a pixel's loss is

    pixel_weight * sum_c w_c ((1 - s) target_c + s / C) (-log p_c)

as in torch.nn.functional.cross_entropy. A mean divides by the number of pixels, not by weights.
"""

import torch
from torch import Tensor

from fastseg import _check
from fastseg._backend import ALWAYS, Stock, rows
from fastseg._dtypes import FLOATING, HALF, accumulator, is_autocast
from fastseg._early_gradient import scaled
from fastseg._layout import empty_as, is_channels_last
from fastseg._op import THROUGH_REFERENCE, Op
from fastseg._private_api import stock_cross_entropy
from fastseg._reduction import MEAN, NONE, SUM
from fastseg.kernels.cross_entropy import reference
from fastseg.ops.cross_entropy.common import check_common

_INPUTS = "Tensor input, Tensor target, Tensor? weight, Tensor? pixel_weight"
_OPTIONS = "int reduction, float label_smoothing, bool to_input, bool to_target"


def check(input, target, weight, pixel_weight, label_smoothing):
    """input and target [N, C, ...], weight [C], pixel_weight [N, ...]."""
    op = "cross_entropy"
    shape = input.shape
    if input.dtype not in FLOATING or target.dtype not in FLOATING or target.device != input.device:
        _check.argument(op, "input", input, FLOATING, shape)
        _check.argument(op, "target", target, FLOATING, target.shape, like=("input", input))
    if len(shape) < 2 or not shape[1] or not 0 <= label_smoothing <= 1 or weight is not pixel_weight:  # not both None
        check_common(op, input, weight, pixel_weight, label_smoothing)
    if target.shape != shape:
        _check.shape(op, "target", target, shape, "the shape of input")


def gradient_outputs(input, target, to_input, to_target):
    """A gradient that is not requested has no elements."""
    return (
        empty_as(input) if to_input else input.new_empty(0),
        empty_as(target) if to_target else target.new_empty(0),
    )


def outputs(input, target, reduction, to_input, to_target):
    shape = (input.shape[0], *input.shape[2:]) if reduction == NONE else ()
    loss = input.new_empty(shape, dtype=accumulator(input.dtype))
    return loss, *gradient_outputs(input, target, to_input, to_target)


def backward(
    input, target, weight, pixel_weight, grad_loss, grad_input, grad_target, reduction, label_smoothing,
    to_input, to_target, needs_input, needs_target, backend,
):  # fmt: skip
    known = (to_input or to_target) and (to_input or not needs_input) and (to_target or not needs_target)
    if known and not torch.is_grad_enabled():
        return {
            "input": scaled(grad_input, grad_loss, backend) if needs_input else None,
            "target": scaled(grad_target, grad_loss, backend) if needs_target else None,
        }
    gradients = cross_entropy_probabilities_backward(
        input, target, weight, pixel_weight, grad_loss, reduction, label_smoothing, needs_input, needs_target,
        backend=backend,
    )  # fmt: skip
    return {
        name: gradient
        for name, gradient, needed in zip(("input", "target"), gradients, (needs_input, needs_target))
        if needed
    }


# --- stock PyTorch, for small calls ---

# From this number of classes on, (N, C) input is as fast in stock, which reads rows that our kernel must transpose.
STOCK_ROW_LENGTH = 64


def stock(input, target, weight, reduction, label_smoothing):
    """Converts half types to fp32, because stock sums in the precision of its input."""
    if input.dtype in HALF or target.dtype in HALF:
        input, target = input.float(), target.float()
    return (stock_cross_entropy(input, target, weight, reduction, -100, label_smoothing),)


def stock_class(input):
    if input.dim() == 2 and input.shape[1] >= STOCK_ROW_LENGTH:
        return "probabilities (N, 64 or more)"
    return "probabilities"


def stock_refuses(input, target, weight, pixel_weight):
    if pixel_weight is not None:
        return "it has no pixel_weight"
    for tensor in (input, target):
        if tensor.requires_grad and not tensor.is_contiguous() and is_channels_last(tensor):
            return "its gradients lose channels_last"
    return None


cross_entropy_probabilities_op = Op(
    f"cross_entropy_probabilities({_INPUTS}, {_OPTIONS}) -> (Tensor loss, Tensor grad_input, Tensor grad_target)",
    check=check,
    outputs=outputs,
    backward=backward,
    internal=True,
    accumulated=("weight", "pixel_weight"),
    backends=rows(
        reference.cross_entropy_probabilities,
        stock=Stock(
            stock,
            below={
                "probabilities": 1 << 14,
                "probabilities (N, 64 or more)": ALWAYS,
            },
            which=stock_class,
            refuses=stock_refuses,
        ),
        triton="cross_entropy.triton_probabilities.forward",
    ),
)

cross_entropy_probabilities_backward = Op(
    f"cross_entropy_probabilities_backward({_INPUTS}, Tensor grad_loss, {_OPTIONS})"
    " -> (Tensor grad_input, Tensor grad_target)",
    check=check,
    outputs=gradient_outputs,
    backward=THROUGH_REFERENCE,
    internal=True,
    accumulated=("weight", "pixel_weight", "grad_loss"),
    backends=rows(reference.cross_entropy_probabilities_backward, triton="cross_entropy.triton_probabilities.backward"),
)


def loss_of_probabilities(
    input, target, weight, pixel_weight, reduction, label_smoothing, zero_if_empty, backend
) -> Tensor:
    """The result of fastseg.ops.cross_entropy, in stock's dtype. input, target: (N, C, ...); reduction: its number."""
    check(input, target, weight, pixel_weight, label_smoothing)
    result = input.dtype
    if target.dtype != result or weight is not None:
        result = torch.promote_types(result, target.dtype)
        result = result if weight is None else torch.promote_types(result, weight.dtype)
        if result == torch.float64:
            input, target = input.double(), target.double()
    if result in HALF and is_autocast(input):
        result = torch.float32
    if reduction == MEAN and (pixel_weight is not None or zero_if_empty):
        # A mean over weights is the sum with weights that add up to 1.
        pixel_weight = _shares(input, pixel_weight, zero_if_empty)
        reduction = SUM
    loss = _run(input, target, weight, pixel_weight, reduction, label_smoothing, backend)
    return loss if loss.dtype == result else loss.to(result)


def _shares(input: Tensor, pixel_weight: Tensor | None, zero_if_empty: bool) -> Tensor:
    """pixel_weight / its sum; NaN if the sum is 0, or 0 with zero_if_empty."""
    dtype = accumulator(input.dtype)
    if pixel_weight is None:
        pixel_weight = input.new_ones((), dtype=dtype).expand(input.shape[0], *input.shape[2:])
    total = pixel_weight.sum(dtype=dtype)
    shares = pixel_weight.to(dtype) / total
    return torch.where(total == 0, torch.zeros_like(shares), shares) if zero_if_empty else shares


def _run(input, target, weight, pixel_weight, reduction, label_smoothing, backend) -> Tensor:
    arguments = input, target, weight, pixel_weight, reduction, label_smoothing
    if torch.is_grad_enabled() and weight is not None and weight.requires_grad:
        if backend not in ("auto", "reference"):
            raise RuntimeError(
                f"fastseg.ops.cross_entropy: weight requires grad; allowed: a constant with backend={backend!r}"
            )
        return reference.loss_of_probabilities(*arguments)  # by autograd: hardly anyone trains class weights
    to_input, to_target = _gradients_in_forward(input, target, reduction)
    return cross_entropy_probabilities_op(*arguments, to_input, to_target, backend=backend)[0]


def _gradients_in_forward(input: Tensor, target: Tensor, reduction: int) -> tuple[bool, bool]:
    """Which gradients the forward computes, as labels.early_gradient says; none in a compiled graph."""
    if reduction == NONE or torch.float16 in (input.dtype, target.dtype):
        return False, False
    if not (input.requires_grad or target.requires_grad) or not torch.is_grad_enabled():
        return False, False
    if torch.compiler.is_compiling():
        return False, False
    return input.requires_grad, target.requires_grad
