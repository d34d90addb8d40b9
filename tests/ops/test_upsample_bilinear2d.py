"""upsample_bilinear2d against torch.nn.functional.interpolate, the bilinear transposed convolution against torch's."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from fastseg._bilinear import bilinear_kernel
from fastseg._layout import image_format
from fastseg.ops import upsample_bilinear2d
from fastseg.ops.upsample_bilinear2d import bilinear_conv_transpose2d
from fastseg.testing import assert_within_policy
from tests.contract import Case, Contract

HALF = (torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def stock(input, **arguments):
    return F.interpolate(input, mode="bilinear", **arguments)


def case(name, shape, small=True, **arguments):
    return Case(name, lambda make: dict(input=make.floating(*shape), **arguments), small)


CONTRACTS = [
    Contract(
        upsample_bilinear2d,
        stock,
        [
            case("x8", (2, 3, 4, 5), scale_factor=8),
            case("x2", (2, 3, 5, 4), size=(10, 8), align_corners=False),
            case("size", (1, 3, 5, 7), size=(13, 20), align_corners=True),
            case("odd_scale", (2, 2, 5, 4), scale_factor=(2.3, 3.7)),
            case("recomputed", (1, 2, 5, 4), scale_factor=(2.3, 3.7), recompute_scale_factor=True),
            case("smaller", (1, 2, 12, 9), scale_factor=(0.3, 0.7)),
            case("halved", (1, 2, 8, 10), scale_factor=0.5),
            case("smaller_align_corners", (1, 2, 9, 12), size=(4, 5), align_corners=True),
            case("taller_and_narrower", (1, 3, 4, 9), size=(11, 4)),
            case("same_size", (2, 3, 4, 5), size=(4, 5)),
            case("same_height", (2, 3, 4, 5), size=(4, 12)),
            case("same_width", (2, 3, 4, 5), size=(9, 5), align_corners=True),
            case("nearly_same_size", (1, 2, 12, 11), scale_factor=1.05),
            case("from_one_pixel", (2, 3, 1, 1), size=(4, 7)),
            case("to_one_pixel", (2, 3, 5, 4), size=1),
            case("to_one_pixel_align_corners", (2, 3, 5, 4), size=1, align_corners=True),
            case("no_image", (0, 3, 4, 4), size=8),
            case("one_channel", (3, 1, 5, 6), scale_factor=2),
            case("many_channels", (2, 37, 6, 5), small=False, scale_factor=4),
            case("wide", (1, 2, 5, 140), small=False, size=(11, 431)),
            case("much_smaller", (1, 2, 70, 90), small=False, size=(5, 7)),
            case("x64", (1, 2, 2, 3), small=False, scale_factor=64),
        ],
    )
]


def results(function, input, gradient, **arguments):
    input = input.detach().requires_grad_()
    output = function(input, **arguments)
    output.backward(gradient.to(output.dtype))
    return output.detach(), input.grad


def check(input, **arguments):
    """Output and gradient within the policy, and in the memory format of the input."""
    gradient = torch.randn(stock(input, **arguments).shape).to(torch.bfloat16)
    ours = results(upsample_bilinear2d, input, gradient, **arguments)
    plain = results(stock, input, gradient, **arguments)
    exact = results(stock, input.double(), gradient, **arguments)
    for what, one, two, three in zip(("output", "gradient"), ours, plain, exact):
        assert_within_policy(one, two, three, what)
        assert one.is_contiguous(memory_format=image_format(input)), what


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    "shape, arguments",
    [
        ((2, 19, 16, 32), dict(scale_factor=8)),
        ((1, 150, 13, 20), dict(scale_factor=4, align_corners=True)),
        ((1, 64, 30, 40), dict(scale_factor=0.5)),
        ((2, 7, 33, 17), dict(scale_factor=(7.3, 11.9))),
        ((1, 1, 3, 9000), dict(scale_factor=2)),  # more columns than are handled at a time
        ((1, 3, 3, 20000), dict(scale_factor=(2, 0.9))),
        ((1, 700, 3, 40), dict(scale_factor=2)),
        ((1, 17000, 2, 2), dict(scale_factor=2)),  # more channels
        ((1, 16, 300, 300), dict(scale_factor=2)),  # large enough to go past the cache, in several slices
        ((3, 5, 257, 129), dict(size=(513, 257), align_corners=True)),
    ],
)
def test_large(shape, arguments, dtype, layout):
    check(torch.randn(shape).to(dtype).contiguous(memory_format=layout), **arguments)


@settings(max_examples=150, deadline=None)
@given(
    channels=st.integers(1, 40),
    source=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    size=st.tuples(st.integers(1, 90), st.integers(1, 150)),
    align_corners=st.booleans(),
    dtype=st.sampled_from([torch.float32, *HALF]),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_size(channels, source, size, align_corners, dtype, layout):
    torch.manual_seed(0)  # so that what hypothesis reports can be run again
    # At least 200 gradients: stock's own error, by which ours is judged, is a matter of luck for the sums of a few.
    images = 2 + 200 // (channels * source[0] * source[1])
    input = torch.randn(images, channels, *source).to(dtype).contiguous(memory_format=layout)
    check(input, size=size, align_corners=align_corners)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_long_sums(layout):
    """A source of one or two pixels, whose gradient is the sum of thousands."""
    for source, size in (((1, 1), (67, 40)), ((1, 2), (90, 150)), ((2, 1), (3, 300))):
        input = torch.randn(200, 1, *source, generator=torch.Generator().manual_seed(0))
        for align_corners in (False, True):
            check(input.contiguous(memory_format=layout), size=size, align_corners=align_corners)


@pytest.mark.parametrize("align_corners", [False, True])
def test_a_constant_stays_the_same_number(align_corners):
    """Where both neighbours are the same pixel, the last one: of a source of one pixel, everywhere."""
    input = torch.randn(50, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    output = upsample_bilinear2d(input, size=(48, 101), align_corners=align_corners)
    assert torch.equal(output, input.expand_as(output))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("align_corners", [False, True])
def test_an_axis_that_keeps_its_size_is_copied(dtype, layout, align_corners):
    input = torch.randn(2, 21, 9, 20).to(dtype).contiguous(memory_format=layout)
    options = dict(align_corners=align_corners)
    assert torch.equal(upsample_bilinear2d(input, (9, 20), **options), input)
    for index, size in ((4, (9, 55)), (3, (33, 20))):
        wide = upsample_bilinear2d(input, size, **options)
        part = input.narrow(2 if index == 4 else 3, index, 1)
        size = (1, 55) if index == 4 else (33, 1)
        assert torch.equal(wide.narrow(2 if index == 4 else 3, index, 1), upsample_bilinear2d(part, size, **options))


@pytest.mark.sanitized
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("arguments", [dict(scale_factor=4), dict(size=(7, 9)), dict(size=(3, 30), align_corners=True)])
def test_hostile_values(value, arguments, layout):
    """They reach the same pixels as in torch, even those that it multiplies by 0; so does a gradient of NaN."""
    input = torch.randn(1, 20, 7, 12)
    input[0, 3, 2, 5], input[0, 7, 0, 0], input[0, 7, 6, 11] = value, value, value
    input = input.contiguous(memory_format=layout)
    exact = stock(input.double(), **arguments)
    assert_within_policy(upsample_bilinear2d(input, **arguments), stock(input, **arguments), exact)
    gradient = torch.randn(exact.shape)
    gradient[0, 3, 1, 4] = float("nan")
    _, found = results(upsample_bilinear2d, input, gradient, **arguments)
    _, expected = results(stock, input, gradient, **arguments)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_gradients_of_any_strides():
    for input in (torch.randn(2, 5, 6, 7), torch.randn(2, 5, 6, 7).to(memory_format=torch.channels_last)):
        dense = torch.randn(2, 5, 12, 14)
        for gradient in (
            dense,
            dense.to(memory_format=torch.channels_last),
            dense.transpose(2, 3).contiguous().mT,
            torch.randn(2, 5, 12, 1).expand(2, 5, 12, 14),
            torch.tensor(0.5).expand(2, 5, 12, 14),
        ):
            _, found = results(upsample_bilinear2d, input, gradient, scale_factor=2)
            _, expected = results(stock, input, gradient.contiguous(), scale_factor=2)
            torch.testing.assert_close(found, expected)
            assert found.stride() == input.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_number_of_threads_changes_nothing(layout):
    input = torch.randn(2, 19, 40, 50).contiguous(memory_format=layout)
    gradient, threads, found = torch.randn(2, 19, 200, 250), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(upsample_bilinear2d, input, gradient, scale_factor=5))
    finally:
        torch.set_num_threads(threads)
    for output, grad in found[1:]:
        assert torch.equal(output, found[0][0]) and torch.equal(grad, found[0][1])


# --- the transposed convolution ---


def deconvolution(input, kernel, stride, padding, size=None):
    """torch's transposed convolution of each channel; rows and columns up to `size`."""
    channels = input.shape[1]
    weight = bilinear_kernel(kernel).to(input).expand(channels, 1, kernel, kernel)
    output = F.conv_transpose2d(input, weight, stride=stride, groups=channels)
    height, width = size or (output.shape[2] - 2 * padding, output.shape[3] - 2 * padding)
    border = abs(padding)
    around = border, max(border, width), border, max(border, height)
    first = border + padding
    return F.pad(output, around)[:, :, first : first + height, first : first + width]


def ours(input, kernel, stride, padding, size, **options):
    channels_last = not input.is_contiguous()
    geometry = [kernel] * 2, [stride] * 2, [padding] * 2
    return bilinear_conv_transpose2d(input, *geometry, [*size], channels_last, **options)


GEOMETRIES = [
    (64, 32, 0), (32, 16, 0), (16, 8, 0), (4, 2, 0), (63, 32, 0), (64, 32, 16), (16, 8, 4), (4, 2, 1), (3, 2, 1),
    (2, 1, 0), (1, 1, 0),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel, stride, padding", GEOMETRIES)
def test_transposed_convolution(kernel, stride, padding, layout):
    """Complete, cropped by other offsets, and larger than what the kernel reaches; stock is torch's fp32."""
    for channels, more, size in (
        (3, 0, None),
        (19, 3, (4 * stride + 1, 3 * stride)),
        (1, -2, (1, 7 * stride + 90)),
        (2, 0, (9 * stride, 2)),
    ):
        input = torch.randn(2, channels, 4, 5).contiguous(memory_format=layout)
        padding_here = padding + more
        size = size or deconvolution(input, kernel, stride, padding_here).shape[2:]
        gradient = torch.randn(2, channels, *size)
        arguments = dict(kernel=kernel, stride=stride, padding=padding_here, size=size)
        plain = results(deconvolution, input, gradient, **arguments)
        exact = results(deconvolution, input.double(), gradient, **arguments)
        for backend in ("cpu", "reference"):
            found = results(ours, input, gradient, **arguments, backend=backend)
            for one, two, three in zip(found, plain, exact):
                assert_within_policy(one, two, three, backend)
        for one, three in zip(results(ours, input.double(), gradient, **arguments), exact):
            torch.testing.assert_close(one, three, rtol=0, atol=1e-12)
        for dtype in HALF:
            half = input.to(dtype)
            exact = results(deconvolution, half.double(), gradient, **arguments)
            plain = [result.to(dtype) for result in exact]
            for one, two, three in zip(
                results(ours, half, gradient.to(dtype).float(), **arguments),
                plain,
                results(deconvolution, half.double(), gradient.to(dtype), **arguments),
            ):
                assert_within_policy(one, two.to(dtype), three, str(dtype))


def test_transposed_convolution_is_interpolation():
    """k = 2s, p = s/2: in the interior. k = 2s - 1, cropped by s - 1: everywhere, with the corners aligned."""
    input = torch.randn(1, 3, 6, 7, dtype=torch.float64)
    for stride in (2, 8, 32):
        size = 6 * stride, 7 * stride
        margin = stride // 2
        found = ours(input, 2 * stride, stride, stride // 2, size)[..., margin:-margin, margin:-margin]
        expected = upsample_bilinear2d(input, size)[..., margin:-margin, margin:-margin]
        torch.testing.assert_close(found, expected)
        size = 5 * stride + 1, 6 * stride + 1
        found = ours(input, 2 * stride - 1, stride, stride - 1, size)
        torch.testing.assert_close(found, upsample_bilinear2d(input, size, align_corners=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_reaches_beyond_its_kernel(layout):
    """Infinite elements give no NaN in outputs that read no element, or only one."""
    input = torch.full((1, 18, 3, 4), float("inf")).contiguous(memory_format=layout)
    for kernel, stride, padding in ((4, 2, -3), (3, 2, -2), (16, 8, -20)):
        size = 6 * stride + 8, 7 * stride + 8
        found = ours(input, kernel, stride, padding, size)
        assert torch.equal(found, deconvolution(input, kernel, stride, padding, size).nan_to_num(0.0, float("inf")))


def test_transposed_convolution_gradients():
    input = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    function = lambda input: ours(input, 3, 2, 1, (6, 7))  # noqa: E731
    assert torch.autograd.gradcheck(function, input) and torch.autograd.gradgradcheck(function, input)
    torch.library.opcheck(
        torch.ops.fastseg.bilinear_conv_transpose2d,
        (input.detach().float().requires_grad_(), [3, 3], [2, 2], [1, 1], [6, 7], False),
    )


def test_both_pairs_are_adjoint_in_float32():
    """<A x, y> = <x, A' y>, through the kernels, also of the second derivative."""
    x, y = torch.randn(2, 3, 5, 6, requires_grad=True), torch.randn(2, 3, 17, 15, requires_grad=True)
    for function in (lambda x: upsample_bilinear2d(x, (17, 15)), lambda x: ours(x, 6, 3, 1, (17, 15))):
        (gradient,) = torch.autograd.grad(function(x), x, y, create_graph=True)
        torch.testing.assert_close((function(x) * y).sum(), (x * gradient).sum(), rtol=1e-4, atol=1e-4)
        (second,) = torch.autograd.grad(gradient, y, x.detach())
        assert torch.equal(second, function(x).detach())


# --- errors ---


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(), ValueError, "size and scale_factor: neither given"),
        (dict(size=4, scale_factor=2), ValueError, "size and scale_factor are both given"),
        (dict(size=0), ValueError, "size=0"),
        (dict(size=4.7), TypeError, "size=4.7; allowed: an integer"),
        (dict(size=(4, 5, 6)), ValueError, r"size=\(4, 5, 6\)"),
        (dict(scale_factor=-1.0), ValueError, "scale_factor=-1.0"),
        (dict(scale_factor=0.1), ValueError, r"scale_factor=0.1 makes \(4, 4\) into \(0, 0\)"),
        (dict(scale_factor=float("nan")), ValueError, "scale_factor=nan"),
        (dict(size=8, align_corners=1), TypeError, "align_corners=1; allowed: True or False"),
        (dict(size=8, recompute_scale_factor=True), ValueError, "recompute_scale_factor=True with size"),
        (dict(size=8, recompute_scale_factor="yes"), TypeError, "recompute_scale_factor='yes'; allowed: True or False"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        upsample_bilinear2d(torch.randn(1, 3, 4, 4), **arguments)


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 0, 4, 4), (1, 3, 0, 4), (1, 3, 4, 0), (1, 2, 3, 4, 5)])
def test_bad_shapes(shape):
    with pytest.raises(RuntimeError, match="input has shape"):
        upsample_bilinear2d(torch.randn(shape), size=(4, 4))


def test_bad_inputs():
    with pytest.raises(TypeError, match="input is list"):
        upsample_bilinear2d([[1.0]], size=4)
    image = torch.randn(1, 1, 4, 4)
    for kernel, stride, padding, size, message in (
        (5, 2, 0, (8, 8), "kernel_size=.*allowed: 2 stride or 2 stride - 1"),
        (4, 0, 0, (8, 8), "stride of at least 1"),
        (4, 2, 1 << 31, (8, 8), "padding="),
        (4, 2, 0, (0, 8), "size="),
        (4, 2, 0, (8,), "size="),
    ):
        with pytest.raises(ValueError, match=message):
            ours(image, kernel, stride, padding, size)
