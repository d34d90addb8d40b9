"""Polygons as packed masks, by COCO's rule."""

from collections.abc import Callable, Sequence

import numpy
import torch

from fastseg import _check
from fastseg._backend import rows
from fastseg._op import Op
from fastseg.kernels.fill_polygons import reference
from fastseg.kernels.pack_masks.reference import words_in_row
from fastseg.ops import PackedMasks

_NAME = "fastseg.metrics.polygons_to_masks"
_FARTHEST = 1e8  # pixels: the limit of the scaling in COCO's code


def check(points, ends, objects, count, height, width):
    _check.argument("fill_polygons", "points", points, (torch.float64,), ("points", 2))
    _check.argument("fill_polygons", "ends", ends, (torch.int64,), ("polygons",))
    _check.argument("fill_polygons", "objects", objects, (torch.int64,), ends.shape)


# ends [polygons]: end of the points of each; objects [polygons]: the mask that each is part of, ascending
fill_polygons = Op(
    "fill_polygons(Tensor points, Tensor ends, Tensor objects, SymInt count, SymInt height, SymInt width)"
    " -> Tensor words",
    check=check,
    outputs=lambda points, count, height, width: points.new_empty(
        (count, height, words_in_row(width)), dtype=torch.int32
    ),
    contiguous=("points", "ends", "objects"),
    backends=rows(reference.fill_polygons, cpu=(torch.float64,)),
)


def polygons_to_masks(polygons: Sequence[Sequence[Sequence[float]]], size: tuple[int, int]) -> PackedMasks:
    """Rasterises polygons as pycocotools does: equal to `decode(merge(frPyObjects(polygons, H, W)))` for each object.

    Args:
        polygons: for each of N objects a list of polygons, whose union is its mask; a polygon is x1, y1, x2, y2, ...
            in pixels, three points or more. It is filled by the even-odd rule.
        size: (H, W) of the image; parts outside are cut off.

    Returns:
        N masks, on the CPU.

    Raises:
        ValueError: an odd number of coordinates, fewer than three points, coordinates that are NaN or farther away
        than 1e8.
    """
    return fill(polygons, size, lambda number: f"{_NAME}: object {number}")


def fill(
    polygons: Sequence[Sequence[Sequence[float]]], size: tuple[int, int], name: Callable[[int], str]
) -> PackedMasks:
    """`polygons_to_masks`; name(i): the beginning of an error message about object i."""
    height, width = size
    lengths, objects, values = [], [], []
    for number, parts in enumerate(polygons):
        for polygon in parts:
            values.append(_coordinates(polygon, name, number))
            lengths.append(len(values[-1]) // 2)
            objects.append(number)
    points = numpy.concatenate(values).reshape(-1, 2) if values else numpy.zeros((0, 2))
    ends = numpy.cumsum(lengths, dtype=numpy.int64)
    far = ~(numpy.abs(points) <= _FARTHEST)
    if far.any():
        number = objects[numpy.searchsorted(ends, far.any(1).argmax(), side="right")]
        raise ValueError(
            f"{name(number)} has a polygon with the coordinate {points[far][0]}; allowed: at most {_FARTHEST:.0e}"
        )
    numbers = torch.from_numpy(ends), torch.tensor(objects, dtype=torch.int64)
    return PackedMasks._of(fill_polygons(torch.from_numpy(points), *numbers, len(polygons), height, width), width)


def _coordinates(polygon: Sequence[float], name: Callable[[int], str], number: int) -> numpy.ndarray:
    try:
        values = numpy.asarray(polygon, numpy.float64)
        if values.ndim != 1:
            raise ValueError("not one after the other")
    except (TypeError, ValueError):
        raise ValueError(f"{name(number)} has a polygon {polygon!r:.80}; allowed: x1, y1, x2, y2, ...") from None
    if len(values) < 6 or len(values) % 2:
        given = f"has a polygon of {len(values)} coordinates"
        raise ValueError(f"{name(number)} {given}; allowed: an even number, 6 or more")
    return values
