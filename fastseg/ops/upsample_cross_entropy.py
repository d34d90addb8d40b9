"""Bilinear upsampling of low-resolution logits fused with cross-entropy and Dice loss: no full-resolution logits.

    z = interpolate(input, (H, W), mode="bilinear"),  p = softmax(z) over C,  V = pixels whose label y is not ignored
    losses[n, y, x] = v ((1 - s) w_y (lse(z) - z_y) + s/C sum_c w_c (lse(z) - z_c))   0 outside V; s = label smoothing
    numerator = sum_V losses,  denominator = sum_V v w_y,  mean = numerator / denominator
    Dice: the statistics of `fastseg.ops.cross_entropy_dice`, per image and class

Shapes: input (N, C, h, w), target and pixel_weight v (N, H, W), weight w (C,). `scale_factors` is None, or
torch's two scale factors when the caller gave them (torch then samples at 1/scale_factor rather than at h/H).
The gradient at the source grid is the transposed interpolation of v (p - onehot), gathered without atomics.
Sources: torch.nn.functional.interpolate and cross_entropy; V-Net (squared Dice).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastseg import _check
from fastseg._bilinear import output_size_and_scales
from fastseg._op import FLOATING, FLOATING_GPU, Backend, Op, native, somebody_watches
from fastseg._triton import lazy
from fastseg.kernels.upsample_cross_entropy import reference
from fastseg.ops._cross_entropy_common import scaled
from fastseg.ops._dice import check_dice, cross_entropy_dice_of, loss_dtype
from fastseg.ops.cross_entropy_dice import accumulator

LABELS = (torch.int64, torch.int32, torch.uint8)
REDUCTIONS = ("none", "mean", "sum")
CPU_DTYPES = FLOATING_GPU  # fp64 is for gradcheck: the reference does it

_TENSORS = "Tensor input, Tensor target, Tensor? weight, Tensor? pixel_weight"
_OPTIONS = "float[]? scale_factors, bool align_corners, int ignore_index, float label_smoothing"

_sums_native = native(
    f"_upsample_cross_entropy_sums({_TENSORS}, {_OPTIONS}, bool with_gradient) -> (Tensor, Tensor, Tensor)"
)
_pixels_native = native(f"_upsample_cross_entropy_pixels({_TENSORS}, {_OPTIONS}) -> Tensor")
_pixels_backward_native = native(
    f"_upsample_cross_entropy_pixels_backward({_TENSORS}, Tensor grad_losses, {_OPTIONS}) -> Tensor"
)
_statistics_native = native(
    f"_upsample_softmax_statistics({_TENSORS}, {_OPTIONS}, bool squared) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_statistics_backward_native = native(
    f"_upsample_softmax_statistics_backward({_TENSORS}, Tensor grad_intersection, Tensor grad_prediction,"
    f" Tensor grad_numerator, {_OPTIONS}, bool squared) -> Tensor"
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


def check_sums_backward(input, target, weight, pixel_weight, gradient, grad_numerator, *options):
    check(input, target, weight, pixel_weight, *options)
    _check.shape("upsample_cross_entropy_sums_backward", "grad_numerator", grad_numerator, ())


def check_pixels_backward(input, target, weight, pixel_weight, grad_losses, *options):
    check(input, target, weight, pixel_weight, *options)
    name = "upsample_cross_entropy_pixels_backward"
    _check.shape(name, "grad_losses", grad_losses, tuple(target.shape))
    _check.dtype(name, "grad_losses", grad_losses, (accumulator(input),))


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


def _like_input(input: Tensor, dtype: torch.dtype) -> Tensor:
    """Empty, of the shape of `input`: channels_last if that is how `input` lies in memory, else contiguous."""
    channels_last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty_like(input, dtype=dtype, memory_format=layout)


def fake_sums(input, *arguments):
    numerator, denominator = (input.new_empty((), dtype=torch.float64) for _ in range(2))
    with_gradient = arguments[-1]
    gradient = _like_input(input, accumulator(input)) if with_gradient else input.new_empty(0, dtype=accumulator(input))
    return numerator, denominator, gradient


def fake_pixels(input, target, *_):
    return input.new_empty(target.shape, dtype=accumulator(input))


def fake_statistics(input, *_):
    sums = [input.new_empty(input.shape[:2], dtype=torch.float64) for _ in range(3)]
    return *sums, *(input.new_empty((), dtype=torch.float64) for _ in range(2))


def fake_gradient(input, *_):
    return _like_input(input, input.dtype)


# --- autograd ---


def save_sums(ctx, inputs, output):
    *tensors, scale_factors, align_corners, ignore_index, label_smoothing, _with_gradient, _backend = inputs
    ctx.options = scale_factors, align_corners, ignore_index, label_smoothing
    _, denominator, gradient = output
    ctx.mark_non_differentiable(denominator, gradient)
    ctx.set_materialize_grads(False)  # no zeros of the gradient's size
    ctx.save_for_backward(*tensors, gradient)


def backward_sums(ctx, grad_numerator, _denominator, _gradient):
    if grad_numerator is None:
        return (None,) * 9
    input, *_, gradient = ctx.saved_tensors
    if gradient.numel() == input.numel() and not torch.is_grad_enabled():
        grad_input = scaled(gradient, grad_numerator).to(input.dtype)
    else:
        grad_input = upsample_cross_entropy_sums_backward(*ctx.saved_tensors, grad_numerator, *ctx.options)
    return grad_input, *[None] * 8


def save_pixels(ctx, inputs, output):
    *tensors, scale_factors, align_corners, ignore_index, label_smoothing, _backend = inputs
    ctx.options = scale_factors, align_corners, ignore_index, label_smoothing
    ctx.save_for_backward(*tensors)


def backward_pixels(ctx, grad_losses):
    return upsample_cross_entropy_pixels_backward(*ctx.saved_tensors, grad_losses, *ctx.options), *[None] * 7


def save_statistics(ctx, inputs, output):
    *tensors, scale_factors, align_corners, ignore_index, label_smoothing, squared, _backend = inputs
    ctx.options = scale_factors, align_corners, ignore_index, label_smoothing, squared
    ctx.mark_non_differentiable(output[2], output[4])
    ctx.save_for_backward(*tensors)


def backward_statistics(ctx, grad_intersection, grad_prediction, _truth, grad_numerator, _denominator):
    gradients = grad_intersection, grad_prediction, grad_numerator
    return upsample_softmax_statistics_backward(*ctx.saved_tensors, *gradients, *ctx.options), *[None] * 8


# --- what runs on the CPU ---


def _scale_gradient(input, target, weight, pixel_weight, gradient, grad_numerator, *options):
    """`gradient` is d numerator / d input, made in the forward; it is empty if that was not asked for."""
    if gradient.numel() == input.numel():
        return (gradient * grad_numerator).to(input.dtype)
    grad_losses = grad_numerator.to(accumulator(input)).expand(target.shape)
    return upsample_cross_entropy_pixels_backward(input, target, weight, pixel_weight, grad_losses, *options)


def _pixels_backward_cpu(input, *arguments):
    return _pixels_backward_native(input, *arguments).to(input.dtype)


def _statistics_backward_cpu(input, *arguments):
    return _statistics_backward_native(input, *arguments).to(input.dtype)


def _refuse_unless_built(*_):
    return _sums_native.missing("CPU")


def _backends(name: str, cpu: Callable, plain: Callable) -> list[Backend]:
    """`name`: of the launcher in kernels/upsample_cross_entropy/triton.py; `plain`: the reference."""
    return [
        Backend("cpu", cpu, dtypes=CPU_DTYPES, refuses=_refuse_unless_built),
        Backend("triton", lazy("upsample_cross_entropy.triton", name), dtypes=FLOATING_GPU),
        Backend("reference", plain),
    ]


upsample_cross_entropy_sums = Op(
    "upsample_cross_entropy_sums",
    f"({_TENSORS}, {_OPTIONS}, bool with_gradient) -> (Tensor, Tensor, Tensor)",
    check=check,
    fake=fake_sums,
    save=save_sums,
    backward=backward_sums,
    backends=_backends("sums", _sums_native, reference.upsample_cross_entropy_sums),
)
upsample_cross_entropy_sums_backward = Op(
    "upsample_cross_entropy_sums_backward",
    f"({_TENSORS}, Tensor gradient, Tensor grad_numerator, {_OPTIONS}) -> Tensor",
    check=check_sums_backward,
    fake=fake_gradient,
    differentiable=True,
    backends=_backends("sums_backward", _scale_gradient, reference.upsample_cross_entropy_sums_backward),
)
upsample_cross_entropy_pixels = Op(
    "upsample_cross_entropy_pixels",
    f"({_TENSORS}, {_OPTIONS}) -> Tensor",
    check=check,
    fake=fake_pixels,
    save=save_pixels,
    backward=backward_pixels,
    backends=_backends("pixels", _pixels_native, reference.upsample_cross_entropy_pixels),
)
upsample_cross_entropy_pixels_backward = Op(
    "upsample_cross_entropy_pixels_backward",
    f"({_TENSORS}, Tensor grad_losses, {_OPTIONS}) -> Tensor",
    check=check_pixels_backward,
    fake=fake_gradient,
    differentiable=True,
    backends=_backends(
        "pixels_backward", _pixels_backward_cpu, reference.upsample_cross_entropy_pixels_backward
    ),
)
upsample_softmax_statistics = Op(
    "upsample_softmax_statistics",
    f"({_TENSORS}, {_OPTIONS}, bool squared) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=check,
    fake=fake_statistics,
    save=save_statistics,
    backward=backward_statistics,
    backends=_backends("statistics", _statistics_native, reference.upsample_softmax_statistics),
)
upsample_softmax_statistics_backward = Op(
    "upsample_softmax_statistics_backward",
    f"({_TENSORS}, Tensor grad_intersection, Tensor grad_prediction, Tensor grad_numerator, {_OPTIONS},"
    " bool squared) -> Tensor",
    check=check_statistics_backward,
    fake=fake_gradient,
    differentiable=True,
    backends=_backends(
        "statistics_backward", _statistics_backward_cpu, reference.upsample_softmax_statistics_backward
    ),
)


# --- public functions ---


def _op_arguments(name, input, target, size, scale_factor, weight, pixel_weight):
    """((input, target, weight, pixel_weight) as the ops take them, scale factors or None)."""
    _check.tensor(name, "input", input)
    _check.tensor(name, "target", target)
    _check.dtype(name, "input", input, FLOATING)
    _check.shape(name, "input", input, ("N", "C", "h", "w"))
    output_size, scale_factors = output_size_and_scales(name, input, size, scale_factor)
    _check.dtype(name, "target", target, LABELS)
    height, width = output_size or ("H", "W")
    _check.shape(name, "target", target, (input.size(0), height, width), "N, and the size of the upsampled logits")
    for argument, value in (("weight", weight), ("pixel_weight", pixel_weight)):
        if value is None:
            continue
        _check.tensor(name, argument, value)
        _check.dtype(name, argument, value, FLOATING)
        if value.requires_grad:
            raise RuntimeError(f"fastseg.ops.{name}: {argument} requires grad; allowed: a constant")
    weight, pixel_weight = (
        None if value is None else value.to(accumulator(input)) for value in (weight, pixel_weight)
    )
    return (input, target, weight, pixel_weight), scale_factors


def _smoothing(input: Tensor, label_smoothing: float) -> float:
    """0 where there is one class: nothing to spread, and the loss and its gradient stay exactly 0."""
    return 0.0 if input.size(1) == 1 else float(label_smoothing)


def upsample_cross_entropy(
    input: Tensor,
    target: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    align_corners: bool = False,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    pixel_weight: Tensor | None = None,
    zero_if_empty: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of bilinearly upsampled logits, without ever making the upsampled logits.

    Equals F.cross_entropy(F.interpolate(input, size, scale_factor, mode="bilinear",
    align_corners=align_corners), target, weight, ignore_index=ignore_index, reduction=reduction,
    label_smoothing=label_smoothing), F being torch.nn.functional, with torch's sampling rule on the CPU
    (clamped below 0; 1/scale_factor where that is given). Peak extra memory is at most 4 times `input` and 8
    bytes per output pixel, forward and backward together.

    Args:
        input: low-resolution logits (N, C, h, w) in fp32, fp16, bf16 or fp64, contiguous, channels_last or strided.
        target: labels (N, H, W), in int64, int32 or uint8.
        size: (H, W) or one number for both; by default the size of `target`. Both up- and downsampling work.
        scale_factor: instead of `size`, one factor or (vertical, horizontal).
        align_corners: the corner pixels' centres coincide; otherwise the corners' corners do.
        weight: (C,) floating class weights. A constant.
        ignore_index: label of pixels that count for nothing; may lie inside or outside [0, C).
        reduction: "none": losses (N, H, W); "mean": sum v w_y loss / sum v w_y; "sum".
        label_smoothing: in [0, 1], as in torch.
        pixel_weight: floating weights v (N, H, W) of the losses, for instance U-Net's map. A constant.
        zero_if_empty: 0 rather than NaN for the mean over no pixel. The gradient is zero either way.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        The loss in the dtype of `input` (fp32 for half types under autocast). Twice differentiable in `input`.

    Raises:
        IndexError: on CPU, a label outside [0, C) that is not `ignore_index`. (On a GPU it counts for nothing.)
        RuntimeError, ValueError, TypeError: a dtype, shape, device or option not listed above.
    """
    name = "upsample_cross_entropy"
    _check.one_of(name, "reduction", reduction, REDUCTIONS)
    tensors, scale_factors = _op_arguments(name, input, target, size, scale_factor, weight, pixel_weight)
    options = scale_factors, bool(align_corners), ignore_index, _smoothing(input, label_smoothing)
    if reduction == "none":
        losses = upsample_cross_entropy_pixels(*tensors, *options, backend=backend)
        return losses.to(loss_dtype(input))
    # On the CPU the gradient is made while the probabilities are at hand; it is as small as `input`.
    in_forward = input.device.type == "cpu" and input.dtype in CPU_DTYPES
    with_gradient = in_forward and input.requires_grad and torch.is_grad_enabled()
    numerator, denominator, _ = upsample_cross_entropy_sums(*tensors, *options, with_gradient, backend=backend)
    if reduction == "sum":
        return numerator.to(loss_dtype(input))
    if denominator.device.type == "cpu" and not somebody_watches((denominator,)):
        known = denominator.item()  # nothing to wait for: one operation instead of four
        if known != 0:
            return (numerator / known).to(loss_dtype(input))
    empty = denominator == 0
    mean = numerator / torch.where(empty, 1.0, denominator)
    return torch.where(empty, 0.0 if zero_if_empty else float("nan"), mean).to(loss_dtype(input))


def upsample_cross_entropy_dice(
    input: Tensor,
    target: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    align_corners: bool = False,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    ce_weight: float = 1.0,
    dice_weight: float = 1.0,
    pixel_weight: Tensor | None = None,
    include_background: bool = True,
    squared: bool = True,
    smooth: float = 1e-6,
    per_image: bool = False,
    zero_if_empty: bool = False,
    process_group=None,
    backend: str = "auto",
) -> Tensor:
    """`fastseg.ops.cross_entropy_dice` of bilinearly upsampled logits, without ever making the upsampled logits.

    Equals cross_entropy_dice(F.interpolate(input, size, scale_factor, mode="bilinear",
    align_corners=align_corners), target, ...): the forward gives the Dice sums per image and class and the
    two sums of the cross-entropy, the backward makes the probabilities once more. Peak extra memory as for
    `upsample_cross_entropy`.

    Args:
        input, target, size, scale_factor, align_corners, weight, ignore_index, label_smoothing, pixel_weight, backend:
            see `upsample_cross_entropy`.
        ce_weight, dice_weight, include_background, squared, smooth, per_image, zero_if_empty, process_group:
            see `cross_entropy_dice`.

    Returns:
        The loss, a scalar in `input`'s dtype (fp32 for half types under autocast). Twice differentiable in `input`.

    Raises:
        IndexError: on CPU, a label outside [0, C) that is not `ignore_index`. (On a GPU it counts for nothing.)
        RuntimeError, ValueError, TypeError: a dtype, shape, device or option not listed above.
    """
    name = "upsample_cross_entropy_dice"
    tensors, scale_factors = _op_arguments(name, input, target, size, scale_factor, weight, pixel_weight)
    check_dice(name, input.size(1), include_background, smooth)
    options = scale_factors, bool(align_corners), ignore_index, _smoothing(input, label_smoothing)
    statistics = upsample_softmax_statistics(*tensors, *options, bool(squared), backend=backend)
    return cross_entropy_dice_of(
        statistics, ce_weight, dice_weight, smooth, include_background, per_image, zero_if_empty, process_group,
        loss_dtype(input), backend,
    )
