"""masks_to_boxes of bool masks, packing included. The shape of a case is (N, H, W)."""

import torch

import fastseg.ops
from benchmarks import checks, peers
from benchmarks.harness import Case, Peer
from benchmarks.masks import instances


def make(shape, device, dtype, layout):
    return (instances(shape, device),)


def search(masks):
    """The boxes mask by mask."""
    boxes = torch.zeros(len(masks), 4, device=masks.device)
    for n, mask in enumerate(masks):
        y, x = torch.where(mask)
        if len(x):
            boxes[n] = torch.stack([x.min(), y.min(), x.max(), y.max()])
    return boxes


def torchvision_masks_to_boxes(masks):
    from torchvision.ops import masks_to_boxes

    return masks_to_boxes(masks)


def minimal_bytes(shape, dtype):
    """Every pixel read."""
    return shape[0] * shape[1] * shape[2]


PEERS = {
    "search": Peer(search),
    "torchvision": Peer(torchvision_masks_to_boxes, missing=peers.missing("torchvision")),
}
CASES = [
    Case("masks_to_boxes", (100, 480, 640), make, fastseg.ops.masks_to_boxes, PEERS, minimal_bytes,
         checks.equal_to(search), dtype=torch.bool, backward=False, quick_shape=(5, 24, 64))
]  # fmt: skip
