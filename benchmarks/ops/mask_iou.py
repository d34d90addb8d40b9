"""mask_iou of all pairs, from bool masks: packing is included. The shape of a case is (N, H, W)."""

import torch

import fastseg.ops
from benchmarks import masks
from benchmarks.harness import Case, Peer, Target


def make(shape, device, dtype, layout):
    return (masks.instances(shape, device),)


def make_noise(shape, device, dtype, layout):
    """Masks whose boxes are the whole image: boxes decide no pair."""
    return (torch.rand(shape, device=device) < 0.5,)


def minimal_bytes(shape, dtype):
    """Every pixel read, and every IoU written."""
    return shape[0] * shape[1] * shape[2] + 4 * shape[0] ** 2


def verify(case, inputs):
    exact = masks.matmul_iou(inputs[0]) if not inputs[0].is_cuda else masks.matmul_iou(inputs[0].cpu())
    error = (case.ours(*inputs).cpu() - exact).abs().max().item()
    return None if error < 1e-6 else f"off by {error}"


def case(shape, make=make, name="", targets=()):
    peers = {"matmul": Peer(masks.matmul_iou)}
    if not name:  # it takes minutes on the run lengths of noise
        peers["pycocotools"] = masks.coco_peer(masks.coco_iou)
    return Case("mask_iou", shape, make, fastseg.ops.mask_iou, peers, minimal_bytes, verify, name=name,
                dtype=torch.bool, targets=targets, backward=False, quick_shape=(5, 24, 64))  # fmt: skip


CASES = [
    case((1000, 480, 640), targets=(Target("speedup", 15, "matmul"),)),
    case((1000, 480, 640), make_noise, "noise", (Target("speedup", 15, "matmul"),)),
    case((100, 480, 640)),
]
