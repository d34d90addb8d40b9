"""Images that continue beyond their borders as mirror images."""

import torch
from torch import Tensor


def mirrored(image: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """(N, C, H, W) with so many rows added above and below, columns left and right.

    The border pixels are the mirror, as with ``torch.nn.functional.pad(mode="reflect")``; an image smaller than what is
    added is mirrored again and again.
    """
    for axis, (before, after) in ((2, rows), (3, columns)):
        length = image.shape[axis]
        period = max(2 * (length - 1), 1)
        places = torch.arange(-before, length + after, device=image.device) % period
        image = image.index_select(axis, torch.where(places < length, places, period - places))
    return image
