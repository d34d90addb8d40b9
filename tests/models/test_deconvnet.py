"""DeconvNet: the facts of the release."""

import pytest
import torch
from torch import nn

from fastseg.models import DeconvNet
from fastseg.testing import assert_within_policy
from tests.models.contract import CLASSES, Contract, he
from tests.models.stock_deconvnet import StockDeconvNet
from tests.models.stock_fcn import vgg16_in_torchvision_layout
from tests.models.verification import called_modules, randomised

WIDTH = 1 / 32
VGG16_LAYERS = [(1, 2), (2, 2), (3, 3), (4, 3), (5, 3)]


def layers_in_order():
    order = []
    for block, count in VGG16_LAYERS:
        for index in range(1, count + 1):
            order += [f"conv{block}_{index}", f"bn{block}_{index}"]
        order.append(f"pool{block}")
    order += ["fc6", "bnfc6", "fc7", "bnfc7", "fc6-deconv", "fc6-deconv-bn"]
    for block, count in reversed(VGG16_LAYERS):
        order.append(f"unpool{block}")
        for index in range(1, count + 1):
            order += [f"deconv{block}_{index}", f"debn{block}_{index}"]
    return [*order, "seg-score"]


def keys():
    kinds = {True: ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"), False: ("weight", "bias")}
    layers = [name for name in layers_in_order() if "pool" not in name]
    return [f"{name}.{kind}" for name in layers for kind in kinds["bn" in name]]


CONTRACTS = [
    Contract(
        DeconvNet, lambda classes=CLASSES, width=WIDTH: StockDeconvNet(classes, width), sizes=((224, 224), (193, 230)),
        arguments=dict(width_multiplier=WIDTH), smallest=193, parameters=(({}, 251_805_653),), keys=keys(),
        deviation=lambda key, layer: 0.01 if "deconv" in key or key.startswith("seg-score") else he(layer),
        norm_shift=1e-3, deep=False,
    )
]  # fmt: skip


def image_of(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_order_and_shapes_at_full_size():
    with torch.device("meta"):
        model = DeconvNet()
        calls = called_modules(model, torch.empty(2, 3, 224, 224))
    assert [name for name, _ in calls] == layers_in_order()
    shapes = dict(calls)
    assert shapes["pool5"] == (2, 512, 7, 7)
    assert shapes["fc7"] == (2, 4096, 1, 1)
    assert shapes["fc6-deconv"] == (2, 512, 7, 7)
    for block, channels, side in ((5, 512, 14), (4, 512, 28), (3, 256, 56), (2, 128, 112), (1, 64, 224)):
        assert shapes[f"unpool{block}"] == (2, channels, side, side)
    assert shapes["seg-score"] == (2, 21, 224, 224)

    state = model.state_dict()  # transposed convolutions are stored as (in, out, k, k)
    assert state["fc6-deconv.weight"].shape == (4096, 512, 7, 7)
    assert state["deconv4_3.weight"].shape == (512, 256, 3, 3)
    assert state["deconv1_2.weight"].shape == (64, 64, 3, 3)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_load_imagenet_fills_the_encoder_and_the_fully_connected_layers(batch_norm):
    stock = randomised(vgg16_in_torchvision_layout(WIDTH, batch_norm=batch_norm)).eval()
    model = DeconvNet(width_multiplier=WIDTH).eval()
    decoder = {key: value.clone() for key, value in model.state_dict().items() if "de" in key}
    assert model.load_imagenet(stock.state_dict()) is model
    for key, value in decoder.items():
        assert torch.equal(model.state_dict()[key], value), key
    for place, layer in enumerate((0, 3)):
        linear, convolution = stock["classifier"][layer], model.bottom[place].layer
        assert torch.equal(convolution.weight.flatten(1), linear.weight)
        assert torch.equal(convolution.bias, linear.bias)
    if not batch_norm:  # make the batch normalisations of the network do nothing
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eps = 0.0
                nn.init.zeros_(norm.bias)
    pooled = []
    model.encoder[4].pool.register_forward_hook(lambda module, inputs, output: pooled.append(output[0]))
    image = image_of(1, 3, 224, 224)
    model(image)
    expected = stock["features"](image)
    assert_within_policy(pooled[0], expected, stock.double()["features"](image.double()), "pool5")


def test_load_imagenet_needs_the_fully_connected_layers():
    state_dict = vgg16_in_torchvision_layout(WIDTH).state_dict()
    state_dict = {key: value for key, value in state_dict.items() if key.startswith("features")}
    with pytest.raises(RuntimeError, match=r"DeconvNet\.load_imagenet: state_dict lacks classifier\.0\.bias"):
        DeconvNet(width_multiplier=WIDTH).load_imagenet(state_dict)
