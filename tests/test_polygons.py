"""fastseg.metrics.polygons_to_masks: golden values, C++ against the reference, error messages."""

import numpy
import pytest
import torch

from fastseg.metrics.polygons import fill_polygons, polygons_to_masks
from fastseg.ops import unpack_masks

HOSTILE = (-1e8, -70.0, -0.3, 0.0, 0.4, 0.5, 31.5, 32.0, 49.9, 50.0, 1e8)


def mask(*polygons, size):
    return unpack_masks(polygons_to_masks([polygons], size))[0].int().tolist()


def test_golden_rectangle_and_triangle():
    assert mask([1, 1, 4, 1, 4, 3, 1, 3], size=(5, 6)) == [
        [int(1 <= x <= 3 and 1 <= y <= 2) for x in range(6)] for y in range(5)
    ]
    assert mask([0.5, 0.5, 3.5, 0.5, 3.5, 2.5], size=(5, 6)) == [
        [int(y == 1 and x in (2, 3)) for x in range(6)] for y in range(5)
    ]


def test_the_polygons_of_an_object_are_united():
    square = [1, 1, 4, 1, 4, 4, 1, 4]
    assert mask(square, square, size=(6, 6)) == mask(square, size=(6, 6))
    assert sum(map(sum, mask(square, [3, 3, 6, 3, 6, 6, 3, 6], size=(6, 6)))) == 9 + 9 - 1


def test_objects_without_polygons_are_empty():
    assert polygons_to_masks([[], [[0, 0, 4, 0, 4, 4]], []], (5, 5)).area.tolist()[::2] == [0, 0]
    assert polygons_to_masks([], (5, 5)).shape == (0, 5, 5)
    assert polygons_to_masks([[[0, 0, 4, 0, 4, 4]]], (0, 5)).shape == (1, 0, 5)


@pytest.mark.sanitized
@pytest.mark.parametrize("seed", range(12))
def test_the_kernel_equals_the_definition(seed):
    """Corners inside, outside and on the borders; widths near multiples of a word."""
    random = numpy.random.default_rng(seed)
    height, width = int(random.integers(1, 40)), int(random.choice([1, 31, 32, 33, 50, 64, 65]))
    lengths = random.integers(3, 9, 30)
    points = random.uniform(-20, 80, (lengths.sum(), 2))
    points[::3] = points[::3].round()
    ends, objects = torch.from_numpy(lengths.cumsum()), torch.from_numpy(numpy.sort(random.integers(0, 9, 30)))
    arguments = torch.from_numpy(points), ends, objects, 9, height, width
    assert torch.equal(fill_polygons(*arguments), fill_polygons(*arguments, backend="reference"))


def test_sums_are_rounded_as_they_are_written():
    """A line within a rounding of a pixel: fused multiply-adds would put it on the other side."""
    corners = [
        [-12.925944423124758, -2.495651866452672],
        [37.46155095202, 67.2621007908112],
        [43.31197299250983, 23.30087311715937],
        [-17.36919370996114, 48.78570734040517],
        [23.744403858486898, 84.1388102074069],
        [-18.367155776805028, -5.431666611095922],
        [1.2155699424779058, -5.592878957846455],
        [63.85941195781962, 81.43606309995332],
    ]
    arguments = torch.tensor(corners, dtype=torch.float64), torch.tensor([8]), torch.tensor([0]), 1, 53, 38
    assert torch.equal(fill_polygons(*arguments), fill_polygons(*arguments, backend="reference"))


@pytest.mark.sanitized
def test_corners_far_away_take_no_time():
    random = numpy.random.default_rng(0)
    polygons = [[random.choice(HOSTILE, 8).tolist()] for _ in range(200)]
    assert polygons_to_masks(polygons, (50, 50)).shape == (200, 50, 50)
    assert polygons_to_masks([[[-1e8, -1e8, 1e8, -1e8, 1e8, 1e8, -1e8, 1e8]]], (50, 50)).area.item() == 2500


@pytest.mark.parametrize(
    "polygon, message",
    [
        ([0, 0, 1, 1], "object 0 has a polygon of 4 coordinates; allowed: an even number, 6 or more"),
        ([0, 0, 1, 1, 2, 2, 3], "object 0 has a polygon of 7 coordinates"),
        ([[0, 0], [1, 1], [2, 2]], r"object 0 has a polygon \[\[0, 0\], .*; allowed: x1, y1, x2, y2"),
        ("polygon", "object 0 has a polygon 'polygon'"),
        ([0, 0, 1, 1, 2, float("nan")], "object 0 has a polygon with the coordinate nan; allowed: at most 1e"),
        ([0, 0, 1, 1, 2, 1e9], "coordinate 1000000000.0; allowed: at most 1e"),
    ],
)
def test_errors(polygon, message):
    with pytest.raises(ValueError, match=message):
        polygons_to_masks([[polygon]], (5, 5))
