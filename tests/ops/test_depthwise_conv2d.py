"""Depthwise dilated_conv2d, conv_transpose2d in C++: any geometry, layout, dtype and epilogue, against fp64 stock."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg.ops import conv_transpose2d, dilated_conv2d
from fastseg.ops.convolution.maps import DEPTHWISE
from fastseg.testing import assert_within_policy

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
OURS = {"convolution": dilated_conv2d, "transposed": conv_transpose2d}


def stock(kind, input, weight, bias, residual, relu, crop=None, **window):
    function = F.conv2d if kind == "convolution" else F.conv_transpose2d
    output = function(input, weight, bias, groups=input.shape[-3], **window)
    if crop is not None:
        top, left, height, width = crop
        output = output[..., top : top + height, left : left + width]
    output = output if residual is None else output + residual
    return output.relu() if relu else output


def ours(kind, input, weight, bias, residual, relu, **window):
    addend = {"residual" if kind == "convolution" else "skip": residual}
    return OURS[kind](
        input, weight, bias, groups=input.shape[-3], activation="relu" if relu else None, backend="cpu", **addend,
        **window,
    )  # fmt: skip


def leaves(dtype, *tensors):
    """Leaves of this dtype, each with its strides."""
    return [None if t is None else t.detach().clone().to(dtype).requires_grad_() for t in tensors]


def outcome(run, dtype, tensors, grad_output):
    """The output and the gradients of all tensors."""
    own = leaves(dtype, *tensors)
    output = run(*own)
    output.backward(grad_output.to(dtype))
    return [output, *(None if t is None else t.grad for t in own)]


def check(kind, image, weight, bias=None, residual=None, relu=False, grad_output=None, **window):
    """Forward and every gradient within the policy, and the layout of the input kept."""
    exact_output = stock(
        kind, *(None if t is None else t.double() for t in (image, weight, bias, residual)), relu, **window
    )
    if grad_output is None:
        grad_output = torch.randn_like(exact_output)
    grad_output = grad_output.to(image.dtype)
    tensors = image, weight, bias, residual
    exact = outcome(lambda *t: stock(kind, *t, relu, **window), torch.float64, tensors, grad_output)
    theirs = outcome(lambda *t: stock(kind, *t, relu, **window), image.dtype, tensors, grad_output)
    got = outcome(lambda *t: ours(kind, *t, relu, **window), image.dtype, tensors, grad_output)
    for name, mine, other, right in zip(("output", "input", "weight", "bias", "residual"), got, theirs, exact):
        if right is not None:
            assert_within_policy(mine, other, right, f"{kind} {tuple(image.shape)} {window}: {name}")
    if image.shape[1] > 1 and image[0:1].numel() > image.shape[1]:
        layout = torch.channels_last if image.stride(1) == 1 else torch.contiguous_format
        assert got[0].is_contiguous(memory_format=layout)


def whole(generator, *shape):
    """Small whole numbers, whose sums are exact in any order: stock's error is 0, and so must ours be."""
    return torch.randint(-4, 5, shape, generator=generator).float()


def values(dtype, *shape):
    """Random numbers; whole ones in fp64, which is compared with itself."""
    return whole(None, *shape).double() if dtype == torch.float64 else torch.randn(shape).to(dtype)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_convolution_equals_stock(data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    channels = data.draw(st.sampled_from([2, 3, 16, 17, 40]))
    height, width = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([1, 2, 5, 8, 15, 16, 17, 31, 33, 50, 83]))
    kernel_size = data.draw(st.sampled_from([(1, 1), (3, 3), (2, 2), (5, 5), (1, 7), (15, 1), (4, 4), (2, 9), (3, 1)]))
    stride = data.draw(st.sampled_from([(1, 1), (2, 2), (3, 1), (1, 4), (5, 8), (2, 3)]))
    dilation = data.draw(st.sampled_from([(1, 1), (2, 2), (12, 12), (1, 5), (7, 1), (60, 90)]))
    padding = [
        data.draw(st.integers(max(0, -(-(dilation[i] * (kernel_size[i] - 1) + 1 - (height, width)[i]) // 2)),
                              dilation[i] * (kernel_size[i] - 1) + 3))
        for i in (0, 1)
    ]  # fmt: skip
    dtype, layout = data.draw(st.sampled_from(FLOATS)), data.draw(st.sampled_from(LAYOUTS))
    images = data.draw(st.integers(1, 2))
    image = whole(generator, images, channels, height, width).to(dtype).contiguous(memory_format=layout)
    weight = whole(generator, channels, 1, *kernel_size).to(dtype)
    bias = whole(generator, channels).to(dtype) if data.draw(st.booleans()) else None
    window = dict(stride=stride, padding=padding, dilation=dilation)
    grad_output = whole(generator, *stock("convolution", image, weight, bias, None, False, **window).shape)
    check("convolution", image, weight, bias, grad_output=grad_output, **window)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_transposed_convolution_equals_stock(data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    channels = data.draw(st.sampled_from([2, 3, 16, 17, 40]))
    height, width = data.draw(st.integers(1, 6)), data.draw(st.sampled_from([1, 2, 5, 8, 15, 16, 17, 33, 50]))
    kernel_size = data.draw(st.sampled_from([(1, 1), (3, 3), (2, 2), (4, 4), (1, 7), (15, 1), (16, 16), (6, 6)]))
    stride = data.draw(st.sampled_from([(1, 1), (2, 2), (3, 1), (1, 4), (5, 8), (8, 8), (3, 3), (20, 40)]))
    dilation = data.draw(st.sampled_from([(1, 1), (2, 2), (1, 5), (7, 1), (3, 4)]))
    full = [((height, width)[i] - 1) * stride[i] + dilation[i] * (kernel_size[i] - 1) + 1 for i in (0, 1)]
    padding = [data.draw(st.integers(0, min((full[i] - 1) // 2, 9))) for i in (0, 1)]
    more = [data.draw(st.integers(0, max(stride[i], dilation[i]) - 1)) for i in (0, 1)]
    dtype, layout = data.draw(st.sampled_from(FLOATS)), data.draw(st.sampled_from(LAYOUTS))
    image = whole(generator, 2, channels, height, width).to(dtype).contiguous(memory_format=layout)
    weight = whole(generator, channels, 1, *kernel_size).to(dtype)
    window = dict(stride=stride, padding=padding, output_padding=more, dilation=dilation)
    if data.draw(st.booleans()):
        size = [full[i] - 2 * padding[i] + more[i] for i in (0, 1)]
        top, left = (data.draw(st.integers(0, size[i] - 1)) for i in (0, 1))
        height, width = data.draw(st.integers(1, size[0] - top)), data.draw(st.integers(1, size[1] - left))
        window["crop"] = (top, left, height, width)
    grad_output = whole(generator, *stock("transposed", image, weight, None, None, False, **window).shape)
    check("transposed", image, weight, grad_output=grad_output, **window)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [3, 16, 17, 304])
@pytest.mark.parametrize("kind", ["convolution", "transposed"])
def test_epilogue(kind, channels, dtype, layout):
    images = 1 if channels > 100 else 2  # stock takes seconds for many channels
    image = values(dtype, images, channels, 9, 21).contiguous(memory_format=layout)
    weight, bias = values(dtype, channels, 1, 3, 3), values(dtype, 2 * channels)[::2]
    window = dict(padding=2, dilation=2) if kind == "convolution" else dict(padding=1, stride=2, output_padding=1)
    output = stock(kind, image, weight, None, None, False, **window)
    grad_output = values(dtype, *output.shape)
    residuals = [
        values(dtype, *output.shape),
        values(dtype, *output.shape).contiguous(memory_format=torch.channels_last),
        values(dtype, images, channels, 1, 1).expand_as(output),
        values(dtype, 1, 1, 1, output.shape[3]).expand_as(output),
        values(dtype, images, channels, output.shape[2], 2 * output.shape[3])[..., ::2],
    ]
    for residual in residuals:
        for own_bias in (None, bias):
            check(kind, image, weight, own_bias, residual, grad_output=grad_output, **window)
            double = [None if t is None else t.double() for t in (image, weight, own_bias, residual)]
            with torch.no_grad():
                args = image, weight, own_bias, residual, True
                assert_within_policy(
                    ours(kind, *args, **window), stock(kind, *args, **window), stock(kind, *double, True, **window)
                )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_relu_hides_the_gradient_where_it_gives_zero(layout):
    image = values(torch.float64, 2, 17, 9, 21).contiguous(memory_format=layout)
    weight, residual = values(torch.float64, 17, 1, 3, 3), values(torch.float64, 2, 17, 9, 21)
    grad_output = values(torch.float64, 2, 17, 9, 21)
    check("convolution", image, weight, values(torch.float64, 17), residual, True, grad_output, padding=1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_dilation_beyond_the_map_leaves_the_centre_tap(dtype, layout):
    image = torch.randn(2, 20, 9, 33).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(20, 1, 3, 3).to(dtype)
    output = dilated_conv2d(image, weight, padding=40, dilation=40, groups=20, backend="cpu")
    assert torch.equal(output, (image.double() * weight[:, 0, 1, 1].double().view(-1, 1, 1)).to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_taps_in_the_padding_are_not_visited(layout):
    """Not even multiplied by zero: an infinite weight that reads no pixel gives no NaN."""
    image = torch.randn(1, 18, 3, 20).contiguous(memory_format=layout).requires_grad_()
    weight = torch.full((18, 1, 5, 5), float("inf"))
    weight[:, :, 2, 2] = 2.0
    weight.requires_grad_()
    output = dilated_conv2d(image, weight, padding=60, dilation=30, groups=18, backend="cpu")
    output.sum().backward()
    assert torch.equal(output, image * 2) and torch.equal(image.grad, torch.full_like(image, 2.0))
    outer = torch.ones(5, 5, dtype=torch.bool)
    outer[2, 2] = False
    assert torch.equal(weight.grad[:, :, outer], torch.zeros(18, 1, 24))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [5, 40])
def test_outputs_that_no_tap_reaches_are_bias(width, layout):
    image = torch.randn(1, 17, 4, width).contiguous(memory_format=layout)
    weight, bias = torch.randn(17, 1, 2, 2), torch.randn(17)
    check("convolution", image, weight, bias, padding=90, dilation=30, stride=(7, 11))
    check("transposed", image, weight, bias, stride=5)  # gaps between windows
    far = dilated_conv2d(image, weight, bias, padding=1000, stride=(2000, 3000), groups=17, backend="cpu")
    assert torch.equal(far, bias.view(1, -1, 1, 1).expand_as(far))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["convolution", "transposed"])
def test_an_empty_batch(kind, layout):
    image = torch.randn(0, 17, 8, 9).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(17, 1, 3, 3, requires_grad=True)
    output = ours(kind, image, weight, None, None, False, padding=1)
    output.sum().backward()
    assert output.shape == (0, 17, 8, 9) and image.grad.shape == image.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["convolution", "transposed"])
def test_weights_and_gradients_of_any_strides(kind, layout):
    image = torch.randn(2, 17, 8, 19).contiguous(memory_format=layout)
    window = dict(padding=1, stride=2) if kind == "convolution" else dict(padding=1)
    size = stock(kind, image, torch.zeros(17, 1, 3, 3), None, None, False, **window).shape
    weights = [
        torch.randn(3, 3, 1, 17).permute(3, 2, 0, 1),
        torch.randn(34, 1, 3, 6)[::2, :, :, 1::2],
        torch.randn(1, 1, 3, 3).expand(17, 1, 3, 3),
    ]
    gradients = [
        torch.randn(1, 1, 1, 1).expand(size),
        torch.randn(1, 17, 1, 1).expand(size),
        torch.randn(size).mT.contiguous().mT,
    ]
    for weight in weights:
        for gradient in gradients:
            check(kind, image, weight, grad_output=gradient, **window)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["convolution", "transposed"])
def test_second_derivatives(kind, layout):
    image = torch.randn(1, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(3, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    window = dict(stride=(2, 1), padding=1, dilation=(1, 2))

    def function(image, weight, bias):
        return ours(kind, image, weight, bias, None, False, **window)

    assert torch.autograd.gradcheck(function, (image, weight, bias))
    assert torch.autograd.gradgradcheck(function, (image, weight, bias))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 2, 1, 40), (1, 3, 2, 5), (3, 20, 30, 30)])
def test_any_number_of_threads(shape, layout):
    """More threads than rows, too; the same call gives the same bits."""
    image, weight = torch.randn(shape).contiguous(memory_format=layout), torch.randn(shape[1], 1, 3, 3)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            check("convolution", image, weight, padding=1)
            check("transposed", image, weight, padding=1, stride=2)
            windows = [1, 1], [1, 1], [1, 1], shape[1]
            args = image, image, *windows, [3, 3], False
            first, second = (DEPTHWISE.grad_weight(*args, backend="cpu") for _ in range(2))
            assert torch.equal(first, second)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS[:3])
def test_sums_over_many_pixels(dtype, layout):
    image = torch.rand(2, 5, 150, 301).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(5, 1, 3, 3).to(dtype)
    check("convolution", image, weight, padding=1, grad_output=torch.rand(2, 5, 150, 301))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_many_planes_of_one_width(data):
    """NCHW without strides and of equal width: rows end anywhere in a vector, planes are overwritten at their ends."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    dtype = data.draw(st.sampled_from(FLOATS))
    height, width = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([1, 3, 5, 7, 14, 16, 31, 33, 65, 128]))
    across, dilation = data.draw(st.sampled_from([(3, 1), (3, 6), (5, 1), (5, 40), (7, 2), (1, 1)]))
    down, slack = data.draw(st.sampled_from([1, 3, 4])), data.draw(st.integers(0, 3))
    image = whole(generator, data.draw(st.integers(1, 3)), 40, height, width).to(dtype)
    weight, bias = whole(generator, 40, 1, down, across).to(dtype), whole(generator, 40).to(dtype)
    window = dict(padding=(down // 2 + slack, dilation * (across - 1) // 2), dilation=(1, dilation))
    output = stock("convolution", image, weight, bias, None, False, **window)
    residual = whole(generator, *output.shape).to(dtype) if data.draw(st.booleans()) else None
    grad_output = whole(generator, *output.shape)
    check("convolution", image, weight, bias, residual, data.draw(st.booleans()), grad_output, **window)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_large_transposed_convolution(layout):
    """Large enough for stores past the cache."""
    image, weight = torch.randn(1, 21, 40, 64).contiguous(memory_format=layout), torch.randn(21, 1, 16, 16)
    check("transposed", image, weight, stride=8, padding=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [16, 40, 200])
@pytest.mark.parametrize("stride", [2, 3, 4, (8, 8), (5, 11)])
def test_strided_planes_with_an_epilogue(stride, width, dtype):
    """Planes that are split into phases, and rows of 16 taps."""
    image, bias = values(dtype, 2, 5, 19, width), values(dtype, 5)
    for kernel_size, padding in (((3, 3), 1), ((4, 16), 7), ((16, 16), 4), ((16, 16), 15)):
        if min(19 + 2 * padding - kernel_size[0], width + 2 * padding - kernel_size[1]) < 0:
            continue
        window, weight = dict(stride=stride, padding=padding), values(dtype, 5, 1, *kernel_size)
        output = stock("convolution", image, weight, None, None, False, **window)
        residual, grad_output = values(dtype, *output.shape), values(dtype, *output.shape)
        check("convolution", image, weight, bias, residual, True, grad_output, **window)
        output = stock("transposed", image, weight, None, None, False, **window)
        check("transposed", image, weight, bias, grad_output=values(dtype, *output.shape), **window)


def test_planes_in_a_row_longer_than_the_cache_of_rows():
    """Rows of a strided image that are far apart are split again for every output row."""
    check("convolution", torch.randn(1, 2, 300, 220), torch.randn(2, 1, 3, 3), stride=2, dilation=100, padding=30)


@pytest.mark.parametrize(
    "change",
    [
        dict(stride=[2**61, 1]),
        dict(padding=[2**61, 0]),
        dict(dilation=[1, 2**61]),
    ],
)
def test_numbers_that_would_overflow_are_refused(change):
    image, weight = torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3)
    windows = dict(stride=[1, 1], padding=[1, 1], dilation=[1, 1]) | change
    with pytest.raises(RuntimeError, match="out of range"):
        DEPTHWISE.forward(image, weight, None, None, *windows.values(), 4, [5, 5], False, backend="cpu")
