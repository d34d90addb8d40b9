"""Batch normalisation as the releases train it: over a process, over all processes, or frozen."""

from collections.abc import Callable
from functools import partial

from torch import nn

NORMS = ("batch", "sync", "frozen")


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation by its running statistics, in training too; nothing of it is trained. Keys as BatchNorm2d."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True):
        return super().train(False)


def batch_norm(kind: str, *, eps: float = 1e-5, momentum: float = 0.1) -> Callable[[int], nn.BatchNorm2d]:
    """What makes the normalisation of so many channels: `kind` is "batch", "sync" (over all processes) or "frozen"."""
    layer = {"batch": nn.BatchNorm2d, "sync": nn.SyncBatchNorm, "frozen": FrozenBatchNorm2d}[kind]
    return partial(layer, eps=eps, momentum=momentum)
