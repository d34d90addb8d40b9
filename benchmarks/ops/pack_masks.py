"""pack_masks from bool masks and from probabilities, and back. The shape of a case is (N, H, W)."""

import torch

import fastseg.ops
from benchmarks.harness import Case, Peer
from benchmarks.masks import instances


def make(shape, device, dtype, layout):
    masks = instances(shape, device)
    return (masks,) if dtype == torch.bool else (masks.to(dtype) * 0.8 + 0.1,)


def pack(masks):
    return fastseg.ops.pack_masks(masks, 0.5 if masks.is_floating_point() else None)


def with_area(masks):
    packed = pack(masks)
    return packed.words, packed.area


def shifts(masks):
    """In PyTorch, for widths that are multiples of 32."""
    pixels = masks > 0.5 if masks.is_floating_point() else masks
    count, height, width = pixels.shape
    bits = pixels.view(count, height, width // 32, 32).to(torch.int32)
    words = (bits << torch.arange(32, dtype=torch.int32, device=bits.device)).sum(3, dtype=torch.int32)
    return words, pixels.sum((1, 2))


def minimal_bytes(shape, dtype):
    """Every pixel read, one bit per pixel written."""
    pixels = shape[0] * shape[1] * shape[2]
    return pixels * dtype.itemsize + pixels // 8


def verify(case, inputs):
    words, area = case.ours(*inputs)
    expected, expected_area = shifts(*inputs)
    if not torch.equal(words, expected) or not torch.equal(area, expected_area):
        return "the words or areas differ"
    unpacked = fastseg.ops.unpack_masks(pack(*inputs))
    return None if torch.equal(unpacked, inputs[0] > 0.5) else "the masks do not come back"


def case(shape, dtype):
    return Case("pack_masks", shape, make, with_area, {"shifts": Peer(shifts)}, minimal_bytes, verify, dtype=dtype,
                backward=False, quick_shape=(5, 24, 64))  # fmt: skip


CASES = [case((1000, 480, 640), torch.bool), case((100, 480, 640), torch.bool), case((100, 480, 640), torch.float32)]
