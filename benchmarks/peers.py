"""Peers: stock PyTorch in both layouts and compiled, and other packages if they are installed."""

import importlib.util
from collections.abc import Callable

import torch

from benchmarks.harness import Peer, Target
from benchmarks.inputs import IGNORED


def stock(function: Callable, layouts: tuple[str, ...] = ("contiguous", "channels_last")) -> dict[str, Peer]:
    """The stock expression, eager and through `torch.compile`, in each layout.

    A channels_last peer gets its inputs already in channels_last: its time does not include the conversion.
    """
    suffix = {"contiguous": "", "channels_last": " channels_last"}
    peers = {}
    for layout in layouts:
        peers["eager" + suffix[layout]] = Peer(function, layout)
        peers["compile" + suffix[layout]] = Peer(function, layout, compiled=True)
    return peers


def ours_in_float32(function: Callable) -> dict[str, Peer]:
    """Our own op on the same values in fp32, to compare half-precision cases with."""
    return {"fastseg float32": Peer(function, dtype=torch.float32, ours=True)}


HALF_SPEED = (Target("speedup", 0.95, "fastseg float32"),)  # half types are never slower than fp32


def missing(package: str) -> str | None:
    """None if the package can be imported, else the reason, for the report on its peers."""
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def liger_cross_entropy(input, target):
    """Liger-Kernel's mean cross entropy, which takes (rows, classes): its time includes the permutation."""
    from liger_kernel.transformers.functional import liger_cross_entropy as function

    classes = input.shape[1]
    rows = input.movedim(1, -1).reshape(-1, classes)
    return function(rows, target.reshape(-1), ignore_index=IGNORED)


def torchvision_sigmoid_focal_loss(input, target):
    """`torchvision.ops.sigmoid_focal_loss` with its default alpha and gamma, averaged."""
    from torchvision.ops import sigmoid_focal_loss

    return sigmoid_focal_loss(input, target, reduction="mean")


LIGER_CROSS_ENTROPY = Peer(liger_cross_entropy, missing=missing("liger_kernel"), devices=("cuda",))
TORCHVISION_SIGMOID_FOCAL_LOSS = Peer(torchvision_sigmoid_focal_loss, missing=missing("torchvision"))
