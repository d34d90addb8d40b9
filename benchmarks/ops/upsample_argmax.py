"""upsample_argmax: from low-resolution logits to uint8 labels. The shape of a case is that of the upsampled logits."""

from functools import partial

import torch

import fastseg.ops
from benchmarks import checks, peers
from benchmarks.harness import Case, Target
from benchmarks.inputs import logits
from benchmarks.ops.upsample_cross_entropy import low_resolution, upsample


def make(shape, device, dtype, layout, scale):
    return logits(low_resolution(shape, scale), device, dtype, layout), tuple(shape[2:])


def minimal_bytes(shape, dtype, scale):
    """Low-resolution logits read once, one byte written per output pixel."""
    batch, classes, height, width = low_resolution(shape, scale)
    return batch * classes * height * width * dtype.itemsize + shape[0] * shape[2] * shape[3]


def flops(shape, scale):
    """At most a horizontal and a vertical interpolation (2 each) and a comparison per class and output pixel."""
    return 5 * shape[0] * shape[1] * shape[2] * shape[3]


def stock_upsample_argmax(input, size, align_corners):
    return upsample(input, size, align_corners).argmax(1)


def upsample_argmax(input, size, align_corners):
    return fastseg.ops.upsample_argmax(input, size=size, align_corners=align_corners, dtype=torch.uint8)


def case(shape, scale, targets=(), align_corners=False, **options):
    ours, stock, scores = (
        partial(function, align_corners=align_corners)
        for function in (upsample_argmax, stock_upsample_argmax, upsample)
    )
    return Case(
        "upsample_argmax",
        shape,
        partial(make, scale=scale),
        ours,
        peers.stock(stock),
        partial(minimal_bytes, scale=scale),
        checks.labels_of_maximum(scores),
        name=f"x{scale:g}" + (" align_corners" if align_corners else ""),
        targets=targets,
        backward=False,
        flops=partial(flops, scale=scale),
        **options,
    )


LABEL_MAP = 2 * 1024 * 2048
RESOLUTION = 1e6  # Linux counts resident pages in batches; see benchmarks/memory.py

CASES = [
    case(
        (2, 19, 1024, 2048),
        8,
        (
            Target("speedup", 25),
            Target("extra_memory", LABEL_MAP + RESOLUTION, allocator="default"),
            Target("speedup", 10, "eager", "default", "cuda"),
            Target("speedup", 4, "compile", "default", "cuda"),
        ),
    ),
    case((2, 19, 1024, 2048), 8, align_corners=True),
    case((2, 19, 1024, 2048), 8, layout="channels_last"),
    case((2, 19, 1024, 2048), 8, dtype=torch.bfloat16),
    case((2, 150, 512, 512), 8),
    case((2, 21, 513, 513), 7.9),
    case((1, 2, 512, 512), 4),
    case((2, 19, 512, 1024), 1),  # logits of full size, as of SegNet and U-Net
    case((2, 19, 512, 1024), 1, layout="channels_last"),
]
