"""Softmax cross entropy, drop-in for `torch.nn.functional.cross_entropy`, and softmax focal loss: the public functions.

labels.py and probabilities.py define their ops.
"""

from torch import Tensor

from fastseg import _check
from fastseg._private_api import legacy_reduction
from fastseg._reduction import MEAN, MEAN_OF_COUNT, NONE, NUMBERS, reduction_number
from fastseg.ops.cross_entropy.labels import loss_of_labels
from fastseg.ops.cross_entropy.probabilities import loss_of_probabilities

__all__ = ["cross_entropy", "focal_loss"]


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
        ignore_index: label that contributes nothing, inside or outside [0, C); None for none. Not for probabilities,
            as in stock. As in stock, an infinite or NaN logit at an ignored pixel gives a NaN gradient there.
        reduction: "none", "mean" or "sum". A mean divides by the sum of weight[label] * pixel_weight over the pixels
            not ignored; for probabilities by the number of pixels (with pixel_weight: their sum).
        label_smoothing: in [0, 1].
        pixel_weight: (N, d1, ..., dk) constant that multiplies each pixel's loss, such as U-Net's border weights.
        zero_if_empty: a mean over nothing is 0 with zero gradient; by default NaN with zero gradient, as in stock.
        backend: "auto", "stock", "cpu", "triton" or "reference". On CPU "auto" leaves small calls to stock PyTorch
            if this gives the same results (`fastseg.info` shows the sizes).

    Returns:
        The loss in the input's dtype (that of input, probabilities and weight together; fp32 under autocast): a scalar,
        or input's shape without its class dimension for reduction "none".
        The gradient has the memory format of the input. Twice differentiable. The backward needs the arguments
        unchanged: after an in-place change (`input.sigmoid_()`) PyTorch raises, also where stock would not.

    Raises:
        IndexError: on CPU, a label neither in [0, C) nor ignore_index. On GPU such a pixel contributes nothing.
        RuntimeError, ValueError, TypeError: shapes, dtypes, devices or options that do not fit.
    """
    op = "cross_entropy"
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
        _check.tensors(op, input=input, target=target)
    if weight is not None and not isinstance(weight, Tensor):
        _check.tensors(op, weight=weight)
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    reduced = NUMBERS.get(reduction) if type(reduction) is str else None
    if reduced is None:
        reduced = reduction_number(op, reduction)  # raises
    if type(ignore_index) is not int or abs(ignore_index) >= 1 << 63:
        ignore_index = _check.label(op, "ignore_index", ignore_index)
    if type(label_smoothing) is not float:
        label_smoothing = _check.number(op, "label_smoothing", label_smoothing)
    if type(zero_if_empty) is not bool:
        _check.booleans(op, zero_if_empty=zero_if_empty)
    probabilities = target.is_floating_point() and target.shape == input.shape
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
        loss = loss_of_probabilities(
            input, target, weight, pixel_weight, reduced, label_smoothing, zero_if_empty, backend
        )
    else:
        loss = loss_of_labels(
            input, target, weight, pixel_weight, ignore_index, reduced, label_smoothing,
            zero_if_empty=zero_if_empty, backend=backend,
        )  # fmt: skip
    return loss.squeeze(0) if single and reduced == NONE else loss


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
        ignore_index: label that contributes nothing, for any logits of the pixel; None for none.
        reduction: "none", "mean" or "sum". A mean divides by the number of pixels not ignored (by the sum of their
            pixel_weight, if given); alpha scales the loss and is not divided out, unlike cross_entropy's weight.
        pixel_weight: (N, d1, ..., dk) constant that multiplies each pixel's loss.
        zero_if_empty: a mean over nothing is 0 instead of NaN.
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        The loss in the input's dtype (fp32 under autocast): a scalar, or the target's shape for reduction "none".
        The backward needs the arguments unchanged: after an in-place change PyTorch raises.

    Raises:
        IndexError: on CPU, a label neither in [0, C) nor ignore_index. On GPU such a pixel contributes nothing.
        RuntimeError, ValueError, TypeError: shapes, dtypes, devices or options that do not fit.
    """
    op = "focal_loss"
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
        _check.tensors(op, input=input, target=target)
    reduced = reduction_number(op, reduction)
    _check.booleans(op, zero_if_empty=zero_if_empty)
    return loss_of_labels(
        input, target, alpha, pixel_weight, _check.label(op, "ignore_index", ignore_index),
        MEAN_OF_COUNT if reduced == MEAN else reduced, 0.0, gamma=_check.number(op, "gamma", gamma),
        zero_if_empty=zero_if_empty, inert_ignored=True, backend=backend,
    )  # fmt: skip
