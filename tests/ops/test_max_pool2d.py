"""max_pool2d: geometry, ties, NaN and infinities against torch's, both index formats, gradients of any order."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastseg
from fastseg.ops import PoolIndices, max_pool2d
from tests.contract import Case, Contract

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BACKENDS = ("auto", "reference")
NAN, INF = float("nan"), float("inf")


def case(name, *shape, small=True, **arguments):
    return Case(name, lambda make: dict(input=make.floating(*shape), **arguments), small)


CASES = [
    case("segnet", 2, 3, 4, 6, kernel_size=2),
    case("resnet", 1, 3, 7, 6, kernel_size=3, stride=2, padding=1),
    case("odd extents, ceil_mode", 2, 2, 5, 7, kernel_size=2, stride=2, ceil_mode=True),
    case("overlapping, dilated", 1, 2, 9, 8, kernel_size=(3, 2), stride=1, padding=(1, 0), dilation=(2, 3)),
    case("gaps", 1, 2, 10, 7, kernel_size=2, stride=(3, 4)),
    case("no batch", 3, 4, 5, kernel_size=[2], stride=[], padding=[1]),
    case("one pixel", 2, 17, 1, 1, kernel_size=1),
    case("a window as large as the image", 2, 3, 5, 6, kernel_size=(5, 6), stride=()),
    case("empty batch", 0, 3, 8, 12, kernel_size=2),
    case("wide", 2, 35, 30, 75, small=False, kernel_size=2),
    case("wide, overlapping", 2, 35, 31, 75, small=False, kernel_size=3, stride=2, padding=1),
    case("many taps", 1, 20, 20, 40, small=False, kernel_size=17, stride=2, padding=8),
]


def values_and_compact_gradient(input, **arguments):
    """max_pool2d whose gradient goes through int64 indices: return_indices keeps them."""
    return max_pool2d(input, return_indices=True, **arguments)[0]


CONTRACTS = [
    Contract(function=max_pool2d, stock=F.max_pool2d, cases=CASES),
    Contract(
        function=values_and_compact_gradient,
        stock=F.max_pool2d,
        cases=CASES,
        name="max_pool2d_with_flat_indices",
    ),
]
