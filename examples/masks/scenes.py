"""Scenes of overlapping handwritten digits with the visible mask of each: nothing downloaded."""

from dataclasses import dataclass

import torch
from torch import Tensor

from examples.digits.scenes import Scenes

SPACING = 42  # pixels between digits of about 64: neighbours overlap
FEWEST_VISIBLE = 0.5  # least share of a digit's pixels that stay visible under other digits


@dataclass
class Scene:
    """image: uint8 ``(3, H, W)``; masks: bool ``(M, H, W)``, disjoint; labels: int64 ``(M)``, the digits."""

    image: Tensor
    masks: Tensor
    labels: Tensor


class OverlappingScenes(Scenes):
    """Makes scenes, always the same for the same ``seed``."""

    def __init__(self, seed):
        super().__init__(training=True, seed=seed)

    def scene(self, height, width):
        image = self._background(height, width)
        owner = torch.zeros(height, width, dtype=torch.int64)  # for each pixel 0, or the number of a digit, from 1
        labels, areas = [], []
        centres = [
            [top + SPACING * self.random.uniform(0.3, 0.7), left + SPACING * self.random.uniform(0.3, 0.7)]
            for top in range(0, height - SPACING // 2, SPACING)
            for left in range(0, width - SPACING // 2, SPACING)
        ]
        for row, column in self.random.permutation(centres):
            pick, where, opacity = self._place_digit((height, width), row, column)
            mask = opacity > 0.5
            covered = owner.clone()
            covered[where][mask] = len(areas) + 1
            visible = covered.flatten().bincount(minlength=len(areas) + 2)[1:-1]
            if (visible < FEWEST_VISIBLE * torch.tensor(areas)).any():
                continue  # this digit would hide another too much
            self._paint(image[:, *where], opacity)
            owner = covered
            labels.append(int(self.meanings[pick]))
            areas.append(int(mask.sum()))
        masks = owner == torch.arange(1, len(areas) + 1)[:, None, None]
        return Scene((image * 255).round().to(torch.uint8), masks, torch.tensor(labels))
