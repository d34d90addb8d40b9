"""dilated_conv2d and conv_transpose2d: properties of every convolution. Layers of networks and errors: other files."""

import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastseg import ops
from fastseg.kernels.convolution import reference
from fastseg.ops.convolution.maps import UPSAMPLING
from fastseg.testing import assert_within_policy
from tests.contract import Case, Contract, Make


def conv(name, image, weight, bias=None, small=True, **numbers):
    """A case of one call with a leaf for image, weight and bias."""

    def arguments(make):
        tensors = dict(input=make.floating(*image), weight=make.floating(*weight, scale=0.5))
        if bias:
            tensors["bias"] = make.floating(bias)
        return tensors | numbers

    return Case(name, arguments, small)


def stock_epilogue(input, weight, bias, residual, **numbers):
    return F.relu(F.conv2d(input, weight, bias, **numbers) + residual)


def ours_epilogue(input, weight, bias, residual, backend="auto", **numbers):
    return ops.dilated_conv2d(input, weight, bias, **numbers, residual=residual, activation="relu", backend=backend)


def stock_skip(input, weight, skip, **numbers):
    output = F.conv_transpose2d(input, weight, **numbers)
    return F.relu(output + skip[..., 1 : 1 + output.shape[-2], 2 : 2 + output.shape[-1]])


def ours_skip(input, weight, skip, backend="auto", **numbers):
    return ops.conv_transpose2d(
        input, weight, **numbers, skip=skip, skip_offset=(1, 2), activation="relu", backend=backend
    )


def stock_crop(input, weight, **numbers):
    return F.conv_transpose2d(input, weight, **numbers)[..., 3:8, 1:9]


def ours_crop(input, weight, backend="auto", **numbers):
    return ops.conv_transpose2d(input, weight, **numbers, crop=(3, 1, 5, 8), backend=backend)


def with_residual(case, *shape, name="residual"):
    return Case(case.name, lambda make: case.arguments(make) | {name: make.floating(*shape)}, case.small)


# fp64 has a test of its own: stock in fp64 is what the contract takes for exact, down to the order of its sums.
DTYPES = torch.float32, torch.float16, torch.bfloat16

CONTRACTS = [
    Contract(
        function=ops.dilated_conv2d,
        stock=F.conv2d,
        dtypes=DTYPES,
        cases=[
            conv("rate 2", (2, 3, 7, 6), (4, 3, 3, 3), 4, padding=2, dilation=2),
            conv("rate beyond the map", (1, 3, 6, 7), (2, 3, 3, 3), 2, padding=9, dilation=9),
            conv("stride", (2, 3, 9, 8), (2, 3, 3, 2), None, stride=(2, 3), padding=(1, 2), dilation=(1, 2)),
            conv("same, even kernel", (1, 2, 6, 5), (3, 2, 4, 2), 3, padding="same", dilation=(2, 3)),
            conv("no padding", (2, 2, 8, 9), (3, 2, 5, 1), 3, padding="valid"),
            conv("groups", (2, 4, 6, 6), (6, 2, 3, 3), 6, padding=2, dilation=2, groups=2),
            conv("depthwise", (2, 5, 6, 7), (5, 1, 3, 3), 5, padding=3, dilation=3, groups=5),
            conv("depthwise, stride", (2, 3, 7, 7), (3, 1, 3, 5), None, stride=2, padding=(1, 2), groups=3),
            conv("depthwise, two each", (1, 3, 6, 5), (6, 1, 3, 3), 6, padding=1, groups=3),
            conv("pointwise", (2, 3, 5, 4), (4, 3, 1, 1), 4),
            conv("padding beyond the window", (1, 2, 4, 4), (2, 2, 2, 2), 2, padding=5),
            conv("one image", (3, 6, 7), (4, 3, 3, 3), 4, padding=1),
            conv("empty batch", (0, 3, 6, 7), (4, 3, 3, 3), 4, padding=2, dilation=2),
            conv("many channels", (1, 33, 11, 9), (40, 33, 3, 3), 40, small=False, padding=4, dilation=4),
        ],
    ),
    Contract(
        function=ours_epilogue,
        stock=stock_epilogue,
        name="dilated_conv2d_epilogue",
        double_backward=False,  # gradgradcheck steps over the edge of the relu
        dtypes=DTYPES,
        cases=[
            with_residual(conv("dense", (2, 3, 7, 6), (4, 3, 3, 3), 4, padding=2, dilation=2), 2, 4, 7, 6),
            with_residual(conv("per image", (2, 3, 7, 6), (4, 3, 3, 3), 4, padding=1), 2, 4, 1, 1),
            with_residual(conv("depthwise", (2, 3, 7, 6), (3, 1, 3, 3), 3, padding=1, groups=3), 2, 3, 7, 6),
        ],
    ),
    Contract(
        function=ops.conv_transpose2d,
        stock=F.conv_transpose2d,
        dtypes=DTYPES,
        cases=[
            conv("2x2 stride 2", (2, 3, 4, 5), (3, 4, 2, 2), 4, stride=2),
            conv("16x16 stride 8", (1, 2, 3, 4), (2, 3, 16, 16), 3, small=False, stride=8, padding=4),
            conv("output_padding", (2, 3, 4, 5), (3, 2, 3, 3), 2, stride=2, padding=1, output_padding=1),
            conv("stride beyond the kernel", (1, 2, 4, 3), (2, 3, 2, 1), 3, stride=(4, 3), padding=(1, 0)),
            conv("dilation", (1, 2, 5, 4), (2, 3, 3, 2), None, stride=(2, 3), padding=1, dilation=(2, 3),
                 output_padding=(1, 2)),
            conv("groups", (1, 4, 4, 5), (4, 3, 3, 3), 6, stride=2, groups=2),
            conv("depthwise", (2, 4, 4, 5), (4, 1, 4, 4), 4, stride=2, padding=1, groups=4),
            conv("stride 1", (1, 3, 5, 6), (3, 2, 3, 3), 2, padding=1),
            conv("one image", (3, 4, 5), (3, 2, 4, 4), 2, stride=2, padding=1),
            conv("empty batch", (0, 3, 4, 5), (3, 2, 4, 4), 2, stride=2, padding=1),
            conv("one pixel", (2, 5, 1, 1), (5, 3, 7, 7), 3),
        ],
    ),
    Contract(
        function=ours_skip,
        stock=stock_skip,
        name="conv_transpose2d_skip",
        double_backward=False,
        layouts=("contiguous", "sliced", "expanded"),  # stock's gradient of a slice is contiguous
        dtypes=DTYPES,
        cases=[
            with_residual(conv("dense", (1, 3, 4, 5), (3, 2, 4, 4), stride=2), 1, 2, 14, 15, name="skip"),
            with_residual(
                conv("depthwise", (1, 3, 4, 5), (3, 1, 4, 4), stride=2, groups=3), 1, 3, 14, 15, name="skip"),
        ],
    ),
    Contract(
        function=ours_crop,
        stock=stock_crop,
        name="conv_transpose2d_crop",
        dtypes=DTYPES,
        cases=[
            conv("dense", (1, 3, 4, 5), (3, 2, 4, 4), stride=2),
            conv("depthwise", (2, 3, 4, 5), (3, 1, 5, 3), stride=2, groups=3),
        ],
    ),
]  # fmt: skip


def tensors(*shapes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def test_a_rate_beyond_the_map_is_the_centre_tap():
    image, weight = tensors((1, 8, 28, 28), (4, 8, 3, 3))
    found = ops.dilated_conv2d(image, weight, padding=36, dilation=36)
    assert_within_policy(
        found, F.conv2d(image, weight[:, :, 1:2, 1:2]), F.conv2d(image.double(), weight[:, :, 1:2, 1:2].double())
    )


@pytest.mark.parametrize("rate", (12, 24, 36))
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_gradient_of_the_weight_of_an_aspp_branch(rate, layout):
    """Two images: the GEMMs of one tap sum over both."""
    image, weight, grad = tensors((2, 24, 33, 33), (16, 24, 3, 3), (2, 16, 33, 33))
    image, grad = image.contiguous(memory_format=layout), grad.contiguous(memory_format=layout)

    def gradients(function, *values):
        leaves = [value.detach().requires_grad_() for value in values[:2]]
        return torch.autograd.grad(function(*leaves, padding=rate, dilation=rate), leaves, values[2])

    found = gradients(lambda *a, **k: ops.dilated_conv2d(*a, **k, backend="cpu"), image, weight, grad)
    stock = gradients(F.conv2d, image, weight, grad)
    exact = gradients(F.conv2d, image.double(), weight.double(), grad.double())
    for triple in zip(found, stock, exact):
        assert_within_policy(*triple)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_types_are_summed_in_fp32(dtype):
    """2048 products of 1: above 256 bfloat16 has no odd numbers."""
    image, weight = torch.ones(1, 2047, 3, 3, dtype=dtype), torch.ones(2, 2047, 1, 1, dtype=dtype)
    for backend in ("auto", "cpu", "reference"):
        found = ops.dilated_conv2d(image, weight, backend=backend)
        assert torch.equal(found, torch.full_like(found, 2047.0))


def test_out_is_written_and_differentiated():
    image, weight, other, grad = tensors((2, 3, 6, 6), (4, 3, 3, 3), (2, 2, 6, 6), (2, 6, 6, 6))
    image.requires_grad_(), weight.requires_grad_(), other.requires_grad_()

    def joined():
        buffer = torch.empty(2, 6, 6, 6)
        buffer[:, 4:] = other
        part = buffer[:, :4]
        returned = ops.dilated_conv2d(image, weight, padding=2, dilation=2, activation="relu", out=part)
        assert returned is part
        return buffer

    expected = torch.cat([F.relu(F.conv2d(image, weight, padding=2, dilation=2)), other], 1)
    torch.testing.assert_close(joined(), expected)
    leaves = image, weight, other
    for ours, stock in zip(torch.autograd.grad(joined(), leaves, grad), torch.autograd.grad(expected, leaves, grad)):
        torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("groups", (1, 4))
@pytest.mark.parametrize("backend", ("auto", "stock", "cpu", "reference"))
def test_out_without_gradients(groups, backend):
    image, weight, narrow = tensors((2, 4, 5, 6), (4, 4 // groups, 4, 4), (4, 4 // groups, 3, 3))
    for layout in (torch.contiguous_format, torch.channels_last):
        buffer = torch.full((2, 8, 10, 12), 7.0).contiguous(memory_format=layout)
        ops.conv_transpose2d(image, weight, None, 2, 1, groups=groups, out=buffer[:, 2:6], backend=backend)
        torch.testing.assert_close(buffer[:, 2:6], F.conv_transpose2d(image, weight, None, 2, 1, groups=groups))
        assert (buffer[:, :2] == 7).all() and (buffer[:, 6:] == 7).all()
        small = torch.full((2, 6, 5, 6), 7.0).contiguous(memory_format=layout)
        ops.dilated_conv2d(image, narrow, padding=1, groups=groups, out=small[:, 1:5], backend=backend)
        torch.testing.assert_close(small[:, 1:5], F.conv2d(image, narrow, padding=1, groups=groups))
        assert (small[:, 0] == 7).all() and (small[:, 5] == 7).all()


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("groups", (1, 16))
def test_the_memory_format_of_the_input_is_kept(layout, groups):
    image, weight = tensors((2, 16, 12, 12), (16, 16 // groups, 3, 3))
    image = image.contiguous(memory_format=layout).requires_grad_()
    for backend in ("cpu", "reference"):
        output = ops.dilated_conv2d(image, weight, padding=2, dilation=2, groups=groups, backend=backend)
        assert output.is_contiguous(memory_format=layout)
        (gradient,) = torch.autograd.grad(output, image, torch.ones_like(output))
        assert gradient.is_contiguous(memory_format=layout)


def test_a_fourth_derivative():
    """The three maps are each other's derivatives."""
    make = Make(torch.float64)
    image, weight = make.floating(1, 2, 5, 5), make.floating(2, 2, 3, 3)

    def fourth(function):
        value = function(image, weight, padding=2, dilation=2).pow(4).sum()
        for leaf in (image, weight, image, weight):
            (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
            value = gradient.pow(2).sum()
        return value

    torch.testing.assert_close(fourth(ops.dilated_conv2d), fourth(F.conv2d))


def exactly(image, weight, grad, stride, padding, dilation, groups):
    """(output, gradients of image and weight) of a convolution in extended precision, rounded to fp64."""
    image, weight, grad = (value.numpy().astype(np.longdouble) for value in (image, weight, grad))
    images, channels, height, width = image.shape
    out_channels, per_group, rows, columns = weight.shape
    margin = padding + (max(rows, columns) - 1) * dilation + stride
    padded = np.pad(image, ((0, 0), (0, 0), (margin, margin), (margin, margin)))
    output, grad_padded, grad_weight = np.zeros_like(grad), np.zeros_like(padded), np.zeros_like(weight)
    high, wide = grad.shape[2] * stride, grad.shape[3] * stride
    for k, c, r, s in itertools.product(range(out_channels), range(per_group), range(rows), range(columns)):
        channel = k // (out_channels // groups) * per_group + c
        top, left = margin - padding + r * dilation, margin - padding + s * dilation
        window = np.s_[:, channel, top : top + high : stride, left : left + wide : stride]
        output[:, k] += weight[k, c, r, s] * padded[window]
        grad_padded[window] += weight[k, c, r, s] * grad[:, k]
        grad_weight[k, c, r, s] = (padded[window] * grad[:, k]).sum()
    grad_image = grad_padded[:, :, margin : margin + height, margin : margin + width]
    return [torch.from_numpy(value.astype(np.float64)) for value in (output, grad_image, grad_weight)]


@pytest.mark.parametrize("groups", (1, 2, 4))
@pytest.mark.parametrize("stride, padding, dilation", ((1, 2, 2), (1, 9, 9), (2, 1, 1), (3, 5, 2)))
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_fp64(groups, stride, padding, dilation, layout):
    image, weight = tensors((2, 4, 9, 8), (8 if groups < 4 else 4, 4 // groups, 3, 3), dtype=torch.float64)
    numbers = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    image = image.contiguous(memory_format=layout)
    (grad,) = tensors(F.conv2d(image, weight, **numbers).shape, seed=1, dtype=torch.float64)

    def results(function, **options):
        leaves = [image.detach().requires_grad_(), weight.detach().requires_grad_()]
        output = function(*leaves, **numbers, **options)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    exact = exactly(image, weight, grad, **numbers)
    for backend in ("cpu", "reference"):
        for triple in zip(results(ops.dilated_conv2d, backend=backend), results(F.conv2d), exact):
            assert_within_policy(*triple)


@pytest.mark.parametrize("stride", (2, 4, 8, 16, 32))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_upsampling_kernels(stride, dtype):
    """The C++ kernels for transposed convolutions of a large stride, also where `auto` does not use them."""
    generator = random.Random(stride)
    for _ in range(8):
        kernel = [generator.choice((stride + 1, 2 * stride - 1, 2 * stride, 2 * stride + 1)), generator.randint(1, 40)]
        kernel, channels = kernel[::-1], [generator.randint(1, 13) for _ in range(2)]
        rows = generator.choice((1, 2, stride))
        extent = [generator.randint(1, 6) for _ in range(2)]
        whole = [(extent[0] - 1) * rows + kernel[0], (extent[1] - 1) * stride + kernel[1]]
        first = [generator.randint(0, extent - 1) for extent in whole]
        size = [generator.randint(1, whole[axis] - first[axis] + (rows, stride)[axis] - 1) for axis in (0, 1)]
        shapes = (2, channels[0], *extent), (*channels, *kernel), (2, channels[1], *size)
        small, weight, big = tensors(*shapes, dtype=dtype)
        windows = [rows, stride], first, [1, 1], 1
        bias, residual = tensors((channels[1],), (2, channels[1], *size), seed=1, dtype=dtype)
        pairs = (
            (UPSAMPLING.transposed, reference.conv_transpose2d, (small, weight, bias, residual, *windows, size, True)),
            (UPSAMPLING.forward, reference.dilated_conv2d, (big, weight, None, None, *windows, extent, False)),
            (UPSAMPLING.grad_weight, reference.conv2d_grad_weight, (big, small, *windows, kernel, False)),
        )
        for ours, definition, arguments in pairs:
            wide = [value.double() if isinstance(value, torch.Tensor) else value for value in arguments]
            assert_within_policy(ours(*arguments, backend="cpu"), definition(*arguments), definition(*wide))
