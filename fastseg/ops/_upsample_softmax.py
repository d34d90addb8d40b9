"""The ops behind upsample_cross_entropy, and what those behind upsample_cross_entropy_dice share with them.

Shapes and formulas: fastseg/ops/upsample_cross_entropy.py.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastseg import _check
from fastseg._first_op import FLOATING, FLOATING_GPU, Backend, Op, native, somebody_watches
from fastseg._triton import lazy
from fastseg.kernels.cross_entropy_dice.reference import mean_or_nan
from fastseg.kernels.upsample_cross_entropy import reference
from fastseg.ops.cross_entropy_dice import accumulator

LABELS = (torch.int64, torch.int32, torch.uint8)
CPU_DTYPES = FLOATING_GPU  # fp64 is for gradcheck: the reference does it

TENSORS = "Tensor input, Tensor target, Tensor? weight, Tensor? pixel_weight"
OPTIONS = "float[]? scale_factors, bool align_corners, int ignore_index, float label_smoothing"
_REDUCTION = "bool with_gradient, bool mean, bool zero_if_empty, ScalarType dtype"

_loss_native = native(
    f"_upsample_cross_entropy_loss({TENSORS}, {OPTIONS}, {_REDUCTION}) -> (Tensor, Tensor, Tensor)"
)
_scaled_native = native(
    "_upsample_cross_entropy_scaled(Tensor gradient, Tensor grad_loss, Tensor count, ScalarType dtype) -> Tensor"
)
_pixels_native = native(f"_upsample_cross_entropy_pixels({TENSORS}, {OPTIONS}) -> Tensor")
_pixels_backward_native = native(
    f"_upsample_cross_entropy_pixels_backward({TENSORS}, Tensor grad_losses, {OPTIONS}) -> Tensor"
)


# --- checks and shapes ---


def check(input, target, weight, pixel_weight, scale_factors, align_corners, ignore_index, label_smoothing, *_):
    name = "upsample_cross_entropy"
    _check.dtype(name, "input", input, FLOATING)
    _check.shape(name, "input", input, ("N", "C", "h", "w"))
    _check.dtype(name, "target", target, LABELS)
    _check.shape(name, "target", target, (input.size(0), "H", "W"))
    _check.same_device(name, "target", target, "input", input)
    if min(input.shape[1:]) < 1 or min(target.shape[1:]) < 1:
        raise RuntimeError(
            f"fastseg.ops.{name}: input has shape {tuple(input.shape)} and target {tuple(target.shape)}; "
            "allowed: no size but N may be 0"
        )
    for argument, value, shape in (
        ("weight", weight, (input.size(1),)),
        ("pixel_weight", pixel_weight, tuple(target.shape)),
    ):
        if value is not None:
            _check.dtype(name, argument, value, (accumulator(input),))
            _check.shape(name, argument, value, shape)
            _check.same_device(name, argument, value, "input", input)
    _check.in_range(name, "label_smoothing", label_smoothing, 0.0, 1.0)


def check_loss_backward(input, target, weight, pixel_weight, gradient, grad_numerator, *options):
    check(input, target, weight, pixel_weight, *options)
    _check.shape("upsample_cross_entropy_loss_backward", "grad_numerator", grad_numerator, ())


def check_pixels_backward(input, target, weight, pixel_weight, grad_losses, *options):
    check(input, target, weight, pixel_weight, *options)
    name = "upsample_cross_entropy_pixels_backward"
    _check.shape(name, "grad_losses", grad_losses, tuple(target.shape))
    _check.dtype(name, "grad_losses", grad_losses, (accumulator(input),))


def layout(input: Tensor) -> torch.memory_format:
    """Of gradients: channels_last if that is how `input` lies in memory, else contiguous."""
    channels_last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def like_input(input: Tensor, dtype: torch.dtype) -> Tensor:
    """Empty, of the shape of `input`."""
    return torch.empty_like(input, dtype=dtype, memory_format=layout(input))


def empty_or_gradient(input: Tensor, with_gradient: bool) -> Tensor:
    """Room for the gradient that a forward makes, in the accumulator dtype; of no element if it makes none."""
    dtype = accumulator(input)
    return like_input(input, dtype) if with_gradient else input.new_empty(0, dtype=dtype)


def fake_loss(input, *arguments):
    with_gradient, _mean, _zero_if_empty, dtype = arguments[-4:]
    loss, count = input.new_empty((), dtype=dtype), input.new_empty((), dtype=torch.float64)
    return loss, count, empty_or_gradient(input, with_gradient)


def fake_pixels(input, target, *_):
    return input.new_empty(target.shape, dtype=accumulator(input))


def fake_gradient(input, *_):
    return like_input(input, input.dtype)


# --- autograd ---


def save_loss(ctx, inputs, output):
    tensors, ctx.options = inputs[:4], inputs[4:8]
    _, count, gradient = output
    ctx.mark_non_differentiable(count, gradient)
    ctx.set_materialize_grads(False)  # no zeros of the gradient's size
    ctx.save_for_backward(*tensors, count, gradient)


def scale_in_backward(input: Tensor, gradient: Tensor, grad_loss: Tensor, count: Tensor) -> Tensor | None:
    """grad_loss / count * gradient in the dtype of `input`: for a gradient that the forward made, of a mean of `count`.

    0 for a mean over nothing. None if the forward made none (`gradient` is empty), or if it is to be differentiated.
    """
    if gradient.numel() != input.numel() or torch.is_grad_enabled():
        return None
    native_runs = input.device.type == "cpu" and _scaled_native.missing("CPU") is None
    if native_runs and not somebody_watches((gradient, grad_loss)):
        return _scaled_native(gradient, grad_loss, count, input.dtype)
    return (gradient * _of_mean(grad_loss, count)).to(input.dtype)


def _of_mean(grad_loss: Tensor, count: Tensor) -> Tensor:
    """The gradient of a sum from that of its mean over `count`, in fp64."""
    empty = count == 0
    return torch.where(empty, 0.0, grad_loss.double() / torch.where(empty, 1.0, count))


def backward_loss(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 12
    *tensors, count, gradient = ctx.saved_tensors
    grad_input = scale_in_backward(tensors[0], gradient, grad_loss, count)
    if grad_input is None:
        grad_numerator = _of_mean(grad_loss, count)
        grad_input = upsample_cross_entropy_loss_backward(*tensors, gradient, grad_numerator, *ctx.options)
    return grad_input, *[None] * 11


def save_pixels(ctx, inputs, output):
    *tensors, scale_factors, align_corners, ignore_index, label_smoothing, _backend = inputs
    ctx.options = scale_factors, align_corners, ignore_index, label_smoothing
    ctx.save_for_backward(*tensors)


def backward_pixels(ctx, grad_losses):
    return upsample_cross_entropy_pixels_backward(*ctx.saved_tensors, grad_losses, *ctx.options), *[None] * 7


# --- what runs on the CPU ---


def _loss_by(sums: Callable) -> Callable:
    """A backend from one that gives (numerator, denominator, gradient). `count` is what the loss is a mean of."""

    def run(*arguments):
        *arguments, mean, zero_if_empty, dtype = arguments
        numerator, denominator, gradient = sums(*arguments)
        if gradient.dim() == 4:  # it was asked for
            gradient = gradient.contiguous(memory_format=layout(arguments[0]))
        if mean:
            return mean_or_nan(numerator, denominator, zero_if_empty).to(dtype), denominator, gradient
        return numerator.to(dtype), torch.ones_like(denominator), gradient

    return run


def laid_out(backward: Callable) -> Callable:
    """A reference whose gradient lies as `input` does."""

    def run(input, *arguments):
        return backward(input, *arguments).contiguous(memory_format=layout(input))

    return run


def _scale_gradient(input, target, weight, pixel_weight, gradient, grad_numerator, *options):
    """`gradient` is d numerator / d input, made in the forward; it is empty if that was not asked for."""
    if gradient.numel() == input.numel():
        return (gradient * grad_numerator).to(input.dtype)
    grad_losses = grad_numerator.to(accumulator(input)).expand(target.shape)
    return upsample_cross_entropy_pixels_backward(input, target, weight, pixel_weight, grad_losses, *options)


def _refuse_unless_built(*_):
    return _loss_native.missing("CPU")


triton = partial(lazy, "upsample_cross_entropy.triton")


def backends(cpu: Callable, triton: Callable, plain: Callable) -> list[Backend]:
    return [
        Backend("cpu", cpu, dtypes=CPU_DTYPES, refuses=_refuse_unless_built),
        Backend("triton", triton, dtypes=FLOATING_GPU),
        Backend("reference", plain),
    ]


upsample_cross_entropy_loss = Op(
    "upsample_cross_entropy_loss",
    f"({TENSORS}, {OPTIONS}, {_REDUCTION}) -> (Tensor loss, Tensor count, Tensor gradient)",
    check=check,
    fake=fake_loss,
    save=save_loss,
    backward=backward_loss,
    backends=backends(_loss_native, _loss_by(triton("sums")), _loss_by(reference.upsample_cross_entropy_sums)),
)
upsample_cross_entropy_loss_backward = Op(
    "upsample_cross_entropy_loss_backward",
    f"({TENSORS}, Tensor gradient, Tensor grad_numerator, {OPTIONS}) -> Tensor",
    check=check_loss_backward,
    fake=fake_gradient,
    differentiable=True,
    backends=backends(
        _scale_gradient, triton("sums_backward"), laid_out(reference.upsample_cross_entropy_sums_backward)
    ),
)
upsample_cross_entropy_pixels = Op(
    "upsample_cross_entropy_pixels",
    f"({TENSORS}, {OPTIONS}) -> Tensor",
    check=check,
    fake=fake_pixels,
    save=save_pixels,
    backward=backward_pixels,
    backends=backends(_pixels_native, triton("pixels"), reference.upsample_cross_entropy_pixels),
)
upsample_cross_entropy_pixels_backward = Op(
    "upsample_cross_entropy_pixels_backward",
    f"({TENSORS}, Tensor grad_losses, {OPTIONS}) -> Tensor",
    check=check_pixels_backward,
    fake=fake_gradient,
    differentiable=True,
    backends=backends(
        _pixels_backward_native, triton("pixels_backward"),
        laid_out(reference.upsample_cross_entropy_pixels_backward),
    ),
)
