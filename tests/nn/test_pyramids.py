"""`fastseg.nn.ASPP` and `PyramidPooling` against the same modules in torch.nn."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastseg
from fastseg.models.blocks.normalisation import FrozenBatchNorm2d
from fastseg.testing import assert_within_policy
from tests.models.verification import together


def image(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def block(channels, out_channels, kernel_size=1, rate=1, before=()):
    padding = rate if kernel_size > 1 else 0
    convolution = nn.Conv2d(channels, out_channels, kernel_size, padding=padding, dilation=rate, bias=False)
    return nn.Sequential(*before, convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


def separable(channels, out_channels, rate):
    """A depthwise convolution, normalised and with ReLU, then a 1x1 one."""
    depthwise = nn.Conv2d(channels, channels, 3, padding=rate, dilation=rate, groups=channels, bias=False)
    return block(channels, out_channels, before=[depthwise, nn.BatchNorm2d(channels), nn.ReLU()])


class StockASPP(nn.Module):
    """As DeepLab v3 has it, or v3+ on Xception."""

    def __init__(self, channels, rates, width, separable_branches=False):
        super().__init__()
        pooling = block(channels, width, before=[nn.AdaptiveAvgPool2d(1)])
        branches = [separable(channels, width, rate) for rate in rates]
        if not separable_branches:
            branches = [block(channels, width, 3, rate) for rate in rates]
        self.convs = nn.ModuleList([block(channels, width), *branches, pooling])
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
@pytest.mark.parametrize("separable", (False, True), ids=("dense", "separable"))
def test_aspp(training, grad, layout, separable):
    ours = fastseg.nn.ASPP(24, (6, 12, 18), 8, separable=separable).train(training)
    input = image(3, 24, 17, 19).contiguous(memory_format=layout)
    assert ours(input).is_contiguous(memory_format=layout) or training
    models = copies(ours, lambda: StockASPP(24, (6, 12, 18), 8, separable))
    compare(models, models, input, grad)


def pyramids(norm):
    return fastseg.nn.ASPP(8, (2, 3), 4, norm=norm), fastseg.nn.PyramidPooling(8, 4, norm=norm)


def test_normalisation_is_the_one_that_was_asked_for():
    for pyramid in pyramids(nn.InstanceNorm2d):
        kinds = {type(layer) for layer in pyramid.modules() if isinstance(layer, nn.modules.batchnorm._NormBase)}
        assert kinds == {nn.InstanceNorm2d}


def test_frozen_normalisation_is_folded_as_batch_normalisation_is():
    aspp, frozen = (fastseg.nn.ASPP(8, (2, 3), 4, norm=norm) for norm in (nn.BatchNorm2d, FrozenBatchNorm2d))
    frozen.load_state_dict(randomised(aspp).state_dict())
    with torch.no_grad():
        assert torch.equal(frozen.eval()(image(2, 8, 9, 9)), aspp.eval()(image(2, 8, 9, 9)))


@pytest.mark.parametrize("grad", (True, False))
def test_pyramids_on_meta_tensors(grad):
    with torch.device("meta"), torch.set_grad_enabled(grad):
        aspp, pooling = (pyramid.eval() for pyramid in pyramids(nn.BatchNorm2d))
        map = torch.empty(1, 8, 9, 7)
        assert aspp(map).shape == (1, 4, 9, 7)
        assert pooling.convolved(map, nn.Conv2d(24, 5, 3, padding=1)).shape == (1, 5, 9, 7)


@pytest.mark.parametrize("grad", (True, False))
def test_pyramids_under_autocast(grad):
    aspp, pooling = (randomised(pyramid).eval() for pyramid in pyramids(nn.BatchNorm2d))
    convolution, map = nn.Conv2d(24, 5, 3, padding=1), image(2, 8, 9, 7)
    with torch.set_grad_enabled(grad):
        for run in (aspp, lambda map: pooling.convolved(map, convolution)):
            expected = run(map)
            with torch.autocast("cpu", torch.bfloat16):
                found = run(map)
            assert found.dtype == torch.bfloat16
            error = (found - expected).abs().max() / expected.abs().max()
            assert 0 < error < 0.05


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
