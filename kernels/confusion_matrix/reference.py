"""confusion_matrix in plain PyTorch: the definition of the op."""

import torch
from torch import Tensor


def confusion_matrix(input: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """input: labels of target's shape, or logits (N, C, *spatial). Gives int64 (C, C), rows are target's."""
    prediction = (input.argmax(1) if input.is_floating_point() else input).long()
    truth = target.long()
    counted = truth != ignore_index
    valid_truth = (truth >= 0) & (truth < num_classes)
    valid_prediction = (prediction >= 0) & (prediction < num_classes)
    if input.device.type == "cpu":
        _refuse("target", truth, counted & ~valid_truth, num_classes)
        _refuse("input", prediction, counted & ~valid_prediction, num_classes)
    counted = counted & valid_truth & valid_prediction
    pairs = torch.where(counted, truth * num_classes + prediction, num_classes * num_classes)
    counts = torch.zeros(num_classes * num_classes + 1, dtype=torch.int64, device=input.device)
    counts.scatter_add_(0, pairs.flatten(), torch.ones_like(pairs).flatten())
    return counts[:-1].reshape(num_classes, num_classes)


def _refuse(name: str, labels: Tensor, wrong: Tensor, num_classes: int) -> None:
    if wrong.any():
        found = labels[wrong][0].item()
        raise IndexError(f"fastseg.ops.confusion_matrix: {name} holds label {found}; allowed: 0 to {num_classes - 1}")
