"""max_pool2d: geometry, ties, NaN and infinities against torch's, both index formats, gradients of any order."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastseg
from fastseg.ops import PoolIndices, max_pool2d
from fastseg.ops.pooling.max_pool2d import max_pool2d_op
from tests.contract import Case, Contract
from tests.programs import recorded_calls

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BACKENDS = ("auto", "reference")
NAN, INF = float("nan"), float("inf")


def case(name, *shape, small=True, **arguments):
    return Case(name, lambda make: dict(input=make.floating(*shape), **arguments), small)


CASES = [
    case("segnet", 2, 3, 4, 6, kernel_size=2),
    case("resnet", 1, 3, 7, 6, kernel_size=3, stride=2, padding=1),
    case("odd extents, ceil_mode", 2, 2, 5, 7, kernel_size=2, stride=2, ceil_mode=True),
    case("overlapping, dilated", 1, 2, 9, 8, kernel_size=(3, 2), stride=1, padding=(1, 0), dilation=(2, 3)),
    case("gaps", 1, 2, 10, 7, kernel_size=2, stride=(3, 4)),
    case("no batch", 3, 4, 5, kernel_size=[2], stride=[], padding=[1]),
    case("one pixel", 2, 17, 1, 1, kernel_size=1),
    case("a window as large as the image", 2, 3, 5, 6, kernel_size=(5, 6), stride=()),
    case("empty batch", 0, 3, 8, 12, kernel_size=2),
    case("wide", 1, 5, 14, 301, small=False, kernel_size=2),
    case("wide, overlapping", 1, 5, 15, 301, small=False, kernel_size=3, stride=2, padding=1),
    case("many channels", 2, 35, 9, 11, small=False, kernel_size=3, stride=2, padding=1),
    case("many taps", 1, 20, 20, 40, small=False, kernel_size=17, stride=2, padding=8),
]


def values_and_compact_gradient(input, **arguments):
    """max_pool2d whose gradient goes through int64 indices: return_indices keeps them."""
    return max_pool2d(input, return_indices=True, **arguments)[0]


CONTRACTS = [
    Contract(function=max_pool2d, stock=F.max_pool2d, cases=CASES, rejected=(torch.bool, torch.complex64)),
    Contract(
        function=values_and_compact_gradient,
        stock=F.max_pool2d,
        cases=CASES,
        rejected=(torch.bool, torch.complex64),
        name="max_pool2d_with_flat_indices",
    ),
]


def same(one, two):
    return one.dtype == two.dtype and torch.equal(one.nan_to_num(77.0), two.nan_to_num(77.0))


@st.composite
def poolings(draw):
    """(input, geometry): few different values, so many ties; NaN and infinities; either layout."""
    pair = lambda low, high: (draw(st.integers(low, high)), draw(st.integers(low, high)))  # noqa: E731
    kernel_size, stride, dilation = pair(1, 5), pair(1, 6), pair(1, 3)
    padding = draw(st.integers(0, kernel_size[0] // 2)), draw(st.integers(0, kernel_size[1] // 2))
    width = draw(st.integers(1, 40) | st.integers(256, 300))
    shape = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 16, 19, 67])), draw(st.integers(1, 20)), width
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    values = torch.randint(-3, 4, shape, generator=generator).to(draw(st.sampled_from(FLOATS)))
    chance = torch.rand(shape, generator=generator)
    if draw(st.booleans()):
        values[chance < 0.15], values[chance > 0.6] = NAN, -INF
    if draw(st.booleans()):
        values = values.contiguous(memory_format=torch.channels_last)
    geometry = dict(kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation)
    return values, dict(geometry, ceil_mode=draw(st.booleans()))


@settings(max_examples=150, deadline=None)
@given(poolings())
def test_any_pooling_equals_stock(pooling):
    input, geometry = pooling
    try:
        expected, indices = F.max_pool2d(input, **geometry, return_indices=True)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            max_pool2d(input, **geometry)
        return
    for backend in BACKENDS:
        output, flat = max_pool2d(input, **geometry, return_indices=True, backend=backend)
        assert same(output, expected) and same(flat, indices)
        output, compact = max_pool2d(input, **geometry, return_indices=True, index_format="compact", backend=backend)
        assert same(output, expected) and compact.offsets.dtype == torch.uint8
        if (F.max_pool2d(torch.ones_like(input), **geometry) > 0).all():  # else a dilated window holds no pixel
            assert same(compact.to_flat(), indices)
            again = PoolIndices.from_flat(indices, input.shape, *[geometry[name] for name in list(geometry)[:4]])
            assert torch.equal(again.offsets, compact.offsets)
    if input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous():
        assert output.is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=100, deadline=None)
@given(poolings())
def test_any_gradient_equals_the_references(pooling):
    """Integers as gradients: their sums are exact in every dtype."""
    input, geometry = pooling
    try:
        shape = F.max_pool2d(input, **geometry).shape
    except RuntimeError:
        return
    gradient = torch.randint(-4, 5, shape).to(input.dtype)
    found = []
    for backend in BACKENDS:
        for index_format in ("flat", "compact"):
            leaf = input.clone().requires_grad_()
            options = dict(return_indices=True, index_format=index_format, backend=backend)
            max_pool2d(leaf, **geometry, **options)[0].backward(gradient)
            found.append(leaf.grad)
    assert all(torch.equal(one, found[0]) for one in found[1:])


@pytest.mark.sanitized
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_ties_nan_and_infinities(layout, dtype, backend):
    windows = {
        (1, 1, 1, 1): 0, (0, 2, 2, 1): 1, (NAN, 5, INF, 5): 0, (5, NAN, 7, NAN): 3, (-INF,) * 4: 0,
        (-INF, -INF, NAN, -INF): 2, (INF, INF, -INF, INF): 0, (-0.0, 0.0, 0.0, -0.0): 0,
    }  # fmt: skip
    pixels = torch.tensor(list(windows), dtype=dtype).view(len(windows), 1, 2, 2).expand(-1, 18, -1, -1)
    _, indices = max_pool2d(pixels.contiguous(memory_format=layout), 2, return_indices=True, backend=backend)
    assert indices[:, :, 0, 0].tolist() == [[index] * 18 for index in windows.values()]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("index_format", ["flat", "compact"])
@pytest.mark.parametrize("channels, height, width", [(16, 2, 2), (17, 5, 31), (33, 3, 32), (48, 4, 67), (3, 9, 130)])
def test_two_by_two_windows_at_every_edge(channels, height, width, index_format, dtype, layout):
    """The kernels of quads.h read and write whole vectors, also at the last window, channel, row and plane."""
    generator = torch.Generator().manual_seed(channels)
    input = torch.randint(-3, 4, (3, channels, height, width), generator=generator).to(dtype)
    input[0, 0, 0, :2], input[-1, -1, -1, -1] = NAN, -INF
    input = input.contiguous(memory_format=layout).requires_grad_()
    stock = input.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    output, indices = max_pool2d(input, 2, return_indices=True, index_format=index_format)
    expected, expected_indices = F.max_pool2d(stock, 2, return_indices=True)
    assert same(output, expected)
    assert torch.equal(indices.to_flat() if index_format == "compact" else indices, expected_indices)
    gradient = torch.randint(-9, 9, output.shape, generator=generator).to(output)
    output.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(input.grad, stock.grad)
    unpooled = fastseg.ops.max_unpool2d(output, indices, 2, output_size=(height, width))
    assert same(unpooled, F.max_unpool2d(expected, expected_indices, 2, output_size=(height, width)))
    again = torch.ones_like(unpooled) * torch.arange(width).to(unpooled)
    (seen,) = torch.autograd.grad(unpooled, output, again)
    assert torch.equal(seen, again.flatten(2).gather(2, expected_indices.flatten(2)).view_as(seen))


@pytest.mark.sanitized
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("wrong", [-1, 8, 2**31, 2**32, 2**63 - 1, -(2**63)])
def test_a_flat_index_outside_its_window_takes_no_gradient(wrong, layout):
    indices = torch.zeros(1, 16, 1, 2, dtype=torch.int64)
    indices[..., 1] = 2 + 4  # the lower left pixel of the second window
    indices[0, 5, 0, 1] = wrong
    ones = torch.ones(1, 16, 1, 2).contiguous(memory_format=layout)
    indices = indices.contiguous(memory_format=layout)
    gradient = torch.ops.fastseg.max_pool2d_backward(ones, indices, [2, 2], [2, 2], [0, 0], [1, 1], [2, 4])
    expected = torch.zeros(1, 16, 2, 4)
    expected[:, :, 0, 0] = expected[:, :, 1, 2] = 1
    expected[0, 5, 1, 2] = 0
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("stride", [5, 2**31 - 1, 2**40, (2**62, 1)])
@pytest.mark.parametrize("index_format", ["flat", "compact"])
def test_any_stride_of_a_single_window(stride, index_format):
    input = torch.randn(1, 2, 5, 4, requires_grad=True)
    output, indices = max_pool2d(input, (2, 4), stride, return_indices=True, index_format=index_format)
    expected, expected_indices = F.max_pool2d(input, (2, 4), 5, return_indices=True)  # stock's must fit 32 bits
    assert torch.equal(output, expected)
    assert torch.equal(indices.to_flat() if index_format == "compact" else indices, expected_indices)
    gradients = [torch.autograd.grad(result.sum(), input)[0] for result in (output, expected)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_integers_are_pooled_as_by_stock(dtype):
    input = torch.randint(0, 100, (2, 3, 7, 9)).to(dtype)
    output, indices = max_pool2d(input, 3, 2, 1, return_indices=True, index_format="compact")
    expected, expected_indices = F.max_pool2d(input, 3, 2, 1, return_indices=True)
    assert output.dtype == dtype and torch.equal(output, expected)
    assert torch.equal(indices.to_flat(), expected_indices)


def test_flat_from_compact_from_flat():
    image = torch.randn(2, 3, 9, 11)
    _, indices = F.max_pool2d(image, 3, 2, 1, return_indices=True)
    _, compact = max_pool2d(image, 3, 2, 1, return_indices=True, index_format="compact")
    assert compact.shape == indices.shape and compact.device == indices.device
    assert torch.equal(compact.to("cpu").to_flat(), indices)
    single = PoolIndices.from_flat(indices[0], (9, 11), 3, 2, 1)
    assert torch.equal(single.offsets, compact.offsets[0]) and torch.equal(single.to_flat(), indices[0])


@pytest.mark.sanitized
@pytest.mark.parametrize("wrong", [-1, 5, 99, 2**31, 2**63 - 1, -(2**63)])
def test_an_index_outside_its_window_has_no_compact_form(wrong):
    _, indices = F.max_pool2d(torch.randn(1, 1, 8, 8), 2, return_indices=True)
    indices[0, 0, 1, 1] = wrong
    with pytest.raises(RuntimeError, match=f"indices holds {wrong}; allowed: the taps of its window"):
        PoolIndices.from_flat(indices, (8, 8), 2)


class Pair(torch.nn.Module):
    def forward(self, image):
        values, indices = max_pool2d(image, 2, return_indices=True, index_format="compact")
        return fastseg.ops.max_unpool2d(values * 2, indices, output_size=image.shape), indices


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compact_pair_compiles_and_its_indices_leave_the_graph(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(Pair(), fullgraph=True, dynamic=dynamic)
    for shape in ((2, 3, 8, 12), (2, 3, 9, 7)):
        image = torch.randn(shape, requires_grad=True)
        (output, indices), (expected, others) = compiled(image), Pair()(image)
        assert torch.equal(output, expected) and torch.equal(indices.to_flat(), others.to_flat())
        (gradient,) = torch.autograd.grad(output.square().sum(), image)
        (expected_gradient,) = torch.autograd.grad(expected.square().sum(), image)
        assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize(
    "gradient, return_indices, dynamic, ours",
    [(False, False, False, False), (True, False, False, True), (False, True, False, True), (False, False, True, True)],
)
def test_compilers_fuse_the_maximum_alone(gradient, return_indices, dynamic, ours):
    def pool(image):
        return max_pool2d(image.relu(), 2, return_indices=return_indices)

    calls = recorded_calls(pool, torch.randn(1, 4, 64, 64, requires_grad=gradient), dynamic=dynamic)
    assert ("fastseg.max_pool2d.default" in calls) is ours


def test_compact_indices_cross_exported_programs():
    class Unpool(torch.nn.Module):
        def forward(self, values, indices):
            return fastseg.ops.max_unpool2d(values, indices, 2)

    image = torch.randn(2, 3, 8, 12)
    pooled = torch.export.export(Pair(), (image,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    output, indices = pooled.module()(torch.cat([image, image]))
    assert isinstance(indices, PoolIndices) and torch.equal(output, Pair()(torch.cat([image, image]))[0])
    values = torch.randn(indices.shape)
    file = io.BytesIO()
    torch.export.save(torch.export.export(Unpool(), (values, indices)), file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(values, indices), Unpool()(values, indices))


@pytest.mark.parametrize("two", [np.int64(2), torch.tensor(2), (np.int32(2), 2)])
def test_sizes_are_integers_of_any_kind(two):
    input = torch.randn(1, 2, 4, 4)
    assert torch.equal(max_pool2d(input, two, stride=two), F.max_pool2d(input, 2))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(kernel_size=0), RuntimeError, r"kernel_size=\(0, 0\); allowed: 1 or more"),
        (dict(kernel_size=2, stride=0), RuntimeError, "stride="),
        (dict(kernel_size=2, padding=-1), RuntimeError, "padding="),
        (dict(kernel_size=2, padding=2), RuntimeError, "at most half of kernel_size"),
        (dict(kernel_size=2, dilation=0), RuntimeError, "dilation="),
        (dict(kernel_size=(2, 2, 2)), RuntimeError, "kernel_size="),
        (dict(kernel_size=2.0), TypeError, "kernel_size=2.0, float; allowed: int"),
        (dict(kernel_size="2"), TypeError, "kernel_size='2', str; allowed: int"),
        (dict(kernel_size=9), RuntimeError, "gives an output of 0x0"),
        (dict(kernel_size=2, index_format="bytes"), ValueError, "index_format='bytes'; allowed: 'flat', 'compact'"),
        (
            dict(kernel_size=(16, 16), padding=8, return_indices=True, index_format="compact"),
            RuntimeError,
            "at most 255",
        ),
        (dict(kernel_size=2, input=[1]), TypeError, "input is list"),
        (dict(kernel_size=1, input=torch.zeros(4, 4)), RuntimeError, "input has shape"),
        (dict(kernel_size=1, input=torch.zeros(2, 0, 4, 4)), RuntimeError, "input has shape"),
        (dict(kernel_size=1, input=torch.zeros(2, 3, 0, 4)), RuntimeError, "input has shape"),
        (dict(kernel_size=1, input=torch.zeros(2, 3, 4, 4) > 0), RuntimeError, "input has dtype bool"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        max_pool2d(**{"input": torch.zeros(1, 2, 4, 4), **arguments})


def test_indices_of_an_impossible_pool_are_refused():
    with pytest.raises(RuntimeError, match=r"PoolIndices: stride=\(0, 1\); allowed: 1 or more"):
        PoolIndices(torch.zeros(1, 2, 2, dtype=torch.uint8), (4, 4), 2, (0, 1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "arguments, stock",
    [
        ({}, True),
        (dict(return_indices=True), True),
        (dict(return_indices=True, index_format="compact"), False),
        (dict(backend="cpu"), False),
    ],
)
def test_few_elements_are_left_to_stock_where_it_can(arguments, stock, layout, monkeypatch):
    input = torch.randn(2, 3, 4, 6).contiguous(memory_format=layout).requires_grad_()
    _leave_to_stock_below(input.numel() + 1, monkeypatch)
    assert _is_stocks(max_pool2d(input, 2, **arguments)) == stock
    _leave_to_stock_below(input.numel(), monkeypatch)
    assert not _is_stocks(max_pool2d(input, 2, **arguments))


def test_few_elements_are_checked_as_many_are(monkeypatch):
    _leave_to_stock_below(1000, monkeypatch)
    input = torch.randn(1, 2, 6, 6)
    for arguments, error, message in (
        (dict(kernel_size=0), RuntimeError, "max_pool2d: kernel_size"),
        (dict(kernel_size=2, padding=2), RuntimeError, "max_pool2d: padding"),
        (dict(kernel_size="2"), TypeError, "max_pool2d: kernel_size"),
    ):
        with pytest.raises(error, match=message):
            max_pool2d(input, **arguments)
    assert max_pool2d(input, 6, stride=2**40).shape == (1, 2, 1, 1)  # stock raises


def _leave_to_stock_below(fewest, monkeypatch):
    for kind in max_pool2d_op.stock.below:
        monkeypatch.setitem(max_pool2d_op.stock.below, kind, fewest)


def _is_stocks(result) -> bool:
    output = result[0] if isinstance(result, tuple) else result
    return type(output.grad_fn).__name__ == "MaxPool2DWithIndicesBackward0"
