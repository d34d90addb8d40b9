"""What a detector might propose for a scene, without one: the truth, disturbed.

Each instance is proposed several times, as by a network before NMS: a shifted and stretched box, in it a soft mask of
28 x 28 cells, cut out of the truth by `roi_align` as the targets of Mask R-CNN are, and noise. Some proposals are read
as another digit, some lie where nothing is.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fastseg
from examples.masks.scenes import Scene

CELLS = 28
SHIFT = 0.1  # of a box, as a share of its size; deviation
MISPLACED = 0.04  # where the mask is pasted, against where it was seen
MISREAD = 0.12  # share of the proposals
CLUTTER = 0.15  # share of the proposals


@dataclass
class Proposals:
    """masks: float ``(N, 28, 28)`` in 0 to 1; boxes: ``(N, 4)``; labels, owners: int64 ``(N)``, the digit that was read
    and the instance that was seen; misread and clutter: bool ``(N)``.
    """

    masks: Tensor
    boxes: Tensor
    labels: Tensor
    owners: Tensor
    misread: Tensor
    clutter: Tensor


def propose(scene: Scene, per_instance: int, generator: torch.Generator) -> Proposals:
    """``per_instance`` proposals for each instance, in no order."""

    def random(*shape):
        return torch.rand(*shape, generator=generator)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def disturbed(boxes, amount):
        size = boxes[:, 2:] - boxes[:, :2]
        return boxes + amount * normal(*boxes.shape) * size.repeat(1, 2)

    count = per_instance * len(scene.labels)
    owners = torch.randperm(count, generator=generator) % len(scene.labels)
    seen = disturbed(fastseg.ops.pack_masks(scene.masks).boxes.float()[owners], SHIFT)
    targets = fastseg.ops.roi_align(
        scene.masks[:, None].float(), torch.cat([owners[:, None].float(), seen], 1), CELLS, aligned=True
    )[:, 0]
    noise = F.interpolate(normal(count, 1, 6, 6), (CELLS, CELLS), mode="bicubic")[:, 0]
    masks = (8 * (targets - 0.5) + 2 * random(count, 1, 1) * noise).sigmoid()

    misread, clutter = random(count) < MISREAD, random(count) < CLUTTER
    labels = (scene.labels[owners] + misread * torch.randint(1, 10, (count,), generator=generator)) % 10
    height, width = scene.masks.shape[1:]
    away = (random(count, 2) - 0.5) * torch.tensor([width, height])
    boxes = disturbed(seen, MISPLACED) + (clutter[:, None] * away).repeat(1, 2)
    return Proposals(masks, boxes, labels, owners, misread, clutter)


def rate(proposals: Proposals, masks, truths: Tensor, generator: torch.Generator) -> Tensor:
    """Scores as a good network would give them: the IoU of a pasted mask with what was seen, roughly."""
    quality = fastseg.ops.mask_iou(masks, fastseg.ops.pack_masks(truths)[proposals.owners], pairs=True)
    luck = torch.rand(len(masks), generator=generator)
    scores = (quality + 0.12 * (luck - 0.5)) * torch.where(proposals.misread, 0.4 + 0.5 * luck, 1)
    return torch.where(proposals.clutter, 0.5 * luck, scores).clamp(0.01, 0.99)
