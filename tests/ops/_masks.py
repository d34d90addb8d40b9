"""Masks for the tests of ops on packed masks."""

import torch
from torch import Tensor

WIDTHS = (0, 1, 31, 32, 33, 64, 65, 640)


def ellipses(count: int, height: int, width: int, seed: int = 0, groups: int | None = None) -> Tensor:
    """bool [count, height, width]; with `groups`, ellipses that differ little from one of as many."""
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda *shape: torch.rand(shape, generator=generator)  # noqa: E731
    kinds = groups or count
    centre = uniform(kinds, 2) * torch.tensor([height, width])
    radius = (0.05 + 0.25 * uniform(kinds, 2)) * torch.tensor([height, width]) + 0.5
    pick = torch.arange(count) % kinds
    centre = centre[pick] + 0.2 * radius[pick] * (uniform(count, 2) - 0.5)
    radius = radius[pick] * (0.9 + 0.2 * uniform(count, 2))
    y = (torch.arange(height).view(1, -1, 1) - centre[:, 0].view(-1, 1, 1)) / radius[:, 0].view(-1, 1, 1)
    x = (torch.arange(width).view(1, 1, -1) - centre[:, 1].view(-1, 1, 1)) / radius[:, 1].view(-1, 1, 1)
    return y.square() + x.square() <= 1


def noise(count: int, height: int, width: int, seed: int = 0, density: float = 0.5) -> Tensor:
    """bool [count, height, width] of independent pixels; of several masks the second is empty, the third full."""
    masks = torch.rand(count, height, width, generator=torch.Generator().manual_seed(seed)) < density
    if count > 2:
        masks[1], masks[2] = False, True
    return masks


# The four masks of the golden table of Matrix NMS, 4 x 4.
GOLDEN = torch.zeros(4, 4, 4, dtype=torch.bool)
GOLDEN[0, :3, :3] = GOLDEN[1, :3, :2] = GOLDEN[2, 1:, 1:] = GOLDEN[3, 3, 3] = True
GOLDEN_SCORES = torch.tensor([0.9, 0.8, 0.7, 0.6])
GOLDEN_LABELS = torch.tensor([1, 1, 1, 2])
