"""Softmax cross-entropy and Dice loss from one read of the logits.

    p = softmax(z) over the C classes, y one-hot, V the pixels whose label is not `ignore_index`
    dice[n, c]     = (2 I + smooth) / (P + T + smooth),  I = sum_V p y,  P = sum_V p^2 or p,  T = sum_V y
    cross_entropy  = sum_V w_y (logsumexp(z) - z_y) / sum_V w_y                         (label smoothing as in torch)

The sums come from statistics.py, the loss of the sums from loss_of_sums.py. Sources: V-Net (squared Dice),
torch.nn.functional.cross_entropy.
"""

from torch import Tensor

from fastseg import _check
from fastseg._dtypes import FLOATING, LABELS, accumulator, loss_dtype
from fastseg._reduction import NONE, SUM, reduction_number
from fastseg.kernels.cross_entropy_dice.arithmetic import dice_per_class
from fastseg.ops.cross_entropy_dice.loss_of_sums import check_dice, counted, cross_entropy_dice_of, sum_over_ranks
from fastseg.ops.cross_entropy_dice.statistics import softmax_statistics

__all__ = ["cross_entropy_dice", "dice_loss"]


def _check_call(name, input, target, weight, pixel_weight, label_smoothing):
    """Checks the caller's arguments: input (N, C, ...), target and pixel_weight (N, ...); or (C,) and ()."""
    _check.tensors(name, input=input)
    _check.argument(name, "input", input, FLOATING, input.shape)
    if input.dim() == 0:
        raise ValueError(f"fastseg.ops.{name}: input has shape (); allowed: (C,) or (N, C, ...)")
    maps = (input.size(0), *input.shape[2:]) if input.dim() > 1 else ()
    classes = input.size(min(1, input.dim() - 1))
    if classes == 0:
        allowed = "(C,) or (N, C, ...) with C of at least 1"
        raise ValueError(f"fastseg.ops.{name}: input has shape {tuple(input.shape)}; allowed: {allowed}")
    like = ("input", input)
    _check.argument(name, "target", target, LABELS, maps, "input without its class dimension", like=like)
    _check.in_range(name, "label_smoothing", label_smoothing, 0.0, 1.0)
    for argument, value, shape in (("weight", weight, (classes,)), ("pixel_weight", pixel_weight, maps)):
        if value is not None:
            _check.argument(name, argument, value, FLOATING, shape, like=like)
            _check.constant(name, argument, value)


def _as_images(input: Tensor, target: Tensor, pixel_weight: Tensor | None, per_image: bool):
    """input as (N, C, ...), target and pixel_weight as (N, ...): views of the caller's tensors.

    A row of (N, C) logits is an image with `per_image`, else a pixel of one image.
    """
    if input.dim() == 1:
        input, target = input.unsqueeze(0), target.unsqueeze(0)
        pixel_weight = None if pixel_weight is None else pixel_weight.unsqueeze(0)
    if input.dim() == 2 and not per_image:
        input, target = input.t().unsqueeze(0), target.unsqueeze(0)
        pixel_weight = None if pixel_weight is None else pixel_weight.unsqueeze(0)
    if pixel_weight is not None:
        pixel_weight = pixel_weight.to(accumulator(input.dtype))
    return input, target, pixel_weight


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

    A class with neither truth nor predicted probability has loss 0; a class with only one of the two, or with both
    at different pixels, has loss 1. smooth=0 gives the quotient alone, NaN for an empty class.

    Args:
        input: logits (N, C, d1, ..., dk), (N, C) or (C,), in fp32, fp16, bf16 or fp64; NC... and
            channels_last are both read in place.
        target: labels (N, d1, ..., dk), (N,) or (), in int64, int32 or uint8.
        weight: (C,) floating class weights of the mean over classes, sum_c w_c loss_c / sum_c w_c. A constant.
        ignore_index: label of pixels that do not count in the loss or its gradient, for any logits;
            None for none.
        include_background: False leaves class 0 out of the mean.
        per_image: average over the quotients of the images (of the rows of (N, C) input); otherwise the sums run
            over the whole batch.
        reduction: "mean"; "sum" of w_c loss_c; "none": the w_c loss_c, of shape (C',), or (N, C') with
            per_image, where C' is C, or C - 1 without background.
        process_group: a torch.distributed group. The sums run over its ranks before the quotient, so that every
            rank returns the loss of the whole batch. The gradient at `input` is that of the sum over ranks:
            (number of ranks) x the gradient of that one loss. DistributedDataParallel averages over ranks, so the
            parameters get exactly the single-process gradient. Every rank must call forward and backward.
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        The loss in the dtype of `input` (fp32 for half types under autocast). Twice differentiable in `input`.
        The backward needs the arguments unchanged: after an in-place change PyTorch raises.

    Raises:
        IndexError: on CPU, a label outside [0, C) that is not `ignore_index`. (On a GPU such a pixel does not count.)
        RuntimeError, ValueError, TypeError: a dtype, shape, device or option not listed above.
    """
    name = "dice_loss"
    reduced = reduction_number(name, reduction)
    smooth = _check.number(name, "smooth", smooth)
    _check.booleans(name, include_background=include_background, squared=squared, per_image=per_image)
    ignore_index = _check.label(name, "ignore_index", ignore_index)
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
        weight = weight.to(loss.dtype)[-loss.size(1) :]
    loss = loss * weight
    if reduced == NONE:
        return (loss if per_image else loss.squeeze(0)).to(loss_dtype(input))
    total, count = loss.sum(), weight.sum() * loss.size(0)
    if per_image:
        total, count = sum_over_ranks((total, count), process_group)
    return (total if reduced == SUM else total / count).to(loss_dtype(input))


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
        ignore_index: label of pixels that do not count in the loss or its gradient, for any logits;
            None for none.
        label_smoothing: of the cross-entropy, in [0, 1].
        pixel_weight: floating weights shaped like `target`, of the cross-entropy alone: the mean becomes
            sum v w_y l / sum v w_y. A constant.
        include_background, squared, smooth, per_image: of the Dice loss, see `dice_loss`.
        zero_if_empty: 0 instead of NaN for a mean over nothing (no pixel left in the batch).
        process_group: as for `dice_loss`; the cross-entropy too becomes the mean over the pixels of all ranks.
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        The loss, a scalar in `input`'s dtype (fp32 for half types under autocast). Twice differentiable in `input`.
        The backward needs the arguments unchanged: after an in-place change PyTorch raises.

    Raises:
        IndexError: on CPU, a label outside [0, C) that is not `ignore_index`. (On a GPU such a pixel does not count.)
        RuntimeError, ValueError, TypeError: a dtype, shape, device or option not listed above.
    """
    name = "cross_entropy_dice"
    _check.booleans(
        name, include_background=include_background, squared=squared, per_image=per_image, zero_if_empty=zero_if_empty
    )
    ignore_index = _check.label(name, "ignore_index", ignore_index)
    label_smoothing, ce_weight, dice_weight, smooth = _check.numbers(
        name, label_smoothing=label_smoothing, ce_weight=ce_weight, dice_weight=dice_weight, smooth=smooth
    )
    _check_call(name, input, target, weight, pixel_weight, label_smoothing)
    images, labels, pixel_weight = _as_images(input, target, pixel_weight, per_image)
    check_dice(name, images.size(1), include_background, smooth)
    weight = None if weight is None else weight.to(accumulator(input.dtype))
    arguments = images, labels, weight, pixel_weight, ignore_index, label_smoothing, squared
    statistics = softmax_statistics(*arguments, backend=backend)
    return cross_entropy_dice_of(
        statistics,
        ce_weight,
        dice_weight,
        smooth,
        include_background,
        per_image,
        zero_if_empty,
        process_group,
        loss_dtype(input),
        backend,
    )
