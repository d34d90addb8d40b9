"""Scores at every pixel from a network that scores every n-th one (Long, Shelhamer, Darrell 2015)."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def shift_and_stitch(network: Callable[[Tensor], Tensor], image: Tensor, stride: int) -> Tensor:
    """Runs `network` on the image moved down and right by 0 to ``stride - 1`` pixels, and interleaves the outputs.

    Output (y, x) of the image moved by (dy, dx) is that of (y stride - dy, x stride - dx); those above or left of the
    image are left out. This takes stride^2 passes. For a network without padding the result is that of the same
    network with strides 1 and the taps of all later layers farther apart.

    Args:
        network: from images (N, C, H, W) to maps (N, K, h, w); `coarse_scores` of a network, for example.
        image: (N, C, H, W).
        stride: that of the map.

    Returns:
        (N, K, H', W'), as large as the passes fill.

    Raises:
        ValueError: `stride` below 1.
    """
    if stride < 1:
        raise ValueError(f"fastseg.models.shift_and_stitch: stride is {stride}; allowed: 1 or more")
    rows = []
    for down in range(stride):
        passes = [network(F.pad(image, (right, 0, down, 0))) for right in range(stride)]
        rows.append(_interleaved(passes, axis=3))
    return _interleaved(rows, axis=2)


def _interleaved(maps: list[Tensor], axis: int) -> Tensor:
    """Element i of map number s becomes element ``i len(maps) - s``; those before the first are left out."""
    stride = len(maps)
    unmoved, *moved = (part.movedim(axis, 0) for part in maps)
    phases = [unmoved, *(part[1:] for part in reversed(moved))]
    length = min(len(part) * stride + phase for phase, part in enumerate(phases))
    result = unmoved.new_empty(length, *unmoved.shape[1:])
    for phase, part in enumerate(phases):
        places = result[phase::stride]
        places.copy_(part[: len(places)])
    return result.movedim(0, axis)
