"""Simulated proposals of a detector for a scene: the truth with random errors.

Each instance has several proposals, as from a network before NMS: a shifted and stretched box and in it a soft mask of
28 x 28 cells, cut out of the truth by `roi_align` as for the targets of Mask R-CNN, with noise. Some proposals have the
label of another digit, some are at places without a digit.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fastseg
from examples.masks.scenes import Scene

CELLS = 28
SHIFT = 0.1  # standard deviation of the shift of a box, as a share of its size
MISPLACED = 0.04  # the same for the shift between the box of the crop and the box for pasting
MISREAD = 0.12  # share of the proposals
CLUTTER = 0.15  # share of the proposals


@dataclass
class Proposals:
    """masks: float ``(N, 28, 28)`` in 0 to 1; boxes: ``(N, 4)``; labels, owners: int64 ``(N)``, the predicted digit
    and the true instance; misread and clutter: bool ``(N)``.
    """

    masks: Tensor
    boxes: Tensor
    labels: Tensor
    owners: Tensor
    misread: Tensor
    clutter: Tensor


def propose(scene: Scene, per_instance: int, generator: torch.Generator) -> Proposals:
    """``per_instance`` proposals for each instance, in random order."""

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
    """Scores similar to those of a good network: roughly the IoU of the pasted mask with its true instance."""
    quality = fastseg.ops.mask_iou(masks, fastseg.ops.pack_masks(truths)[proposals.owners], pairs=True)
    luck = torch.rand(len(masks), generator=generator)
    scores = (quality + 0.12 * (luck - 0.5)) * torch.where(proposals.misread, 0.4 + 0.5 * luck, 1)
    return torch.where(proposals.clutter, 0.5 * luck, scores).clamp(0.01, 0.99)
