"""Networks that pool and unpool: a training step of SegNet with our pooling against torch's, otherwise identical."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import checks, inputs
from benchmarks.harness import MEMORY_FORMATS, Case, Peer, Target
from fastseg import models

CLASSES = 11


def with_stock_pooling(network: nn.Module) -> nn.Module:
    """The same network with torch's own pooling and unpooling, with int64 indices."""
    for name, module in list(network.named_children()):
        if isinstance(module, nn.MaxPool2d):
            setattr(network, name, nn.MaxPool2d(2, 2, ceil_mode=True, return_indices=True))
        elif isinstance(module, nn.MaxUnpool2d):
            setattr(network, name, nn.MaxUnpool2d(2, 2))
    return network


@functools.cache
def network(build, stock: bool, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """One network for all calls on this device in this dtype, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = build(CLASSES)
    return (with_stock_pooling(made) if stock else made).to(device, dtype)


def loss(build, stock: bool):
    def run(image, target):
        scores = network(build, stock, image.device, image.dtype)(image)
        return F.cross_entropy(scores, target, ignore_index=inputs.IGNORED)

    return run


def make(shape, device, dtype, layout):
    image = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=MEMORY_FORMATS[layout])
    return image, inputs.labels((shape[0], *shape[2:]), CLASSES, device)


def minimal_bytes(build):
    """The least of any training step: image and weights read, their gradients written, labels read."""

    def count(shape, dtype):
        with torch.device("meta"):
            weights = sum(weight.numel() for weight in build(CLASSES).parameters())
        image = torch.empty(shape, device="meta").numel()
        return 2 * dtype.itemsize * (image + weights) + 8 * image // shape[1]

    return count


def case(build, shape, **options):
    stock = loss(build, stock=True)
    # Eager only: compiling also changes convolutions and normalisations.
    eager = {"eager": Peer(stock, "contiguous"), "eager channels_last": Peer(stock, "channels_last")}
    return Case(
        build.__name__, shape, make, loss(build, stock=False), eager, minimal_bytes(build),
        checks.differentiable_within_policy(stock), **options,
    )  # fmt: skip


def segnet(layout, peer):
    target = Target("speedup", 1.15, peer, allocator="default", device="cuda")
    return case(models.SegNet, (4, 3, 360, 480), layout=layout, devices=("cuda",), targets=(target,))


CASES = [
    segnet("contiguous", "eager"),
    segnet("channels_last", "eager channels_last"),
    case(models.SegNetBasic, (1, 3, 180, 240), layout="channels_last"),
]
