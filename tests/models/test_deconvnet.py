"""DeconvNet against a plain torch.nn build that shares no code with it, and the facts of its release."""

import pytest
import torch
from torch import nn

from fastseg.models import DeconvNet
from fastseg.testing import assert_within_policy
from tests.models.plain_deconvnet import PlainDeconvNet
from tests.models.plain_fcn import vgg16_in_torchvision_layout
from tests.models.verification import assert_equals_plain, called_modules, randomised

WIDTH = 1 / 32
VGG16_LAYERS = [(1, 2), (2, 2), (3, 3), (4, 3), (5, 3)]


def image_of(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("size", [(224, 224), (193, 230)], ids=str)
def test_equals_a_plain_build_forward_and_backward(size, training):
    model = randomised(DeconvNet(5, width_multiplier=WIDTH)).train(training)
    assert_equals_plain(model, lambda: PlainDeconvNet(5, WIDTH), image_of(2, 3, *size))


def test_full_size_parameters_names_and_shapes():
    with torch.device("meta"):
        model = DeconvNet()
        calls = called_modules(model, torch.empty(2, 3, 224, 224))
    assert sum(parameter.numel() for parameter in model.parameters()) == 251_805_653

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
    order.append("seg-score")
    assert [name for name, _ in calls] == order
    assert {key.rpartition(".")[0] for key in model.state_dict()} == {
        name for name in order if "pool" not in name
    }

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


def test_sizes_from_193_on_come_back_as_they_went_in():
    with torch.device("meta"):
        model = DeconvNet(2, 1, width_multiplier=WIDTH).eval()
        for height in range(193, 260):
            width = 193 + 7 * height % 131
            assert model(torch.empty(1, 1, height, width)).shape == (1, 2, height, width)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_load_vgg16_fills_the_encoder_and_the_fully_connected_layers(batch_norm):
    stock = randomised(vgg16_in_torchvision_layout(WIDTH, batch_norm=batch_norm)).eval()
    model = DeconvNet(width_multiplier=WIDTH).eval()
    decoder = {key: value.clone() for key, value in model.state_dict().items() if "de" in key}
    assert model.load_vgg16(stock.state_dict()) is model
    for key, value in decoder.items():
        assert torch.equal(model.state_dict()[key], value), key
    for layer, name in ((0, "fc6"), (3, "fc7")):
        linear, convolution = stock["classifier"][layer], model.get_submodule(name)
        assert torch.equal(convolution.weight.flatten(1), linear.weight)
        assert torch.equal(convolution.bias, linear.bias)
    if not batch_norm:  # make the batch normalisations of the network do nothing
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eps = 0.0
                nn.init.zeros_(norm.bias)
    pooled = []
    model.pool5.register_forward_hook(lambda module, inputs, output: pooled.append(output[0]))
    image = image_of(1, 3, 224, 224)
    model(image)
    expected = stock["features"](image)
    assert_within_policy(pooled[0], expected, stock.double()["features"](image.double()), "pool5")


def test_load_vgg16_needs_the_fully_connected_layers():
    state_dict = vgg16_in_torchvision_layout(WIDTH).state_dict()
    state_dict = {key: value for key, value in state_dict.items() if key.startswith("features")}
    with pytest.raises(RuntimeError, match=r"DeconvNet\.load_vgg16: state_dict lacks classifier\.0\.bias"):
        DeconvNet(width_multiplier=WIDTH).load_vgg16(state_dict)


def test_initialisation():
    torch.manual_seed(0)
    for name, layer in DeconvNet(width_multiplier=0.125).named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.weight.eq(1).all() and layer.bias.eq(1e-3).all(), name
        elif isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            in_decoder = "deconv" in name or name == "seg-score"
            expected = 0.01 if in_decoder else (2 / layer.weight[0].numel()) ** 0.5
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.2), name
            assert layer.bias.count_nonzero() == 0, name


@pytest.mark.parametrize("shape", [(3, 224, 224), (1, 1, 224, 224), (1, 3, 192, 224), (1, 3, 224, 192)])
def test_bad_images_are_named(shape):
    model = DeconvNet(width_multiplier=WIDTH)
    message = r"DeconvNet: image has shape .*; allowed: \(N, 3, H, W\) with H and W at least 193"
    with pytest.raises(RuntimeError, match=message):
        model(torch.zeros(shape))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="num_classes is 0; allowed: 1 or more"):
        DeconvNet(0, width_multiplier=WIDTH)
