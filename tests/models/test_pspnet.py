"""PSPNet: semseg's parameters and keys, sizes, and the auxiliary loss."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastseg.models import PSPNet
from fastseg.models.blocks.normalisation import FrozenBatchNorm2d
from fastseg.testing import assert_within_policy
from tests.models.contract import CLASSES, Contract, he_but_for_scores, same_keys
from tests.models.stock_pspnet import StockPSPNet
from tests.models.verification import randomised

WIDTH = 1 / 16


def on_meta(build):
    with torch.device("meta"):
        return build()


def enlarged(scores, image):
    return F.interpolate(scores, image.shape[2:], mode="bilinear", align_corners=True)


class Scores(StockPSPNet):
    """Its scores alone, in training too."""

    def forward(self, image):
        return enlarged(self.maps(image)[0], image)


def stock_loss(stock, image, target):
    main, auxiliary = (
        F.cross_entropy(enlarged(scores, image), target, ignore_index=255) for scores in stock.maps(image)
    )
    return main + 0.4 * auxiliary


CONTRACTS = [
    Contract(
        PSPNet,
        lambda classes=CLASSES, width=WIDTH: Scores(classes, width, dropout=0.0),
        sizes=((49, 65), (46, 39)),
        arguments=dict(width_multiplier=WIDTH),
        keys_of_stock=same_keys,
        stock_loss=stock_loss,
        summed_alike=False,
        parameters=(
            ({}, 49_180_908),
            (dict(num_classes=21), 49_081_578),
            (dict(num_classes=21, layers=101), 68_073_706),
            (dict(num_classes=19, layers=101), 68_072_166),
        ),
        keys=list(on_meta(StockPSPNet).state_dict()),
        deviation=he_but_for_scores("cls.4", "aux.4"),
        bad_arguments=(
            (dict(layers=18), "layers is 18; allowed: 50, 101, 152"),
            (dict(norm="group"), "norm is 'group'; allowed: batch, sync, frozen"),
        ),
    )
]


@pytest.mark.parametrize("side, coarse", ((473, 60), (713, 90)))
def test_sizes(side, coarse):
    model, image = on_meta(PSPNet).eval(), torch.empty(1, 3, side, side, device="meta")
    assert model.coarse_scores(image).shape == (1, 150, coarse, coarse)
    assert model(image).shape == (1, 150, side, side)


@pytest.mark.parametrize("classes, number", ((21, 2_365_205), (150, 2_398_358), (19, 2_364_691)))
def test_parameters_of_the_auxiliary_head(classes, number):
    model = on_meta(lambda: PSPNet(classes))
    assert sum(value.numel() for value in model.aux.parameters()) == number


def test_keys_without_auxiliary_head():
    keys = on_meta(lambda: PSPNet(auxiliary=False)).state_dict().keys()
    assert keys == on_meta(lambda: StockPSPNet(auxiliary=False)).state_dict().keys()


def test_without_auxiliary_head():
    model = randomised(PSPNet(CLASSES, auxiliary=False, width_multiplier=WIDTH, dropout=0.0))
    image = torch.randn(2, 3, 33, 41, generator=torch.Generator().manual_seed(1))
    target = torch.randint(CLASSES, (2, 33, 41), generator=torch.Generator().manual_seed(3))
    losses = []
    for dtype in (torch.float32, torch.float64):
        stock = Scores(CLASSES, WIDTH, auxiliary=False, dropout=0.0)
        stock.load_state_dict(model.state_dict())
        losses.append(F.cross_entropy(stock.to(dtype)(image.to(dtype)), target))
    assert_within_policy(model.loss(image, target), *losses, "loss")


@pytest.mark.parametrize(
    "norm, kind", (("batch", nn.BatchNorm2d), ("sync", nn.SyncBatchNorm), ("frozen", FrozenBatchNorm2d))
)
def test_normalisation_is_of_one_kind(norm, kind):
    model = on_meta(lambda: PSPNet(norm=norm))
    assert {type(layer) for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._NormBase)} == {kind}


def test_dropout_is_of_whole_channels():
    assert [type(head[3]) for head in (PSPNet(width_multiplier=WIDTH).cls, PSPNet(width_multiplier=WIDTH).aux)] == [
        nn.Dropout2d,
        nn.Dropout2d,
    ]
