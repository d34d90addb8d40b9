"""Sigmoid statistics in plain PyTorch: the definition of the op, and the explicit formula of its gradient.

Shapes: input, target and pixel_weight (N, P), pos_weight (). Pixels whose target equals `ignore_index` count
for nothing, whatever their logits hold. See README.md for the derivation.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastseg._check import may_look_at
from fastseg._dtypes import accumulator


def sigmoid_statistics(
    input: Tensor,
    target: Tensor,
    pos_weight: Tensor | None,
    pixel_weight: Tensor | None,
    ignore_index: float | None,
    squared: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(intersection, prediction, truth): (N,) fp64; (numerator, denominator) of the cross-entropy: () fp64."""
    _check_mask(target, ignore_index)
    logits, y, valid, pos_weight, share = _prepare(input, target, pos_weight, pixel_weight, ignore_index)
    p = logits.sigmoid() * valid
    sums = p * y, p**2 if squared else p, y**2 if squared else y
    # -log sigmoid(z) by log1p: -logsigmoid subtracts, softplus switches to its asymptote at 20
    cross_entropy = (1 - y) * logits + (1 + (pos_weight - 1) * y) * softplus(-logits, threshold=50)
    numerator = (share * torch.where(valid, cross_entropy, 0)).sum(dtype=torch.float64)
    return *(values.sum(1, dtype=torch.float64) for values in sums), numerator, share.sum(dtype=torch.float64)


def sigmoid_statistics_backward(
    input: Tensor,
    target: Tensor,
    pos_weight: Tensor | None,
    pixel_weight: Tensor | None,
    grad_intersection: Tensor,
    grad_prediction: Tensor,
    grad_numerator: Tensor,
    ignore_index: float | None,
    squared: bool,
) -> Tensor:
    """Gradient of `input`."""
    logits, y, valid, pos_weight, share = _prepare(input, target, pos_weight, pixel_weight, ignore_index)
    p, q = logits.sigmoid(), (-logits).sigmoid()
    grad_intersection, grad_prediction = (
        grad.to(logits.dtype).unsqueeze(1) for grad in (grad_intersection, grad_prediction)
    )
    dice = p * q * (grad_intersection * y + grad_prediction * (2 * p if squared else 1))
    cross_entropy = (1 - y) * p - pos_weight * y * q
    gradient = dice + grad_numerator.to(logits.dtype) * share * cross_entropy
    return torch.where(valid, gradient, 0).to(input.dtype)


def _check_mask(target: Tensor, ignore_index: float | None) -> None:
    """On the CPU only: on a GPU any number is accepted, since raising would need a host sync."""
    if may_look_at(target) and not target.is_floating_point():
        wrong = (target != 0) & (target != 1)
        if ignore_index is not None:
            wrong &= target != ignore_index
        if wrong.any():
            raise IndexError(f"Target {target[wrong][0].item()} is out of bounds.")


def _prepare(input, target, pos_weight, pixel_weight, ignore_index):
    """Logits and truth y (N, P) in the accumulator dtype, 0 where ignored; valid (N, P) bool; pos_weight ();
    pixel weights (N, P), 0 where ignored."""
    dtype = accumulator(input.dtype)
    ones = torch.ones((), dtype=dtype, device=input.device)
    valid = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    y = torch.where(valid, target.to(dtype), 0)
    logits = torch.where(valid, input.to(dtype), 0)
    share = torch.where(valid, ones if pixel_weight is None else pixel_weight.to(dtype), 0)
    return logits, y, valid, ones if pos_weight is None else pos_weight.to(dtype), share
