"""Sigmoid focal loss in plain PyTorch: the definition of the op, and the explicit formula of its gradient."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from fastseg._dtypes import accumulator


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float, gamma: float, summed: bool, dtype: torch.dtype
) -> Tensor:
    """Of the shape of `inputs` and of `dtype`; if `summed`, the sum () in the accumulator's."""
    logits, targets = _accumulated(inputs, targets)
    p = logits.sigmoid()
    cross_entropy = binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = _alpha(targets, alpha) * cross_entropy * (1 - p_t) ** gamma
    return loss.sum() if summed else loss.to(dtype)


def sigmoid_focal_loss_backward(
    inputs: Tensor, targets: Tensor, grad_loss: Tensor, alpha: float, gamma: float
) -> Tensor:
    """Gradient of `inputs`; grad_loss is () or of the shape of `inputs`."""
    logits, targets = _accumulated(inputs, targets)
    p = logits.sigmoid()
    missed = p * (1 - targets) + (1 - p) * targets  # 1 - p_t
    cross_entropy = binary_cross_entropy_with_logits(logits, targets, reduction="none")
    derivative = (p - targets) * missed**gamma
    if gamma:
        derivative = derivative + gamma * missed ** (gamma - 1) * p * (1 - p) * (1 - 2 * targets) * cross_entropy
    return (grad_loss.to(logits.dtype) * _alpha(targets, alpha) * derivative).to(inputs.dtype)


def _alpha(targets: Tensor, alpha: float) -> Tensor | float:
    return alpha * targets + (1 - alpha) * (1 - targets) if alpha >= 0 else 1.0


def _accumulated(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulator(inputs.dtype)
    return inputs.to(dtype), targets.to(dtype)
