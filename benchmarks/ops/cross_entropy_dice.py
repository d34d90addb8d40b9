"""cross_entropy_dice and dice_loss: forward and backward of the mean over the valid pixels and over the classes."""

import torch
import torch.nn.functional as F

import fastseg.ops
from benchmarks import checks, peers
from benchmarks.harness import Case, Target
from benchmarks.inputs import IGNORED
from benchmarks.ops.cross_entropy import make

SMOOTH = 1e-6


def minimal_bytes(shape, dtype):
    """The gradient needs the sums over all pixels: logits and int64 labels read twice, gradient written once."""
    batch, classes, height, width = shape
    return batch * height * width * (3 * classes * dtype.itemsize + 2 * 8)


def stock_dice_loss(input, target):
    """1 - 2 sum(p y) / (sum(p^2) + sum(y^2)) per class over the batch, averaged over the classes."""
    valid = (target != IGNORED).unsqueeze(1)
    truth = F.one_hot(target.where(valid.squeeze(1), 0), input.shape[1]).movedim(-1, 1) * valid
    p = input.softmax(1) * valid
    truth = truth.to(p.dtype)
    intersection = (p * truth).sum((0, 2, 3))
    denominator = (p * p).sum((0, 2, 3)) + truth.sum((0, 2, 3))
    return (1 - (2 * intersection + SMOOTH) / (denominator + SMOOTH)).mean()


def stock_cross_entropy_dice(input, target):
    return F.cross_entropy(input, target, ignore_index=IGNORED) + stock_dice_loss(input, target)


def dice_loss(input, target):
    return fastseg.ops.dice_loss(input, target, ignore_index=IGNORED, smooth=SMOOTH)


def cross_entropy_dice(input, target):
    return fastseg.ops.cross_entropy_dice(input, target, ignore_index=IGNORED, smooth=SMOOTH)


def case(op, shape, targets=(), more_peers=None, **options):
    ours, stock = {
        "dice_loss": (dice_loss, stock_dice_loss),
        "cross_entropy_dice": (cross_entropy_dice, stock_cross_entropy_dice),
    }[op]
    return Case(
        op,
        shape,
        make,
        ours,
        peers.stock(stock) | (more_peers or {}),
        minimal_bytes,
        checks.differentiable_within_policy(stock),
        targets=targets,
        **options,
    )


CASES = [
    case(
        "cross_entropy_dice",
        (2, 19, 512, 1024),
        (
            Target("speedup", 6),
            Target("speedup", 20, "eager", "default"),
            Target("extra_memory", 90e6, allocator="default"),
        ),
    ),
    case(
        "cross_entropy_dice",
        (16, 19, 512, 1024),
        (Target("bandwidth", 0.85, allocator="default", device="cuda"),),
        devices=("cuda",),
    ),
    case("cross_entropy_dice", (2, 19, 512, 1024), layout="channels_last"),
    case("cross_entropy_dice", (2, 150, 512, 512)),
    case(
        "cross_entropy_dice",
        (2, 19, 512, 1024),
        peers.HALF_SPEED,
        peers.ours_in_float32(cross_entropy_dice),
        dtype=torch.bfloat16,
    ),
    case("cross_entropy_dice", (2, 21, 513, 513)),
    case("dice_loss", (2, 19, 512, 1024)),
    case("dice_loss", (4, 2, 512, 512)),
]
