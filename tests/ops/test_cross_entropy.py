"""cross_entropy: contract cases, golden values, hostile input, strides, autograd, levels."""

import math
import mmap
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg import _library
from fastseg._op import REGISTRY
from fastseg.ops import cross_entropy, focal_loss
from fastseg.testing import assert_within_policy
from tests.contract import Case, Contract

IGNORE = -100
# In fp64 stock is its own reference and the policy would ask for its very bits; gradcheck and a test below hold fp64.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def weighted_definition(input, target, weight=None, pixel_weight=None, reduction="mean"):
    """The definition of pixel_weight by stock operations."""
    loss = F.cross_entropy(input, target, weight, reduction="none")
    each = pixel_weight.to(loss.dtype)
    if reduction == "none":
        return loss * each
    label_weight = torch.ones_like(each) if weight is None else weight[target.clamp(min=0)]
    return (loss * each).sum() / torch.where(target != IGNORE, label_weight * each, 0).sum()


def maps(make, classes=5, ignored=IGNORE, **options):
    """Arguments of a call on (2, classes, 4, 6) maps."""
    target = make.labels(2, 4, 6, classes=classes, ignored=ignored)
    return dict(input=make.floating(2, classes, 4, 6), target=target, **options)


CONTRACTS = [
    Contract(
        function=cross_entropy,
        stock=F.cross_entropy,
        dtypes=DTYPES,
        cases=[
            Case("maps", maps),
            Case("sum", lambda make: maps(make, reduction="sum")),
            Case("none", lambda make: maps(make, reduction="none")),
            Case("one_class", lambda make: maps(make, classes=1)),
            Case("two_classes", lambda make: maps(make, classes=2)),
            Case("two_classes_sum", lambda make: dict(
                input=make.floating(2, 2, 37, 31), target=make.labels(2, 37, 31, classes=2, ignored=IGNORE),
                reduction="sum"), small=False),
            Case("ignored_class", lambda make: maps(make, ignored=None, ignore_index=2)),
            Case("uint8_255", lambda make: {
                "input": make.floating(9, 4),
                "target": make.labels(9, classes=4, ignored=255, dtype=torch.uint8),
                "ignore_index": 255,
            }),
            Case("weight", lambda make: maps(make, weight=make.constant(5))),
            Case("smoothing", lambda make: maps(make, label_smoothing=0.1)),
            Case("weight_smoothing", lambda make: maps(make, weight=make.constant(5), label_smoothing=0.3)),
            Case("rows", lambda make: dict(input=make.floating(7, 11), target=make.labels(7, classes=11))),
            Case("one_row", lambda make: dict(input=make.floating(6), target=make.labels(classes=6))),
            Case("volume", lambda make: dict(
                input=make.floating(2, 3, 2, 3, 4), target=make.labels(2, 2, 3, 4, classes=3))),
            Case("empty_batch", lambda make: dict(input=make.floating(0, 3, 2), target=make.labels(0, 2, classes=3))),
            Case("many_tiles", lambda make: dict(
                input=make.floating(2, 19, 17, 31), target=make.labels(2, 17, 31, classes=19)), small=False),
            Case("many_classes", lambda make: dict(
                input=make.floating(2, 600, 33), target=make.labels(2, 33, classes=600)), small=False),
        ],
    ),
    Contract(
        function=cross_entropy,
        stock=weighted_definition,
        dtypes=DTYPES,
        name="cross_entropy_pixel_weight",
        cases=[
            Case("mean", lambda make: maps(make, pixel_weight=make.constant(2, 4, 6))),
            Case("weight", lambda make: maps(make, weight=make.constant(5), pixel_weight=make.constant(2, 4, 6))),
            Case("none", lambda make: maps(make, pixel_weight=make.constant(2, 4, 6), reduction="none")),
        ],
    ),
]  # fmt: skip


# --- golden values ---


def test_golden_cross_entropy():
    loss = cross_entropy(torch.tensor([2.0, 1.0, 0.0]), torch.tensor(0))
    assert loss.item() == pytest.approx(0.4076060, abs=1e-7)
    logits, weight = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]), torch.tensor([1.0, 3.0, 1.0])
    target = torch.tensor([0, 1])
    assert cross_entropy(logits, target, weight).item() == pytest.approx(1.1576060, abs=2e-7)
    assert cross_entropy(logits, target, weight, reduction="sum").item() / 2 == pytest.approx(2.3152119, abs=2e-7)


# --- values that hurt ---


def both(input, target, **options):
    """((loss, gradient) of ours, of stock)."""
    results = []
    for function in (cross_entropy, F.cross_entropy):
        leaf = input.detach().requires_grad_()
        loss = function(leaf, target, **options)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf, torch.ones_like(loss))[0]))
    return results


HOSTILE = {
    "nan": [float("nan"), 1.0, 2.0],
    "inf": [1.0, float("inf"), 2.0],
    "minus_inf": [-float("inf"), 1.0, 2.0],
    "all_minus_inf": [-float("inf")] * 3,
    "huge": [3e38, -3e38, 0.0],
    "large": [1e4, 1e4 - 1, -1e4],
    "far": [0.0, -200.0, -90.0],
}


@pytest.mark.sanitized
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("label", [0, 1, IGNORE])
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("classes", [3, 2])
def test_hostile_logits_as_stock(classes, name, label, smoothing, reduction):
    input = torch.randn(40, classes)
    input[17] = torch.tensor(HOSTILE[name][:classes])
    target = torch.randint(classes, (40,))
    target[17] = label
    (loss, gradient), (stock_loss, stock_gradient) = both(input, target, label_smoothing=smoothing, reduction=reduction)
    torch.testing.assert_close(loss, stock_loss, equal_nan=True)
    torch.testing.assert_close(gradient, stock_gradient, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_mean_over_nothing_is_nan_with_zero_gradient_as_in_stock(smoothing):
    input, target = torch.randn(2, 3, 5), torch.full((2, 5), IGNORE)
    (loss, gradient), (stock_loss, stock_gradient) = both(input, target, label_smoothing=smoothing)
    assert loss.isnan() and stock_loss.isnan()
    assert torch.equal(gradient, stock_gradient) and not gradient.any()


def test_zero_weights_as_stock():
    input, target = torch.randn(4, 3), torch.tensor([0, 0, IGNORE, 0])
    ours, stock = both(input, target, weight=torch.tensor([0.0, 1.0, 1.0]))
    torch.testing.assert_close(ours, stock, equal_nan=True)


@pytest.mark.parametrize("function", [cross_entropy, focal_loss])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_zero_if_empty(function, reduction):
    input, target = torch.randn(2, 3, 5, requires_grad=True), torch.full((2, 5), IGNORE)
    loss = function(input, target, reduction=reduction, zero_if_empty=True)
    assert not loss.any()
    assert not torch.autograd.grad(loss.sum(), input)[0].any()


# --- arguments that must be refused ---


@pytest.mark.parametrize("arguments, error, message", [
    (dict(target=torch.zeros(3, dtype=torch.int64)), ValueError, "batch size 3"),
    (dict(target=torch.zeros(2, 5, dtype=torch.int64)), RuntimeError, r"target has shape \(2, 5\)"),
    (dict(target=torch.zeros(2, 4, dtype=torch.int16)), RuntimeError,
     "target has dtype int16; allowed: int64, int32, uint8"),
    (dict(target=torch.zeros(2, 4)), RuntimeError, "target has dtype float32"),
    (dict(weight=torch.ones(4)), RuntimeError, r"weight has shape \(4,\); allowed: \(3\)"),
    (dict(weight=torch.ones(3, requires_grad=True)), RuntimeError, "weight requires grad"),
    (dict(pixel_weight=torch.ones(2, 3)), RuntimeError, "pixel_weight has shape"),
    (dict(label_smoothing=1.5), RuntimeError, "label_smoothing=1.5"),
    (dict(reduction="median"), ValueError, "reduction='median'"),
    (dict(target=torch.rand(2, 3, 4), ignore_index=1), RuntimeError, "ignore_index=1"),
    (dict(input=[1.0]), TypeError, "input is list"),
    (dict(weight=[1.0, 1.0, 1.0]), TypeError, "weight is list"),
    (dict(pixel_weight=[1.0]), TypeError, "pixel_weight is list"),
    (dict(input=torch.randn(2, 0, 4)), RuntimeError, "C > 0"),
])  # fmt: skip
def test_bad_arguments_are_named(arguments, error, message):
    call = dict(input=torch.randn(2, 3, 4), target=torch.zeros(2, 4, dtype=torch.int64)) | arguments
    with pytest.raises(error, match=message):
        cross_entropy(**call)


def test_deprecated_reduction_arguments_mean_what_they_meant():
    input, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for options in (dict(size_average=False), dict(reduce=False), dict(size_average=True, reduce=True)):
            torch.testing.assert_close(
                cross_entropy(input, target, **options), F.cross_entropy(input, target, **options)
            )


# --- any shape, stride and dtype ---


@st.composite
def calls(draw):
    """(input, target, options) with strides that a view can have."""
    classes = draw(st.integers(1, 40))
    spatial = draw(st.lists(st.integers(0, 23), max_size=3))
    images = draw(st.integers(0, 3))
    if images > 0 and 0 < math.prod(spatial) * classes < 256:
        images = -(-256 // (math.prod(spatial) * classes))  # with a few numbers stock's own error can be 0 by luck
    shape = [images, classes, *spatial]
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.integers(1, 2)) for _ in shape]
    stored = torch.randn([shape[axis] * steps[axis] for axis in order], generator=generator, dtype=torch.float64)
    input = stored.to(dtype).permute([order.index(axis) for axis in range(len(shape))])
    input = input[tuple(slice(None, None, step) for step in steps)]
    target = torch.randint(classes, [shape[0], *spatial], generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.3] = IGNORE
    options = dict(reduction=draw(st.sampled_from(["none", "sum"])), label_smoothing=draw(st.sampled_from([0.0, 0.25])))
    return input, target.to(draw(st.sampled_from([torch.int64, torch.int32]))), options


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_double_precision_as_stock(channels_last, reduction):
    input, target = torch.randn(2, 19, 17, 31, dtype=torch.float64), torch.randint(19, (2, 17, 31))
    input = input.to(memory_format=torch.channels_last) if channels_last else input
    weight = torch.rand(19, dtype=torch.float64)
    ours, stock = both(input, target, weight=weight, label_smoothing=0.1, reduction=reduction)
    torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-15)


@settings(max_examples=120, deadline=None)
@given(calls())
def test_any_view_as_stock(call):
    input, target, options = call
    before = input.clone()
    results = []
    for function, dtype in (
        (cross_entropy, input.dtype),
        (F.cross_entropy, input.dtype),
        (F.cross_entropy, torch.float64),
    ):
        leaf = input.to(dtype).detach().requires_grad_()
        labels = target if function is cross_entropy else target.long()
        loss = function(leaf, labels, **options)
        results.append((loss, torch.autograd.grad(loss.sum(), leaf)[0]))
    for ours, stock, exact in zip(*results):
        assert_within_policy(ours, stock, exact)
    assert torch.equal(input, before)


def test_offsets_beyond_31_bits():
    """A class stride of 2^30 elements over reserved memory, little of which is touched."""
    stride, pixels = 1 << 30, 160
    count = 2 * stride + pixels
    memory = mmap.mmap(-1, 2 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # 0x4000: MAP_NORESERVE
    input = torch.frombuffer(memory, dtype=torch.bfloat16, count=count).as_strided((1, 3, pixels), (count, stride, 1))
    values = torch.randn(1, 3, pixels).bfloat16()
    input.copy_(values)
    target = torch.randint(3, (1, pixels))
    leaf, small = input.detach().requires_grad_(), values.requires_grad_()
    losses = [cross_entropy(logits, target, reduction="none") for logits in (leaf, small)]
    assert torch.equal(*losses)
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss, logits in zip(losses, (leaf, small))]
    assert torch.equal(*gradients)


# --- the gradient that was computed in the forward ---


@pytest.mark.parametrize("factor", [1.0, 0.4])
def test_backward_twice_over_a_retained_graph(factor):
    input, target = torch.randn(2, 5, 9, requires_grad=True), torch.randint(5, (2, 9))
    expected = torch.autograd.grad(F.cross_entropy(input, target) * factor, input)[0]
    loss = cross_entropy(input, target) * factor
    first = torch.autograd.grad(loss, input, retain_graph=True)[0]
    torch.testing.assert_close(first, expected)
    first.zero_()  # a change to one gradient must not change the next one
    torch.testing.assert_close(torch.autograd.grad(loss, input)[0], expected)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, input)


def test_gradients_add_up_over_two_losses_of_one_input():
    input, target = torch.randn(2, 5, 9, requires_grad=True), torch.randint(5, (2, 9))
    (cross_entropy(input, target) + 0.4 * cross_entropy(input, target)).backward()
    expected = torch.autograd.grad(1.4 * F.cross_entropy(input, target), input)[0]
    torch.testing.assert_close(input.grad, expected)


def test_half_precision_gradient_is_scaled_before_it_is_rounded():
    """The gradient of a mean over many pixels underflows in fp16 unless GradScaler's factor is applied first."""
    input, target = torch.randn(1, 4, 128, 512).half().requires_grad_(), torch.randint(4, (1, 128, 512))
    gradient = torch.autograd.grad(cross_entropy(input, target).float() * 32768, input)[0]
    exact_input = input.detach().double().requires_grad_()
    exact = torch.autograd.grad(F.cross_entropy(exact_input, target) * 32768, exact_input)[0]
    torch.testing.assert_close(gradient.double(), exact, rtol=2**-9, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("innermost", [False, True])
@pytest.mark.parametrize("shape", [(2, 19, 17, 31), (3, 150, 40), (2, 600, 9), (50, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_and_many_classes(dtype, shape, innermost, smoothing):
    input = torch.randn(shape, dtype=torch.float64).to(dtype)
    input = input.movedim(1, -1).contiguous().movedim(-1, 1) if innermost else input
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    results = []
    for function, kind in ((cross_entropy, dtype), (F.cross_entropy, dtype), (F.cross_entropy, torch.float64)):
        leaf = input.to(kind).detach().requires_grad_()
        loss = function(leaf, target, label_smoothing=smoothing, reduction="sum")
        results.append((loss, torch.autograd.grad(loss, leaf)[0]))
    for ours, stock, exact in zip(*results):
        assert_within_policy(ours, stock, exact)


@pytest.mark.skipif(_library.CPU_LEVEL is None, reason="needs a compiled library")
@pytest.mark.parametrize("pixels", [64 * 7, 33 * 13])
def test_bfloat16_gradients_are_those_of_float32_rounded(pixels):
    """To nearest even; at v4 those of shorter exponentials (relative error 7e-6 in numerator and sum). NaN stays NaN
    even if its bits would round up to 0.
    """
    change = 2e-5 if _library.CPU_LEVEL == "v4" else 0
    input = (4 * torch.randn(2, 19, pixels)).bfloat16()
    input[0, 3, 11], input[1, 2, 70] = float("nan"), float("inf")
    target, pixel_weight = torch.randint(19, (2, pixels)), torch.rand(2, pixels)
    pixel_weight[0, 100:102] = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        leaf = input.to(dtype).requires_grad_()
        loss = cross_entropy(leaf, target, pixel_weight=pixel_weight, reduction="sum", backend="cpu")
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    assert gradients[1][0, :, 100:102].isnan().all()
    below, above = (gradients[0] * (1 - change)).bfloat16(), (gradients[0] * (1 + change)).bfloat16()
    rounded = (gradients[1] == below) | (gradients[1] == above)
    assert (rounded | (gradients[0].isnan() & gradients[1].isnan())).all()


@pytest.mark.parametrize(
    "arguments, stock",
    [
        ({}, True),
        (dict(label_smoothing=0.1, reduction="none"), True),
        (dict(backend="cpu"), False),
        (dict(zero_if_empty=True), False),
        (dict(pixel_weight=torch.ones(2, 4, 5)), False),
    ],
)
def test_few_logits_are_left_to_stock_where_it_can(arguments, stock, monkeypatch):
    op, calls = REGISTRY["cross_entropy"], []
    run = op._run
    monkeypatch.setattr(op, "_run", lambda *args: calls.append(args) or run(*args))
    monkeypatch.setitem(op.stock.below, "labels", 2 * 3 * 4 * 5 + 1)
    input, target = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    loss = cross_entropy(input, target, **arguments)
    assert bool(calls) != stock
    if stock:
        assert torch.equal(loss, F.cross_entropy(input, target, **arguments))
    monkeypatch.setitem(REGISTRY["cross_entropy"].stock.below, "labels", 2 * 3 * 4 * 5)
    cross_entropy(input, target, **arguments)
    assert calls


def test_few_logits_are_checked_as_many_are(monkeypatch):
    monkeypatch.setitem(REGISTRY["cross_entropy"].stock.below, "labels", 1000)
    with pytest.raises(RuntimeError, match="label_smoothing=2.0; allowed"):
        cross_entropy(torch.randn(2, 3), torch.zeros(2, dtype=torch.int64), label_smoothing=2.0)
    with pytest.raises(IndexError, match="out of bounds"):
        cross_entropy(torch.randn(2, 3), torch.full((2,), 3))
    with pytest.raises(TypeError, match="weight is list"):
        cross_entropy(torch.randn(2, 3), torch.zeros(2, dtype=torch.int64), [1.0, 1.0, 1.0])


def test_a_program_exported_with_few_logits_takes_many(monkeypatch):
    monkeypatch.setitem(REGISTRY["cross_entropy"].stock.below, "labels", 1000)

    class Loss(torch.nn.Module):
        def forward(self, input, target):
            return cross_entropy(input, target)

    images = torch.export.Dim("images")
    few = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    program = torch.export.export(Loss(), few, dynamic_shapes={"input": {0: images}, "target": {0: images}}).module()
    many = torch.randn(20, 3, 4, 5), torch.randint(3, (20, 4, 5))
    torch.testing.assert_close(program(*many), F.cross_entropy(*many))
