"""`fastseg.nn.Upsample` and `UpsamplingBilinear2d`, and the modules that `fastseg.accelerate` replaces by them."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import fastseg
from fastseg.testing import assert_within_policy

BILINEAR = [
    dict(scale_factor=8, mode="bilinear"),
    dict(size=(9, 21), mode="bilinear", align_corners=True),
    dict(scale_factor=(2.3, 0.7), mode="bilinear"),
    dict(scale_factor=(2.3, 0.7), mode="bilinear", recompute_scale_factor=True),
    dict(size=7, mode="bilinear", align_corners=False),
]
OTHERS = [dict(scale_factor=2), dict(size=(5, 6), mode="nearest-exact"), dict(scale_factor=2, mode="bicubic"),
          dict(size=3, mode="area")]  # fmt: skip


def image(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def check_equals_stock(ours, stock):
    assert repr(ours) == repr(stock)
    results = []
    for module, dtype in ((ours, torch.float32), (stock, torch.float32), (stock, torch.float64)):
        x = image(2, 3, 6, 8).to(dtype).requires_grad_()
        output = module(x)
        output.cos().sum().backward()
        results.append((output, x.grad))
    for one, two, three in zip(*results):
        assert_within_policy(one, two, three)


@pytest.mark.parametrize("arguments", BILINEAR)
def test_bilinear_runs_ours_and_equals_stock(arguments):
    ours, stock = fastseg.nn.Upsample(**arguments), nn.Upsample(**arguments)
    check_equals_stock(ours, stock)
    assert "fastseg" in str(type(ours(image(2, 3, 6, 8).requires_grad_()).grad_fn)) or "upsample_bilinear2d" in str(
        ours(image(2, 3, 6, 8).requires_grad_()).grad_fn
    )
    for same in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(same(image(1, 2, 4, 5)), ours(image(1, 2, 4, 5)))


@pytest.mark.parametrize("arguments", OTHERS)
def test_other_modes_are_stocks(arguments):
    x = image(2, 3, 6, 8)
    assert torch.equal(fastseg.nn.Upsample(**arguments)(x), nn.Upsample(**arguments)(x))


def test_images_of_integers_and_other_shapes_are_stocks():
    bytes_of_image = (image(1, 3, 4, 5) * 100).to(torch.uint8)
    for ours, stock in (
        (fastseg.nn.Upsample(scale_factor=2, mode="bilinear"), nn.Upsample(scale_factor=2, mode="bilinear")),
        (fastseg.nn.UpsamplingBilinear2d(scale_factor=2), nn.UpsamplingBilinear2d(scale_factor=2)),
    ):
        assert torch.equal(ours(bytes_of_image), stock(bytes_of_image))
        with pytest.raises(NotImplementedError):
            ours(image(3, 4, 5))
    linear = dict(scale_factor=2, mode="linear")
    assert torch.equal(fastseg.nn.Upsample(**linear)(image(2, 3, 8)), nn.Upsample(**linear)(image(2, 3, 8)))


@pytest.mark.parametrize("arguments", [dict(scale_factor=2), dict(size=(7, 9))])
def test_upsampling_bilinear_equals_stock(arguments):
    check_equals_stock(fastseg.nn.UpsamplingBilinear2d(**arguments), nn.UpsamplingBilinear2d(**arguments))


@pytest.mark.parametrize("name", ["Upsample", "UpsamplingBilinear2d"])
def test_arguments_are_those_of_stock(name):
    assert inspect.signature(getattr(fastseg.nn, name)) == inspect.signature(getattr(nn, name))


def test_accelerate_replaces_the_bilinear_ones_and_says_why_not_the_others():
    model = nn.Sequential(
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.UpsamplingBilinear2d(size=(5, 6)),
        nn.Upsample(scale_factor=2),
    )
    stock = copy.deepcopy(model)
    report = fastseg.accelerate(model)
    assert [type(module) for module in model] == [fastseg.nn.Upsample, fastseg.nn.UpsamplingBilinear2d, nn.Upsample]
    assert [entry.names for entry in report.replaced] == [("0",), ("1",)]
    assert all("UpsampleCrossEntropyLoss" in entry.note for entry in report.replaced)
    (skipped,) = report.skipped
    assert skipped.why == "mode='nearest'; only 'bilinear' has a kernel here"
    torch.testing.assert_close(model(image(1, 3, 4, 4)), stock(image(1, 3, 4, 4)))
    report.undo()
    assert [type(module) for module in model] == [type(module) for module in stock]
