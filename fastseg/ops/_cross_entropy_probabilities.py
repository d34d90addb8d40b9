"""Softmax cross entropy against a distribution over the classes at every pixel: `cross_entropy` with floating targets.

With log p = log_softmax(input) over dim 1, class weights w and smoothing s, a pixel's loss is

    pixel_weight * sum_c w_c ((1 - s) target_c + s / C) (-log p_c)

as torch.nn.functional.cross_entropy has it. A mean divides by the number of pixels, not by weights.
"""

import math

import torch
from torch import Tensor

from fastseg import _check
from fastseg._first_op import FLOATING, FLOATING_GPU, STOCK_BELOW, Backend, Op, autocasting, native
from fastseg._triton import lazy
from fastseg.kernels.cross_entropy import reference
from fastseg.kernels.cross_entropy.reference import MEAN, NONE, SUM, accumulator
from fastseg.ops._cross_entropy_common import (
    check_common,
    empty_gradient,
    gradient_in_forward,
    in_layout_of,
    one_image,
    pixels,
    plain,
    scaled,
)

STOCK_BELOW["cross_entropy: probabilities"] = 1 << 18  # four times that with 2 or 3 classes
# Rows (N, C) of that many classes, which stock reads along the row and ours must transpose, are as fast in stock.
LONGEST_ROWS_CPU = 64
_INPUTS = "Tensor input, Tensor target, Tensor? weight, Tensor? pixel_weight"
_OPTIONS = "int reduction, float label_smoothing"
_ASKED = "bool to_input, bool to_target"

# One entry for forward and backward: it writes the outputs that are there. Input and target (and their gradients) are
# [N, C, P] views with unit class or pixel stride, the rest contiguous and in the accumulator's dtype.
_native = native(
    f"_cross_entropy_probabilities({_INPUTS}, Tensor? grad_output, {_OPTIONS}, "
    "Tensor(a!)? loss, Tensor(b!)? grad_input, Tensor(c!)? grad_target) -> ()"
)


def check(input, target, weight, pixel_weight, reduction, label_smoothing):
    """The arguments of `fastseg::cross_entropy_probabilities`: input and target [N, C, *spatial], reduction an int."""
    op = "cross_entropy"
    _check.dtype(op, "input", input, FLOATING)
    _check.dtype(op, "target", target, FLOATING)
    check_common(op, input, weight, FLOATING, pixel_weight, label_smoothing)
    _check.same_device(op, "target", target, "input", input)
    if target.shape != input.shape:
        _check.shape(op, "target", target, input.shape, "the shape of input")


def _check_with_gradient(input, target, weight, pixel_weight, reduction, label_smoothing, to_input, to_target):
    check(input, target, weight, pixel_weight, reduction, label_smoothing)


def _check_backward(input, target, weight, pixel_weight, grad_output, *options):
    _check_with_gradient(input, target, weight, pixel_weight, *options)


def fake(input, target, weight, pixel_weight, reduction, label_smoothing):
    shape = (input.shape[0], *input.shape[2:]) if reduction == NONE else ()
    return input.new_empty(shape, dtype=accumulator(input.dtype))


def _fake_with_gradient(input, target, weight, pixel_weight, reduction, label_smoothing, to_input, to_target):
    """A gradient that is not asked for has no elements."""
    gradients = (
        empty_gradient(tensor) if asked else tensor.new_empty(0)
        for tensor, asked in ((input, to_input), (target, to_target))
    )
    return fake(input, target, weight, pixel_weight, reduction, label_smoothing), *gradients


def _fake_backward(input, target, weight, pixel_weight, grad_output, *options):
    return _fake_with_gradient(input, target, weight, pixel_weight, *options)[1:]


# --- the C++ and the Triton backend ---


def _run_by(kernel, arguments, grad_output, loss, *gradients) -> None:
    """Calls a kernel, C++ or Triton, on views of the op's arguments; it writes what is not None."""
    input, target, weight, pixel_weight, *options = arguments
    together = one_image(input) and one_image(target)
    views = (None if gradient is None else pixels(gradient, together) for gradient in gradients)
    dtype = accumulator(input.dtype)
    grad_output = None if grad_output is None else grad_output.contiguous()
    tensors = pixels(input, together), pixels(target, together), plain(weight, dtype), plain(pixel_weight, dtype)
    kernel(*tensors, grad_output, *options, loss, *views)


def _forward_by(kernel):
    def run(*arguments):
        loss = fake(*arguments)
        _run_by(kernel, arguments, None, loss, None, None)
        return loss

    return run


def _with_gradient_by(kernel):
    def run(*arguments):
        loss, *gradients = _fake_with_gradient(*arguments)
        wanted = (gradient if asked else None for gradient, asked in zip(gradients, arguments[-2:]))
        _run_by(kernel, arguments[:-2], None, loss, *wanted)
        return loss, *gradients

    return run


def _backward_by(kernel):
    def run(input, target, weight, pixel_weight, grad_output, *options):
        gradients = _fake_backward(input, target, weight, pixel_weight, grad_output, *options)
        wanted = (gradient if asked else None for gradient, asked in zip(gradients, options[-2:]))
        _run_by(kernel, (input, target, weight, pixel_weight, *options[:-2]), grad_output, None, *wanted)
        return gradients

    return run


def _in_layouts(input, target, grad_input, grad_target, to_input, to_target) -> tuple[Tensor, Tensor]:
    grad_input = in_layout_of(input, grad_input) if to_input else grad_input
    return grad_input, in_layout_of(target, grad_target) if to_target else grad_target


def _with_gradient_reference(input, target, *args):
    loss, *gradients = reference.cross_entropy_probabilities_with_gradient(input, target, *args)
    return loss, *_in_layouts(input, target, *gradients, *args[-2:])


def _backward_reference(input, target, *args):
    gradients = reference.cross_entropy_probabilities_backward(input, target, *args)
    return _in_layouts(input, target, *gradients, *args[-2:])


# --- autograd ---


def save(ctx, inputs, output):
    input, target, weight, pixel_weight, reduction, label_smoothing, *computed, ctx.backend = inputs
    ctx.options, ctx.computed = (reduction, label_smoothing), computed
    gradients = output[1:] if computed else ()
    ctx.save_for_backward(input, target, weight, pixel_weight, *gradients)
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)


def backward(ctx, grad_loss, *_):
    constants = [None] * (4 + len(ctx.computed))
    if grad_loss is None:
        return None, None, *constants
    input, target, weight, pixel_weight, *computed = ctx.saved_tensors
    needed = ctx.needs_input_grad[:2]
    known = ctx.computed and all(has or not need for has, need in zip(ctx.computed, needed))
    if known and not torch.is_grad_enabled():
        gradients = [scaled(gradient, grad_loss) if need else None for gradient, need in zip(computed, needed)]
    else:
        arguments = (input, target, weight, pixel_weight, grad_loss, *ctx.options, *needed)
        gradients = cross_entropy_probabilities_backward(*arguments, backend=ctx.backend)
        gradients = [gradient if need else None for gradient, need in zip(gradients, needed)]
    return *gradients, *constants


_triton = lazy("cross_entropy.triton_probabilities", "cross_entropy_probabilities")

_cross_entropy_probabilities = Op(
    "cross_entropy_probabilities",
    f"({_INPUTS}, {_OPTIONS}) -> Tensor loss",
    check=check,
    fake=fake,
    save=save,
    backward=backward,
    backends=[
        Backend("cpu", _forward_by(_native), dtypes=FLOATING),
        Backend("triton", _forward_by(_triton), dtypes=FLOATING_GPU),
        Backend("reference", reference.cross_entropy_probabilities),
    ],
)

_cross_entropy_probabilities_with_gradient = Op(
    "cross_entropy_probabilities_with_gradient",
    f"({_INPUTS}, {_OPTIONS}, {_ASKED}) -> (Tensor loss, Tensor grad_input, Tensor grad_target)",
    check=_check_with_gradient,
    fake=_fake_with_gradient,
    save=save,
    backward=backward,
    backends=[
        Backend("cpu", _with_gradient_by(_native), dtypes=FLOATING),
        Backend("triton", _with_gradient_by(_triton), dtypes=FLOATING_GPU),
        Backend("reference", _with_gradient_reference),
    ],
)

cross_entropy_probabilities_backward = Op(
    "cross_entropy_probabilities_backward",
    f"({_INPUTS}, Tensor grad_output, {_OPTIONS}, {_ASKED}) -> (Tensor grad_input, Tensor grad_target)",
    check=_check_backward,
    fake=_fake_backward,
    differentiable=True,
    backends=[
        Backend("cpu", _backward_by(_native), dtypes=FLOATING),
        Backend("triton", _backward_by(_triton), dtypes=FLOATING_GPU),
        Backend("reference", _backward_reference),
    ],
)


# --- what fastseg.ops.cross_entropy calls ---


def cross_entropy_of_probabilities(
    input, target, weight, pixel_weight, reduction, label_smoothing, zero_if_empty, backend
) -> Tensor:
    """The loss in stock's dtype. input, target: (N, C, d1, ..., dk); reduction: NONE, MEAN or SUM."""
    check(input, target, weight, pixel_weight, reduction, label_smoothing)
    result = torch.promote_types(input.dtype, target.dtype)
    result = result if weight is None else torch.promote_types(result, weight.dtype)
    if result == torch.float64:
        input, target = input.double(), target.double()
    if autocasting(input):
        result = accumulator(result)
    if reduction == MEAN and (pixel_weight is not None or zero_if_empty):
        # A mean over weights is the sum with weights that add up to 1.
        pixel_weight = _shares(input, pixel_weight, zero_if_empty)
        reduction = SUM
    arguments = (input, target, weight, pixel_weight, reduction, label_smoothing)
    return _run(arguments, backend).to(result)


def fewest_probabilities(input: Tensor) -> float:
    """What `few_for_auto` is to be asked about (N, C, ...)."""
    if input.dim() == 2 and input.shape[1] >= LONGEST_ROWS_CPU:
        return math.inf
    few_classes = input.dim() > 1 and input.shape[1] < 4
    return STOCK_BELOW["cross_entropy: probabilities"] * (4 if few_classes else 1)


def _shares(input: Tensor, pixel_weight: Tensor | None, zero_if_empty: bool) -> Tensor:
    """pixel_weight / its sum; of no weight at all NaN, or 0 with zero_if_empty."""
    dtype = accumulator(input.dtype)
    if pixel_weight is None:
        pixel_weight = input.new_ones((), dtype=dtype).expand(input.shape[0], *input.shape[2:])
    total = pixel_weight.sum(dtype=dtype)
    shares = pixel_weight.to(dtype) / total
    return torch.where(total == 0, torch.zeros_like(shares), shares) if zero_if_empty else shares


def _run(arguments: tuple, backend: str) -> Tensor:
    input, target, weight, _, reduction, _ = arguments
    if torch.is_grad_enabled() and weight is not None and weight.requires_grad:
        if backend not in ("auto", "reference"):
            raise RuntimeError(
                f"fastseg.ops.cross_entropy: weight requires grad; allowed: a constant with backend={backend!r}"
            )
        return reference.cross_entropy_probabilities(*arguments)  # by autograd: nobody learns these in earnest
    if gradient_in_forward(reduction, input, target):
        asked = (input.requires_grad, target.requires_grad)
        return _cross_entropy_probabilities_with_gradient(*arguments, *asked, backend=backend)[0]
    return _cross_entropy_probabilities(*arguments, backend=backend)
