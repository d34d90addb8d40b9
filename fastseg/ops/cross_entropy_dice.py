"""Softmax cross-entropy and Dice loss from one read of the logits.

    p = softmax(z) over the C classes, y one-hot, V the pixels whose label is not `ignore_index`
    dice[n, c]     = (2 I + smooth) / (P + T + smooth),  I = sum_V p y,  P = sum_V p^2 or p,  T = sum_V y
    cross_entropy  = sum_V w_y (logsumexp(z) - z_y) / sum_V w_y                         (label smoothing as in torch)

The op `softmax_statistics` reads the logits once and gives I, P, T and the two sums of the cross-entropy; the
losses are arithmetic on those few numbers, which autograd differentiates. `softmax_statistics_backward` turns
the gradients of the statistics into the gradient of the logits in one pass:

    dz = p (h - sum_k p_k h_k) + cross-entropy part,  h = 2 p dP (or dP) + y dI

It computes the softmax again: a stored fp32 logsumexp would lose digits of large logits. Sources: V-Net
(squared Dice), torch.nn.functional.cross_entropy.
"""

import torch
from torch import Tensor

from fastseg import _check
from fastseg._first_op import FLOATING, FLOATING_GPU, Backend, Op, native
from fastseg._triton import lazy
from fastseg.kernels.cross_entropy_dice import reference
from fastseg.ops._dice import check_dice, counted, cross_entropy_dice_of, dice_per_class, loss_dtype, sum_over_ranks

LABELS = (torch.int64, torch.int32, torch.uint8)

_forward_native = native(
    "_softmax_statistics_forward(Tensor input, Tensor target, Tensor? weight, Tensor? pixel_weight, int ignore_index,"
    " float label_smoothing, bool squared) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_backward_native = native(
    "_softmax_statistics_backward(Tensor input, Tensor target, Tensor? weight, Tensor? pixel_weight,"
    " Tensor grad_intersection, Tensor grad_prediction, Tensor grad_numerator, int ignore_index, float label_smoothing,"
    " bool squared) -> Tensor"
)

_forward_triton = lazy("cross_entropy_dice.triton", "softmax_statistics")
_backward_triton = lazy("cross_entropy_dice.triton", "softmax_statistics_backward")
_MOST_CLASSES_TRITON = 4096  # that fit in the registers of a block


def _refuses_triton(input, *others):
    too_many = input.size(1) > _MOST_CLASSES_TRITON
    return (
        f"{input.size(1)} classes; at most {_MOST_CLASSES_TRITON} fit in the registers of a block" if too_many else None
    )


def accumulator(input: Tensor) -> torch.dtype:
    """What the kernels compute in, and the dtype of `weight` and `pixel_weight`."""
    return torch.promote_types(input.dtype, torch.float32)


def check(input, target, weight, pixel_weight, ignore_index, label_smoothing, squared):
    """input (N, C, P), target (N, P), weight (C,), pixel_weight (N, P)."""
    name = "softmax_statistics"
    _check.dtype(name, "input", input, FLOATING)
    _check.shape(name, "input", input, ("N", "C", "P"))
    _check.dtype(name, "target", target, LABELS)
    images, classes, pixels = input.shape
    _check.shape(name, "target", target, (images, pixels))
    _check.same_device(name, "target", target, "input", input)
    constants = ("weight", weight, (classes,)), ("pixel_weight", pixel_weight, (images, pixels))
    for argument, value, shape in constants:
        if value is not None:
            _check.dtype(name, argument, value, (accumulator(input),))
            _check.shape(name, argument, value, shape)
            _check.same_device(name, argument, value, "input", input)
    _check.in_range(name, "label_smoothing", label_smoothing, 0.0, 1.0)


def fake(input, target, weight, pixel_weight, ignore_index, label_smoothing, squared):
    images, classes, _ = input.shape
    sums = [input.new_empty((images, classes), dtype=torch.float64) for _ in range(3)]
    scalars = [input.new_empty((), dtype=torch.float64) for _ in range(2)]
    return *sums, *scalars


def save(ctx, inputs, output):
    input, target, weight, pixel_weight, *ctx.constants, _ = inputs
    intersection, prediction, truth, numerator, denominator = output
    ctx.mark_non_differentiable(truth, denominator)
    ctx.save_for_backward(input, target, weight, pixel_weight)


def backward(ctx, grad_intersection, grad_prediction, _truth, grad_numerator, _denominator):
    grads = grad_intersection, grad_prediction, grad_numerator
    return softmax_statistics_backward(*ctx.saved_tensors, *grads, *ctx.constants), *[None] * 6


def check_backward(input, target, weight, pixel_weight, grad_intersection, grad_prediction, grad_numerator,
                   ignore_index, label_smoothing, squared):
    check(input, target, weight, pixel_weight, ignore_index, label_smoothing, squared)
    name = "softmax_statistics_backward"
    for argument, value in (("grad_intersection", grad_intersection), ("grad_prediction", grad_prediction)):
        _check.shape(name, argument, value, input.shape[:2])
        _check.dtype(name, argument, value, (torch.float64,))
    _check.shape(name, "grad_numerator", grad_numerator, ())
    _check.dtype(name, "grad_numerator", grad_numerator, (torch.float64,))


def fake_backward(input, *others):
    """Pixels or classes contiguous: the layout of the input; anything else is copied to (N, C, P) first."""
    walkable = input.stride(1) == 1 or input.stride(2) == 1
    return torch.empty_like(input, memory_format=torch.preserve_format if walkable else torch.contiguous_format)


softmax_statistics = Op(
    "softmax_statistics",
    "(Tensor input, Tensor target, Tensor? weight, Tensor? pixel_weight, int ignore_index, float label_smoothing,"
    " bool squared) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=check,
    fake=fake,
    save=save,
    backward=backward,
    backends=[
        Backend("cpu", _forward_native, dtypes=FLOATING),
        Backend("triton", _forward_triton, dtypes=FLOATING_GPU, refuses=_refuses_triton),
        Backend("reference", reference.softmax_statistics),
    ],
)
softmax_statistics_backward = Op(
    "softmax_statistics_backward",
    "(Tensor input, Tensor target, Tensor? weight, Tensor? pixel_weight, Tensor grad_intersection,"
    " Tensor grad_prediction, Tensor grad_numerator, int ignore_index, float label_smoothing, bool squared) -> Tensor",
    check=check_backward,
    fake=fake_backward,
    differentiable=True,
    backends=[
        Backend("cpu", _backward_native, dtypes=FLOATING),
        Backend("triton", _backward_triton, dtypes=FLOATING_GPU, refuses=_refuses_triton),
        Backend("reference", reference.softmax_statistics_backward),
    ],
)


def _check_call(name, input, target, weight, pixel_weight, label_smoothing):
    """The arguments as the caller gave them: input (N, C, ...), target and pixel_weight (N, ...); or (C,) and ()."""
    _check.tensor(name, "input", input)
    _check.tensor(name, "target", target)
    _check.dtype(name, "input", input, FLOATING)
    _check.dtype(name, "target", target, LABELS)
    if input.dim() == 0:
        raise ValueError(f"fastseg.ops.{name}: input has shape (); allowed: (C,) or (N, C, ...)")
    maps = (input.size(0), *input.shape[2:]) if input.dim() > 1 else ()
    classes = input.size(min(1, input.dim() - 1))
    if classes == 0:
        allowed = "(C,) or (N, C, ...) with C of at least 1"
        raise ValueError(f"fastseg.ops.{name}: input has shape {tuple(input.shape)}; allowed: {allowed}")
    _check.shape(name, "target", target, maps, f"input has shape {tuple(input.shape)}")
    _check.same_device(name, "target", target, "input", input)
    _check.in_range(name, "label_smoothing", label_smoothing, 0.0, 1.0)
    for argument, value, shape in (("weight", weight, (classes,)), ("pixel_weight", pixel_weight, maps)):
        if value is None:
            continue
        _check.tensor(name, argument, value)
        _check.dtype(name, argument, value, FLOATING)
        _check.shape(name, argument, value, shape)
        _check.same_device(name, argument, value, "input", input)
        if value.requires_grad:
            raise RuntimeError(f"fastseg.ops.{name}: {argument} requires grad; allowed: a constant")


def _as_images(input: Tensor, target: Tensor, pixel_weight: Tensor | None, per_image: bool):
    """input as (N, C, P), target and pixel_weight as (N, P): views wherever the layout is NC... or channels_last."""
    if input.dim() == 1:
        input = input.unsqueeze(0)
    if input.dim() == 2 and not per_image:  # N pixels of one image, channels last
        input = input.t().unsqueeze(0)
    elif input.dim() == 2:
        input = input.unsqueeze(2)
    else:
        input = input.flatten(2)
    maps = (input.size(0), input.size(2))
    if pixel_weight is not None:
        pixel_weight = pixel_weight.to(accumulator(input)).reshape(maps)
    return input, target.reshape(maps), pixel_weight


def dice_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    include_background: bool = True,
    squared: bool = True,
    smooth: float = 1e-6,
    per_image: bool = False,
    reduction: str = "mean",
    process_group=None,
    backend: str = "auto",
) -> Tensor:
    """Dice loss of the softmax of `input` against integer labels, from one read of the logits.

    Per class c, with sums over all pixels whose label is not `ignore_index`:

        squared=True   1 - (2 sum p y + smooth) / (sum p^2 + sum y^2 + smooth)       (V-Net)
        squared=False  1 - (2 sum p y + smooth) / (sum p   + sum y   + smooth)

    A class with neither truth nor predicted probability has loss 0; one that is only predicted (or, with all
    of its probability elsewhere, only true) has loss 1. smooth=0 gives the bare quotient, NaN for an empty
    class.

    Args:
        input: logits (N, C, d1, ..., dk), (N, C) or (C,), in fp32, fp16, bf16 or fp64; NC... and
            channels_last are both read in place.
        target: labels (N, d1, ..., dk), (N,) or (), in int64, int32 or uint8.
        weight: (C,) floating class weights of the mean over classes, sum_c w_c loss_c / sum_c w_c. A constant.
        ignore_index: label of pixels that count for nothing, in the value and in the gradient, whatever their logits.
        include_background: False leaves class 0 out of the mean.
        per_image: the quotient is taken per image (per row for (N, C) input) and averaged; otherwise the sums
            run over the whole batch.
        reduction: "mean"; "sum" of w_c loss_c; "none": the w_c loss_c, of shape (C',), or (N, C') with
            per_image, where C' is C, or C - 1 without background.
        process_group: a torch.distributed group over whose ranks the sums are taken before the quotient, so
            that every rank returns the loss of the whole batch. The gradient of the sum over ranks is what
            arrives at `input`: (number of ranks) x the gradient of that one loss, which
            DistributedDataParallel's averaging over ranks turns into exactly the single-process gradient of
            the parameters. Every rank must take part, in forward and in backward.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        The loss in the dtype of `input` (fp32 for half types under autocast). Twice differentiable in `input`.

    Raises:
        IndexError: on CPU, a label outside [0, C) that is not `ignore_index`. (On a GPU it counts for nothing.)
        RuntimeError, ValueError, TypeError: a dtype, shape, device or option not listed above.
    """
    name = "dice_loss"
    _check.one_of(name, "reduction", reduction, ("mean", "sum", "none"))
    _check_call(name, input, target, weight, None, 0.0)
    images, labels, _ = _as_images(input, target, None, per_image)
    check_dice(name, images.size(1), include_background, smooth)
    statistics = softmax_statistics(images, labels, None, None, ignore_index, 0.0, squared, backend=backend)
    sums = counted(statistics[:3], include_background)
    if not per_image:
        sums = sum_over_ranks([values.sum(0, keepdim=True) for values in sums], process_group)
    loss = dice_per_class(*sums, smooth)  # (1 or N, C')
    if weight is None:
        weight = loss.new_ones(loss.size(1))
    else:
        weight = weight.to(loss.dtype)[-loss.size(1):]
    loss = loss * weight
    if reduction == "none":
        return (loss if per_image else loss.squeeze(0)).to(loss_dtype(input))
    total, count = loss.sum(), weight.sum() * loss.size(0)
    if per_image:
        total, count = sum_over_ranks((total, count), process_group)
    return (total if reduction == "sum" else total / count).to(loss_dtype(input))


def cross_entropy_dice(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ce_weight: float = 1.0,
    dice_weight: float = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    pixel_weight: Tensor | None = None,
    include_background: bool = True,
    squared: bool = True,
    smooth: float = 1e-6,
    per_image: bool = False,
    zero_if_empty: bool = False,
    process_group=None,
    backend: str = "auto",
) -> Tensor:
    """ce_weight * cross-entropy + dice_weight * Dice loss, from one read of the logits, with a one-pass backward.

    The cross-entropy is torch.nn.functional.cross_entropy(input, target, weight, ignore_index=...,
    label_smoothing=...) with reduction "mean"; the Dice loss is `fastseg.ops.dice_loss` with reduction "mean"
    and no class weights.

    Args:
        input: logits (N, C, d1, ..., dk), (N, C) or (C,), in fp32, fp16, bf16 or fp64; NC... and
            channels_last are both read in place.
        target: labels (N, d1, ..., dk), (N,) or (), in int64, int32 or uint8.
        weight: (C,) floating class weights of the cross-entropy. A constant.
        ce_weight, dice_weight: factors of the two terms; a term with factor 0 is left out.
        ignore_index: label of pixels that count for nothing, in the value and in the gradient, whatever their logits.
        label_smoothing: of the cross-entropy, in [0, 1].
        pixel_weight: floating weights shaped like `target`, of the cross-entropy alone: the mean becomes
            sum v w_y l / sum v w_y. A constant.
        include_background, squared, smooth, per_image: of the Dice loss, see `dice_loss`.
        zero_if_empty: 0 instead of NaN for a mean over nothing (no pixel left in the batch).
        process_group: as for `dice_loss`; the cross-entropy too becomes the mean over the pixels of all ranks.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        The loss, a scalar in `input`'s dtype (fp32 for half types under autocast). Twice differentiable in `input`.

    Raises:
        IndexError: on CPU, a label outside [0, C) that is not `ignore_index`. (On a GPU it counts for nothing.)
        RuntimeError, ValueError, TypeError: a dtype, shape, device or option not listed above.
    """
    name = "cross_entropy_dice"
    _check_call(name, input, target, weight, pixel_weight, label_smoothing)
    images, labels, pixel_weight = _as_images(input, target, pixel_weight, per_image)
    check_dice(name, images.size(1), include_background, smooth)
    weight = None if weight is None else weight.to(accumulator(input))
    arguments = images, labels, weight, pixel_weight, ignore_index, float(label_smoothing), squared
    statistics = softmax_statistics(*arguments, backend=backend)
    return cross_entropy_dice_of(
        statistics, ce_weight, dice_weight, smooth, include_background, per_image, zero_if_empty, process_group,
        loss_dtype(input), backend,
    )
