"""cross_entropy with probabilities: contract, every option against stock, hostile values, strides, dtypes, levels."""

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg._op import REGISTRY
from fastseg.ops import cross_entropy
from fastseg.testing import assert_within_policy
from tests.contract import Case, Contract

# In fp64 stock is its own reference and the policy would ask for its very bits; gradcheck and a test below hold fp64.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def probabilities(input, target, **options):
    """cross_entropy, under its own name in the reports of tests/test_contract.py."""
    return cross_entropy(input, target, **options)


def weighted_definition(input, target, weight=None, pixel_weight=None, reduction="mean", label_smoothing=0.0):
    """The definition of pixel_weight by stock operations."""
    loss = F.cross_entropy(input, target, weight, reduction="none", label_smoothing=label_smoothing)
    each = pixel_weight.to(loss.dtype)
    return loss * each if reduction == "none" else (loss * each).sum() / each.sum()


def maps(make, classes=5, **options):
    """Arguments of a call on (2, classes, 4, 6) maps."""
    return both(make, 2, classes, 4, 6, **options)


def both(make, *shape, **options):
    """Logits and targets of this shape, differentiable in both. Targets need not add up to 1."""
    return dict(input=make.floating(*shape), target=make.floating(*shape, scale=0.5, positive=True), **options)


CONTRACTS = [
    Contract(
        function=probabilities,
        stock=F.cross_entropy,
        dtypes=DTYPES,
        cases=[
            Case("maps", maps),
            Case("constant", lambda make: dict(input=make.floating(2, 5, 4, 6), target=make.probabilities(2, 5, 4, 6))),
            Case("only_target", lambda make: maps(make) | dict(input=make.constant(2, 5, 4, 6))),
            Case("sum", lambda make: maps(make, reduction="sum")),
            Case("none", lambda make: maps(make, reduction="none")),
            Case("one_class", lambda make: maps(make, classes=1)),
            Case("weight", lambda make: maps(make, weight=make.constant(5))),
            Case("smoothing", lambda make: maps(make, label_smoothing=0.1)),
            Case("all_smoothing", lambda make: maps(make, label_smoothing=1.0)),
            Case("weight_smoothing", lambda make: maps(
                make, weight=make.constant(5), label_smoothing=0.3, reduction="sum")),
            Case("rows", lambda make: both(make, 7, 11)),
            Case("one_row", lambda make: both(make, 6, weight=make.constant(6))),
            Case("volume", lambda make: both(make, 2, 3, 2, 3, 4)),
            Case("empty_batch", lambda make: both(make, 0, 3, 2)),
            Case("no_pixels", lambda make: both(make, 2, 3, 0, reduction="none")),
            Case("many_tiles", lambda make: dict(
                input=make.floating(2, 19, 17, 31), target=make.probabilities(2, 19, 17, 31)), small=False),
            Case("many_classes", lambda make: both(make, 2, 600, 33), small=False),
        ],
    ),
    Contract(
        function=cross_entropy,
        stock=weighted_definition,
        dtypes=DTYPES,
        name="probabilities_pixel_weight",
        cases=[
            Case("mean", lambda make: maps(make, pixel_weight=make.constant(2, 4, 6))),
            Case("weight", lambda make: maps(
                make, weight=make.constant(5), pixel_weight=make.constant(2, 4, 6), label_smoothing=0.2)),
            Case("none", lambda make: maps(make, pixel_weight=make.constant(2, 4, 6), reduction="none")),
        ],
    ),
]  # fmt: skip


def results(function, input, target, dtypes=None, wanted=(True, True), grad_output=None, **options):
    """[loss, gradients of the wanted ones of input and target] of one call; dtypes: of those two."""
    dtypes = dtypes or (input.dtype, target.dtype)
    leaves = [
        value.to(dtype).detach().requires_grad_(asked) for value, dtype, asked in zip((input, target), dtypes, wanted)
    ]
    loss = function(*leaves, **options)
    slope = torch.ones_like(loss) if grad_output is None else grad_output.to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad], slope)]


def compare(input, target, **options):
    """Ours against stock and against stock in fp64."""
    ours, stock = (results(function, input, target, **options) for function in (cross_entropy, F.cross_entropy))
    if options.get("weight") is not None:
        options["weight"] = options["weight"].double()
    exact = results(F.cross_entropy, input, target, (torch.float64,) * 2, **options)
    for one, two, three in zip(ours, stock, exact):
        assert_within_policy(one, two, three)
    return ours


# --- every option, dtype and layout against stock ---


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layouts", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
def test_every_combination_of_options(reduction, label_smoothing, weighted, layouts, wanted):
    shape = 2, 19, 17, 31
    tensors = torch.randn(shape) * 2, torch.randn(shape).softmax(1)
    input, target = (
        value.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        for value, last in zip(tensors, layouts)
    )
    gradients = compare(
        input, target, wanted=wanted, reduction=reduction, label_smoothing=label_smoothing,
        weight=torch.rand(19) if weighted else None,
    )[1:]  # fmt: skip
    formats = [value.is_contiguous() for value, asked in zip((input, target), wanted) if asked]
    assert [gradient.is_contiguous() for gradient in gradients] == formats


@pytest.mark.parametrize("input_dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("target_dtype", [*DTYPES, torch.float64])
def test_dtypes_mix_as_in_stock(input_dtype, target_dtype):
    input, target = torch.randn(3, 5, 40).to(input_dtype), torch.rand(3, 5, 40).to(target_dtype)
    for weight_dtype in (None, *DTYPES, torch.float64):
        weight = None if weight_dtype is None else torch.rand(5).to(weight_dtype)
        for reduction in ("none", "mean"):
            if torch.float64 in (input_dtype, target_dtype, weight_dtype):
                ours, stock = (
                    results(function, input, target, weight=weight, reduction=reduction)
                    for function in (cross_entropy, F.cross_entropy)
                )
                fine = max(torch.finfo(dtype).eps for dtype in (input_dtype, target_dtype))
                for one, two in zip(ours, stock):
                    assert one.dtype == two.dtype
                    torch.testing.assert_close(one, two, rtol=8 * fine, atol=8 * fine)
            else:
                compare(input, target, weight=weight, reduction=reduction)


@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("target_dtype", [torch.float16, torch.float32, torch.float64])
def test_autocast_gives_stocks_dtype(input_dtype, target_dtype):
    input, target = torch.randn(3, 5, 40).to(input_dtype), torch.rand(3, 5, 40).to(target_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cross_entropy(input, target).dtype == F.cross_entropy(input, target).dtype


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_double_precision_as_stock(channels_last, reduction):
    shape = 2, 19, 17, 31
    input, target = torch.randn(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)
    input = input.to(memory_format=torch.channels_last) if channels_last else input
    options = dict(weight=torch.rand(19, dtype=torch.float64), label_smoothing=0.1, reduction=reduction)
    ours, stock = (results(function, input, target, **options) for function in (cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-14)


@st.composite
def views(draw, shape, dtype, generator):
    """A tensor of that shape with strides that a view can have, including 0."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.integers(1, 2)) for _ in shape]
    expanded = draw(st.sampled_from([None, None, *range(len(shape))]))
    sizes = [1 if axis == expanded else extent * steps[axis] for axis, extent in enumerate(shape)]
    stored = torch.rand([sizes[axis] for axis in order], generator=generator, dtype=torch.float64)
    value = stored.to(dtype).permute([order.index(axis) for axis in range(len(shape))])
    value = value[tuple(slice(None, None, 1 if axis == expanded else step) for axis, step in enumerate(steps))]
    return value.expand(shape)


@st.composite
def calls(draw):
    """(input, target, options) of any shapes, dtypes and strides."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    classes = draw(st.integers(1, 40))
    shape = [draw(st.integers(0, 3)), classes, *draw(st.lists(st.integers(0, 23), max_size=3))]
    input, target = (draw(views(shape, draw(st.sampled_from(DTYPES)), generator)) for _ in range(2))
    options = dict(
        reduction=draw(st.sampled_from(["none", "sum"])),
        label_smoothing=draw(st.sampled_from([0.0, 0.25])),
        weight=torch.rand(classes, generator=generator) if draw(st.booleans()) else None,
        wanted=draw(st.sampled_from([(True, False), (False, True), (True, True)])),
    )
    return 9 * input, target, options


# derandomized: of few numbers stock's own error, which the tolerance follows, is sometimes tiny by luck
@settings(max_examples=150, deadline=None, derandomize=True)
@given(calls())
def test_any_view_as_stock(call):
    input, target, options = call
    before = input.clone(), target.clone()
    compare(input, target, **options)
    assert torch.equal(input, before[0]) and torch.equal(target, before[1])


# --- values that hurt ---

NAN, INF = float("nan"), float("inf")
HOSTILE_LOGITS = {
    "nan": [NAN, 1.0, 2.0],
    "inf": [1.0, INF, 2.0],
    "minus_inf": [-INF, 1.0, 2.0],
    "all_minus_inf": [-INF] * 3,
    "huge": [3e38, -3e38, 0.0],
    "large": [1e4, 1e4 - 1, -1e4],
    "far": [0.0, -200.0, -90.0],
}
HOSTILE_TARGETS = {
    "plain": [0.2, 0.5, 0.3],
    "one_hot": [0.0, 1.0, 0.0],
    "nothing": [0.0, 0.0, 0.0],
    "nan": [0.2, NAN, 0.3],
    "inf": [0.2, INF, 0.3],
    "negative": [-1.0, 2.0, 0.5],
}


@pytest.mark.sanitized
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("target_name", HOSTILE_TARGETS)
@pytest.mark.parametrize("name", HOSTILE_LOGITS)
def test_hostile_values_as_stock(name, target_name, label_smoothing, reduction):
    input, target = torch.randn(40, 3), torch.rand(40, 3)
    input[17], target[17] = torch.tensor(HOSTILE_LOGITS[name]), torch.tensor(HOSTILE_TARGETS[target_name])
    if (name, target_name) == ("far", "inf"):
        input[17, 2] = -80.0  # e^-90 is denormal: below AVX-512 our 0, and 0 times infinity NaN
    options = dict(weight=torch.tensor([0.5, 2.0, 0.0]), label_smoothing=label_smoothing, reduction=reduction)
    for backend in ("auto", "reference"):
        ours = results(cross_entropy, input, target, backend=backend, **options)
        torch.testing.assert_close(ours, results(F.cross_entropy, input, target, **options), equal_nan=True)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_mean_over_nothing(reduction, backend):
    input, target = torch.randn(0, 3, 5), torch.rand(0, 3, 5)
    stock = F.cross_entropy(input, target, reduction=reduction)
    assert cross_entropy(input, target, reduction=reduction, backend=backend).equal(stock) or stock.isnan()
    assert cross_entropy(input, target, backend=backend).isnan()
    assert cross_entropy(input, target, zero_if_empty=True, backend=backend).item() == 0
    input, target = torch.randn(2, 3, 5), torch.rand(2, 3, 5)
    options = dict(pixel_weight=torch.zeros(2, 5), backend=backend)
    assert cross_entropy(input, target, **options).isnan()
    loss, *gradients = results(cross_entropy, input, target, zero_if_empty=True, **options)
    assert loss.item() == 0 and not any(gradient.any() for gradient in gradients)
    loss = cross_entropy(input, target, zero_if_empty=True, backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(input, target))


# --- arguments that must be refused ---


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(target=torch.rand(2, 3, 4).long()), RuntimeError, r"target has shape \(2, 3, 4\)"),
        (dict(target=torch.rand(2, 3, 5)), RuntimeError, "target has dtype float32; allowed: int64, int32, uint8"),
        (dict(target=torch.rand(2, 3, 4).to(torch.complex64)), RuntimeError, "target has dtype complex64"),
        (dict(target=torch.rand(2, 3, 4, device="meta")), RuntimeError, "target is on meta; allowed: cpu"),
        (dict(ignore_index=1), RuntimeError, "ignore_index=1 with probabilities as target"),
        (dict(weight=torch.ones(4)), RuntimeError, r"weight has shape \(4,\); allowed: \(3\)"),
        (dict(weight=torch.ones(3).long()), RuntimeError, "weight has dtype int64"),
        (dict(pixel_weight=torch.ones(2, 3)), RuntimeError, r"pixel_weight has shape \(2, 3\)"),
        (dict(pixel_weight=torch.ones(3, 4)), ValueError, "pixel_weight has batch size 3"),
        (dict(pixel_weight=torch.ones(2, 4, requires_grad=True)), RuntimeError, "pixel_weight requires grad"),
        (dict(label_smoothing=1.5), RuntimeError, "label_smoothing=1.5"),
        (dict(label_smoothing=-0.5), RuntimeError, "label_smoothing=-0.5"),
        (dict(reduction="median"), ValueError, "reduction='median'"),
        (dict(backend="magic"), ValueError, "backend='magic'"),
        (dict(weight=torch.ones(3, requires_grad=True), backend="cpu"), RuntimeError, "requires grad.*backend='cpu'"),
        (dict(input=torch.randn(2, 0, 4), target=torch.rand(2, 0, 4)), RuntimeError, "C > 0"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    call = dict(input=torch.randn(2, 3, 4), target=torch.rand(2, 3, 4)) | arguments
    with pytest.raises(error, match=message):
        cross_entropy(**call)


def test_explicit_backend_that_cannot_run_says_why():
    input = torch.randn(2, 3, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="backend='triton' cannot run this call"):
        cross_entropy(input, torch.rand(2, 3, 4), backend="triton")


# --- autograd ---


@pytest.mark.parametrize("factor", [1.0, 0.4])
def test_backward_twice_over_a_retained_graph(factor):
    input, target = torch.randn(2, 5, 9, requires_grad=True), torch.rand(2, 5, 9)
    expected = torch.autograd.grad(F.cross_entropy(input, target) * factor, input)[0]
    loss = cross_entropy(input, target) * factor
    first = torch.autograd.grad(loss, input, retain_graph=True)[0]
    torch.testing.assert_close(first, expected)
    first.zero_()  # a change to one gradient must not change the next one
    torch.testing.assert_close(torch.autograd.grad(loss, input)[0], expected)


def test_half_precision_gradient_is_scaled_before_it_is_rounded():
    """The gradient of a mean over many pixels underflows in fp16 unless GradScaler's factor is applied first."""
    input, target = torch.randn(1, 4, 128, 512).half(), torch.rand(1, 4, 128, 512)
    slope = torch.tensor(32768.0)
    ours = results(cross_entropy, input, target, grad_output=slope)
    exact = results(F.cross_entropy, input, target, (torch.float64,) * 2, grad_output=slope)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=2**-9, atol=1e-6)


def test_weight_that_requires_grad():
    """As in stock, where class weights get a gradient if the target is probabilities."""
    input, target = torch.randn(3, 4, 5), torch.rand(3, 4, 5)
    gradients = []
    for function in (cross_entropy, F.cross_entropy):
        leaves = [value.clone().requires_grad_() for value in (input, target, torch.tensor([1.0, 2.0, 0.5, 1.0]))]
        gradients.append(torch.autograd.grad(function(*leaves, label_smoothing=0.1), leaves))
    torch.testing.assert_close(*gradients)


def test_only_what_is_asked_for_is_computed(monkeypatch):
    module = importlib.import_module("fastseg.ops.cross_entropy.probabilities")
    asked = []
    backward = module.cross_entropy_probabilities_backward

    def recorded(*arguments, backend):
        asked.append(arguments[-2:])
        return backward(*arguments, backend=backend)

    monkeypatch.setattr(module, "cross_entropy_probabilities_backward", recorded)
    combinations = [(True, False), (False, True), (True, True)]
    for wanted in combinations:
        results(cross_entropy, torch.randn(2, 3, 4), torch.rand(2, 3, 4), wanted=wanted, reduction="none")
    assert asked == combinations
    for wanted in combinations:
        results(cross_entropy, torch.randn(2, 3, 4), torch.rand(2, 3, 4), wanted=wanted)
    assert len(asked) == 3  # the gradients came with the loss


# --- stock where it is faster; instruction levels ---


def calls_that_stock_does_not_take(monkeypatch, fewest):
    """The list that such calls are added to, with `fewest` elements as the limit of the general class of calls."""
    op, calls = REGISTRY["cross_entropy_probabilities"], []
    run = op._run
    monkeypatch.setattr(op, "_run", lambda *args: calls.append(args) or run(*args))
    limits = {"": fewest, " (N, 64 or more)": 1 << 62}
    for kind, limit in limits.items():
        monkeypatch.setitem(op.stock.below, f"probabilities{kind}", limit)
    return calls


@pytest.mark.parametrize("arguments, stock", [
    ({}, True), (dict(label_smoothing=0.1, reduction="none"), True), (dict(backend="cpu"), False),
    (dict(zero_if_empty=True), False), (dict(pixel_weight=torch.ones(2, 5, 6)), False),
])  # fmt: skip
def test_few_probabilities_are_left_to_stock_where_it_can(arguments, stock, monkeypatch):
    calls = calls_that_stock_does_not_take(monkeypatch, 2 * 4 * 5 * 6 + 1)
    input, target = torch.randn(2, 4, 5, 6), torch.rand(2, 4, 5, 6)
    loss = cross_entropy(input, target, **arguments)
    assert bool(calls) != stock
    if stock:
        assert torch.equal(loss, F.cross_entropy(input, target, **arguments))
    calls_that_stock_does_not_take(monkeypatch, 2 * 4 * 5 * 6)
    cross_entropy(input, target, **arguments)
    assert calls


@pytest.mark.parametrize("shape, ours", [((20, 63), True), ((20, 64), False), ((20, 64, 2), True), ((3, 3, 40), True)])
def test_shapes_that_are_left_to_stock(shape, ours, monkeypatch):
    calls = calls_that_stock_does_not_take(monkeypatch, 80)
    cross_entropy(torch.randn(shape), torch.rand(shape))
    assert bool(calls) == ours


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("innermost", [False, True])
@pytest.mark.parametrize("shape", [(2, 19, 17, 31), (3, 150, 40), (2, 600, 9), (50, 3)])
@pytest.mark.parametrize("dtype, target_dtype", zip(DTYPES, (torch.float32, torch.float32, torch.bfloat16)))
def test_few_and_many_classes(dtype, target_dtype, shape, innermost, smoothing):
    input = torch.randn(shape, dtype=torch.float64).to(dtype)
    input = input.movedim(1, -1).contiguous().movedim(-1, 1) if innermost else input
    compare(input, torch.rand(shape).to(target_dtype), label_smoothing=smoothing, reduction="sum")
