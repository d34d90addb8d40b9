"""upsample_cross_entropy and upsample_cross_entropy_dice: forward and backward from the low-resolution logits.

The shape of a case is that of the upsampled logits, which our ops never store.
"""

from functools import partial

import torch
import torch.nn.functional as F

import fastseg.ops
from benchmarks import checks, peers
from benchmarks.harness import Case, Target
from benchmarks.inputs import IGNORED, labels, logits
from benchmarks.ops.cross_entropy import stock_cross_entropy
from benchmarks.ops.cross_entropy_dice import SMOOTH, stock_cross_entropy_dice


def low_resolution(shape, scale):
    return (*shape[:2], *(max(1, round(extent / scale)) for extent in shape[2:]))


def make(shape, device, dtype, layout, scale):
    batch, classes, *spatial = shape
    low = logits(low_resolution(shape, scale), device, dtype, layout)
    return low, labels((batch, *spatial), classes, device)


def minimal_bytes(shape, dtype, scale, passes):
    """Low-resolution logits and int64 labels read once per pass, gradient written once."""
    batch, classes, height, width = low_resolution(shape, scale)
    low = batch * classes * height * width * dtype.itemsize
    return (passes + 1) * low + passes * 8 * shape[0] * shape[2] * shape[3]


def upsample(input, size, align_corners):
    return F.interpolate(input, size=size, mode="bilinear", align_corners=align_corners)


def stock_upsample_cross_entropy(input, target, align_corners):
    return stock_cross_entropy(upsample(input, target.shape[1:], align_corners), target)


def stock_upsample_cross_entropy_dice(input, target, align_corners):
    return stock_cross_entropy_dice(upsample(input, target.shape[1:], align_corners), target)


def upsample_cross_entropy(input, target, align_corners):
    return fastseg.ops.upsample_cross_entropy(input, target, align_corners=align_corners, ignore_index=IGNORED)


def upsample_cross_entropy_dice(input, target, align_corners):
    return fastseg.ops.upsample_cross_entropy_dice(
        input, target, align_corners=align_corners, ignore_index=IGNORED, smooth=SMOOTH
    )


# Ours, stock, and the number of times that ours reads the logits.
FUNCTIONS = {
    "upsample_cross_entropy": (upsample_cross_entropy, stock_upsample_cross_entropy, 1),
    "upsample_cross_entropy_dice": (upsample_cross_entropy_dice, stock_upsample_cross_entropy_dice, 2),
}


def case(op, shape, scale, targets=(), align_corners=False, more_peers=None, **options):
    ours, stock, passes = FUNCTIONS[op]
    stock = partial(stock, align_corners=align_corners)
    return Case(
        op,
        shape,
        partial(make, scale=scale),
        partial(ours, align_corners=align_corners),
        peers.stock(stock) | (more_peers or {}),
        partial(minimal_bytes, scale=scale, passes=passes),
        checks.differentiable_within_policy(stock),
        name=f"x{scale:g}" + (" align_corners" if align_corners else ""),
        targets=targets,
        **options,
    )


def in_bfloat16(op, images):
    """In bfloat16, which must not be slower than our own float32."""
    return case(
        op,
        (images, 19, 512, 1024),
        8,
        peers.HALF_SPEED,
        dtype=torch.bfloat16,
        more_peers=peers.ours_in_float32(partial(FUNCTIONS[op][0], align_corners=False)),
    )


CASES = [
    case(
        "upsample_cross_entropy",
        (2, 19, 512, 1024),
        8,
        (
            Target("speedup", 20),
            Target("extra_memory", 14e6, allocator="default"),
            Target("speedup", 10, allocator="default", device="cuda"),
            Target("memory_ratio", 20, allocator="default", device="cuda"),
        ),
    ),
    case(
        "upsample_cross_entropy_dice",
        (2, 150, 512, 512),
        8,
        (Target("speedup", 25), Target("extra_memory", 25e6, allocator="default")),
    ),
    case("upsample_cross_entropy", (2, 19, 512, 1024), 8, align_corners=True),
    case("upsample_cross_entropy", (2, 19, 512, 1024), 8, layout="channels_last"),
    *(in_bfloat16(op, images) for op in FUNCTIONS for images in (2, 8)),
    case("upsample_cross_entropy", (2, 150, 512, 512), 8),
    case("upsample_cross_entropy", (2, 21, 513, 513), 7.9),
    case("upsample_cross_entropy", (2, 19, 512, 1024), 4),
    case("upsample_cross_entropy", (1, 1000, 256, 256), 8),
    case("upsample_cross_entropy_dice", (2, 19, 512, 1024), 8),
]
