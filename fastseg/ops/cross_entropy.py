"""Softmax cross entropy, drop-in for `torch.nn.functional.cross_entropy`, and softmax focal loss: one kernel.

With p = softmax(input) over dim 1 and y the label, a pixel's loss is

    weight[y] * pixel_weight * (1 - p_y)^gamma * (-log p_y)        gamma = 0: cross entropy

and with label smoothing (1 - s) of it plus s / C of the same sum over all classes. Formulas of the gradient, and why
it is sometimes computed in the forward: kernels/cross_entropy/README.md.
"""

import torch
from torch import Tensor
from torch.nn import _reduction, functional

from fastseg import _check
from fastseg._first_op import FLOATING, FLOATING_GPU, STOCK_BELOW, Backend, Op, autocasting, few_for_auto, native
from fastseg._triton import lazy
from fastseg.kernels.cross_entropy import reference
from fastseg.kernels.cross_entropy.reference import MEAN, MEAN_OF_COUNT, NONE, SUM, accumulator
from fastseg.ops._cross_entropy_common import (
    check_common,
    check_spatial,
    empty_gradient,
    gradient_in_forward,
    in_layout_of,
    one_image,
    pixels,
    plain,
    scaled,
    weight_name,
)
from fastseg.ops._cross_entropy_probabilities import cross_entropy_of_probabilities, fewest_probabilities

__all__ = ["cross_entropy", "focal_loss"]

_REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}
_LABEL_DTYPES = (torch.int64, torch.int32, torch.uint8)
STOCK_BELOW["cross_entropy: labels"] = 1 << 16
_OPTIONS = "int ignore_index, int reduction, float label_smoothing, float gamma, bool zero_if_empty"
_INPUTS = "Tensor input, Tensor target, Tensor? weight, Tensor? pixel_weight"

# What C++ and Triton see: input and gradient as [N, C, P] views with unit class or pixel stride, the rest contiguous
# and in the accumulator's dtype, outputs allocated here.
_forward_native = native(
    f"_cross_entropy_forward({_INPUTS}, {_OPTIONS}, Tensor(a!) loss, Tensor(b!) denominator) -> ()"
)
_with_gradient_native = native(
    f"_cross_entropy_with_gradient({_INPUTS}, {_OPTIONS}, "
    f"Tensor(a!) loss, Tensor(b!) denominator, Tensor(c!) grad_input) -> ()"
)
_backward_native = native(
    f"_cross_entropy_backward({_INPUTS}, Tensor grad_output, Tensor denominator, "
    f"{_OPTIONS}, Tensor(a!) grad_input) -> ()"
)


def check(input, target, weight, pixel_weight, ignore_index, reduction, label_smoothing, gamma, zero_if_empty, *_):
    """The arguments of `fastseg::cross_entropy`: input [N, C, *spatial], target [N, *spatial], reduction an int."""
    op = "focal_loss" if gamma != 0 else "cross_entropy"
    _check.dtype(op, "input", input, FLOATING)
    _check.dtype(op, "target", target, _LABEL_DTYPES)
    check_common(op, input, weight, (input.dtype, accumulator(input.dtype)), pixel_weight, label_smoothing)
    _check.same_device(op, "target", target, "input", input)
    check_spatial(op, "target", target, input)
    if not gamma >= 0:
        raise ValueError(f"fastseg.ops.{op}: gamma={gamma!r}; allowed: 0 or more")
    if weight is not None and weight.requires_grad:
        name = weight_name(op)
        raise RuntimeError(f"fastseg.ops.{op}: {name} requires grad; allowed: a constant, with labels as target")


def _check_backward(input, target, weight, pixel_weight, grad_output, denominator, *options):
    check(input, target, weight, pixel_weight, *options)


def fake(input, target, weight, pixel_weight, ignore_index, reduction, label_smoothing, gamma, zero_if_empty, dtype):
    shape = (input.shape[0], *input.shape[2:]) if reduction == NONE else ()
    return input.new_empty(shape, dtype=dtype), input.new_empty((), dtype=accumulator(input.dtype))


def _fake_backward(input, *args):
    return empty_gradient(input)


def _fake_with_gradient(input, *args):
    return *fake(input, *args), empty_gradient(input)


# --- the C++ and the Triton backend ---


def _native_inputs(input, target, weight, pixel_weight):
    dtype = accumulator(input.dtype)
    return pixels(input, one_image(input)), target.contiguous(), plain(weight, dtype), plain(pixel_weight, dtype)


def _forward_by(kernel):
    """A backend's forward around a kernel that writes into its last arguments, C++ or Triton."""

    def run(input, target, weight, pixel_weight, *options):
        *options, dtype = options
        own = accumulator(input.dtype)
        loss, denominator = fake(input, target, weight, pixel_weight, *options, own)
        kernel(*_native_inputs(input, target, weight, pixel_weight), *options, loss, denominator)
        return loss.to(dtype), denominator

    return run


def _with_gradient_by(kernel):
    def run(input, target, weight, pixel_weight, *options):
        *options, dtype = options
        own = accumulator(input.dtype)
        loss, denominator, gradient = _fake_with_gradient(input, target, weight, pixel_weight, *options, own)
        inputs = _native_inputs(input, target, weight, pixel_weight)
        kernel(*inputs, *options, loss, denominator, pixels(gradient, one_image(input)))
        return loss.to(dtype), denominator, gradient

    return run


def _backward_by(kernel):
    def run(input, target, weight, pixel_weight, grad_output, denominator, *options):
        gradient = empty_gradient(input)
        inputs = _native_inputs(input, target, weight, pixel_weight)
        kernel(*inputs, grad_output.contiguous(), denominator, *options, pixels(gradient, one_image(input)))
        return gradient

    return run


def _backward_reference(input, *args):
    return in_layout_of(input, reference.cross_entropy_backward(input, *args))


def _forward_reference(*args):
    loss, denominator = reference.cross_entropy(*args[:-1])
    return loss.to(args[-1]), denominator


def _with_gradient_reference(input, *args):
    loss, denominator, gradient = reference.cross_entropy_with_gradient(input, *args[:-1])
    return loss.to(args[-1]), denominator, in_layout_of(input, gradient)


# --- autograd ---


def save(ctx, inputs, output):
    tensors, ctx.options, ctx.backend = inputs[:4], inputs[4:9], inputs[10]
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 10
    input, target, weight, pixel_weight, denominator, *gradient = ctx.saved_tensors
    if gradient and not torch.is_grad_enabled():
        grad_input = scaled(gradient[0], grad_loss)
    else:
        grad_loss = grad_loss.to(accumulator(input.dtype))
        arguments = (input, target, weight, pixel_weight, grad_loss, denominator, *ctx.options)
        grad_input = cross_entropy_backward(*arguments, backend=ctx.backend)
    return grad_input, *[None] * 9


_cross_entropy = Op(
    "cross_entropy",
    f"({_INPUTS}, {_OPTIONS}, ScalarType dtype) -> (Tensor loss, Tensor denominator)",
    check=check,
    fake=fake,
    save=save,
    backward=backward,
    backends=[
        Backend("cpu", _forward_by(_forward_native), dtypes=FLOATING),
        Backend("triton", _forward_by(lazy("cross_entropy.triton", "forward")), dtypes=FLOATING_GPU),
        Backend("reference", _forward_reference),
    ],
)

_cross_entropy_with_gradient = Op(
    "cross_entropy_with_gradient",
    f"({_INPUTS}, {_OPTIONS}, ScalarType dtype) -> (Tensor loss, Tensor denominator, Tensor gradient)",
    check=check,
    fake=_fake_with_gradient,
    save=save,
    backward=backward,
    backends=[
        Backend("cpu", _with_gradient_by(_with_gradient_native), dtypes=FLOATING),
        Backend("triton", _with_gradient_by(lazy("cross_entropy.triton", "with_gradient")), dtypes=FLOATING_GPU),
        Backend("reference", _with_gradient_reference),
    ],
)

cross_entropy_backward = Op(
    "cross_entropy_backward",
    f"({_INPUTS}, Tensor grad_output, Tensor denominator, {_OPTIONS}) -> Tensor grad_input",
    check=_check_backward,
    fake=_fake_backward,
    differentiable=True,
    backends=[
        Backend("cpu", _backward_by(_backward_native), dtypes=FLOATING),
        Backend("triton", _backward_by(lazy("cross_entropy.triton", "backward")), dtypes=FLOATING_GPU),
        Backend("reference", _backward_reference),
    ],
)


# --- public functions ---


def _run(input, target, weight, pixel_weight, *options, backend):
    arguments = (input, target, weight, pixel_weight, *options, _result_dtype(input))
    if gradient_in_forward(options[1], input):
        return _cross_entropy_with_gradient(*arguments, backend=backend)[0]
    return _cross_entropy(*arguments, backend=backend)[0]


def _result_dtype(input: Tensor) -> torch.dtype:
    """The input's, as stock's; under autocast stock computes and returns fp32."""
    return accumulator(input.dtype) if autocasting(input) else input.dtype


def _reduction_of(op: str, reduction: str) -> int:
    _check.one_of(op, "reduction", reduction, tuple(_REDUCTIONS))
    return _REDUCTIONS[reduction]


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    pixel_weight: Tensor | None = None,
    zero_if_empty: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Softmax cross entropy, drop-in for `torch.nn.functional.cross_entropy`.

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ..., dk), contiguous or channels_last without a copy; float32, float16,
            bfloat16, or float64 on CPU. Half types are accumulated in fp32.
        target: labels (), (N,) or (N, d1, ..., dk) of dtype int64, int32 or uint8; or probabilities in the shape of
            input, of any floating dtype and any layout, which then may require grad.
        weight: (C,) weight of each class, of the input's dtype or fp32; with probabilities of any floating dtype, and
            it may require grad (plain PyTorch runs then).
        size_average, reduce: deprecated, as in the stock function.
        ignore_index: label that contributes nothing; inside or outside [0, C). Not for probabilities, as in stock.
        reduction: "none", "mean" or "sum". A mean divides by the sum of weight[label] * pixel_weight over the pixels
            not ignored; for probabilities by the number of pixels (with pixel_weight: their sum).
        label_smoothing: in [0, 1].
        pixel_weight: (N, d1, ..., dk) constant that multiplies each pixel's loss, such as U-Net's border weights.
        zero_if_empty: a mean over nothing is 0 with zero gradient; by default NaN with zero gradient, as in stock.
        backend: "auto", "cpu", "triton" or "reference". On CPU "auto" leaves fewer than 65,536 logits to stock PyTorch;
            with probabilities fewer than 262,144 (four times that for 2 or 3 classes), and rows (N, C) of 64+ classes.

    Returns:
        The loss in the input's dtype (that of input, probabilities and weight together; fp32 under autocast): a scalar,
        or input's shape without its class dimension for reduction "none".
        The gradient has the memory format of the input. Twice differentiable.

    Raises:
        IndexError: on CPU, a label neither in [0, C) nor ignore_index. On GPU such a pixel contributes nothing.
        RuntimeError, ValueError, TypeError: shapes, dtypes, devices or options that do not fit.
    """
    op = "cross_entropy"
    _check.tensor(op, "input", input)
    _check.tensor(op, "target", target)
    if weight is not None:
        _check.tensor(op, "weight", weight)
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    probabilities = target.is_floating_point() and target.shape == input.shape
    if pixel_weight is None and not zero_if_empty and _stock_is_faster(backend, input, target, weight, probabilities):
        options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
        try:
            return functional.cross_entropy(input, target, weight, **options)
        except (IndexError, RuntimeError, TypeError, ValueError):
            pass  # What follows takes it, or says what is wrong.
    reduced = _reduction_of(op, reduction)
    single = input.dim() == 1
    if single:
        input = input.unsqueeze(0)
        if not probabilities and target.numel() != 1:
            raise RuntimeError(f"fastseg.ops.{op}: target has shape {tuple(target.shape)}; allowed: () for input (C,)")
        target = target.unsqueeze(0) if probabilities else target.reshape(1)
        pixel_weight = None if pixel_weight is None else pixel_weight.reshape(1)
    if probabilities:
        if ignore_index >= 0:
            raise RuntimeError(
                f"fastseg.ops.{op}: ignore_index={ignore_index} with probabilities as target; allowed: none"
            )
        options = (reduced, float(label_smoothing), zero_if_empty, backend)
        loss = cross_entropy_of_probabilities(input, target, weight, pixel_weight, *options)
    else:
        options = (ignore_index, reduced, float(label_smoothing), 0.0, zero_if_empty)
        loss = _run(input, target, weight, pixel_weight, *options, backend=backend)
    return loss.squeeze(0) if single and reduced == NONE else loss


def _stock_is_faster(backend, input, target, weight, probabilities) -> bool:
    """Whether "auto" leaves a call to stock PyTorch, which gives the same loss."""
    if probabilities:
        return few_for_auto(backend, input, fewest_probabilities(input))
    if target.dtype != torch.int64 or (weight is not None and weight.dtype != input.dtype):
        return False
    return few_for_auto(backend, input, STOCK_BELOW["cross_entropy: labels"])


def focal_loss(
    input: Tensor,
    target: Tensor,
    alpha: Tensor | None = None,
    gamma: float = 2.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    pixel_weight: Tensor | None = None,
    zero_if_empty: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Softmax focal loss: alpha[y] (1 - p_y)^gamma (-log p_y) at every pixel (Lin et al. 2017, over softmax).

    Args:
        input: logits (N, C) or (N, C, d1, ..., dk); float32, float16, bfloat16, or float64 on CPU.
        target: labels (N,) or (N, d1, ..., dk), int64, int32 or uint8.
        alpha: (C,) weight of each class, or None for 1.
        gamma: 0 or more; 0 is cross entropy.
        ignore_index: label that contributes nothing.
        reduction: "none", "mean" or "sum". A mean divides by the number of pixels not ignored (by the sum of their
            pixel_weight, if given); alpha scales the loss and is not divided out, unlike cross_entropy's weight.
        pixel_weight: (N, d1, ..., dk) constant that multiplies each pixel's loss.
        zero_if_empty: a mean over nothing is 0 instead of NaN.
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        The loss in the input's dtype (fp32 under autocast): a scalar, or the target's shape for reduction "none".

    Raises:
        IndexError: on CPU, a label neither in [0, C) nor ignore_index. On GPU such a pixel contributes nothing.
        RuntimeError, ValueError, TypeError: shapes, dtypes, devices or options that do not fit.
    """
    op = "focal_loss"
    _check.tensor(op, "input", input)
    _check.tensor(op, "target", target)
    reduced = _reduction_of(op, reduction)
    reduced = MEAN_OF_COUNT if reduced == MEAN else reduced
    options = (ignore_index, reduced, 0.0, float(gamma), zero_if_empty)
    return _run(input, target, alpha, pixel_weight, *options, backend=backend)
