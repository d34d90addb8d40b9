"""max_unpool2d: against torch's in every form of its arguments, duplicates, hostile indices, both index formats."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastseg
from fastseg.ops import PoolIndices, max_pool2d, max_unpool2d
from tests.contract import Case, Contract, Make

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BACKENDS = ("auto", "reference")


def pooled(make, *shape, **pool):
    """(a leaf of the shape of the pool's output, int64 indices of a pooling of random numbers, the pool's input size)."""
    image = torch.randn(shape, generator=make.generator)
    output, indices = F.max_pool2d(image, return_indices=True, **pool)
    return make.floating(*output.shape), indices.to(make.device), shape[-2:]


def case(name, *shape, small=True, unpool=(), **pool):
    def arguments(make):
        input, indices, size = pooled(make, *shape, **pool)
        sizes = {key: value for key, value in pool.items() if key in ("kernel_size", "stride", "padding")}
        return dict(input=input, indices=indices, **sizes, **{"output_size": size, **dict(unpool)})

    return Case(name, arguments, small)


CASES = [
    case("segnet", 2, 3, 8, 12, kernel_size=2, unpool=dict(output_size=None)),
    case("odd extents", 2, 3, 7, 9, kernel_size=2, ceil_mode=True),
    case("full size", 2, 3, 9, 9, kernel_size=3, unpool=dict(output_size=(2, 3, 9, 9))),
    case("gaps", 1, 3, 11, 8, kernel_size=2, stride=(3, 4)),
    case("padding", 1, 17, 8, 10, kernel_size=4, stride=4, padding=(2, 1)),
    case("no batch", 3, 6, 8, kernel_size=2),
    case("one pixel", 2, 20, 1, 1, kernel_size=1),
    case("empty batch", 0, 3, 8, 12, kernel_size=2),
    case("wide", 2, 35, 30, 75, small=False, kernel_size=2),
    case("wide, overlapping rows", 2, 35, 31, 75, small=False, kernel_size=(3, 2), stride=(2, 2), padding=1),
]


def with_compact_indices(input, indices, kernel_size, stride=None, padding=0, output_size=None, **options):
    """max_unpool2d of the compact form of the same indices."""
    default = fastseg.ops.max_unpool2d(input.detach(), indices, kernel_size, stride, padding, output_size)
    compact = PoolIndices.from_flat(indices, default.shape[-2:], kernel_size, stride, padding)
    return max_unpool2d(input, compact, output_size=output_size, **options)


CONTRACTS = [
    Contract(function=max_unpool2d, stock=F.max_unpool2d, cases=CASES),
    Contract(
        function=with_compact_indices,
        stock=F.max_unpool2d,
        cases=CASES,
        name="max_unpool2d_with_compact_indices",
        compile_whole=False,  # from_flat looks at the indices; compiled pairs are tested below
    ),
]
