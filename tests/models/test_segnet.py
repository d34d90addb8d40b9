"""SegNet and SegNet-Basic: the facts of the release."""

import pytest
import torch
from torch import nn

from fastseg.models import SegNet, SegNetBasic
from fastseg.models.segnet import CAMVID_CLASS_WEIGHTS, CAMVID_CLASSES
from fastseg.nn import MaxUnpool2d
from fastseg.ops import PoolIndices
from fastseg.testing import assert_within_policy
from tests.models.contract import CLASSES, Contract
from tests.models.stock_fcn import vgg16_in_torchvision_layout
from tests.models.stock_segnet import StockSegNet, StockSegNetBasic
from tests.models.verification import called_modules, randomised

WIDTH = 1 / 16
NETWORKS = {SegNet: StockSegNet, SegNetBasic: StockSegNetBasic}
VGG16 = [f"conv{stage}_{layer}" for stage, layers in enumerate((2, 2, 3, 3, 3), 1) for layer in range(1, layers + 1)]
BASIC = [f"conv{stage}" for stage in range(1, 5)] + [f"conv_decode{stage}" for stage in range(1, 5)]


def keys_of(convolutions, scores):
    """All keys of a network with these convolutions; all but `scores` have a normalisation."""
    keys = {f"{name}.{kind}" for name in convolutions for kind in ("weight", "bias")}
    kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return keys | {f"{name}_bn.{kind}" for name in convolutions if name != scores for kind in kinds}


def contract(network, **facts):
    return Contract(
        network, lambda classes=CLASSES, width=WIDTH: NETWORKS[network](classes, width),
        sizes=((64, 96), (45, 23), (37, 61)),
        arguments=dict(width_multiplier=WIDTH), norm_shift=1e-3, deep=False,
        bad_arguments=((dict(batch_norm_eps=-1e-5), "batch_norm_eps is -1e-05; allowed: above 0"),), **facts,
    )  # fmt: skip


CONTRACTS = [
    contract(
        SegNet,
        parameters=(
            (dict(num_classes=11), 29_449_355),
            (dict(num_classes=12), 29_449_932),
            (dict(num_classes=21), 29_455_125),
            (dict(num_classes=37), 29_464_357),
        ),
        keys=keys_of(VGG16 + [f"{name}_D" for name in VGG16], scores="conv1_1_D"),
    ),
    contract(
        SegNetBasic,
        parameters=((dict(num_classes=11), 1_416_587),),
        keys=keys_of([*BASIC, "conv_classifier"], scores="conv_classifier"),
        # Our local response normalisation rounds otherwise, and the biases' gradients are rounding alone.
        summed_alike=False,
    ),
]


def image_of(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_shapes_of_the_release():
    with torch.device("meta"):
        segnet, basic = SegNet().state_dict(), SegNetBasic().state_dict()
    assert segnet["conv1_1_D.weight"].shape == (11, 64, 3, 3)
    assert segnet["conv5_1_D.weight"].shape == (512, 512, 3, 3)
    assert segnet["conv4_1_D.weight"].shape == (256, 512, 3, 3)
    assert basic["conv_decode1.weight"].shape == (64, 64, 7, 7)
    assert basic["conv_classifier.weight"].shape == (11, 64, 1, 1)


def test_number_of_parameters_without_batch_normalisation():
    with torch.device("meta"):
        layers = [layer for layer in SegNet(11).modules() if isinstance(layer, nn.Conv2d)]
    assert sum(parameter.numel() for layer in layers for parameter in layer.parameters()) == 29_433_483


def test_camvid_sizes():
    with torch.device("meta"):
        segnet = dict(called_modules(SegNet(width_multiplier=WIDTH), torch.empty(2, 3, 360, 480)))
        basic = dict(called_modules(SegNetBasic(), torch.empty(2, 3, 360, 480)))
    pooled = [(180, 240), (90, 120), (45, 60), (23, 30), (12, 15)]
    unpooled = [(360, 480), (180, 240), (90, 120), (45, 60), (23, 30)]
    for calls, stages in ((segnet, 5), (basic, 4)):
        assert [calls[f"pool{stage}"][2:] for stage in range(1, stages + 1)] == pooled[:stages]
        assert [calls[f"unpool{stage}"][2:] for stage in range(1, stages + 1)] == unpooled[:stages]
    assert segnet["conv1_1_D"] == basic["conv_classifier"] == (2, 11, 360, 480)


@pytest.mark.parametrize("network", NETWORKS)
def test_indices_take_one_byte(network):
    model, seen = network(2, width_multiplier=WIDTH).eval(), []
    for layer in model.modules():
        if isinstance(layer, MaxUnpool2d):
            layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    model(image_of(1, 3, 45, 23))
    assert len(seen) == (5 if network is SegNet else 4)
    for indices in seen:
        assert isinstance(indices, PoolIndices) and indices.offsets.dtype == torch.uint8


def test_order_of_layers_and_dropout():
    with torch.device("meta"):
        image = torch.empty(2, 3, 64, 64)
        segnet = [name for name, _ in called_modules(SegNet(dropout=0.5), image)]
        basic = [name for name, _ in called_modules(SegNetBasic(dropout=0.5), image)]
        without = [name for name, _ in called_modules(SegNet(), image)]

    def normalised(*names):
        return [layer for name in names for layer in (name, f"{name}_bn")]

    assert segnet == [
        *normalised("conv1_1", "conv1_2"), "pool1",
        *normalised("conv2_1", "conv2_2"), "pool2",
        *normalised("conv3_1", "conv3_2", "conv3_3"), "pool3", "encdrop3",
        *normalised("conv4_1", "conv4_2", "conv4_3"), "pool4", "encdrop4",
        *normalised("conv5_1", "conv5_2", "conv5_3"), "pool5", "encdrop5",
        "unpool5", *normalised("conv5_3_D", "conv5_2_D", "conv5_1_D"), "decdrop5",
        "unpool4", *normalised("conv4_3_D", "conv4_2_D", "conv4_1_D"), "decdrop4",
        "unpool3", *normalised("conv3_3_D", "conv3_2_D", "conv3_1_D"), "decdrop3",
        "unpool2", *normalised("conv2_2_D", "conv2_1_D"),
        "unpool1", *normalised("conv1_2_D"), "conv1_1_D",
    ]  # fmt: skip
    assert without == [name for name in segnet if "drop" not in name]
    assert basic == [
        "norm", *normalised("conv1"), "pool1", *normalised("conv2"), "pool2",
        *normalised("conv3"), "pool3", "encdrop3", *normalised("conv4"), "pool4", "encdrop4",
        "unpool4", *normalised("conv_decode4"), "decdrop4",
        "unpool3", *normalised("conv_decode3"), "decdrop3",
        "unpool2", *normalised("conv_decode2"),
        "unpool1", *normalised("conv_decode1"), "conv_classifier",
    ]  # fmt: skip


@pytest.mark.parametrize("batch_norm", [False, True])
def test_load_imagenet_gives_its_features(batch_norm):
    stock = vgg16_in_torchvision_layout(WIDTH, batch_norm=batch_norm)["features"]
    if batch_norm:
        randomised(stock)
    stock.eval()
    model = SegNet(width_multiplier=WIDTH).eval()
    state_dict = {f"features.{key}": value for key, value in stock.state_dict().items()}
    # the published weights are older than the counter of batches
    state_dict = {key: value for key, value in state_dict.items() if not key.endswith("tracked")}
    assert model.load_imagenet(state_dict) is model
    if not batch_norm:  # make the batch normalisations of the network do nothing
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eps = 0.0
                nn.init.zeros_(layer.bias)
    pooled = []
    model.encoder[4].pool.register_forward_hook(lambda module, inputs, output: pooled.append(output[0]))
    image = image_of(2, 3, 64, 96)
    model(image)
    expected = stock(image)
    assert_within_policy(pooled[0], expected, stock.double()(image.double()), "pool5")


def test_load_imagenet_refuses_what_does_not_fit_and_copies_nothing():
    model = SegNet(width_multiplier=WIDTH)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    good = vgg16_in_torchvision_layout(WIDTH, batch_norm=True).state_dict()
    with pytest.raises(RuntimeError, match=r"SegNet\.load_imagenet: state_dict lacks features\.41\.running_var"):
        model.load_imagenet({key: value for key, value in good.items() if key != "features.41.running_var"})
    wrong = {**good, "features.40.weight": torch.zeros(2, 2)}
    with pytest.raises(RuntimeError, match=r"features\.40\.weight has shape \(2, 2\); allowed for conv5_3"):
        model.load_imagenet(wrong)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_published_class_weights():
    assert len(CAMVID_CLASSES) == len(CAMVID_CLASS_WEIGHTS) == 11
    weight_of = dict(zip(CAMVID_CLASSES, CAMVID_CLASS_WEIGHTS))
    assert min(weight_of, key=weight_of.get) == "road" and max(weight_of, key=weight_of.get) == "sign"
