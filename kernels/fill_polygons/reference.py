"""Polygons as masks by COCO's rule, in plain Python: the definition of the op.

The boundary is walked in steps of a fifth of a pixel. Where it passes the centre line of a column of pixels, the
pixels of that column from there down change between outside and inside.
"""

import math

import torch
from torch import Tensor

from fastseg.kernels.pack_masks.reference import WORD, words_in_row

SCALE = 5  # steps in a pixel


def fill_polygons(points: Tensor, ends: Tensor, objects: Tensor, count: int, height: int, width: int) -> Tensor:
    words = torch.zeros(count, height, words_in_row(width), dtype=torch.int32)
    begin = 0
    for end, entry in zip(ends.tolist(), objects.tolist()):
        inside = torch.zeros(height + 1, width, dtype=torch.int32)
        for y, x in _crossings(points[begin:end].tolist(), height, width):
            inside[y, x] += 1
        inside = inside.cumsum(0)[:height] % 2
        for x in range(width):
            bit = 1 << x % WORD
            words[entry, :, x // WORD] |= (inside[:, x] * (bit - (1 << WORD) * (bit >> (WORD - 1)))).int()
        begin = end
    return words


def _crossings(corners, height, width):
    """Row and column of the pixels from which on a column changes between inside and outside."""
    walk = []
    scaled = [(int(SCALE * x + 0.5), int(SCALE * y + 0.5)) for x, y in corners]  # int() rounds towards 0, as in C
    for (x, y), (next_x, next_y) in zip(scaled, [*scaled[1:], scaled[0]]):
        walk += _line(x, y, next_x, next_y)
    for (before_x, before_y), (x, y) in zip(walk, walk[1:]):
        column = (min(x, before_x) + 0.5) / SCALE - 0.5
        if x != before_x and column == math.floor(column) and 0 <= column <= width - 1:
            row = (min(y, before_y) + 0.5) / SCALE - 0.5
            yield math.ceil(min(max(row, 0), height)), int(column)


def _line(x, y, end_x, end_y):
    """The steps from one point to the other, computed from the one with the lower coordinate on the longer axis."""
    wide = abs(end_x - x) >= abs(end_y - y)
    flipped = x > end_x if wide else y > end_y
    if flipped:
        x, y, end_x, end_y = end_x, end_y, x, y
    length = end_x - x if wide else end_y - y
    slope = ((end_y - y if wide else end_x - x) / length) if length else 0.0
    if wide:
        steps = [(x + t, int(y + slope * t + 0.5)) for t in range(length + 1)]
    else:
        steps = [(int(x + slope * t + 0.5), y + t) for t in range(length + 1)]
    return steps[::-1] if flipped else steps
