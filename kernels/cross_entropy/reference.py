"""Definition of softmax cross entropy and focal loss in plain PyTorch: formulas in README.md.

Shapes: input [N, C, *spatial], target [N, *spatial] (labels) or like input (probabilities), weight [C],
pixel_weight [N, *spatial]. Everything is computed in fp32, in fp64 for fp64 input.
"""

import torch
from torch import Tensor

from fastseg._check import may_look_at
from fastseg._dtypes import accumulator
from fastseg._layout import in_layout_of
from fastseg._reduction import MEAN, NONE, SUM


def _labels(target: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(labels as indices, which of them count). A label out of range counts as ignored."""
    valid = (target != ignore_index) & (target >= 0) & (target < classes)
    return torch.where(valid, target, 0).long(), valid


def _weights(input: Tensor, label: Tensor, valid: Tensor, weight: Tensor | None, pixel_weight: Tensor | None):
    """(class weights [C], weight of each pixel's label, weight of each pixel), zero where the pixel is ignored."""
    dtype = accumulator(input.dtype)
    class_weight = torch.ones(input.shape[1], dtype=dtype, device=input.device) if weight is None else weight.to(dtype)
    each = torch.ones_like(label, dtype=dtype) if pixel_weight is None else pixel_weight.to(dtype)
    zero = torch.zeros((), dtype=dtype, device=input.device)
    return class_weight, torch.where(valid, class_weight[label], zero), torch.where(valid, each, zero)


def _broadcast(class_weight: Tensor, input: Tensor) -> Tensor:
    return class_weight.view(1, -1, *[1] * (input.dim() - 2))


def _scale(denominator: Tensor, reduction: int, zero_if_empty: bool) -> Tensor:
    if reduction in (NONE, SUM):
        return torch.ones_like(denominator)
    scale = 1 / denominator
    return torch.where(denominator == 0, torch.zeros_like(scale), scale) if zero_if_empty else scale


def reject_bad_labels(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raises IndexError as stock PyTorch does on CPU. Looks at data."""
    bad = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bad.any():
        raise IndexError(
            f"Target {target[bad][0].item()} is out of bounds: labels must be in [0, {classes}) "
            f"or equal to ignore_index={ignore_index}"
        )


def cross_entropy(
    input, target, weight, pixel_weight, ignore_index, reduction, label_smoothing, gamma, zero_if_empty,
    inert_ignored, with_gradient,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, denominator, the gradient of `input`, empty unless with_gradient); gamma > 0 is the focal loss."""
    options = (ignore_index, reduction, label_smoothing, gamma, zero_if_empty)
    loss, denominator = _loss(input, target, weight, pixel_weight, *options)
    if not with_gradient:
        return loss, denominator, input.new_empty(0)
    one = torch.ones_like(loss)
    arguments = (input, target, weight, pixel_weight, one, denominator, *options, inert_ignored)
    return loss, denominator, cross_entropy_backward(*arguments)


def _loss(
    input, target, weight, pixel_weight, ignore_index, reduction, label_smoothing, gamma, zero_if_empty
) -> tuple[Tensor, Tensor]:
    if may_look_at(target):
        reject_bad_labels(target, input.shape[1], ignore_index)
    label, valid = _labels(target, input.shape[1], ignore_index)
    class_weight, label_weight, each = _weights(input, label, valid, weight, pixel_weight)
    log_p = input.to(accumulator(input.dtype)).log_softmax(1)
    surprise = -log_p.gather(1, label.unsqueeze(1)).squeeze(1)
    loss = label_weight * surprise
    if gamma > 0:
        loss = loss * (-torch.expm1(-surprise)) ** gamma
    elif label_smoothing > 0:
        uniform = -(log_p * _broadcast(class_weight, input)).sum(1)
        loss = (1 - label_smoothing) * loss + label_smoothing / input.shape[1] * uniform
    loss = torch.where(valid, loss * each, torch.zeros_like(loss))
    denominator = (label_weight * each if reduction == MEAN else each).sum()
    if reduction == NONE:
        return loss, denominator
    total = loss.sum()
    if reduction == SUM:
        return total, denominator
    mean = total / denominator
    if zero_if_empty:
        mean = torch.where(denominator == 0, torch.zeros_like(mean), mean)
    return mean, denominator


def _focal_factor(surprise: Tensor, gamma: float) -> Tensor:
    """f in dloss/dlogit_c = f (p_c - [c = label]): (1 - p)^gamma + gamma p (1 - p)^(gamma - 1) (-log p)."""
    p, miss = torch.exp(-surprise), -torch.expm1(-surprise)
    safe = torch.where(miss > 0, miss, torch.ones_like(miss))
    ratio = torch.where(miss > 0, surprise / safe, torch.ones_like(miss))  # -log p / (1 - p) -> 1 as p -> 1
    bounded = torch.where(p > 0, p * ratio, torch.zeros_like(p))
    return miss**gamma * (1 + gamma * bounded)


def cross_entropy_backward(
    input, target, weight, pixel_weight, grad_loss, denominator,
    ignore_index, reduction, label_smoothing, gamma, zero_if_empty, inert_ignored,
) -> Tensor:  # fmt: skip
    """Gradient of the loss with respect to `input`, written so that autograd can differentiate it once more."""
    classes = input.shape[1]
    label, valid = _labels(target, classes, ignore_index)
    class_weight, label_weight, each = _weights(input, label, valid, weight, pixel_weight)
    log_p = input.to(accumulator(input.dtype)).log_softmax(1)
    factor = label_weight
    if gamma > 0:
        surprise = -log_p.gather(1, label.unsqueeze(1)).squeeze(1)
        factor = factor * _focal_factor(surprise, gamma)
    one_hot = torch.zeros_like(log_p).scatter(1, label.unsqueeze(1), 1)
    scale = each * grad_loss * _scale(denominator, reduction, zero_if_empty)
    scale = torch.where(valid, scale, torch.zeros_like(scale)).unsqueeze(1)
    towards_label = (1 - label_smoothing) * factor.unsqueeze(1)
    uniform = label_smoothing / classes * _broadcast(class_weight, input)
    total = towards_label + label_smoothing / classes * class_weight.sum()
    gradient = torch.where(valid.unsqueeze(1), scale * total, torch.zeros_like(scale)) * log_p.exp()
    gradient = gradient - torch.where(valid.unsqueeze(1), scale * towards_label, torch.zeros_like(scale)) * one_hot
    if label_smoothing > 0:
        gradient = gradient - scale * uniform
    if inert_ignored:
        gradient = torch.where(valid.unsqueeze(1), gradient, torch.zeros_like(gradient))
    return in_layout_of(input, gradient.to(input.dtype))


def _weighted_target(target: Tensor, weight: Tensor | None, label_smoothing: float) -> Tensor:
    """w_c ((1 - s) t_c + s / C) in the accumulator's dtype, in the order in which stock PyTorch rounds."""
    distribution = target.to(accumulator(target.dtype))
    if label_smoothing > 0:
        distribution = distribution * (1 - label_smoothing) + label_smoothing / target.shape[1]
    return distribution if weight is None else distribution * _broadcast(weight.to(distribution.dtype), target)


def cross_entropy_probabilities(
    input, target, weight, pixel_weight, reduction, label_smoothing, to_input, to_target
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss for a distribution over the classes at every pixel, its gradient to `input`, to `target`).

    MEAN divides by the number of pixels. A gradient that is not requested is empty.
    """
    loss = loss_of_probabilities(input, target, weight, pixel_weight, reduction, label_smoothing)
    if not (to_input or to_target):
        return loss, input.new_empty(0), target.new_empty(0)
    options = (torch.ones_like(loss), reduction, label_smoothing, to_input, to_target)
    return loss, *cross_entropy_probabilities_backward(input, target, weight, pixel_weight, *options)


def loss_of_probabilities(input, target, weight, pixel_weight, reduction, label_smoothing) -> Tensor:
    log_p = input.to(accumulator(input.dtype)).log_softmax(1)
    loss = -(log_p * _weighted_target(target, weight, label_smoothing)).sum(1)
    if pixel_weight is not None:
        loss = loss * pixel_weight.to(loss.dtype)
    if reduction == NONE:
        return loss
    return loss.mean() if reduction == MEAN else loss.sum()


def cross_entropy_probabilities_backward(
    input, target, weight, pixel_weight, grad_loss, reduction, label_smoothing, to_input, to_target
) -> tuple[Tensor, Tensor]:
    """(gradient of input, of target), each empty if not requested; autograd can differentiate both again."""
    log_p = input.to(accumulator(input.dtype)).log_softmax(1)
    factor = grad_loss / (input.numel() / input.shape[1]) if reduction == MEAN and input.numel() else grad_loss
    if pixel_weight is not None:
        factor = factor * pixel_weight.to(log_p.dtype)
    factor = factor.unsqueeze(1) if factor.dim() else factor
    grad_input, grad_target = input.new_empty(0), target.new_empty(0)
    if to_input:
        distribution = _weighted_target(target, weight, label_smoothing)
        grad_input = (log_p.exp() * distribution.sum(1, keepdim=True) - distribution) * factor
    if to_target:
        grad_target = -log_p * (1 - label_smoothing) * factor
        if weight is not None:
            grad_target = grad_target * _broadcast(weight.to(log_p.dtype), input)
    grad_input, grad_target = grad_input.to(input.dtype), grad_target.to(target.dtype)
    return (
        in_layout_of(input, grad_input) if to_input else grad_input,
        in_layout_of(target, grad_target) if to_target else grad_target,
    )
