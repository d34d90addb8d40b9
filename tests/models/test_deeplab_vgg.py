"""DeepLab v1, DeepLab-MSc and DeepLab v2 on VGG16."""

import pytest
import torch
import torch.nn.functional as F

from fastseg.models import DeepLabMSc, DeepLabV1, DeepLabV2VGG, parameter_groups
from fastseg.testing import assert_within_policy
from tests.models.contract import CLASSES, Contract, he_but_for_scores
from tests.models.stock_deeplab_vgg import StockDeepLabV1, StockDeepLabV2VGG
from tests.models.stock_fcn import vgg16_in_torchvision_layout
from tests.models.verification import copied, randomised

WIDTH = 1 / 16
NETWORKS = ("largefov", "4x4", "7x7")


def keys_of_stock(model, stock):
    return {key: key.replace("sides", "branches") for key in stock.state_dict()}


def loss_at_every_eighth_pixel(stock, image, target):
    return F.cross_entropy(stock.scores(image), target[:, ::8, ::8], ignore_index=255)


def contract(network, stock, name, arguments, stock_arguments, **facts):
    def build(classes=CLASSES, width=WIDTH):
        return stock(classes, width, dropout=0.0, cropped=True, **stock_arguments)

    with torch.device("meta"):
        keys = list(keys_of_stock(None, build(21, 1.0)).values())
    return Contract(
        network, build, name=name, arguments=dict(width_multiplier=WIDTH, **arguments), keys_of_stock=keys_of_stock,
        stock_loss=loss_at_every_eighth_pixel, training=False, summed_alike=False, keys=keys,
        deviation=he_but_for_scores("fc8", *(f"branches.{branch}.6" for branch in range(5))), **facts,
    )  # fmt: skip


BAD_NETWORK = ((dict(network="5x5"), "network is '5x5'; allowed: largefov, 4x4, 7x7"),)
CONTRACTS = [
    contract(
        DeepLabV1, StockDeepLabV1, "DeepLab v1 LargeFOV", {}, {},
        sizes=((33, 121), (30, 44)), parameters=(({}, 20_505_429),), bad_arguments=BAD_NETWORK,
    ),
    contract(
        DeepLabV1, StockDeepLabV1, "DeepLab v1 4x4", dict(network="4x4"), dict(network="4x4"),
        sizes=((33, 121), (30, 44)),
        parameters=((dict(network="4x4"), 65_140_565), (dict(network="7x7"), 134_346_581)),
    ),
    contract(
        DeepLabMSc, StockDeepLabV1, "DeepLab-MSc", {}, dict(multi_scale=True),
        sizes=((33, 57), (30, 44)), parameters=(({}, 21_711_550),), bad_arguments=BAD_NETWORK,
    ),
    contract(
        DeepLabV2VGG, StockDeepLabV2VGG, "DeepLab v2 VGG16", {}, {},
        sizes=((33, 209), (30, 44)), parameters=(({}, 37_877_652),),
        bad_arguments=(
            (dict(rates=(6,)), r"rates is \(6,\); allowed: two or more rates of 1 or more"),
            (dict(rates=(6, 0)), r"rates is \(6, 0\); allowed"),
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize("network", [DeepLabV1, DeepLabMSc, DeepLabV2VGG])
def test_321_pixels_have_41_scores(network):
    with torch.device("meta"):
        model, image = network(), torch.empty(1, 3, 321, 321)
        assert model.coarse_scores(image).shape == (1, 21, 41, 41)
        assert model(image).shape == (1, 21, 321, 321)


@pytest.mark.parametrize("network", NETWORKS)
def test_shapes_of_fc6(network):
    with torch.device("meta"):
        weight = DeepLabV1(network=network).state_dict()["fc6.weight"]
    assert weight.shape == {"largefov": (1024, 512, 3, 3), "4x4": (4096, 512, 4, 4), "7x7": (4096, 512, 7, 7)}[network]


def test_the_7x7_network_equals_stock():
    model = randomised(DeepLabV1(CLASSES, network="7x7", width_multiplier=WIDTH)).eval()
    image = torch.randn(1, 3, 41, 121, generator=torch.Generator().manual_seed(1))
    stock, exact = (copied(StockDeepLabV1(CLASSES, WIDTH, "7x7"), model, keys_of_stock) for _ in range(2))
    assert_within_policy(model(image), stock(image), exact.double()(image.double()), "scores")


def test_six_score_paths_are_summed():
    model = randomised(DeepLabMSc(CLASSES, width_multiplier=WIDTH)).eval()
    stock = copied(StockDeepLabV1(CLASSES, WIDTH, multi_scale=True), model, keys_of_stock)
    image = torch.randn(1, 3, 33, 41, generator=torch.Generator().manual_seed(1))
    paths = stock.paths(image)
    assert len(paths) == 6 and min(path.abs().max() for path in paths) > 0.1
    torch.testing.assert_close(model.coarse_scores(image), sum(paths))


@pytest.mark.parametrize("size", [(33, 41), (30, 44)])
def test_loss_takes_every_eighth_label(size):
    """Of a size that is not 8k + 1 the scores beyond the image have no label."""
    model = randomised(DeepLabV1(CLASSES, width_multiplier=WIDTH)).eval()
    generator = torch.Generator().manual_seed(1)
    image, target = (
        torch.randn(2, 3, *size, generator=generator),
        torch.randint(CLASSES, (2, *size), generator=generator),
    )
    seen = torch.full_like(target, 255)
    seen[:, ::8, ::8] = target[:, ::8, ::8]
    seen[:, :8], target[:, :8] = 255, 255
    expected = F.cross_entropy(model(image), seen, ignore_index=255)
    torch.testing.assert_close(model.loss(image, target), expected)
    weight = torch.arange(1.0, CLASSES + 1)
    expected = F.cross_entropy(model(image), seen.long(), weight, ignore_index=255, reduction="sum")
    torch.testing.assert_close(model.loss(image, target.byte(), weight=weight, reduction="sum"), expected)


@pytest.mark.parametrize("network, kept, apart", [("largefov", 4, 3), ("4x4", 1, 2), ("7x7", 1, 1)])
def test_load_imagenet_thins_out_the_fully_connected_layers(network, kept, apart):
    source = randomised(vgg16_in_torchvision_layout(WIDTH)).state_dict()
    model = DeepLabMSc(CLASSES, network=network, width_multiplier=WIDTH)
    others = {key: value.clone() for key, value in model.state_dict().items() if key.startswith(("fc8", "branches"))}
    assert model.load_imagenet(source) is model
    own = model.state_dict()
    convolutions = [value for key, value in own.items() if key.startswith("conv")]
    for ours, theirs in zip(convolutions, [value for key, value in source.items() if key.startswith("features")]):
        assert torch.equal(ours, theirs)
    fc6, fc7 = source["classifier.0.weight"].unflatten(1, (-1, 7, 7)), source["classifier.3.weight"]
    assert torch.equal(own["fc6.weight"], fc6[::kept, :, ::apart, ::apart])
    assert torch.equal(own["fc7.weight"][:, :, 0, 0], fc7[::kept, ::kept])
    assert torch.equal(own["fc6.bias"], source["classifier.0.bias"][::kept])
    assert torch.equal(own["fc7.bias"], source["classifier.3.bias"][::kept])
    assert all(torch.equal(own[key], value) for key, value in others.items())


def test_load_imagenet_of_v2_fills_the_convolutions():
    source = vgg16_in_torchvision_layout(WIDTH).state_dict()
    model = DeepLabV2VGG(CLASSES, width_multiplier=WIDTH)
    fc6 = model.state_dict()["fc6_1.weight"].clone()
    model.load_imagenet({key: value for key, value in source.items() if key.startswith("features")})
    assert torch.equal(model.state_dict()["conv5_3.weight"], source["features.28.weight"])
    assert torch.equal(model.state_dict()["fc6_1.weight"], fc6)


def test_load_imagenet_refuses_what_does_not_fit_and_copies_nothing():
    model = DeepLabV1(CLASSES, width_multiplier=WIDTH)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    good = vgg16_in_torchvision_layout(WIDTH).state_dict()
    with pytest.raises(RuntimeError, match=r"DeepLabV1\.load_imagenet: state_dict lacks classifier\.3\.bias"):
        model.load_imagenet({key: value for key, value in good.items() if key != "classifier.3.bias"})
    with pytest.raises(RuntimeError, match=r"classifier\.0\.weight has shape \(2, 2\); allowed for fc6\.weight"):
        model.load_imagenet({**good, "classifier.0.weight": torch.zeros(2, 2)})
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_only_the_score_layers_learn_faster():
    model = DeepLabV2VGG(CLASSES, width_multiplier=WIDTH)
    groups = parameter_groups(model, 1e-3, 5e-4, bias_factor=2.0)
    counts = {group["lr"]: len(group["params"]) for group in groups}
    assert counts == {1e-3: 13 + 8, 2e-3: 13 + 8, 1e-2: 4, 2e-2: 4}
