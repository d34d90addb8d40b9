"""Softmax statistics in plain PyTorch: the definition of the op, and the explicit formula of its gradient.

Shapes: input (N, C, ...), target and pixel_weight (N, ...), weight (C,); inside, the pixels are one dimension P.
Ignored pixels count for nothing, whatever their logits hold. See README.md for the derivation.
"""

import torch
from torch import Tensor

from fastseg._check import may_look_at
from fastseg._dtypes import accumulator
from fastseg._layout import in_layout_of
from fastseg.kernels.cross_entropy_dice.arithmetic import dice_per_class, mean_or_nan


def softmax_statistics(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pixel_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    squared: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(intersection, prediction, truth): (N, C) fp64; (numerator, denominator): () fp64."""
    _check_labels(target, ignore_index, input.size(1))
    logits, valid, truth, class_weight, share = _prepare(input, target, weight, pixel_weight, ignore_index)
    log_probability = logits.log_softmax(1)
    probability = torch.where(valid, log_probability.exp(), 0)  # (N, C, P)

    sums = [torch.where(truth, probability, 0), probability**2 if squared else probability, truth]
    intersection, prediction, truth_count = (values.sum(2, dtype=torch.float64) for values in sums)

    true_weight = torch.where(truth, class_weight, 0).sum(1, keepdim=True)  # (N, 1, P)
    negative_log = -torch.where(truth, log_probability, 0).sum(1, keepdim=True)
    cross_entropy = (1 - label_smoothing) * true_weight * negative_log
    if label_smoothing:
        smoothing = -(class_weight * log_probability).sum(1, keepdim=True) / input.size(1)
        cross_entropy = cross_entropy + label_smoothing * smoothing
    numerator = (share * torch.where(valid, cross_entropy, 0)).sum(dtype=torch.float64)
    denominator = (share * true_weight).sum(dtype=torch.float64)
    return intersection, prediction, truth_count, numerator, denominator


def softmax_statistics_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pixel_weight: Tensor | None,
    grad_intersection: Tensor,
    grad_prediction: Tensor,
    grad_numerator: Tensor,
    ignore_index: int,
    label_smoothing: float,
    squared: bool,
) -> Tensor:
    """Gradient of `input`; differentiable in its turn."""
    logits, valid, truth, class_weight, share = _prepare(input, target, weight, pixel_weight, ignore_index)
    probability = logits.softmax(1)
    grad_intersection, grad_prediction = (
        grad.to(logits.dtype).unsqueeze(2) for grad in (grad_intersection, grad_prediction)
    )
    grad_probability = grad_prediction * (2 * probability if squared else 1) + torch.where(truth, grad_intersection, 0)
    dice = probability * (grad_probability - (probability * grad_probability).sum(1, keepdim=True))

    true_weight = torch.where(truth, class_weight, 0).sum(1, keepdim=True)
    cross_entropy = (1 - label_smoothing) * true_weight * (probability - truth.to(probability.dtype))
    if label_smoothing:
        smoothing = probability * class_weight.sum() - class_weight
        cross_entropy = cross_entropy + label_smoothing / input.size(1) * smoothing
    gradient = dice + grad_numerator.to(logits.dtype) * share * cross_entropy
    gradient = torch.where(valid, gradient, 0).to(input.dtype)
    return in_layout_of(input, gradient.reshape(input.shape))


def loss_of_sums(
    intersection: Tensor,
    prediction: Tensor,
    truth: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    ce_weight: float,
    dice_weight: float,
    smooth: float,
    include_background: bool,
    per_image: bool,
    zero_if_empty: bool,
    dtype: torch.dtype,
) -> Tensor:
    """ce_weight * numerator / denominator + dice_weight * (mean Dice loss), () of `dtype`, of the statistics above."""
    sums = [values if include_background else values[:, 1:] for values in (intersection, prediction, truth)]
    sums = sums if per_image else [values.sum(0, keepdim=True) for values in sums]
    loss = torch.zeros_like(numerator)
    if ce_weight:
        loss = loss + ce_weight * mean_or_nan(numerator, denominator, zero_if_empty)
    if dice_weight:
        losses = dice_per_class(*sums, smooth)
        count = torch.full_like(numerator, losses.numel())
        loss = loss + dice_weight * mean_or_nan(losses.sum(), count, zero_if_empty)
    return loss.to(dtype)


def loss_of_sums_backward(
    intersection: Tensor,
    prediction: Tensor,
    truth: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    grad_loss: Tensor,
    ce_weight: float,
    dice_weight: float,
    smooth: float,
    include_background: bool,
    per_image: bool,
    zero_if_empty: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of intersection, prediction (N, C) and numerator (), fp64; differentiable in their turn."""
    slope = grad_loss.double()
    grad_numerator = torch.zeros_like(numerator)
    if ce_weight:
        grad_numerator = ce_weight * slope * mean_or_nan(torch.ones_like(numerator), denominator, zero_if_empty)
    above, below = 2 * intersection, prediction + truth
    if not per_image:
        above, below = above.sum(0, keepdim=True), below.sum(0, keepdim=True)
    above, below = above + smooth, below + smooth
    counts = torch.ones_like(above, dtype=torch.bool)
    counts[:, : 0 if include_background else 1] = False
    each = dice_weight * slope / max(1, (above.size(0) * above.size(1) if include_background else above[:, 1:].numel()))
    of_intersection = torch.where(counts & (dice_weight != 0), -2 * each / below, 0)
    of_prediction = torch.where(counts & (dice_weight != 0), each * above / below**2, 0)
    return of_intersection.expand_as(intersection).clone(), of_prediction.expand_as(prediction).clone(), grad_numerator


def _check_labels(target: Tensor, ignore_index: int, classes: int) -> None:
    """On the CPU only: on a GPU a label out of range counts as ignored, since raising would need a host sync."""
    if may_look_at(target):
        wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
        if wrong.any():
            raise IndexError(f"Target {target[wrong][0].item()} is out of bounds.")


def _prepare(input: Tensor, target: Tensor, weight: Tensor | None, pixel_weight: Tensor | None, ignore_index: int):
    """Logits (N, C, P) in the accumulator dtype, 0 where ignored; valid (N, 1, P) and one-hot truth (N, C,
    P), bool; class weights (1, C, 1) and pixel weights (N, 1, P), 0 where ignored."""
    images, classes = input.shape[:2]
    pixels = target[0].numel() if images else 0
    label = target.reshape(images, 1, pixels).long()
    valid = label != ignore_index
    known = (label >= 0) & (label < classes)
    valid = valid & known
    truth = valid & (label == torch.arange(classes, device=input.device).view(1, classes, 1))
    logits = input.reshape(images, classes, pixels).to(accumulator(input.dtype))
    logits = torch.where(valid, logits, 0)
    ones = torch.ones((), dtype=logits.dtype, device=input.device)
    class_weight = ones.expand(1, classes, 1) if weight is None else weight.to(logits.dtype).view(1, classes, 1)
    share = ones if pixel_weight is None else pixel_weight.to(logits.dtype).reshape(images, 1, pixels)
    return logits, valid, truth, class_weight, torch.where(valid, share, 0)
