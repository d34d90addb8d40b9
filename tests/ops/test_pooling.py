"""max_pool2d and max_unpool2d: both sides of the limits of stock, layouts, backends, errors, calls."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._prims_common import suggest_memory_format

from fastseg._layout import image_format
from fastseg._op import REGISTRY, BackendError
from fastseg.ops import PoolIndices, max_pool2d, max_unpool2d
from tests.contract import Make, leaves
from tests.ops import test_max_pool2d, test_max_unpool2d

OPS = ("max_pool2d", "max_pool2d_backward", "max_unpool2d", "max_unpool2d_backward")
CASES = [
    pytest.param(function, case, id=f"{function.__name__}-{case.name}")
    for function, cases in ((max_pool2d, test_max_pool2d.CASES), (max_unpool2d, test_max_unpool2d.CASES))
    for case in cases
]


def leave_to_stock_below(fewest, monkeypatch):
    for name in ("max_pool2d", "max_unpool2d"):
        below = REGISTRY[name].stock.below
        for kind in below:
            monkeypatch.setitem(below, kind, fewest)


def run(function, case, make, **options):
    """(outputs, gradients) of one call."""
    arguments = case.arguments(make)
    result = function(**arguments, **options)
    outputs = result if isinstance(result, tuple) else (result,)
    gradient = torch.arange(outputs[0].numel()).reshape(outputs[0].shape).to(outputs[0].dtype)
    return outputs, torch.autograd.grad(outputs[0], list(leaves(arguments).values()), gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("function, case", CASES)
def test_both_sides_of_the_threshold_to_stock_give_the_same(function, case, layout, dtype, monkeypatch):
    for options in ({}, {"return_indices": True}) if function is max_pool2d else ({},):
        found = []
        for fewest in (0, 1 << 62):
            leave_to_stock_below(fewest, monkeypatch)
            outputs, gradients = run(function, case, Make(dtype, layout=layout), **options)
            found.append((*outputs, *gradients))
        for ours, stocks in zip(*found, strict=True):
            assert ours.dtype == stocks.dtype and torch.equal(ours, stocks)
            assert ours.numel() == 0 or ours.stride() == stocks.stride()


@pytest.mark.parametrize("shape, dilation", [((1, 16, 1, 64), 2), ((2, 3, 3, 9), (3, 1))])
def test_dilated_windows_are_not_left_to_stock(shape, dilation, monkeypatch):
    """If they hold no pixel, stock's index lies outside of the plane, and its backward writes there."""
    leave_to_stock_below(1 << 62, monkeypatch)
    x = torch.randn(shape, requires_grad=True)
    gradients = []
    for backend in ("auto", "cpu", "reference"):
        output = max_pool2d(x, 2, 1, 1, dilation, backend=backend)
        gradients.append(torch.autograd.grad(output.sum(), x)[0])
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
    with pytest.raises(BackendError, match="backend='stock' cannot run this call: .* dilated window"):
        max_pool2d(x, 2, 1, 1, dilation, backend="stock")


def test_half_gradients_of_overlapping_windows_are_not_left_to_stock(monkeypatch):
    leave_to_stock_below(1 << 62, monkeypatch)
    x = torch.zeros(1, 1, 5, 5, dtype=torch.bfloat16)
    x[0, 0, 2, 2] = 1
    gradient = torch.ones_like(x)
    gradient[0, 0, 1, 1] = 256  # to which bfloat16 cannot add 1
    (found,) = torch.autograd.grad(max_pool2d(x.requires_grad_(), 3, 1, 1), x, gradient)
    assert found[0, 0, 2, 2] == 264


@pytest.mark.parametrize("dtype, width", [(torch.uint8, 300), (torch.int8, 200), (torch.int16, 40000)])
@pytest.mark.parametrize("backend", ["auto", "stock below", "reference"])
def test_integer_planes_of_more_pixels_than_their_dtype_counts(dtype, width, backend, monkeypatch):
    if backend == "stock below":
        leave_to_stock_below(1 << 62, monkeypatch)
        backend = "auto"
    planes = torch.randint(0, 100, (1, 3, 2, width)).to(dtype)
    expected, indices = F.max_pool2d(planes, 2, return_indices=True)
    for layout in (torch.contiguous_format, torch.channels_last):
        input = planes.contiguous(memory_format=layout)
        assert torch.equal(max_pool2d(input, 2, backend=backend), expected)
        output, flat = max_pool2d(input, 2, return_indices=True, backend=backend)
        assert torch.equal(output, expected) and torch.equal(flat, indices)
        assert output.is_contiguous(memory_format=layout) and flat.is_contiguous(memory_format=layout)
        _, compact = max_pool2d(input, 2, return_indices=True, index_format="compact", backend=backend)
        assert torch.equal(compact.to_flat(), indices)


@pytest.mark.parametrize("backend", ["auto", "stock", "cpu", "reference"])
def test_an_unpooling_to_nothing_is_refused_by_every_backend(backend):
    values, indices = torch.randn(1, 2, 1, 1), torch.zeros(1, 2, 1, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="the output would be 0x0; allowed: at least 1x1"):
        max_unpool2d(values, indices, 2, 3, output_size=(0, 0), backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "reference", "auto"])
@pytest.mark.parametrize("index_format", ["flat", "compact"])
def test_the_backend_of_the_forward_runs_the_backward(backend, index_format, monkeypatch):
    ran = []

    def watched(op, entry, attribute):
        original = getattr(entry, attribute)

        def watching(*values):
            ran.append((op.name, entry.name))
            return original(*values)

        monkeypatch.setattr(entry, attribute, watching)

    for op in map(REGISTRY.get, OPS):
        for entry in op.backends:
            watched(op, entry, "function" if entry.name == "reference" else "kernel")
    x = torch.randn(1, 2, 6, 8, dtype=torch.float64, requires_grad=True)
    values, indices = max_pool2d(x, 2, return_indices=True, index_format=index_format, backend=backend)
    output = max_unpool2d(values, indices, 2, backend=backend)
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    forward = ["max_pool2d", "max_unpool2d"]
    assert [name for name, _ in ran[:4]] == [*forward, "max_unpool2d_backward", "max_pool2d_backward"]
    assert {name for name, _ in ran[4:]} == {"max_unpool2d_backward", "max_pool2d_backward"}
    assert {by for _, by in ran} == {"cpu" if backend == "auto" else backend}


def test_the_memory_format_is_the_one_that_torch_tells():
    """Small tensors with any possible strides, including overlapping ones."""
    storage = torch.zeros(4000)
    for shape in itertools.product((1, 2, 3), (1, 2, 4), (1, 2, 3), (1, 2, 3)):
        images, channels, height, width = shape
        steps = {0, 1, width, channels, width * height, width * channels, channels * height * width, 40}
        for strides in itertools.product(steps, repeat=4):
            view = storage.as_strided(shape, strides)
            assert image_format(view) == suggest_memory_format(view), (shape, strides)


def test_the_memory_format_of_an_empty_batch_is_kept():
    for layout in (torch.contiguous_format, torch.channels_last):
        empty = torch.empty(0, 3, 4, 6, memory_format=layout)
        assert image_format(empty) == layout
        assert max_pool2d(empty, 2).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.filterwarnings("ignore")
def test_torch_jit_trace_goes_through(layout):
    image = torch.randn(1, 3, 8, 8).contiguous(memory_format=layout)

    def pair(image):
        values, indices = max_pool2d(image, 2, return_indices=True)
        return max_unpool2d(values, indices, 2)

    assert torch.equal(torch.jit.trace(pair, image, check_trace=False)(image), pair(image))


@pytest.mark.parametrize("given", ["contiguous", "channels_last", "sliced"])
def test_indices_that_lie_otherwise_than_the_values(given):
    image = torch.randn(2, 3, 8, 8)
    values, indices = F.max_pool2d(image, 2, return_indices=True)
    expected = F.max_unpool2d(values, indices, 2)
    other = Make(torch.float32, layout=given)._laid_out((2, 3, 4, 4), 1.0, False).long().copy_(indices)
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = values.detach().contiguous(memory_format=layout).requires_grad_()
        output = max_unpool2d(leaf, other, 2)
        output.backward(image)
        assert torch.equal(output, expected) and output.is_contiguous(memory_format=layout)
        assert torch.equal(leaf.grad, F.max_pool2d(image, 2)) and leaf.grad.is_contiguous(memory_format=layout)


def test_batches_of_torch_func_in_any_layout():
    image = torch.randn(4, 2, 3, 8, 8)
    values, indices = torch.func.vmap(lambda one: max_pool2d(one, 2, return_indices=True))(image)
    expected = torch.func.vmap(lambda one, where: max_unpool2d(one, where, 2))(values, indices)
    last = values.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    for other in (indices, indices.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)):
        assert torch.equal(torch.func.vmap(lambda one, where: max_unpool2d(one, where, 2))(last, other), expected)
    assert torch.equal(expected[1], max_unpool2d(values[1], indices[1], 2))


HUGE = (2**31 - 1, 2**31, 2**32 + 1, 2**40, 2**62, 2**63, 2**70, -(2**70))
NO_INTS = (2.0, float("nan"), "2", True, [2, 2.0], None)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("name", ["kernel_size", "stride", "padding", "dilation"])
@pytest.mark.parametrize("threshold", [0, 1 << 62])
def test_sizes_that_no_pooling_has(name, backend, threshold, monkeypatch):
    leave_to_stock_below(threshold, monkeypatch)
    input = torch.randn(1, 2, 4, 4)
    values, indices = F.max_pool2d(input, 2, return_indices=True)
    calls = [lambda **sizes: max_pool2d(input, **{"kernel_size": 2, **sizes}, backend=backend)]
    if name != "dilation":
        calls.append(lambda **sizes: max_unpool2d(values, indices, **{"kernel_size": 2, **sizes}, backend=backend))
    for number, call in enumerate(calls):
        for huge in HUGE:
            if number == 0 and name == "stride" and 0 < huge < 2**63:
                assert call(stride=huge).shape == (1, 2, 1, 1)
                continue
            with pytest.raises(RuntimeError, match=r"fastseg.ops.max_(un)?pool2d: .*allowed"):
                call(**{name: huge})
        for wrong in NO_INTS:
            if wrong is None and name == "stride":
                continue
            with pytest.raises(TypeError, match=rf"fastseg.ops.max_(un)?pool2d: {name}.*allowed: int"):
                call(**{name: wrong})


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("arguments", [(2**31 - 2, 1, 2**30 - 1), (1, 1, 0, 2**31 - 1)])
def test_no_message_names_a_file_of_the_build(arguments, backend):
    with pytest.raises(RuntimeError, match="a window spans 2.31 pixels or more") as failure:
        max_pool2d(torch.randn(1, 2, 4, 4), *arguments, return_indices=True, backend=backend)
    assert "kernels/" not in str(failure.value) and ".h" not in str(failure.value)


def test_no_message_about_compact_indices_names_one_either():
    offsets = torch.zeros(1, 2, 2, 2, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="256 taps; allowed: at most 255") as failure:
        max_unpool2d(torch.randn(1, 2, 2, 2), PoolIndices(offsets, (40, 40), 16), backend="cpu")
    assert "kernels/" not in str(failure.value)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(input=torch.randn(4), indices=torch.zeros(4).long()), RuntimeError, r"input has shape \(4,\); allowed"),
        (dict(kernel_size=0), RuntimeError, r"kernel_size=\(0, 0\); allowed: 1 or more"),
        (dict(stride=0), RuntimeError, r"stride=\(0, 0\); allowed: 1 or more"),
        (dict(padding=-1), RuntimeError, r"padding=\(-1, -1\); allowed: 0 or more"),
        (dict(stride=2**40), RuntimeError, "the output would be .* allowed: at most 2.50 pixels"),
        (dict(output_size=(2**70, 4)), ValueError, "allowed for H: 3 to 5"),
        (dict(output_size=(4.0, 4)), TypeError, r"output_size=\(4.0, 4\), tuple; allowed: two or four ints"),
        (dict(output_size="44"), TypeError, "output_size='44', str; allowed: two or four ints"),
        (dict(output_size=(True, 4)), TypeError, "output_size="),
    ],
)
def test_bad_arguments_of_an_unpooling_are_named(change, error, message):
    values, indices = F.max_pool2d(torch.randn(1, 2, 4, 4), 2, return_indices=True)
    for backend in ("auto", "cpu", "reference"):
        with pytest.raises(error, match=f"fastseg.ops.max_unpool2d: .*{message}"):
            max_unpool2d(**{"input": values, "indices": indices, "kernel_size": 2, "backend": backend, **change})


def python_calls(function) -> int:
    """The number of Python functions that one call of `function` enters, without itself; after a first call."""
    function()
    entered = []
    sys.setprofile(lambda frame, event, argument: entered.append(frame) if event == "call" else None)
    try:
        function()
    finally:
        sys.setprofile(None)
    return len(entered) - 1


def test_few_hops_lead_to_the_kernel():
    image = torch.randn(1, 4, 8, 8)
    values, indices = max_pool2d(image, 2, return_indices=True)
    assert python_calls(lambda: max_pool2d(image, 2, return_indices=True, backend="cpu")) <= 20
    assert python_calls(lambda: max_unpool2d(values, indices, 2, backend="cpu")) <= 21


def test_compact_indices_stay_in_the_layout_of_the_values():
    image = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    _, compact = max_pool2d(image, 2, return_indices=True, index_format="compact")
    assert isinstance(compact, PoolIndices) and compact.offsets.is_contiguous(memory_format=torch.channels_last)
