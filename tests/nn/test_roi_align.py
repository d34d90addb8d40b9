"""RoIAlign, RoIPool and MultiScaleRoIAlign: the functions they call, and the scales that the last one computes."""

from collections import OrderedDict

import pytest
import torch

from fastseg import nn, ops

IMAGE = torch.randn(2, 9, 16, 20)
BOXES = [torch.tensor([[1.0, 2, 30, 40]]), torch.tensor([[0.0, 0, 9, 9], [4, 4, 60, 60]])]


def test_they_call_the_ops():
    pool = nn.RoIAlign((3, 2), spatial_scale=0.25, sampling_ratio=2, aligned=True)
    assert torch.equal(pool(IMAGE, BOXES), ops.roi_align(IMAGE, BOXES, (3, 2), 0.25, 2, True))
    assert repr(pool) == "RoIAlign(output_size=(3, 2), spatial_scale=0.25, sampling_ratio=2, aligned=True)"
    pool = nn.RoIPool(3, 0.25)
    assert torch.equal(pool(IMAGE, BOXES), ops.roi_pool(IMAGE, BOXES, 3, 0.25))
    assert repr(pool) == "RoIPool(output_size=3, spatial_scale=0.25)"


def test_scales_are_found_once():
    maps = OrderedDict((str(level), torch.randn(2, 9, 64 >> level, 80 >> level)) for level in range(4))
    pool = nn.MultiScaleRoIAlign(["0", "1", "2"], 2, 2)
    pooled = pool(maps, BOXES, [(250, 310), (256, 320)])
    assert pool.scales == [1 / 4, 1 / 8, 1 / 16]
    assert torch.equal(pooled, ops.multiscale_roi_align([maps[name] for name in "012"], BOXES, 2, pool.scales, 2))
    pool(maps, BOXES, [(1, 1)])
    assert pool.scales == [1 / 4, 1 / 8, 1 / 16]


def test_errors():
    pool = nn.MultiScaleRoIAlign(["a"], 2, 2)
    with pytest.raises(ValueError, match=r"x has the keys \['b'\]; allowed: some of \['a'\]"):
        pool({"b": IMAGE}, BOXES, [(16, 20)])
    with pytest.raises(ValueError, match="image_shapes is empty"):
        pool({"a": IMAGE}, BOXES, [])
