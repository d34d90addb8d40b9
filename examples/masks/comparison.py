"""Pasting and NMS in fastseg and in stock PyTorch: both keep the same masks; time and peak memory."""

from functools import partial

import torch

import fastseg
from benchmarks.masks import greedy, matmul_iou
from benchmarks.measure import measure_turns
from benchmarks.memory import peak_extra
from benchmarks.ops.paste_masks import grid_sample
from examples.masks.proposals import propose, rate
from examples.masks.scenes import OverlappingScenes

ROUNDING = 1e-5  # largest distance from the threshold at which rounding may decide a pixel


def ours(soft, boxes, scores, labels, size, threshold):
    masks = fastseg.ops.paste_masks(soft, boxes, size)
    return masks, fastseg.ops.mask_nms(masks, scores, threshold, labels)


def stock(soft, boxes, scores, labels, size, threshold):
    """Every pixel of the image samples every mask; intersections by a product of float matrices."""
    masks = grid_sample(soft, boxes, *size)
    iou = torch.where(labels[:, None] == labels, matmul_iou(masks), 0)
    return masks, greedy(iou, scores, threshold)


def prove_equal(arguments):
    """Check that both keep the same masks, and print how many pixels rounding decides."""
    soft, boxes, _, _, size, _ = arguments
    (masks, kept), (expected, expected_kept) = ours(*arguments), stock(*arguments)
    differ = fastseg.ops.unpack_masks(masks) != expected
    values = fastseg.ops.paste_masks(soft, boxes, size, output="soft")[differ]
    assert (values - 0.5).abs().le(ROUNDING).all(), "pixels differ that are not at the threshold"
    assert torch.equal(kept, expected_kept), "other masks are kept"
    print(
        f"  equal: the same {len(kept)} of {len(masks)} masks are kept; of {differ.numel():,} pixels {differ.sum()} "
        "differ, at the threshold but for roundings"
    )


def compare(count, size, per_instance, threshold, repetitions):
    """Compare both on the best ``count`` proposals of a scene."""
    generator = torch.Generator().manual_seed(2)
    scene = OverlappingScenes(seed=2).scene(*size)
    proposals = propose(scene, per_instance, generator)
    scores = rate(proposals, fastseg.ops.paste_masks(proposals.masks, proposals.boxes, size), scene.masks, generator)
    best = scores.argsort(descending=True)[:count]
    arguments = proposals.masks[best], proposals.boxes[best], scores[best], proposals.labels[best], size, threshold
    print(f"{len(best)} proposals in an image of {size[0]} x {size[1]}:")
    prove_equal(arguments)

    calls = {"stock PyTorch": partial(stock, *arguments), "fastseg": partial(ours, *arguments)}
    times = measure_turns(calls, repetitions)
    peaks = {name: peak_extra(call, "cpu") for name, call in calls.items()}
    for name, timing in times.items():
        memory = "unknown here" if peaks[name] is None else f"{peaks[name] / 2**20:7.1f} MiB"
        speedup = times["stock PyTorch"].median / timing.median
        print(f"  {name:<15} {timing.median * 1e3:8.1f} ms ({speedup:5.1f}x), peak extra memory {memory}")
