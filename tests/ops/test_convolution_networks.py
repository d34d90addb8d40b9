"""Every convolution and transposed convolution that the networks use, with few channels: forward and gradients."""

import pytest
import torch
import torch.nn.functional as F

from fastseg import ops
from fastseg._bilinear import bilinear_kernel
from fastseg.testing import assert_within_policy

# what uses it: (input channels, output channels, (H, W)), kernel, the other numbers
CONVOLUTIONS = {
    "dilation front-end conv5": ((3, 4, (30, 26)), (3, 3), dict(dilation=2)),
    "dilation front-end fc6": ((3, 5, (40, 42)), (7, 7), dict(dilation=4)),
    "context module, basic": ((4, 4, (33, 33)), (3, 3), dict(dilation=16, padding=16)),
    "context module, release": ((2, 4, (12, 14)), (3, 3), dict(padding=33)),
    "context module, last": ((8, 2, (20, 20)), (3, 3), dict(dilation=4)),
    "dilation10": ((4, 4, (64, 48)), (3, 3), dict(dilation=32, padding=32)),
    "dilation10, widest": ((4, 4, (48, 64)), (3, 3), dict(dilation=64, padding=64)),
    "DeepLab conv5, BASNet bridge, mask head": ((5, 5, (41, 41)), (3, 3), dict(dilation=2, padding=2)),
    "LargeFOV": ((4, 6, (41, 41)), (3, 3), dict(dilation=12, padding=12)),
    "DeepLab-4x4": ((4, 6, (41, 41)), (4, 4), dict(dilation=4, padding=6)),
    "SSD fc6": ((4, 6, (19, 19)), (3, 3), dict(dilation=6, padding=6)),
    "ASPP 18": ((6, 3, (33, 33)), (3, 3), dict(dilation=18, padding=18)),
    "ASPP 36": ((6, 3, (65, 65)), (3, 3), dict(dilation=36, padding=36)),
    "ASPP 36 beyond the map": ((6, 3, (28, 28)), (3, 3), dict(dilation=36, padding=36)),
    "separable ASPP": ((20, 20, (33, 33)), (3, 3), dict(dilation=12, padding=12, groups=20)),
    "Xception": ((19, 19, (33, 31)), (3, 3), dict(padding=1, groups=19)),
    "Xception, stride": ((18, 18, (33, 32)), (3, 3), dict(padding=1, stride=2, groups=18)),
    "Xception, rate 36": ((17, 17, (33, 33)), (3, 3), dict(padding=36, dilation=36, groups=17)),
    "multi-grid": ((4, 4, (33, 33)), (3, 3), dict(dilation=8, padding=8)),
    "HDC 5": ((4, 4, (50, 50)), (3, 3), dict(dilation=5, padding=5)),
    "HDC 17": ((4, 4, (50, 50)), (3, 3), dict(dilation=17, padding=17)),
    "DenseASPP 24": ((5, 3, (32, 64)), (3, 3), dict(dilation=24, padding=24)),
    "GCN, rows": ((5, 3, (16, 20)), (15, 1), dict(padding="same")),
    "GCN, columns": ((3, 3, (16, 20)), (1, 15), dict(padding="same")),
    "GCN, small": ((3, 3, (16, 16)), (7, 1), dict(padding=(3, 0))),
}
TRANSPOSED = {
    "FCN-32s": ((3, 3, (3, 4)), (64, 64), dict(stride=32)),
    "FCN-16s": ((3, 3, (4, 3)), (32, 32), dict(stride=16)),
    "FCN-8s": ((3, 3, (5, 6)), (16, 16), dict(stride=8)),
    "FCN, twice": ((3, 3, (9, 7)), (4, 4), dict(stride=2)),
    "FCN-AlexNet": ((3, 3, (3, 2)), (63, 63), dict(stride=32)),
    "FCN same 32": ((3, 3, (3, 4)), (64, 64), dict(stride=32, padding=16)),
    "FCN same 8": ((3, 3, (5, 6)), (16, 16), dict(stride=8, padding=4)),
    "FCN same 2": ((3, 3, (9, 8)), (4, 4), dict(stride=2, padding=1)),
    "per channel 32": ((3, 3, (3, 4)), (64, 64), dict(stride=32, padding=16, groups=3)),
    "per channel 8": ((3, 3, (5, 6)), (16, 16), dict(stride=8, padding=4, groups=3)),
    "per channel 2": ((3, 3, (9, 8)), (4, 4), dict(stride=2, padding=1, groups=3)),
    "U-Net, Mask R-CNN": ((6, 4, (14, 14)), (2, 2), dict(stride=2)),
    "Keras same": ((6, 4, (8, 8)), (3, 3), dict(stride=2, padding=1, output_padding=1)),
    "DeconvNet fc6": ((6, 4, (1, 1)), (7, 7), dict()),
    "DeconvNet": ((5, 4, (14, 14)), (3, 3), dict(padding=1)),
    "SharpMask": ((9, 4, (1, 1)), (10, 10), dict()),
}


def tensors(*shapes):
    generator = torch.Generator().manual_seed(30 + len(shapes))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def results(function, numbers, image, weight, bias, grad):
    leaves = [value.detach().requires_grad_() for value in (image, weight, bias)]
    output = function(*leaves, **numbers)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def check(ours, stock, image, weight, channels, numbers):
    image, weight, bias = tensors(image, weight, (channels,))
    (grad,) = tensors(stock(image, weight, bias, **numbers).shape)
    values = image, weight, bias, grad
    exact = results(stock, numbers, *[value.double() for value in values])
    for layout in (torch.contiguous_format, torch.channels_last):
        image, weight, bias, grad = values
        laid = image.contiguous(memory_format=layout), weight, bias, grad.contiguous(memory_format=layout)
        found, plain = results(ours, numbers, *laid), results(stock, numbers, *laid)
        for what, *triple in zip(("output", "input", "weight", "bias"), found, plain, exact):
            assert_within_policy(*triple, what)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    (channels, out_channels, size), kernel, numbers = CONVOLUTIONS[name]
    weight = out_channels, channels // numbers.get("groups", 1), *kernel
    check(ops.dilated_conv2d, F.conv2d, (2, channels, *size), weight, out_channels, numbers)


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolutions(name):
    (channels, out_channels, size), kernel, numbers = TRANSPOSED[name]
    weight = channels, out_channels // numbers.get("groups", 1), *kernel
    check(ops.conv_transpose2d, F.conv_transpose2d, (2, channels, *size), weight, out_channels, numbers)


def diagonal(channels, size):
    weight = torch.zeros(channels, channels, size, size)
    weight[torch.arange(channels), torch.arange(channels)] = bilinear_kernel(size)
    return weight


@pytest.mark.parametrize("backend", ("auto", "cpu", "reference"))
@pytest.mark.parametrize("factor", (2, 4, 8, 16, 32))
def test_an_even_bilinear_kernel_is_interpolation_inside(factor, backend):
    (image,) = tensors((1, 3, 6, 5))
    found = ops.conv_transpose2d(image, diagonal(3, 2 * factor), stride=factor, padding=factor // 2, backend=backend)
    expected = F.interpolate(image, scale_factor=factor, mode="bilinear", align_corners=False)
    inside = slice(factor // 2, -(factor // 2))
    torch.testing.assert_close(found[..., inside, inside], expected[..., inside, inside])
    assert found[..., 0, 0].abs().sum() < expected[..., 0, 0].abs().sum()  # it fades towards the border


@pytest.mark.parametrize("backend", ("auto", "cpu", "reference"))
@pytest.mark.parametrize("factor", (2, 4, 8, 32))
def test_an_odd_bilinear_kernel_is_interpolation_with_aligned_corners(factor, backend):
    (image,) = tensors((1, 3, 6, 5))
    size = 5 * factor + 1, 4 * factor + 1
    crop = factor - 1, factor - 1, *size
    found = ops.conv_transpose2d(image, diagonal(3, 2 * factor - 1), stride=factor, crop=crop, backend=backend)
    torch.testing.assert_close(found, F.interpolate(image, size, mode="bilinear", align_corners=True))


def test_many_channels_round_as_stock_does():
    """torch's channels_last algorithm adds all channels in one chain, too coarse for NCHW by our policy."""
    generator = torch.Generator().manual_seed(0)
    image, weight, grad = (
        torch.randn(shape, generator=generator) for shape in ((1, 512, 33, 33), (256, 512, 3, 3), (1, 256, 33, 33))
    )
    found = []
    for function, dtype in ((ops.dilated_conv2d, None), (F.conv2d, None), (F.conv2d, torch.float64)):
        leaf = image.to(dtype or image.dtype).requires_grad_()
        output = function(leaf, weight.to(leaf.dtype), padding=18, dilation=18)
        found.append((output.detach(), *torch.autograd.grad(output, leaf, grad.to(leaf.dtype))))
    for values in zip(*found):
        assert_within_policy(*values)


def test_a_bilinear_weight_made_in_inference_mode():
    """PyTorch does not count the changes of such tensors."""
    image = torch.randn(1, 3, 5, 6)
    with torch.inference_mode():
        weight = diagonal(3, 4)
        expected = F.conv_transpose2d(image, weight, stride=2)
        torch.testing.assert_close(ops.conv_transpose2d(image, weight, stride=2), expected)
        weight[0, 1] = 1  # no longer one channel each
        expected = F.conv_transpose2d(image, weight, stride=2)
        torch.testing.assert_close(ops.conv_transpose2d(image, weight, stride=2), expected)
