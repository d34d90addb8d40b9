"""`fastseg.nn.ASPP` and `PyramidPooling` against the same modules in torch.nn."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastseg
from fastseg.testing import assert_within_policy
from tests.models.verification import together


def image(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def block(channels, out_channels, kernel_size=1, rate=1, before=()):
    padding = rate if kernel_size > 1 else 0
    convolution = nn.Conv2d(channels, out_channels, kernel_size, padding=padding, dilation=rate, bias=False)
    return nn.Sequential(*before, convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


class StockASPP(nn.Module):
    """As in DeepLab v3."""

    def __init__(self, channels, rates, width):
        super().__init__()
        pooling = block(channels, width, before=[nn.AdaptiveAvgPool2d(1)])
        self.convs = nn.ModuleList(
            [block(channels, width), *(block(channels, width, 3, rate) for rate in rates), pooling]
        )
        self.project = nn.Sequential(*block((len(rates) + 2) * width, width), nn.Dropout(0.5))

    def forward(self, input):
        maps = [branch(input) for branch in self.convs]
        maps[-1] = F.interpolate(maps[-1], input.shape[2:], mode="bilinear", align_corners=False)
        return self.project(torch.cat(maps, 1))


class StockPyramid(nn.Module):
    """As in semseg."""

    def __init__(self, channels, width, bins, align_corners):
        super().__init__()
        self.align_corners = align_corners
        self.features = nn.ModuleList(block(channels, width, before=[nn.AdaptiveAvgPool2d(bin)]) for bin in bins)

    def forward(self, input):
        options = dict(mode="bilinear", align_corners=self.align_corners)
        maps = [F.interpolate(feature(input), input.shape[2:], **options) for feature in self.features]
        return torch.cat([input, *maps], 1)


def randomised(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator) * (0.3 if value.dim() > 1 else 0.1))
                if "running_var" in name or (value.dim() == 1 and "weight" in name):
                    value.abs_().add_(0.5)
    return model


def copies(ours, stock):
    """(ours, stock, stock in fp64) with the same values and mode."""
    randomised(ours)
    models = [ours, stock(), stock().double()]
    for model in models[1:]:
        model.load_state_dict(ours.state_dict())
        model.train(ours.training)
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return models


def compare(models, functions, input, grad=True):
    results = []
    for model, function in zip(models, functions):
        leaf = input.to(next(model.parameters()).dtype).requires_grad_()
        with torch.set_grad_enabled(grad):
            output = function(leaf)
        found = [output.detach()]
        if grad:
            generator = torch.Generator().manual_seed(2)
            gradient = torch.randn(output.shape, generator=generator).to(output.dtype)
            found += torch.autograd.grad(output, [leaf, *model.parameters()], gradient)
        results.append([*found, *(buffer for buffer in model.buffers() if buffer.is_floating_point())])
    output, *others = zip(*results, strict=True)
    assert_within_policy(*output)
    assert_within_policy(*together(others or [output]), "gradients and statistics")


@pytest.mark.parametrize("training, grad", ((True, True), (False, True), (False, False)))
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_aspp(training, grad, layout):
    ours = fastseg.nn.ASPP(24, (6, 12, 18), 8).train(training)
    models = copies(ours, lambda: StockASPP(24, (6, 12, 18), 8))
    input = image(3, 24, 17, 19).contiguous(memory_format=layout)
    assert ours(input).is_contiguous(memory_format=layout) or training
    models = copies(ours, lambda: StockASPP(24, (6, 12, 18), 8))
    compare(models, models, input, grad)


def test_aspp_has_torchvisions_keys():
    aspp = fastseg.nn.ASPP(2048, (12, 24, 36))
    assert sum(parameter.numel() for parameter in aspp.parameters()) == 15_535_104
    assert {name.rpartition(".")[0] for name in aspp.state_dict()} == {
        *(f"convs.{branch}.{place}" for branch in range(4) for place in (0, 1)),
        "convs.4.1",
        "convs.4.2",
        "project.0",
        "project.1",
    }
    assert aspp.state_dict().keys() == StockASPP(2048, (12, 24, 36), 256).state_dict().keys()


def test_hooks_between_convolution_and_relu_are_called():
    aspp, seen = fastseg.nn.ASPP(4, (2, 3), 3).eval(), []
    aspp.convs[1][1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        aspp(image(1, 4, 5, 5))
    assert len(seen) == 1


FOLLOWING = {
    "3x3": lambda channels: nn.Conv2d(channels, 6, 3, padding=1, bias=False),
    "1x1": lambda channels: nn.Conv2d(channels, 6, 1),
    "dilated": lambda channels: nn.Conv2d(channels, 6, 3, padding="same", dilation=2),
    "rows, no padding": lambda channels: nn.Conv2d(channels, 6, (3, 1)),
}


class Followed(nn.Module):
    def __init__(self, pyramid, convolution):
        super().__init__()
        self.pyramid, self.convolution = pyramid, convolution


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("align_corners", (True, False))
def test_pyramid_pooling(training, align_corners):
    ours = fastseg.nn.PyramidPooling(12, 4, align_corners=align_corners).train(training)
    models = copies(ours, lambda: StockPyramid(12, 4, (1, 2, 3, 6), align_corners))
    compare(models, models, image(3, 12, 13, 12))
    assert {name.rpartition(".")[0] for name in ours.state_dict()} == {
        f"features.{place}.{layer}" for place in range(4) for layer in (1, 2)
    }


@pytest.mark.parametrize("name", FOLLOWING)
@pytest.mark.parametrize("align_corners", (True, False))
def test_pyramid_pooling_and_the_convolution_after_it(name, align_corners):
    """The result of the convolution of the upsampled maps, which are never stored."""

    def build(pyramid):
        return Followed(pyramid, FOLLOWING[name](12 + 4 * 4)).eval()

    ours = build(fastseg.nn.PyramidPooling(12, 4, align_corners=align_corners))
    models = copies(ours, lambda: build(StockPyramid(12, 4, (1, 2, 3, 6), align_corners)))
    stock = [lambda input, model=model: model.convolution(model.pyramid(input)) for model in models[1:]]
    compare(models, [lambda input: ours.pyramid.convolved(input, ours.convolution), *stock], image(2, 12, 14, 12))


@pytest.mark.parametrize(
    "convolution, message",
    (
        (nn.Conv2d(27, 6, 3), "has 27 input channels; allowed: 28"),
        (nn.Conv2d(28, 6, 3, stride=2), "has stride=(2, 2), groups=1"),
        (nn.Conv2d(28, 4, 3, groups=2), "groups=2"),
        (nn.Conv2d(28, 6, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'; allowed"),
    ),
)
def test_a_convolution_that_does_not_fit(convolution, message):
    with pytest.raises(ValueError) as caught:
        fastseg.nn.PyramidPooling(12, 4).eval().convolved(image(1, 12, 8, 8), convolution)
    assert str(caught.value).startswith("fastseg.nn.PyramidPooling: convolution") and message in str(caught.value)
