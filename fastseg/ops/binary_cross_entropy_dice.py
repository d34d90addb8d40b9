"""Sigmoid cross-entropy and Dice loss of a one-channel mask from one read of the logits.

    p = sigmoid(z), y the mask, V the pixels whose target is not `ignore_index`
    cross_entropy = sum_V v [(1 - y) z + (1 + (pos_weight - 1) y) log(1 + exp(-z))] / sum_V v
    dice[n]       = (2 I + smooth) / (P + T + smooth),  I = sum_V p y,  P, T = sum_V p^2, y^2 (squared) or p, y

The op `sigmoid_statistics` reads logits and mask once and computes these sums; `loss_of_sums` computes the loss
from them. `sigmoid_statistics_backward` computes the gradient of the logits in one pass.
"""

import torch
from torch import Tensor

from fastseg import _check
from fastseg._backend import rows
from fastseg._dtypes import FLOATING, accumulator, loss_dtype
from fastseg._layout import in_memory_order
from fastseg._op import THROUGH_REFERENCE, Op
from fastseg.kernels.binary_cross_entropy_dice import reference
from fastseg.ops.cross_entropy_dice.loss_of_sums import cross_entropy_dice_of
from fastseg.ops.cross_entropy_dice.statistics import check_gradients, empty_sums

TARGETS = (*FLOATING, torch.bool, torch.uint8, torch.int32, torch.int64)
_INPUTS = "Tensor input, Tensor target, Tensor? pos_weight, Tensor? pixel_weight"
_OPTIONS = "float? ignore_index, bool squared"


def check(input, target, pos_weight, pixel_weight):
    """input, target and pixel_weight (N, P), pos_weight ()."""
    name = "sigmoid_statistics"
    _check.argument(name, "input", input, FLOATING, ("N", "P"))
    _check.argument(name, "target", target, TARGETS, input.shape, like=("input", input))
    for argument, value, shape in (("pos_weight", pos_weight, ()), ("pixel_weight", pixel_weight, input.shape)):
        if value is not None:
            _check.argument(name, argument, value, (accumulator(input.dtype),), shape, like=("input", input))


def backward(
    input, target, pos_weight, pixel_weight, grad_intersection, grad_prediction, grad_numerator,
    ignore_index, squared, backend,
):  # fmt: skip
    grad_input = sigmoid_statistics_backward(
        input, target, pos_weight, pixel_weight, grad_intersection, grad_prediction, grad_numerator,
        ignore_index, squared, backend=backend,
    )  # fmt: skip
    return {"input": grad_input}


sigmoid_statistics = Op(
    f"sigmoid_statistics({_INPUTS}, {_OPTIONS}) -> "
    "(Tensor intersection, Tensor prediction, Tensor truth, Tensor numerator, Tensor denominator)",
    check=check,
    outputs=lambda input: empty_sums(input, input.shape[:1]),
    backward=backward,
    internal=True,
    contiguous=("input", "target", "pixel_weight"),
    backends=rows(reference.sigmoid_statistics, triton="binary_cross_entropy_dice.triton.sigmoid_statistics"),
)


def check_backward(input, target, pos_weight, pixel_weight, grad_intersection, grad_prediction, grad_numerator):
    check(input, target, pos_weight, pixel_weight)
    name = "sigmoid_statistics_backward"
    check_gradients(name, input.shape[:1], grad_intersection, grad_prediction, grad_numerator)


sigmoid_statistics_backward = Op(
    f"sigmoid_statistics_backward({_INPUTS}, Tensor grad_intersection, Tensor grad_prediction, Tensor grad_numerator,"
    f" {_OPTIONS}) -> Tensor grad_input",
    check=check_backward,
    outputs=lambda input: torch.empty_like(input, memory_format=torch.contiguous_format),
    backward=THROUGH_REFERENCE,
    internal=True,
    contiguous=("input", "target", "pixel_weight", "grad_intersection", "grad_prediction"),
    backends=rows(
        reference.sigmoid_statistics_backward,
        triton="binary_cross_entropy_dice.triton.sigmoid_statistics_backward",
    ),
)


def binary_cross_entropy_dice(
    input: Tensor,
    target: Tensor,
    *,
    bce_weight: float = 1.0,
    dice_weight: float = 1.0,
    pos_weight: float | Tensor | None = None,
    ignore_index: int | None = None,
    squared: bool = True,
    smooth: float = 1e-6,
    per_image: bool = False,
    pixel_weight: Tensor | None = None,
    zero_if_empty: bool = False,
    process_group=None,
    backend: str = "auto",
) -> Tensor:
    """bce_weight * BCE + dice_weight * Dice loss of sigmoid(input) for one-channel masks, from one read of the logits.

    The BCE is torch.nn.functional.binary_cross_entropy_with_logits with reduction "mean"; the Dice loss is,
    with sums over the pixels of the batch (of each image with `per_image`, then averaged over the images),

        squared=True   1 - (2 sum p y + smooth) / (sum p^2 + sum y^2 + smooth)       (V-Net)
        squared=False  1 - (2 sum p y + smooth) / (sum p   + sum y   + smooth)

    An empty mask has loss 0 if p is 0 everywhere, else about 1.

    Args:
        input: logits (N, ...), e.g. (N, 1, H, W) or (N, H, W), in fp32, fp16, bf16 or fp64.
        target: the mask, shaped like `input`: bool, uint8, int32, int64 holding 0 and 1, or floating, between 0 and 1.
        bce_weight, dice_weight: factors of the two terms; a term with factor 0 is left out.
        pos_weight: factor of the positives in the BCE, a number or a tensor of one element, as in torch. A constant.
        ignore_index: target value of pixels that do not count in the loss or its gradient, for any logits; an integer
            such as 255, or None for none.
        smooth: 0 gives the quotient alone, NaN if nothing is true or predicted.
        pixel_weight: floating weights v shaped like `input`, for the BCE alone: its mean becomes sum v l / sum v. A
            constant.
        zero_if_empty: 0 instead of NaN for a mean over nothing.
        process_group: ranks over which the sums are taken before the quotients; see `fastseg.ops.dice_loss`.
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        The loss, a scalar in `input`'s dtype (fp32 for half types under autocast). Twice differentiable in `input`.
        The backward needs the arguments unchanged: after an in-place change PyTorch raises.

    Raises:
        IndexError: on CPU, an integer target other than 0, 1 and `ignore_index`.
        RuntimeError, ValueError, TypeError: a dtype, shape, device or option not listed above.
    """
    name = "binary_cross_entropy_dice"
    _check.booleans(name, squared=squared, per_image=per_image, zero_if_empty=zero_if_empty)
    bce_weight, dice_weight, smooth = _check.numbers(
        name, bce_weight=bce_weight, dice_weight=dice_weight, smooth=smooth
    )
    ignored = None if ignore_index is None else float(_check.label(name, "ignore_index", ignore_index))
    pixel_weight = _check_call(name, input, target, pixel_weight, smooth)
    pos_weight = _pos_weight(name, input, pos_weight)
    flat = in_memory_order(input, target, pixel_weight)
    if per_image:
        rows = (input.size(0), input[0].numel() if input.size(0) else 0)
        flat = [None if tensor is None else tensor.view(rows) for tensor in flat]
    else:
        flat = [None if tensor is None else tensor.unsqueeze(0) for tensor in flat]
    logits, mask, pixel_weight = flat
    statistics = sigmoid_statistics(logits, mask, pos_weight, pixel_weight, ignored, squared, backend=backend)
    *sums, numerator, denominator = statistics
    return cross_entropy_dice_of(
        (*(values.unsqueeze(1) for values in sums), numerator, denominator),
        bce_weight,
        dice_weight,
        smooth,
        True,
        per_image,
        zero_if_empty,
        process_group,
        loss_dtype(input),
        backend,
    )


def _check_call(name, input, target, pixel_weight, smooth):
    """Checks the caller's arguments; returns pixel_weight in the accumulator dtype."""
    _check.tensors(name, input=input)
    _check.argument(name, "input", input, FLOATING, input.shape)
    if input.dim() == 0:
        raise ValueError(f"fastseg.ops.{name}: input has shape (); allowed: (N, ...)")
    if not smooth >= 0:
        raise ValueError(f"fastseg.ops.{name}: smooth={smooth!r}; allowed: 0 and above")
    like, what = ("input", input), "the shape of input"
    _check.argument(name, "target", target, TARGETS, input.shape, what, like=like)
    _check.constant(name, "target", target)
    if pixel_weight is None:
        return None
    _check.argument(name, "pixel_weight", pixel_weight, FLOATING, input.shape, what, like=like)
    _check.constant(name, "pixel_weight", pixel_weight)
    return pixel_weight.to(accumulator(input.dtype))


def _pos_weight(name, input, pos_weight):
    """pos_weight as a () tensor in the accumulator dtype, or None."""
    if pos_weight is None:
        return None
    dtype = accumulator(input.dtype)
    if not isinstance(pos_weight, Tensor):
        return torch.full((), _check.number(name, "pos_weight", pos_weight), dtype=dtype, device=input.device)
    if pos_weight.numel() != 1:
        raise RuntimeError(f"fastseg.ops.{name}: pos_weight has shape {tuple(pos_weight.shape)}; allowed: one element")
    _check.same_device(name, "pos_weight", pos_weight, "input", input)
    if pos_weight.requires_grad:
        raise RuntimeError(f"fastseg.ops.{name}: pos_weight requires grad; allowed: a constant")
    return pos_weight.to(dtype).reshape(())
