"""From sums to quotients in plain PyTorch, for the reference and the losses over several ranks."""

import torch
from torch import Tensor


def dice_per_class(intersection: Tensor, prediction: Tensor, truth: Tensor, smooth: float) -> Tensor:
    return 1 - (2 * intersection + smooth) / (prediction + truth + smooth)


def mean_or_nan(total: Tensor, count: Tensor, zero_if_empty: bool) -> Tensor:
    """total / count; for count 0 NaN as in stock PyTorch, or 0 on request."""
    if zero_if_empty:
        return torch.where(count == 0, torch.zeros_like(total), total / torch.where(count == 0, 1, count))
    return total / count
