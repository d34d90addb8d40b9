"""masks_to_rle from packed masks, and rle_to_masks. The shape of a case is (N, H, W)."""

import numpy
import torch

import fastseg.ops
from benchmarks import masks
from benchmarks.harness import Case, Target


def make(shape, device, dtype, layout):
    """The words of the packed masks (the harness needs a tensor first), then the masks for both libraries."""
    pixels = masks.instances(shape, device)
    packed = fastseg.ops.pack_masks(pixels)
    rles = fastseg.ops.masks_to_rle(packed)
    fortran = numpy.asfortranarray(pixels.cpu().view(torch.uint8).numpy().transpose(1, 2, 0))
    return packed.words, packed, rles, fortran


def encode(words, packed, rles, fortran):
    return fastseg.ops.masks_to_rle(packed)


def decode(words, packed, rles, fortran):
    return fastseg.ops.rle_to_masks(rles).words


def coco_encode(words, packed, rles, fortran):
    return masks.coco.encode(fortran)


def coco_decode(words, packed, rles, fortran):
    return masks.coco.decode(rles)


def minimal_bytes(shape, dtype):
    """Every packed word read or written."""
    return shape[0] * shape[1] * (shape[2] + 31) // 32 * 4


def verify(case, inputs):
    words, _, rles, fortran = inputs
    if not torch.equal(fastseg.ops.rle_to_masks(rles).words, words.cpu()):
        return "the masks do not come back"
    if masks.coco is not None and not numpy.array_equal(masks.coco.decode(rles), fortran):
        return "pycocotools reads other masks"
    return None


def case(name, ours, peer, shape, targets=()):
    peers = {"pycocotools": masks.coco_peer(peer)}
    return Case("run_lengths", shape, make, ours, peers, minimal_bytes, verify, name=name, dtype=torch.bool,
                targets=targets, backward=False, quick_shape=(5, 24, 64))  # fmt: skip


CASES = [
    case("encode", encode, coco_encode, (1000, 480, 640), (Target("speedup", 3, "pycocotools"),)),
    case("decode", decode, coco_decode, (1000, 480, 640)),
]
