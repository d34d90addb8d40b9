"""DUC with HDC: parameters, dilations, the places of the cells, and the loss at half resolution."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastseg.models import DUC
from fastseg.models.duc import hybrid_rates
from fastseg.testing import assert_within_policy
from tests.models.contract import CLASSES, Contract, he_but_for_scores
from tests.models.stock_duc import StockDUC
from tests.models.verification import randomised

WIDTH = 1 / 16


def on_meta(build):
    with torch.device("meta"):
        return build()


def own_keys(model, stock):
    """The independent network has the trunk's keys without a prefix and its head in ``layer5``."""
    return {
        key: key.replace("layer5.", "classifier.") if key.startswith("layer5.") else f"backbone.{key}"
        for key in stock.state_dict()
    }


def stock_loss(stock, image, target):
    labels = target[:, ::2, ::2]
    scores = stock.scores(image)[:, :, : labels.shape[1], : labels.shape[2]]
    return F.cross_entropy(scores, labels, ignore_index=255)


CONTRACTS = [
    Contract(
        DUC,
        lambda classes=CLASSES, width=WIDTH: StockDUC(classes, width, 50),
        sizes=((48, 64), (45, 39)),
        arguments=dict(layers=50, width_multiplier=WIDTH),
        keys_of_stock=own_keys,
        stock_loss=stock_loss,
        summed_alike=False,
        parameters=(({}, 65_038_464), (dict(cells=64), 132_282_048)),
        keys=own_keys(None, on_meta(lambda: StockDUC(depth=50))).values(),
        deviation=he_but_for_scores("classifier."),
        bad_arguments=(
            (dict(layers=18), "layers is 18; allowed: 50, 101, 152"),
            (dict(norm="group"), "norm is 'group'; allowed: batch, sync, frozen"),
            (dict(cells=9), "cells is 9; allowed: 1, 4, 16, 64"),
        ),
    )
]


def test_sizes():
    model, image = on_meta(DUC).eval(), torch.empty(1, 3, 800, 800, device="meta")
    assert model.classifier(model.backbone(image)[-1]).shape == (1, 19 * 16, 100, 100)
    assert model.coarse_scores(image).shape == (1, 19, 400, 400)
    assert model(image).shape == (1, 19, 800, 800)


def test_hybrid_rates():
    assert hybrid_rates(23) == [2, 2, 5, 9, *[1, 2, 5, 9] * 4, 1, 2, 5]
    backbone = on_meta(DUC).backbone
    assert [block.conv2.dilation[0] for block in backbone.layer3] == hybrid_rates(23)
    assert [block.conv2.dilation[0] for block in backbone.layer4] == [5, 9, 17]


@pytest.mark.parametrize("cells", (1, 4, 64))
def test_other_numbers_of_cells_equal_a_stock_network(cells):
    model = randomised(DUC(CLASSES, layers=50, cells=cells, width_multiplier=WIDTH)).eval()
    image = torch.randn(1, 3, 27, 35, generator=torch.Generator().manual_seed(1))
    target = torch.randint(CLASSES, (1, 27, 35), generator=torch.Generator().manual_seed(2))
    step = round((64 / cells) ** 0.5)
    results = [(model(image), model.loss(image, target))]
    for dtype in (torch.float32, torch.float64):
        stock = StockDUC(CLASSES, WIDTH, 50, cells)
        values = model.state_dict()
        stock.load_state_dict({key: values[own] for key, own in own_keys(model, stock).items()})
        stock.to(dtype)
        labels = target[:, ::step, ::step]
        scores = stock.scores(image.to(dtype))[:, :, : labels.shape[1], : labels.shape[2]]
        results.append((stock(image.to(dtype)), F.cross_entropy(scores, labels)))
    for what, values in zip(("scores", "loss"), zip(*results)):
        assert_within_policy(*values, what)


def test_pixel_weights_are_those_of_the_labels():
    model = randomised(DUC(CLASSES, layers=50, width_multiplier=WIDTH))
    generator = torch.Generator().manual_seed(1)
    image, weight = torch.randn(1, 3, 24, 32, generator=generator), torch.rand(1, 24, 32, generator=generator)
    target = torch.randint(CLASSES, (1, 24, 32), generator=generator)
    losses = F.cross_entropy(model.coarse_scores(image), target[:, ::2, ::2], reduction="none")
    expected = (losses * weight[:, ::2, ::2]).sum()
    torch.testing.assert_close(model.loss(image, target, pixel_weight=weight, reduction="sum"), expected)


def test_statistics_are_fixed_and_scales_are_trained():
    model = DUC(CLASSES, layers=50, width_multiplier=WIDTH).train()
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == 55
    for layer in norms:
        assert not layer.training and layer.eps == 1e-6 and layer.weight.requires_grad and layer.bias.requires_grad
    trained = DUC(CLASSES, layers=50, width_multiplier=WIDTH, norm="batch").train()
    assert all(
        layer.training and layer.momentum == 5e-4 for layer in trained.modules() if isinstance(layer, nn.BatchNorm2d)
    )
