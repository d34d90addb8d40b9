"""nms of boxes similar to those of a detector's first stage: 20 around each object on an image of 800 x 1333. The shape
of a case is (N, 4).
"""

import torch

import fastseg.ops
from benchmarks import checks, peers
from benchmarks.harness import Case, Peer, Target

THRESHOLD = 0.5
CLASSES = 80


def boxes_and_scores(shape, device, dtype):
    """Boxes, randomly shifted and scaled by a tenth of their size, with distinct scores."""
    count = shape[0]
    objects = max(1, count // 20)
    side = 16 * 2 ** (5 * torch.rand(objects, 2))  # 16 to 512 pixels
    centre = torch.rand(objects, 2) * torch.tensor([1333.0, 800.0])
    around = torch.arange(count) % objects
    centre = centre[around] + 0.1 * side[around] * torch.randn(count, 2)
    side = side[around] * (0.1 * torch.randn(count, 2)).exp()
    boxes = torch.cat([centre - side / 2, centre + side / 2], 1)
    scores = torch.randperm(count).float() / count
    return boxes.to(device, dtype), scores.to(device)


def make(shape, device, dtype, layout):
    return boxes_and_scores(shape, device, dtype)


def make_classes(shape, device, dtype, layout):
    return *boxes_and_scores(shape, device, dtype), torch.randint(CLASSES, shape[:1], device=device)


def minimal_bytes(shape, dtype):
    """Boxes and scores read once, at most one index per box written."""
    return shape[0] * (5 * dtype.itemsize + 8)


def nms_in_torch(boxes, scores):
    """In PyTorch: takes the best remaining box and removes those that it suppresses, in a loop."""
    remaining = scores.argsort(descending=True, stable=True)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    kept = []
    while remaining.numel() > 0:
        best, remaining = remaining[0], remaining[1:]
        kept.append(best)
        size = torch.minimum(boxes[best, 2:], boxes[remaining, 2:]) - torch.maximum(
            boxes[best, :2], boxes[remaining, :2]
        )
        shared = size.clamp(min=0).prod(1)
        remaining = remaining[shared / (areas[best] + areas[remaining] - shared) <= THRESHOLD]
    return torch.stack(kept)


def nms_with_offsets(boxes, scores, idxs):
    """The usual formulation: an offset for each class moves the boxes of the classes apart."""
    return nms_in_torch(boxes + (idxs * (boxes.max() - boxes.min() + 1))[:, None].to(boxes), scores)


def ours(boxes, scores):
    return fastseg.ops.nms(boxes, scores, THRESHOLD)


def ours_classes(boxes, scores, idxs):
    return fastseg.ops.batched_nms(boxes, scores, idxs, THRESHOLD)


def torchvision_nms(boxes, scores):
    from torchvision.ops import nms

    return nms(boxes, scores, THRESHOLD)


def torchvision_batched_nms(boxes, scores, idxs):
    from torchvision.ops import batched_nms

    return batched_nms(boxes, scores, idxs, THRESHOLD)


def class_by_class(boxes, scores, idxs):
    """The correct result of ours_classes, without the rounding of offsets."""
    kept = []
    for k in idxs.unique():
        members = (idxs == k).nonzero()[:, 0]
        kept.append(members[nms_in_torch(boxes[members], scores[members])])
    kept = torch.cat(kept)
    return kept[scores[kept].argsort(descending=True)]


MISSING = peers.missing("torchvision")


def case(count, targets=()):
    return Case(
        "nms",
        (count, 4),
        make,
        ours,
        {"plain": Peer(nms_in_torch), "torchvision": Peer(torchvision_nms, missing=MISSING)},
        minimal_bytes,
        checks.equal_to(nms_in_torch),
        targets=targets,
        backward=False,
        quick_shape=(100, 4),
    )


def case_of_classes(count):
    too_slow = "tens of seconds a call" if count > 1000 else None
    return Case(
        "batched_nms",
        (count, 4),
        make_classes,
        ours_classes,
        {
            "plain": Peer(nms_with_offsets, missing=too_slow),
            "torchvision": Peer(torchvision_batched_nms, missing=MISSING),
        },
        minimal_bytes,
        checks.equal_to(class_by_class),
        backward=False,
        quick_shape=(100, 4),
    )


CASES = [
    case(
        10000,
        (
            Target("speedup", 3, "torchvision"),
            Target("speedup", 1.5, "torchvision", allocator="default", device="cuda"),
        ),
    ),
    case(1000),
    case_of_classes(10000),
    case_of_classes(1000),
]
