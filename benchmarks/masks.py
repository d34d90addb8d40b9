"""Shared by the benchmarks of ops on masks: typical masks, and the usual formulations in PyTorch."""

import numpy
import torch
from torch import Tensor

from benchmarks.harness import Peer

try:
    import pycocotools.mask as coco
except ImportError:
    coco = None

COCO_MISSING = "pycocotools is not installed" if coco is None else None


def coco_peer(run) -> Peer:
    return Peer(run, devices=("cpu",), missing=COCO_MISSING)


def instances(shape, device, dtype=torch.bool, layout="contiguous") -> Tensor:
    """(N, H, W): ellipses with radii of 2 to 30 percent of the image's extent, about five proposals per object."""
    count, height, width = shape
    extent = torch.tensor([height, width], dtype=torch.float32)
    objects = max(1, count // 5)
    pick = torch.randint(objects, (count,))
    centre, radius = torch.rand(objects, 2) * extent, (0.02 + 0.28 * torch.rand(objects, 2)) * extent
    centre = centre[pick] + 0.3 * radius[pick] * (torch.rand(count, 2) - 0.5)
    radius = radius[pick] * (0.85 + 0.3 * torch.rand(count, 2))
    masks = torch.empty(shape, dtype=torch.bool)
    for mask, (y, x), (a, b) in zip(masks, centre.tolist(), radius.tolist()):
        rows = ((torch.arange(height) - y) / a).square().unsqueeze(1)
        mask.copy_(rows + ((torch.arange(width) - x) / b).square() <= 1)
    return masks.to(device, dtype)


def matmul_iou(masks: Tensor) -> Tensor:
    """The usual formulation: intersections by a product of float matrices."""
    flat = masks.flatten(1).to(torch.float16 if masks.is_cuda else torch.float32)
    common = (flat @ flat.T).float()
    area = masks.flatten(1).sum(1).float()
    union = area.unsqueeze(1) + area - common
    return torch.where(union > 0, common / union, 0)


def greedy(iou: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Suppression by a matrix of IoU, row by row."""
    order = scores.argsort(descending=True, stable=True)
    over = (iou[order][:, order] > threshold).cpu().numpy()
    suppressed = numpy.zeros(len(order), dtype=bool)
    for i in range(len(order)):
        if not suppressed[i]:
            suppressed[i + 1 :] |= over[i, i + 1 :]
    return order[torch.from_numpy(~suppressed).to(order.device)]


def coco_encode(masks: Tensor) -> list[dict]:
    return coco.encode(numpy.asfortranarray(masks.view(torch.uint8).numpy().transpose(1, 2, 0)))


def coco_iou(masks: Tensor) -> Tensor:
    rles = coco_encode(masks)
    return torch.from_numpy(coco.iou(rles, rles, [0] * len(rles)))
