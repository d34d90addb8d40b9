"""max_unpool2d: against torch's in every form of its arguments, duplicates, hostile indices, both index formats."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fastseg
from fastseg._op import REGISTRY
from fastseg.ops import PoolIndices, max_pool2d, max_unpool2d
from fastseg.ops.pooling.max_unpool2d import max_unpool2d_op
from tests.contract import Case, Contract

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BACKENDS = ("auto", "reference")


def pooled(make, *shape, **pool):
    """(a leaf of the pool's output shape, int64 indices of a pooling of random numbers, the pool's input size)."""
    image = torch.randn(shape, generator=make.generator)
    output, indices = F.max_pool2d(image, return_indices=True, **pool)
    return make.floating(*output.shape), indices.to(make.device), shape[-2:]


def case(name, *shape, small=True, unpool=(), **pool):
    def arguments(make):
        input, indices, size = pooled(make, *shape, **pool)
        sizes = {key: value for key, value in pool.items() if key in ("kernel_size", "stride", "padding")}
        return dict(input=input, indices=indices, **sizes, **{"output_size": size, **dict(unpool)})

    return Case(name, arguments, small)


CASES = [
    case("segnet", 2, 3, 8, 12, kernel_size=2, unpool=dict(output_size=None)),
    case("odd extents", 2, 3, 7, 9, kernel_size=2, ceil_mode=True),
    case("full size", 2, 3, 9, 9, kernel_size=3, unpool=dict(output_size=(2, 3, 9, 9))),
    case("gaps", 1, 3, 11, 8, kernel_size=2, stride=(3, 4)),
    case("padding", 1, 17, 8, 10, kernel_size=4, stride=4, padding=(2, 1)),
    case("no batch", 3, 6, 8, kernel_size=2),
    case("one pixel", 2, 20, 1, 1, kernel_size=1),
    case("empty batch", 0, 3, 8, 12, kernel_size=2),
    case("wide", 1, 5, 14, 300, small=False, kernel_size=2),
    case("many channels", 2, 35, 8, 10, small=False, kernel_size=2),
    case("wide, padding", 1, 5, 15, 301, small=False, kernel_size=(3, 2), padding=1),
]


def with_compact_indices(input, indices, kernel_size, stride=None, padding=0, output_size=None, **options):
    """max_unpool2d of the compact form of the same indices."""
    default = fastseg.ops.max_unpool2d(input.detach(), indices, kernel_size, stride, padding, output_size, **options)
    compact = PoolIndices.from_flat(indices, default.shape[-2:], kernel_size, stride, padding)
    return max_unpool2d(input, compact, output_size=output_size, **options)


CONTRACTS = [
    Contract(function=max_unpool2d, stock=F.max_unpool2d, cases=CASES),
    Contract(
        function=with_compact_indices,
        stock=F.max_unpool2d,
        cases=CASES,
        name="max_unpool2d_with_compact_indices",
        compile_whole=False,  # from_flat reads the indices; compiled pairs are tested below
    ),
]


@pytest.fixture
def one_thread():
    """With one thread: stock's threads race for repeating indices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stock_unpool(input, indices, size):
    """Torch's function without the checks of output_size in its Python wrapper."""
    return torch._C._nn.max_unpool2d(input, indices, size)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_indices_equal_stocks(data):
    """int64, in any order, repeating; forward and backward."""
    shape = [
        data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from([1, 5, 17, 40])),
        *data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9))),
    ]
    size = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    dtype = data.draw(st.sampled_from(FLOATS))
    layout = data.draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    values = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout)
    indices = torch.randint(size[0] * size[1], shape, generator=generator)
    gradient = torch.randn(*shape[:2], *size, generator=generator).to(dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = stock_unpool(theirs := values.clone().requires_grad_(), indices, size)
        expected.backward(gradient)
    finally:
        torch.set_num_threads(threads)
    for backend in BACKENDS:
        ours = values.clone().requires_grad_()
        none = ([], [], [], [])
        output = torch.ops.fastseg.max_unpool2d(ours, indices, *none, size, backend)
        output.backward(gradient)
        assert torch.equal(output, expected) and torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 21, 15, 18), (1, 40, 15, 270)])
@pytest.mark.parametrize(
    "pool",
    [
        dict(kernel_size=3, stride=1, padding=1),
        dict(kernel_size=(2, 5), stride=(1, 2), padding=(1, 2)),
        dict(kernel_size=3, stride=2, padding=1, dilation=2),
        dict(kernel_size=2, stride=3),
    ],
)
def test_overlapping_windows_the_last_write_counts(pool, shape, backend, layout, one_thread):
    image = torch.randn(shape).contiguous(memory_format=layout)
    _, compact = max_pool2d(image, **pool, return_indices=True, index_format="compact")
    values = torch.randn_like(compact.offsets, dtype=torch.float32)
    expected = stock_unpool(values, compact.to_flat(), shape[2:])
    assert torch.equal(max_unpool2d(values, compact, backend=backend), expected)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape, layout",
    [
        ((2, 19, 13, 22), torch.channels_last),
        ((3, 9, 301, 271), torch.contiguous_format),  # large enough to go past the caches
    ],
)
@pytest.mark.parametrize("strange", [0, 1, 500])
def test_int64_indices_that_are_no_taps_of_2x2_windows(strange, shape, layout, dtype, one_thread):
    """Indices of a pooling, and some that are anywhere in the plane."""
    shape = (*shape[:2], 2 * shape[2], shape[3]) if dtype.itemsize == 2 else shape
    image = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    _, indices = F.max_pool2d(image, 2, return_indices=True)
    in_memory = indices.permute(0, 2, 3, 1).view(-1) if layout == torch.channels_last else indices.view(-1)
    in_memory[torch.randint(indices.numel(), (strange,))] = torch.randint(shape[2] * shape[3], (strange,))
    gradient = torch.randn_like(image)
    ours = torch.randn(indices.shape).to(dtype).contiguous(memory_format=layout).requires_grad_()
    theirs = ours.detach().requires_grad_()
    expected = F.max_unpool2d(theirs, indices, 2, output_size=shape[2:])
    output = max_unpool2d(ours, indices, 2, output_size=shape[2:])
    expected.backward(gradient)
    output.backward(gradient)
    assert torch.equal(output, expected) and torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("index_format", ["flat", "compact"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_unpool_of_pool_and_pool_of_that(index_format, layout):
    image = torch.rand(2, 19, 12, 10).contiguous(memory_format=layout) + 0.5  # above the zeros of unpooling
    values, indices = max_pool2d(image, 2, return_indices=True, index_format=index_format)
    unpooled = max_unpool2d(values, indices, 2)
    flat = indices if index_format == "flat" else indices.to_flat()
    at_maximum = torch.zeros(2, 19, 120, dtype=torch.bool).scatter_(2, flat.flatten(2), True).view_as(image)
    assert torch.equal(unpooled, torch.where(at_maximum, image, 0.0))
    again, same_indices = max_pool2d(unpooled, 2, return_indices=True, index_format=index_format)
    same_flat = same_indices if index_format == "flat" else same_indices.to_flat()
    assert torch.equal(again, values) and torch.equal(same_flat, flat)


HOSTILE = [-1, 64, 2**31 - 1, 2**31, 2**32, 2**32 + 3, 2**63 - 1, -(2**63), -(2**31)]


@pytest.mark.sanitized
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", HOSTILE)
def test_an_index_outside_the_plane_raises_forward_and_backward(wrong, backend, layout):
    values = torch.randn(2, 18, 4, 4).contiguous(memory_format=layout)
    _, indices = F.max_pool2d(torch.randn(2, 18, 8, 8), 2, return_indices=True)
    indices[1, 3, 2, 1] = wrong
    with pytest.raises(RuntimeError, match=f"outside the plane, {wrong}; allowed: 0 to 63 in a plane of 8x8"):
        max_unpool2d(values, indices, 2, backend=backend)
    with pytest.raises(RuntimeError, match=f"outside the plane, {wrong}"):
        REGISTRY["max_unpool2d_backward"](torch.randn(2, 18, 8, 8), indices, [], [], [], [], backend=backend)
    # Where gradients are added, such an index is skipped: the unpooling has already raised.
    add = REGISTRY["max_pool2d_backward"]
    added = add(values, indices, [], [], [], [], [8, 8], backend=backend)
    kept = (indices >= 0) & (indices < 64)
    assert torch.allclose(added.sum(), (values * kept).sum(), atol=1e-4)


@pytest.mark.sanitized
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where, wrong", [((2, 1), 4), ((2, 1), 255), ((0, 0), 0), ((0, 3), 1), ((4, 4), 3)])
def test_an_offset_outside_its_window_raises(where, wrong, backend, layout):
    """Taps that the window does not have, and taps in the padding."""
    image = torch.randn(2, 18, 8, 8).contiguous(memory_format=layout)
    values, compact = max_pool2d(image, 2, 2, 1, return_indices=True, index_format="compact")
    compact.offsets[1, 5, where[0], where[1]] = wrong
    with pytest.raises(RuntimeError, match="indices holds"):
        max_unpool2d(values, compact, backend=backend)
    with pytest.raises(RuntimeError, match="indices holds"):
        REGISTRY["max_unpool2d_backward"](image, compact.offsets, *compact.geometry, backend=backend)


def test_compact_indices_into_an_image_of_another_size_mean_the_same_pixels_as_flat_ones():
    image = torch.randn(2, 3, 9, 9)
    values, compact = max_pool2d(image, 2, return_indices=True, index_format="compact")
    assert max_unpool2d(values, compact).shape == image.shape
    for size in ((9, 9), (9, 8), (8, 9)):
        try:
            expected = F.max_unpool2d(values, compact.to_flat(), 2, output_size=size)
        except RuntimeError:
            with pytest.raises(RuntimeError, match="outside the plane"):
                max_unpool2d(values, compact, 2, output_size=size)
            continue
        assert torch.equal(max_unpool2d(values, compact, 2, output_size=size), expected)


@pytest.mark.parametrize("index_format", ["flat", "compact"])
def test_a_pair_is_differentiable_twice(index_format):
    image = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)

    def pair(image):
        values, indices = max_pool2d(image, 2, return_indices=True, index_format=index_format)
        return max_unpool2d(values.square(), indices, 2, output_size=image.shape)

    assert torch.autograd.gradgradcheck(pair, image)


def three_by_three():
    values, indices = F.max_pool2d(torch.randn(1, 2, 6, 6), 2, return_indices=True)
    return dict(input=values, indices=indices, kernel_size=2)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(output_size=(8, 6)), ValueError, "allowed for H: 5 to 7"),
        (dict(output_size=(6, 4)), ValueError, "allowed for W: 5 to 7"),
        (dict(output_size=(2, 6, 6)), ValueError, "output_size="),
        (dict(kernel_size=None), TypeError, "kernel_size is None"),
        (
            dict(indices=torch.zeros(1, 2, 3, 3, dtype=torch.int32)),
            RuntimeError,
            "indices has dtype int32; allowed: int64",
        ),
        (
            dict(indices=torch.zeros(1, 2, 3, 3, dtype=torch.uint8)),
            RuntimeError,
            "indices has dtype uint8; allowed: int64",
        ),
        (dict(indices=torch.zeros(1, 2, 3, 2).long()), RuntimeError, "indices has shape"),
        (dict(indices=None), TypeError, "indices is NoneType"),
        (dict(input=torch.zeros(3, 3)), RuntimeError, "input has shape"),
        (dict(input=torch.zeros(1, 0, 3, 3), indices=torch.zeros(1, 0, 3, 3).long()), RuntimeError, "input has shape"),
        (dict(input=3), TypeError, "input is int"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        max_unpool2d(**{**three_by_three(), **change})


@pytest.mark.parametrize(
    "layout, shape, stock",
    [
        (torch.contiguous_format, (1, 4, 3, 5), True),
        (torch.contiguous_format, (4, 3, 5), True),
        (torch.contiguous_format, (1, 3, 3, 5), False),  # two threads would share one of three planes
        (torch.channels_last, (2, 3, 3, 5), True),
        (torch.channels_last, (1, 4, 3, 5), False),
    ],
)
def test_few_elements_are_left_to_stock_where_no_threads_share_a_plane(layout, shape, stock, monkeypatch):
    input = torch.randn(shape)
    input = input.contiguous(memory_format=layout) if len(shape) == 4 else input
    indices = torch.randint(60, shape)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for fewest, expected in ((input.numel() + 1, stock), (input.numel(), False)):
        _leave_to_stock_below(fewest, monkeypatch)
        for backend, by_stock in (("auto", expected), ("cpu", False)):
            with _Unpoolings() as unpoolings:
                max_unpool2d(input, indices, 2, backend=backend)
            assert unpoolings.by_stock == [by_stock]


def test_stock_is_not_asked_for_gradients_in_channels_last(monkeypatch):
    """Stock's gradients are contiguous."""
    _leave_to_stock_below(1000, monkeypatch)
    for layout, expected in ((torch.contiguous_format, True), (torch.channels_last, False)):
        input = torch.randn(4, 4, 3, 5).contiguous(memory_format=layout).requires_grad_()
        output = max_unpool2d(input, torch.randint(60, (4, 4, 3, 5)), 2)
        assert (type(output.grad_fn).__name__ == "MaxUnpool2DBackward0") == expected
        output.sum().backward()
        assert input.grad.is_contiguous(memory_format=layout)


def test_stock_is_not_asked_where_it_would_refuse_to_be_nondeterministic(monkeypatch):
    _leave_to_stock_below(1000, monkeypatch)
    input, indices = torch.randn(1, 4, 3, 5), torch.randint(60, (1, 4, 3, 5))
    expected = max_unpool2d(input, indices, 2, backend="reference")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(max_unpool2d(input, indices, 2), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_few_elements_are_checked_as_many_are(one_thread, monkeypatch):
    _leave_to_stock_below(1000, monkeypatch)
    input, indices = torch.randn(1, 4, 3, 5), torch.full((1, 4, 3, 5), 60)
    with pytest.raises(RuntimeError, match="invalid max index: 60 .*6x10"):  # stock's words
        max_unpool2d(input, indices, 2)
    with pytest.raises(ValueError, match="max_unpool2d: output_size"):
        max_unpool2d(input, indices, 2, output_size=(8, 10))


def _leave_to_stock_below(fewest, monkeypatch):
    for kind in max_unpool2d_op.stock.below:
        monkeypatch.setitem(max_unpool2d_op.stock.below, kind, fewest)


class _Unpoolings(TorchDispatchMode):
    """Records for every unpooling whether it is stock's."""

    def __init__(self):
        super().__init__()
        self.by_stock = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name.endswith("::max_unpool2d"):
            self.by_stock.append(name == "aten::max_unpool2d")
        return function(*args, **(kwargs or {}))
