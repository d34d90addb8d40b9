"""Batch normalisation as the releases train it (over a process, over all processes, or frozen), and local response
normalisation.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

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


class LocalResponseNorm(nn.Module):
    """Local response normalisation over five channels: that of AlexNet, GoogLeNet and SegNet-Basic.

    ``x / (1 + 1e-4 m)^0.75``, m the mean of the squares of five neighbouring channels, 0 outside: the values of
    ``nn.LocalResponseNorm(5)``, without its slow ``avg_pool3d`` and ``pow``.
    """

    def forward(self, image: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same shape."""
        channels = image.shape[1]
        squares = F.pad(image.square(), (0, 0, 0, 0, 2, 2))
        total = squares[:, :channels]
        for first in range(1, 5):
            total = total + squares[:, first : first + channels]
        root = (1 + 1e-4 / 5 * total).rsqrt()
        return image * root * root.sqrt()
