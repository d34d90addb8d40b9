"""Scores at every pixel from shifted images."""

import pytest
import torch
from torch import nn

from fastseg.models import shift_and_stitch
from fastseg.nn import Conv2d
from fastseg.testing import assert_within_policy
from tests.models.stock_shift_and_stitch import at_stride_one
from tests.models.stock_shift_and_stitch import shift_and_stitch as stock_shift_and_stitch
from tests.models.verification import randomised


def image_of(height, width):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def stack():
    return randomised(
        nn.Sequential(
            nn.Conv2d(3, 4, 5, stride=2), nn.ReLU(),
            nn.MaxPool2d(3, 2),
            Conv2d(4, 4, 3, dilation=2), nn.ReLU(),
            nn.Conv2d(4, 2, 1),
        )
    )  # fmt: skip


@pytest.mark.parametrize("size", [(40, 37), (35, 52)])
def test_equals_the_stock_function(size):
    network, image = stack(), image_of(*size)
    with torch.no_grad():
        assert torch.equal(shift_and_stitch(network, image, 4), stock_shift_and_stitch(network, image, 4))


def test_equals_the_dilated_network():
    network, image = stack(), image_of(38, 41)
    dense = at_stride_one(network)
    stitched = shift_and_stitch(network, image, 4)
    assert_within_policy(stitched, dense(image), at_stride_one(network.double())(image.double()), "stitched")


def test_dilated_layers_of_ours_equal_stitching():
    network, image = stack(), image_of(38, 41)
    stock = at_stride_one(network)
    ours = nn.Sequential(
        *(
            Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, dilation=layer.dilation)
            if isinstance(layer, nn.Conv2d)
            else layer
            for layer in stock
        )
    )
    ours.load_state_dict(stock.state_dict())
    exact = stock_shift_and_stitch(network.double(), image.double(), 4)
    assert_within_policy(ours(image), stock_shift_and_stitch(network.float(), image, 4), exact, "dilated")


def test_gradients_pass():
    network, image = stack(), image_of(30, 28).requires_grad_()
    shift_and_stitch(network, image, 4).square().sum().backward()
    stitched, image.grad = image.grad, None
    at_stride_one(network)(image).square().sum().backward()
    torch.testing.assert_close(stitched, image.grad)


def test_a_network_whose_last_outputs_see_the_filling_beyond_the_image():
    """Poolings that round up give passes of uneven length; the result ends where the first of them does."""
    pool = nn.MaxPool2d(2, 2, ceil_mode=True)
    image = image_of(5, 6)
    result = shift_and_stitch(pool, image, 2)
    assert result.shape == (2, 3, 5, 6)
    assert torch.equal(result[:, :, :4, :5], nn.MaxPool2d(2, 1)(image))
    assert torch.equal(shift_and_stitch(nn.Identity(), image, 1), image)


def test_bad_strides_are_named():
    with pytest.raises(ValueError, match=r"shift_and_stitch: stride is 0; allowed: 1 or more"):
        shift_and_stitch(nn.Identity(), image_of(4, 4), 0)
