"""`fastseg.nn.Conv2d`, `ConvTranspose2d`, `BilinearUpsample2d`; which convolutions `fastseg.accelerate` replaces."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastseg
from fastseg.testing import assert_within_policy
from tests.models.verification import together


def image(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CONVOLUTIONS = [
    dict(kernel_size=3, padding=2, dilation=2),
    dict(kernel_size=3, stride=2, padding=1, groups=4),
    dict(kernel_size=(3, 2), padding="same", dilation=2, bias=False),
    dict(kernel_size=3, padding=4, dilation=4, groups=8),
    dict(kernel_size=3, padding=2, padding_mode="reflect", dilation=2),
    dict(kernel_size=3, padding=(1, 2), padding_mode="circular"),
]
TRANSPOSED = [
    dict(kernel_size=4, stride=2, padding=1),
    dict(kernel_size=16, stride=8, padding=4, bias=False),
    dict(kernel_size=3, stride=2, padding=1, output_padding=1, groups=4),
    dict(kernel_size=3, stride=2, padding=1, dilation=2, groups=8),
]


def check(ours, stock, *arguments):
    exact = copy.deepcopy(stock).double()
    ours.load_state_dict(stock.state_dict())
    assert repr(ours) == repr(stock) and ours.state_dict().keys() == stock.state_dict().keys()
    outputs, gradients = [], []
    for module, input in ((ours, image(2, 8, 9, 7)), (stock, image(2, 8, 9, 7)), (exact, image(2, 8, 9, 7).double())):
        input.requires_grad_()
        output = module(input, *arguments)
        outputs.append(output)
        gradients.append(torch.autograd.grad(output.square().sum(), (input, *module.parameters())))
    # Compared together: torch's order of sums depends on the layout, and the rounding of a few numbers is random.
    assert_within_policy(*together([outputs, *zip(*gradients)]))


@pytest.mark.parametrize("arguments", CONVOLUTIONS)
def test_convolution_equals_stock(arguments):
    check(fastseg.nn.Conv2d(8, 8, **arguments), nn.Conv2d(8, 8, **arguments))


@pytest.mark.parametrize("arguments", TRANSPOSED)
def test_transposed_convolution_equals_stock(arguments):
    check(fastseg.nn.ConvTranspose2d(8, 8, **arguments), nn.ConvTranspose2d(8, 8, **arguments))


def test_output_size():
    stock = nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1)
    check(fastseg.nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1), stock, [18, 13])
    with pytest.raises(ValueError, match="output size"):
        fastseg.nn.ConvTranspose2d(8, 4, 3, stride=2)(image(1, 8, 4, 4), [30, 30])


def test_own_arguments():
    layer = fastseg.nn.Conv2d(8, 4, 3, padding=2, dilation=2)
    residual, buffer = image(2, 4, 9, 7), torch.zeros(2, 6, 9, 7)
    with torch.no_grad():
        layer(image(2, 8, 9, 7), residual=residual, activation="relu", out=buffer[:, 1:5])
        expected = F.relu(nn.Conv2d.forward(layer, image(2, 8, 9, 7)) + residual)
    torch.testing.assert_close(buffer[:, 1:5], expected)
    up, skip = fastseg.nn.ConvTranspose2d(8, 4, 2, stride=2), image(2, 4, 30, 30)
    found = up(image(2, 8, 9, 7), skip=skip, skip_offset=(3, 4), crop=(1, 2, 16, 10), activation="relu")
    whole = F.conv_transpose2d(image(2, 8, 9, 7), up.weight, up.bias, 2)
    torch.testing.assert_close(found, F.relu(whole[..., 1:17, 2:12] + skip[..., 3:19, 4:14]))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 4, 2, 1)

    def forward(self, image):
        return self.up(self.grouped(self.depthwise(self.dilated(self.stem(image)))))


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("op", [fastseg.ops.dilated_conv2d, fastseg.ops.conv_transpose2d])
def test_a_relu_in_place_may_follow(op, backend):
    """Autograd refuses it on a view that comes from an op."""
    weight = image(4, 4, 3, 3, seed=1).requires_grad_()
    output = op(image(2, 4, 9, 7), weight, padding=2, dilation=2, backend=backend)
    expected = output.detach().clone().relu()
    F.relu(output, inplace=True).sum().backward()
    assert torch.equal(output, expected) and weight.grad.any()


def test_accelerate_replaces_dilated_depthwise_and_transposed_convolutions():
    model, input = Network(), image(2, 3, 8, 6)
    before = model(input)
    report = fastseg.accelerate(model)
    assert {name: entry.after for entry in report.replaced for name in entry.names} == {
        "dilated": "fastseg.nn.Conv2d",
        "depthwise": "fastseg.nn.Conv2d",
        "up": "fastseg.nn.ConvTranspose2d",
    }
    assert not report.skipped  # convolutions that are never replaced are not listed
    torch.testing.assert_close(model(input), before)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(input), before)
    assert fastseg.restore(model) == 3 and torch.equal(model(input), before)


def test_complex_convolutions_are_left_alone():
    layer = nn.Conv2d(2, 2, 3, dilation=2, dtype=torch.complex64)
    assert fastseg.accelerate(layer).skipped[0].why == "weights of torch.complex64"


@pytest.mark.parametrize("per_channel", (False, True))
@pytest.mark.parametrize("factor", (2, 8, 32))
def test_bilinear_upsampling(factor, per_channel):
    layer = fastseg.nn.BilinearUpsample2d(5, factor, factor // 2, per_channel=per_channel)
    assert list(layer.state_dict()) == ["weight"] and not layer.weight.requires_grad
    assert layer.weight.shape == (5, 1 if per_channel else 5, 2 * factor, 2 * factor)
    input, inside = image(2, 5, 4, 3), slice(factor // 2, -(factor // 2))
    expected = F.interpolate(input, scale_factor=factor, mode="bilinear")
    torch.testing.assert_close(layer(input)[..., inside, inside], expected[..., inside, inside])
    stock = F.conv_transpose2d(input, layer.weight, None, factor, factor // 2, groups=layer.groups)
    torch.testing.assert_close(layer(input), stock)
    aligned = fastseg.nn.BilinearUpsample2d(5, factor, factor - 1, kernel_size=2 * factor - 1)
    size = 3 * factor + 1, 2 * factor + 1
    torch.testing.assert_close(aligned(input), F.interpolate(input, size, mode="bilinear", align_corners=True))


def test_bilinear_upsampling_takes_any_weights():
    """Weights from a checkpoint, changed in place, or learned: the result follows the weights."""
    layer, input = fastseg.nn.BilinearUpsample2d(3, 8, 4), image(1, 3, 5, 4)
    layer(input)
    for change in (
        lambda: layer.load_state_dict({"weight": image(3, 3, 16, 16)}),
        lambda: layer.weight.data.mul_(2),
        lambda: layer.weight.requires_grad_(),
    ):
        change()
        torch.testing.assert_close(layer(input), F.conv_transpose2d(input, layer.weight, None, 8, 4))
    learned = fastseg.nn.BilinearUpsample2d(3, 8, 4, learned=True)
    learned(input).sum().backward()
    assert learned.weight.grad.abs().sum() > 0
