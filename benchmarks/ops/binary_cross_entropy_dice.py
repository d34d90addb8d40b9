"""binary_cross_entropy_dice for one-channel masks: forward and backward."""

import torch
import torch.nn.functional as F

import fastseg.ops
from benchmarks import checks, peers
from benchmarks.harness import Case
from benchmarks.inputs import logits

SMOOTH = 1e-6


def make(shape, device, dtype, layout):
    input = logits(shape, device, dtype, layout)
    return input, (torch.rand_like(input) < 0.3).to(dtype)


def minimal_bytes(shape, dtype):
    """The gradient needs the sums over all pixels: logits and mask are read twice, the gradient is written once."""
    batch, channels, height, width = shape
    return 5 * batch * channels * height * width * dtype.itemsize


def stock_binary_cross_entropy_dice(input, target):
    """Mean BCE plus 1 - 2 sum(p y) / (sum(p^2) + sum(y^2)) over the batch."""
    p = input.sigmoid()
    intersection = (p * target).sum()
    denominator = (p * p).sum() + (target * target).sum()
    dice = 1 - (2 * intersection + SMOOTH) / (denominator + SMOOTH)
    return F.binary_cross_entropy_with_logits(input, target) + dice


def binary_cross_entropy_dice(input, target):
    return fastseg.ops.binary_cross_entropy_dice(input, target, smooth=SMOOTH)


def case(shape, targets=(), more_peers=None, **options):
    return Case(
        "binary_cross_entropy_dice",
        shape,
        make,
        binary_cross_entropy_dice,
        peers.stock(stock_binary_cross_entropy_dice, ("contiguous",)) | (more_peers or {}),
        minimal_bytes,
        checks.differentiable_within_policy(stock_binary_cross_entropy_dice),
        targets=targets,
        **options,
    )


CASES = [
    case((8, 1, 512, 1024)),
    case((8, 1, 512, 1024), peers.HALF_SPEED, peers.ours_in_float32(binary_cross_entropy_dice), dtype=torch.bfloat16),
    case((3, 1, 513, 511)),
]
