"""mask_nms at IoU 0.5, from bool masks: packing is included. The shape of a case is (N, H, W)."""

import torch

import fastseg.ops
from benchmarks import masks
from benchmarks.harness import Case, Peer, Target

THRESHOLD = 0.5


def make(shape, device, dtype, layout):
    return masks.instances(shape, device), torch.rand(shape[0], device=device)


def nms(pixels, scores):
    return fastseg.ops.mask_nms(pixels, scores, THRESHOLD)


def matmul(pixels, scores):
    return masks.greedy(masks.matmul_iou(pixels), scores, THRESHOLD)


def pycocotools(pixels, scores):
    return masks.greedy(masks.coco_iou(pixels), scores, THRESHOLD)


def minimal_bytes(shape, dtype):
    """Every pixel read."""
    return shape[0] * shape[1] * shape[2]


def verify(case, inputs):
    expected = matmul(*[value.cpu() for value in inputs])
    return None if torch.equal(case.ours(*inputs).cpu(), expected) else "other masks are kept"


def case(shape, targets=(), devices=("cpu", "cuda")):
    peers = {"matmul": Peer(matmul), "pycocotools": masks.coco_peer(pycocotools)}
    return Case("mask_nms", shape, make, nms, peers, minimal_bytes, verify, dtype=torch.bool, targets=targets,
                devices=devices, backward=False, quick_shape=(10, 24, 64))  # fmt: skip


CASES = [
    case((1000, 480, 640), (Target("speedup", 100, "matmul"), Target("speedup", 12, "pycocotools"))),
    case((100, 480, 640), (Target("speedup", 80, "matmul"), Target("speedup", 10, "pycocotools"))),
    case((1000, 800, 1333), (Target("speedup", 30, "matmul", allocator="default", device="cuda"),), devices=("cuda",)),
]
