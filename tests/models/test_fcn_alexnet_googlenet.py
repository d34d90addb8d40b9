"""FCN-32s on AlexNet and on GoogLeNet."""

import pytest
import torch
import torch.nn.functional as F

from fastseg.models import FCN32sAlexNet, FCN32sGoogLeNet
from tests.models.contract import CLASSES, Contract, he, same_keys
from tests.models.stock_alexnet import StockFCN32sAlexNet
from tests.models.stock_fcn import Coordinates
from tests.models.stock_googlenet import StockFCN32sGoogLeNet
from tests.models.verification import randomised


def deviation(key, layer):
    """Scores start at zero; `test_upsampling_starts_bilinear` checks the upsampling."""
    return None if key.startswith("upscore") else 0.0 if key.startswith("score") else he(layer)


def full_size_keys(stock):
    with torch.device("meta"):
        return list(stock().state_dict())


UPSAMPLING = (dict(upsampling="interp"), "upsampling is 'interp'; allowed: fixed, learned")


def googlenet(padding, **facts):
    return Contract(
        FCN32sGoogLeNet,
        lambda classes=CLASSES, width=1 / 8: StockFCN32sGoogLeNet(classes, width, padding=padding),
        name=f"FCN32sGoogLeNet {padding}",
        arguments=dict(width_multiplier=1 / 8, padding=padding),
        keys_of_stock=same_keys,
        training=False,
        summed_alike=False,
        parameters=((dict(padding=padding), 5_995_077),),
        uncounted=("upscore",),
        keys=full_size_keys(StockFCN32sGoogLeNet),
        deviation=deviation,
        **facts,
    )


CONTRACTS = [
    Contract(
        FCN32sAlexNet,
        lambda classes=CLASSES, width=1 / 16: StockFCN32sAlexNet(classes, width, dropout=0.0),
        sizes=((37, 61),),
        arguments=dict(width_multiplier=1 / 16),
        keys_of_stock=same_keys,
        training=False,
        summed_alike=False,
        parameters=(({}, 56_954_261),),
        uncounted=("upscore",),
        keys=full_size_keys(StockFCN32sAlexNet),
        deviation=deviation,
        bad_arguments=(UPSAMPLING,),
    ),
    googlenet("pad100", sizes=((37, 61),)),
    googlenet(
        "same",
        sizes=((64, 32), (37, 61)),
        bad_arguments=(UPSAMPLING, (dict(padding="valid"), "padding is 'valid'; allowed: pad100, same")),
    ),
]


def test_affine_rule_gives_alexnets_offset():
    point = Coordinates().window(11, stride=4, padding=100).window(3, stride=2)
    point = point.window(5, padding=2).window(3, stride=2).window(3, stride=2).window(6).transposed(63, 32)
    assert point.offset_to(Coordinates()) == 18


@pytest.mark.parametrize("network", [FCN32sAlexNet, FCN32sGoogLeNet])
def test_500_pixels(network):
    with torch.device("meta"):
        model = network()
        assert model(torch.empty(1, 3, 500, 500)).shape == (1, 21, 500, 500)
        assert model.coarse_scores(torch.empty(1, 3, 500, 500)).shape[2] == (16 if network is FCN32sAlexNet else 21)


def test_shapes_of_the_release():
    with torch.device("meta"):
        state = FCN32sAlexNet().state_dict()
    assert state["conv2.weight"].shape == (256, 48, 5, 5)
    assert state["fc6.weight"].shape == (4096, 256, 6, 6)
    assert state["upscore.weight"].shape == (21, 21, 63, 63)


@pytest.mark.parametrize("network, kernel", [(FCN32sAlexNet, 63), (FCN32sGoogLeNet, 64)])
@pytest.mark.parametrize("upsampling", ["fixed", "learned"])
def test_upsampling_starts_bilinear(network, kernel, upsampling):
    layer = network(3, upsampling=upsampling, width_multiplier=1 / 32).upscore
    places = torch.arange(kernel, dtype=torch.float64) - (kernel - 1) / 2
    taps = (1 - places.abs() / 32).clamp(min=0)
    expected = torch.einsum("ab,i,j->abij", torch.eye(3, dtype=torch.float64), taps, taps)
    torch.testing.assert_close(layer.weight.detach().double(), expected)
    assert layer.weight.requires_grad == (upsampling == "learned")


def test_learned_upsampling_equals_fixed_at_the_start():
    image = torch.randn(1, 3, 40, 50)
    fixed, learned = (
        randomised(FCN32sAlexNet(3, upsampling=upsampling, width_multiplier=1 / 16)).eval()
        for upsampling in ("fixed", "learned")
    )
    for model in (fixed, learned):
        model.upscore.reset_parameters()
    torch.testing.assert_close(fixed(image), learned(image))


def test_inner_pixels_of_alexnet_interpolate_the_scores():
    """Score i lies at pixel 32 i + 13 of the image: its transposed convolution interpolates with aligned corners."""
    model = randomised(FCN32sAlexNet(3, width_multiplier=1 / 16)).eval()
    model.upscore.reset_parameters()
    image = torch.randn(1, 3, 80, 110)
    coarse = model.coarse_scores(image)
    size = [32 * (length - 1) + 1 for length in coarse.shape[2:]]
    expected = F.interpolate(coarse, size, mode="bilinear", align_corners=True)
    inside = expected[:, :, : 80 - 13, : 110 - 13]
    torch.testing.assert_close(model(image)[:, :, 13 : 13 + inside.shape[2], 13 : 13 + inside.shape[3]], inside)
