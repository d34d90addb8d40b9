"""DeepLab v2, v3 and v3+ on ResNet: parameters, keys, sizes, losses, and variants against stock networks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastseg.models import DeepLabV2ResNet, DeepLabV3, DeepLabV3Plus, DeepLabV3Torchvision
from fastseg.models.blocks.normalisation import FrozenBatchNorm2d
from fastseg.testing import assert_within_policy
from tests.models.contract import CLASSES, Contract, he_but_for_scores, same_keys
from tests.models.stock_deeplab_resnet import (
    StockDeepLabV2ResNet,
    StockDeepLabV3,
    StockDeepLabV3Paper,
    StockDeepLabV3PlusResNet,
    StockMultiScale,
)
from tests.models.stock_resnet import StockResNet
from tests.models.verification import randomised

WIDTH = 1 / 16
NARROW = dict(width_multiplier=WIDTH, layers=50)
STOCK = dict(width=WIDTH, depth=50)
NETWORKS = (DeepLabV2ResNet, DeepLabV3, DeepLabV3Torchvision, DeepLabV3Plus)
BAD_ARGUMENTS = (
    (dict(layers=18), "layers is 18; allowed: 50, 101, 152"),
    (dict(norm="group"), "norm is 'group'; allowed: batch, sync, frozen"),
)
BAD_ENCODERS = (
    *BAD_ARGUMENTS,
    (dict(output_stride=32), "output_stride is 32; allowed: 8, 16"),
    (dict(multi_grid=(1, 2)), r"multi_grid is \(1, 2\); allowed: three integers, each 1 or more"),
    (dict(multi_grid=(1, 0, 4)), r"multi_grid is \(1, 0, 4\); allowed"),
)


def on_meta(build):
    with torch.device("meta"):
        return build()


def keys_of(build):
    return list(on_meta(build).state_dict())


class TorchvisionScores(StockDeepLabV3):
    """Its scores alone."""

    def forward(self, image):
        return super().forward(image)["out"]


def torchvision_loss(stock, image, target):
    scores = StockDeepLabV3.forward(stock, image)
    main, auxiliary = (F.cross_entropy(scores[name], target, ignore_index=255) for name in ("out", "aux"))
    return main + 0.5 * auxiliary


def nearest_labels(target, size):
    """Labels at the pixels nearest to the points of a grid whose corners are those of the image."""
    rows, columns = (
        np.floor(np.linspace(0, length - 1, count) + 0.5 + 1e-9).astype(int)
        for length, count in zip(target.shape[1:], size)
    )
    return target[:, rows][:, :, columns]


def multi_scale_loss(stock, image, target):
    return sum(
        F.cross_entropy(scores, nearest_labels(target, scores.shape[2:]), ignore_index=255)
        for scores in stock.maps(image)
    )


CONTRACTS = [
    Contract(
        DeepLabV2ResNet,
        lambda classes=CLASSES, width=WIDTH: StockMultiScale(StockDeepLabV2ResNet(classes, width, 50)),
        sizes=((33, 49), (38, 45)),
        arguments=NARROW,
        keys_of_stock=same_keys,
        stock_loss=multi_scale_loss,
        summed_alike=False,
        parameters=(({}, 44_048_532),),
        keys=keys_of(lambda: StockMultiScale(StockDeepLabV2ResNet(depth=50))),
        deviation=he_but_for_scores("Scale.layer5."),
        bad_arguments=(*BAD_ARGUMENTS, (dict(rates=(6, 0)), r"rates is \(6, 0\); allowed: integers, each 1 or more")),
    ),
    Contract(
        DeepLabV3,
        lambda classes=CLASSES, width=WIDTH: StockDeepLabV3Paper(classes, width, 50, dropout=0.0),
        sizes=((48, 64), (49, 41)),
        arguments=NARROW,
        keys_of_stock=same_keys,
        summed_alike=False,
        parameters=(({}, 58_040_661),),
        keys=keys_of(lambda: StockDeepLabV3Paper(depth=50)),
        deviation=he_but_for_scores("classifier"),
        bad_arguments=BAD_ENCODERS,
    ),
    Contract(
        DeepLabV3Torchvision,
        lambda classes=CLASSES, width=WIDTH: TorchvisionScores(classes, width, 50, dropout=0.0),
        sizes=((48, 64), (45, 41)),
        arguments=dict(**NARROW, auxiliary_dropout=0.0),
        keys_of_stock=same_keys,
        stock_loss=torchvision_loss,
        summed_alike=False,
        parameters=(
            (dict(layers=101), 60_996_202),
            (dict(layers=101, auxiliary=False), 58_630_997),
            (dict(layers=50), 42_004_074),
            (dict(layers=50, auxiliary=False), 39_638_869),
        ),
        keys=keys_of(lambda: StockDeepLabV3(depth=50)),
        deviation=he_but_for_scores("classifier.4", "aux_classifier.4"),
        bad_arguments=(*BAD_ARGUMENTS, (dict(auxiliary_dropout=1.5), "dropout")),
    ),
    Contract(
        DeepLabV3Plus,
        lambda classes=CLASSES, width=WIDTH: StockDeepLabV3PlusResNet(classes, width, 50, dropout=0.0),
        sizes=((48, 64), (49, 41)),
        arguments=NARROW,
        keys_of_stock=same_keys,
        summed_alike=False,
        parameters=(({}, 59_344_309),),
        keys=keys_of(lambda: StockDeepLabV3PlusResNet(depth=50)),
        deviation=he_but_for_scores("decoder.last_conv.8"),
        bad_arguments=BAD_ENCODERS,
    ),
]


@pytest.mark.parametrize(
    "build, stock",
    (
        pytest.param(
            lambda **narrow: DeepLabV2ResNet(CLASSES, multi_scale=False, rates=(1, 2), **narrow),
            lambda: StockDeepLabV2ResNet(CLASSES, rates=(1, 2), **STOCK),
            id="v2 at one scale",
        ),
        pytest.param(
            lambda **narrow: DeepLabV3(CLASSES, output_stride=8, multi_grid=(1, 1, 2), **narrow),
            lambda: StockDeepLabV3Paper(CLASSES, output_stride=8, multi_grid=(1, 1, 2), **STOCK),
            id="v3 at stride 8",
        ),
        pytest.param(
            lambda **narrow: DeepLabV3Plus(CLASSES, output_stride=8, norm="frozen", **narrow),
            lambda: StockDeepLabV3PlusResNet(CLASSES, output_stride=8, **STOCK),
            id="v3+ at stride 8",
        ),
    ),
)
def test_variants_equal_stock_networks_without_gradients(build, stock):
    """Also the way on which normalisation is folded into convolutions."""
    model = randomised(build(**NARROW)).eval()
    image = torch.randn(1, 3, 33, 41, generator=torch.Generator().manual_seed(1))
    values = {key.removeprefix("Scale."): value for key, value in model.state_dict().items()}
    stock, exact = stock().eval(), stock().eval().double()
    for network in (stock, exact):
        network.load_state_dict(values)
    with torch.no_grad():
        assert_within_policy(model(image), stock(image), exact(image.double()), "scores")


@pytest.mark.parametrize(
    "network, side, coarse",
    (
        (DeepLabV2ResNet, 321, 41),
        (DeepLabV2ResNet, 513, 65),
        (DeepLabV3, 513, 33),
        (DeepLabV3Torchvision, 513, 65),
        (DeepLabV3Plus, 513, 129),
    ),
)
def test_sizes(network, side, coarse):
    model = on_meta(network).eval()
    image = torch.empty(1, 3, side, side, device="meta")
    assert model.coarse_scores(image).shape == (1, 21, coarse, coarse)
    assert model(image).shape == (1, 21, side, side)


def test_sizes_of_v3plus_inside():
    model, image = on_meta(DeepLabV3Plus).eval(), torch.empty(1, 3, 513, 513, device="meta")
    stage1, _, _, stage4 = model.backbone(image)
    assert stage1.shape == (1, 256, 129, 129) and stage4.shape == (1, 2048, 33, 33)


def count(module):
    return sum(value.numel() for value in module.parameters())


def test_parameters_of_parts():
    torchvision, plus = on_meta(lambda: DeepLabV3Torchvision(layers=101)), on_meta(DeepLabV3Plus)
    assert len(torchvision.state_dict()) == 676
    assert (count(torchvision.classifier), count(torchvision.aux_classifier)) == (16_130_837, 2_365_205)
    assert (count(plus.backbone), count(plus.aspp), count(plus.decoder)) == (42_500_160, 15_535_104, 1_309_045)


def test_v2_learns_every_eighth_label_at_one_scale():
    model = randomised(DeepLabV2ResNet(CLASSES, multi_scale=False, **NARROW))
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, 33, 49, generator=generator)
    target = torch.randint(CLASSES, (1, 33, 49), generator=generator)
    weight = torch.rand(1, 33, 49, generator=generator)
    losses = F.cross_entropy(model.coarse_scores(image), target[:, ::8, ::8], reduction="none")
    torch.testing.assert_close(model.loss(image, target), losses.mean())
    expected = (losses * weight[:, ::8, ::8]).sum()
    torch.testing.assert_close(model.loss(image, target, pixel_weight=weight, reduction="sum"), expected)


def test_v2_keeps_its_normalisation():
    model = DeepLabV2ResNet(CLASSES, **NARROW).train()
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == 53
    for layer in norms:
        assert not layer.training and not any(value.requires_grad for value in layer.parameters())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "norm, kind", (("batch", nn.BatchNorm2d), ("sync", nn.SyncBatchNorm), ("frozen", FrozenBatchNorm2d))
)
def test_normalisation_is_of_one_kind(network, norm, kind):
    model = on_meta(lambda: network(norm=norm, **NARROW))
    assert {type(layer) for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._NormBase)} == {kind}


@pytest.mark.parametrize("network", NETWORKS)
def test_loads_torchvisions_trunk(network):
    trunk = randomised(StockResNet(50, WIDTH))
    given = trunk.state_dict() | {"fc.weight": torch.zeros(3, 3)}
    model = network(CLASSES, **NARROW)
    assert model.load_imagenet(given) is model
    loaded = model.backbone.state_dict()
    assert loaded.keys() == trunk.state_dict().keys()
    assert all(torch.equal(loaded[key], value) for key, value in trunk.state_dict().items())
    del given["layer4.2.bn3.running_var"]
    with pytest.raises(
        RuntimeError, match=f"{network.__name__}.load_imagenet: state_dict lacks layer4.2.bn3.running_var"
    ):
        model.load_imagenet(given)


def test_v2_with_torchvisions_strides_is_torchvisions_trunk():
    model = randomised(DeepLabV2ResNet(CLASSES, stride_in_1x1=False, **NARROW)).eval()
    trunk = StockResNet(50, WIDTH, output_stride=8, ceil_mode=True).eval()
    exact = StockResNet(50, WIDTH, output_stride=8, ceil_mode=True).eval().double()
    image = torch.randn(1, 3, 33, 41, generator=torch.Generator().manual_seed(1))
    for stock in (trunk, exact):
        stock.load_state_dict(model.backbone.state_dict())
    with torch.no_grad():
        for ours, stock, truth in zip(model.backbone(image), trunk(image), exact(image.double())):
            assert_within_policy(ours, stock, truth, "stage")
