"""upsample_cross_entropy and upsample_cross_entropy_dice against stock PyTorch: interpolate, then the loss."""

import os
import subprocess
import sys

import hypothesis.strategies as strategies
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from fastseg.ops import upsample_cross_entropy, upsample_cross_entropy_dice
from fastseg.testing import assert_within_policy
from tests.contract import Case, Contract, Make


def _upsampled(input, target, size=None, scale_factor=None, align_corners=False):
    if size is None and scale_factor is None:
        size = target.shape[-2:]
    return F.interpolate(input, size=size, scale_factor=scale_factor, mode="bilinear", align_corners=align_corners)


def stock_cross_entropy(input, target, size=None, scale_factor=None, align_corners=False, pixel_weight=None, **options):
    logits = _upsampled(input, target, size, scale_factor, align_corners)
    target = target.long()
    if pixel_weight is None:
        return F.cross_entropy(logits, target, **options)
    reduction = options.pop("reduction", "mean")
    losses = F.cross_entropy(logits, target, reduction="none", **options) * pixel_weight
    if reduction == "mean":
        class_weight = options.get("weight")
        valid = target != options.get("ignore_index", -100)
        share = pixel_weight * valid
        if class_weight is not None:
            share = share * class_weight[torch.where(valid, target, 0)]
        return losses.sum() / share.sum()
    return losses if reduction == "none" else losses.sum()


def stock_dice(
    input, target, size=None, scale_factor=None, align_corners=False, ignore_index=-100, ce_weight=1.0, dice_weight=1.0,
    include_background=True, squared=True, smooth=1e-6, per_image=False, weight=None, label_smoothing=0.0,
):  # fmt: skip
    logits = _upsampled(input, target, size, scale_factor, align_corners)
    loss = F.cross_entropy(
        logits, target.long(), weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    valid = (target != ignore_index).unsqueeze(1)
    truth = F.one_hot(torch.where(target == ignore_index, 0, target.long()), input.size(1)).movedim(-1, 1) * valid
    probability = logits.softmax(1) * valid
    over = (2, 3) if per_image else (0, 2, 3)
    intersection, total = (probability * truth).sum(over), truth.sum(over)
    total = total + (probability**2 if squared else probability).sum(over)
    dice = 1 - (2 * intersection + smooth) / (total + smooth)
    return ce_weight * loss + dice_weight * dice[..., 0 if include_background else 1 :].mean()


def _case(name, source, output, classes=5, ignored=None, small=True, label_dtype=torch.int64, **options):
    """`options` may hold "weight" and "pixel_weight" as True."""

    def arguments(make):
        call = dict(
            input=make.floating(2, classes, *source),
            target=make.labels(2, *output, classes=classes, ignored=ignored, dtype=label_dtype),
            **{name: value for name, value in options.items() if name not in ("weight", "pixel_weight")},
        )
        if options.get("weight"):
            call["weight"] = make.constant(classes)
        if options.get("pixel_weight"):
            call["pixel_weight"] = make.constant(2, *output)
        if ignored is not None:
            call["ignore_index"] = ignored
        return call

    return Case(name, arguments, small)


# Stock in fp64 is what everything is judged by, so in fp64 it has no error of its own to compare with: see test_fp64.
JUDGED = (torch.float32, torch.float16, torch.bfloat16)

CONTRACTS = [
    Contract(
        function=upsample_cross_entropy,
        stock=stock_cross_entropy,
        dtypes=JUDGED,
        cases=[
            _case("eight times", (3, 4), (24, 32), ignored=-100),
            _case("aligned corners", (3, 4), (17, 25), align_corners=True, ignored=255, label_dtype=torch.uint8),
            _case("scale factor", (5, 4), (7, 9), scale_factor=(1.5, 2.4), label_dtype=torch.int32),
            _case(
                "sum, weights, smoothing", (4, 3), (9, 10), reduction="sum", weight=True, label_smoothing=0.1, ignored=1
            ),
            _case("no reduction", (4, 3), (9, 10), reduction="none", weight=True, pixel_weight=True, ignored=-100),
            _case("downscaled", (4, 7), (3, 2), ignored=0),
            _case("same size", (4, 3), (4, 3), pixel_weight=True),
            _case("one source pixel", (1, 1), (5, 19), classes=2),
            _case("many cells", (13, 37), (50, 120), small=False, ignored=-100),
        ],
    ),
    Contract(
        function=upsample_cross_entropy_dice,
        stock=stock_dice,
        dtypes=JUDGED,
        cases=[
            _case("squared", (3, 4), (24, 32), ignored=-100),
            _case("linear, foreground", (3, 4), (17, 25), squared=False, include_background=False, smooth=1.0),
            _case("per image", (5, 4), (11, 9), per_image=True, ignored=-100, align_corners=True),
            _case("weighted", (4, 3), (9, 10), weight=True, label_smoothing=0.2, ce_weight=0.5, dice_weight=2.0),
            _case("downscaled", (4, 7), (3, 2), ignored=0),
        ],
    ),
]


def check(function, stock, input, target, **options):
    """Forward and gradient of `function` in the dtype of `input` against `stock`, both judged by `stock` in fp64."""

    def run(call, tensor, **changed):
        leaf = tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        output = call(leaf, target, **{**options, **changed})
        generator = torch.Generator().manual_seed(3)
        seed = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
        return output.detach(), torch.autograd.grad(output, leaf, seed)[0]

    doubled = {name: value.double() for name, value in options.items() if isinstance(value, torch.Tensor)}
    ours, stocks, exact = run(function, input), run(stock, input), run(stock, input.double(), **doubled)
    for what, one, two, three in zip(("loss", "gradient"), ours, stocks, exact):
        assert_within_policy(one, two, three, what)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.name)
def test_fp64(contract):
    for case in contract.cases:
        arguments = case.arguments(Make(torch.float64))
        results = [function(**arguments) for function in (contract.function, contract.stock)]
        torch.testing.assert_close(*results, rtol=1e-13, atol=1e-15)
        gradients = [torch.autograd.grad(result.sum(), arguments["input"])[0] for result in results]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


SIZES = [
    ((1, 1), (1, 1)), ((1, 1), (40, 33)), ((1, 5), (16, 1)), ((5, 1), (1, 40)), ((2, 2), (3, 300)), ((7, 9), (7, 9)),
    ((17, 33), (34, 66)), ((16, 16), (128, 128)), ((15, 17), (44, 52)), ((33, 20), (34, 21)), ((6, 70), (60, 100)),
    ((40, 50), (13, 11)), ((64, 3), (5, 2)), ((100, 100), (99, 60)), ((4, 4), (130, 67)), ((3, 130), (9, 1170)),
]  # fmt: skip


@pytest.mark.parametrize("source, output", SIZES)
@pytest.mark.parametrize("align_corners", [False, True])
def test_sizes(source, output, align_corners):
    torch.manual_seed(1)
    input, target = torch.randn(2, 7, *source) * 3, torch.randint(7, (2, *output))
    target[torch.rand(target.shape) < 0.1] = -100
    for reduction in ("mean", "none"):
        check(
            upsample_cross_entropy, stock_cross_entropy, input, target, align_corners=align_corners, reduction=reduction
        )
    check(upsample_cross_entropy_dice, stock_dice, input, target, align_corners=align_corners)


@pytest.mark.parametrize("source", [(8, 9), (31, 17)])
@pytest.mark.parametrize("scale_factor", [2, 8.0, (1.05, 3.7), (0.6, 0.31), (7.99, 1.0), (1 / 3, 11.3)])
@pytest.mark.parametrize("align_corners", [False, True])
def test_scale_factors(source, scale_factor, align_corners):
    torch.manual_seed(2)
    input = torch.randn(2, 4, *source) * 3
    output = F.interpolate(input, scale_factor=scale_factor, mode="bilinear").shape[2:]
    target = torch.randint(4, (2, *output))
    options = dict(scale_factor=scale_factor, align_corners=align_corners)
    check(upsample_cross_entropy, stock_cross_entropy, input, target, **options)
    check(upsample_cross_entropy_dice, stock_dice, input, target, squared=False, **options)


@pytest.mark.parametrize("classes", [1, 2, 19, 150, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_classes(classes, dtype):
    torch.manual_seed(3)
    input = (torch.randn(1, classes, 6, 7) * 2).to(dtype)
    target = torch.randint(classes, (1, 25, 43))
    check(upsample_cross_entropy, stock_cross_entropy, input, target, weight=torch.rand(classes).to(dtype) + 0.1)
    if dtype == torch.float32:
        check(upsample_cross_entropy_dice, stock_dice, input, target)


@pytest.mark.parametrize("spread", [30.0, 200.0, 1e4])
@pytest.mark.parametrize("output", [(24, 40), (17, 31), (3, 5), (6, 10)])
def test_wide_logits(spread, output):
    """Logits far outside the range of single-precision exponentials: neighbouring cells fall by hundreds."""
    torch.manual_seed(4)
    input, target = torch.randn(6, 6, 3, 5) * spread, torch.randint(6, (6, *output))
    for reduction in ("mean", "none"):
        check(upsample_cross_entropy, stock_cross_entropy, input, target, reduction=reduction)
    input, target = input[:2], target[:2]
    check(upsample_cross_entropy, stock_cross_entropy, input, target, label_smoothing=0.2)
    check(upsample_cross_entropy_dice, stock_dice, input, target)


@pytest.mark.parametrize("hostile", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [(1, 2, 3), (0, 0, 0), (4, 4, 6)])
def test_nan_and_infinity(hostile, position):
    """The same pixels and source elements are NaN or infinite as in stock PyTorch."""
    torch.manual_seed(5)
    input, target = torch.randn(1, 5, 5, 7), torch.randint(5, (1, 20, 28))
    input[(0, *position)] = hostile
    check(upsample_cross_entropy, stock_cross_entropy, input, target, reduction="none")
    ours, stock = (function(input, target) for function in (upsample_cross_entropy, stock_cross_entropy))
    assert torch.equal(ours.isnan(), stock.isnan()) and torch.equal(ours.isinf(), stock.isinf())


@pytest.mark.parametrize("hostile", [float("nan"), float("inf"), float("-inf")])
def test_ignored_pixels_count_for_nothing(hostile):
    """Whatever their logits hold. (Stock PyTorch gives NaN gradients there.)"""
    torch.manual_seed(5)
    input, target = torch.randn(2, 5, 6, 7), torch.randint(5, (2, 24, 28))
    target[:, :, :12] = -100
    for function in (upsample_cross_entropy, upsample_cross_entropy_dice):
        results = []
        for value in (0.0, hostile):
            leaf = input.clone()
            leaf[:, 2, :, :2] = value
            leaf.requires_grad_()
            loss = function(leaf, target)
            results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.sanitized
@pytest.mark.parametrize(
    "label, dtype",
    [(label, torch.int64) for label in (-1, -100, 5, 255, 2**31, 2**40 + 1)]
    + [(label, torch.int32) for label in (-(2**31), -1, 5, 2**31 - 1)]
    + [(label, torch.uint8) for label in (5, 255)],
)
@pytest.mark.parametrize("function", [upsample_cross_entropy, upsample_cross_entropy_dice])
def test_hostile_labels(label, dtype, function):
    input, target = torch.randn(2, 5, 3, 4, requires_grad=True), torch.zeros(2, 9, 16, dtype=dtype)
    target[1, 8, 15] = label
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        function(input, target, ignore_index=3)
    ignoring = function(input, target, ignore_index=label)
    target = target.long()
    target[1, 8, 15] = -7
    assert torch.equal(ignoring, function(input, target, ignore_index=-7))


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 0.5])])
def test_nothing_to_count(weight):
    input, target = torch.randn(2, 3, 4, 5, requires_grad=True), torch.full((2, 12, 15), -100)
    for options, expected in ((dict(), float("nan")), (dict(zero_if_empty=True), 0.0), (dict(reduction="sum"), 0.0)):
        loss = upsample_cross_entropy(input, target, weight=weight, **options)
        torch.testing.assert_close(loss.detach(), torch.tensor(expected), equal_nan=True)
        assert torch.equal(torch.autograd.grad(loss, input)[0], torch.zeros_like(input))
    empty = upsample_cross_entropy(input[:0], target[:0], weight=weight)
    assert empty.isnan() and torch.autograd.grad(empty, input)[0].eq(0).all()


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed", "expanded"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_layouts(layout, reduction):
    torch.manual_seed(6)
    input, target = torch.randn(2, 5, 9, 14), torch.randint(5, (2, 54, 42))
    strided = {
        "channels_last": lambda: input.to(memory_format=torch.channels_last),
        "sliced": lambda: torch.randn(2, 11, 9, 30)[:, 1::2, :, 2::2],
        "transposed": lambda: torch.randn(2, 5, 14, 9).mT,
        "expanded": lambda: torch.randn(1, 5, 9, 1).expand(2, 5, 9, 14),
    }[layout]().requires_grad_()
    gradients = []
    for leaf, labels in (
        (strided, target.mT.contiguous().mT),
        (strided.detach().contiguous().requires_grad_(), target),
    ):
        loss = upsample_cross_entropy(leaf, labels, reduction=reduction)
        gradients.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    assert torch.equal(gradients[0][0], gradients[1][0]) and torch.equal(gradients[0][1], gradients[1][1])
    if layout == "channels_last":
        assert gradients[0][1].is_contiguous(memory_format=torch.channels_last)


# derandomized: twice stock's error is a matter of luck where stock's own error happens to be tiny
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    source=strategies.tuples(strategies.integers(1, 20), strategies.integers(1, 40)),
    output=strategies.tuples(strategies.integers(1, 60), strategies.integers(1, 150)),
    images=strategies.integers(1, 3),
    classes=strategies.integers(1, 30),
    align_corners=strategies.booleans(),
    smoothing=strategies.sampled_from([0.0, 0.3]),
    weighted=strategies.booleans(),
    pixel_weighted=strategies.booleans(),
    reduction=strategies.sampled_from(["none", "mean", "sum"]),
    scale=strategies.sampled_from([0.1, 3.0, 40.0]),
    seed=strategies.integers(0, 99),
)
def test_any_shape(
    source, output, images, classes, align_corners, smoothing, weighted, pixel_weighted, reduction, scale, seed
):
    torch.manual_seed(seed)
    target = torch.randint(classes, (images, *output))
    target[torch.rand(target.shape) < 0.2] = -100
    target[0, 0, 0] = 0
    options = dict(align_corners=align_corners, label_smoothing=smoothing, reduction=reduction)
    if weighted:
        options["weight"] = torch.rand(classes) + 0.1
    if pixel_weighted:
        options["pixel_weight"] = torch.rand(target.shape) + 0.1
    input = torch.randn(images, classes, *source) * scale
    check(upsample_cross_entropy, stock_cross_entropy, input, target, **options)


def test_threads_share_rows():
    """Any number of threads gives the same gradient up to rounding, and the same bits on every run."""
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    try:
        for source, output in (((5, 6), (40, 48)), ((3, 3), (200, 9)), ((40, 8), (13, 16)), ((1, 2), (64, 64))):
            input, target = torch.randn(3, 4, *source, requires_grad=True), torch.randint(4, (3, *output))
            for function in (upsample_cross_entropy, upsample_cross_entropy_dice):
                torch.set_num_threads(1)
                alone = torch.autograd.grad(function(input, target), input)[0]
                for count in (2, 3, 7):
                    torch.set_num_threads(count)
                    gradients = [torch.autograd.grad(function(input, target), input)[0] for _ in range(5)]
                    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
                    torch.testing.assert_close(gradients[0], alone, rtol=2e-6, atol=1e-8)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(input=torch.randn(3, 4, 5)), RuntimeError, "input has shape"),
        (dict(target=torch.zeros(2, 7, 9)), RuntimeError, "target has dtype float32; allowed: int64, int32, uint8"),
        (dict(target=torch.zeros(3, 7, 9, dtype=torch.int64)), RuntimeError, "target has shape"),
        (dict(size=(7, 8)), RuntimeError, "target has shape"),
        (dict(size=7, scale_factor=2), ValueError, "both given"),
        (dict(scale_factor=-1.0), ValueError, "scale_factor=-1.0"),
        (dict(size=(0, 9)), ValueError, "size=\\(0, 9\\)"),
        (dict(size=(7.5, 9)), TypeError, "size=\\(7.5, 9\\)"),
        (dict(scale_factor="2"), TypeError, "scale_factor='2'"),
        (dict(reduction="median"), ValueError, "reduction='median'; allowed: 'none', 'mean', 'sum'"),
        (dict(weight=torch.ones(4)), RuntimeError, "weight has shape \\(4,\\)"),
        (dict(pixel_weight=torch.ones(2, 9, 7)), RuntimeError, "pixel_weight has shape"),
        (dict(weight=torch.ones(5, requires_grad=True)), RuntimeError, "weight requires grad"),
        (dict(label_smoothing=1.5), ValueError, "label_smoothing=1.5"),
        (dict(backend="triton"), RuntimeError, "cannot run this call"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    call = dict(input=torch.randn(2, 5, 3, 4), target=torch.zeros(2, 7, 9, dtype=torch.int64))
    with pytest.raises(error, match=message):
        upsample_cross_entropy(**{**call, **change})


def test_bad_dice_arguments_are_named():
    input, target = torch.randn(2, 1, 3, 4), torch.zeros(2, 7, 9, dtype=torch.int64)
    with pytest.raises(ValueError, match="include_background=False leaves none of 1 classes"):
        upsample_cross_entropy_dice(input, target, include_background=False)
    with pytest.raises(ValueError, match="smooth=-1"):
        upsample_cross_entropy_dice(input, target, smooth=-1)


MEMORY = """
import resource, sys, torch, fastseg
function = getattr(fastseg.ops, sys.argv[1])
classes, height, width, scale = map(int, sys.argv[2:])
input = torch.randn(2, classes, height, width, requires_grad=True)
target = torch.randint(classes, (2, scale * height, scale * width))
small = torch.randn(2, classes, 2, 2, requires_grad=True)
torch.autograd.grad(function(small, target[:, :2, :2]), small)
status = lambda name: int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
before = status("VmRSS")
torch.autograd.grad(function(input, target), input)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc to measure peak memory")
@pytest.mark.parametrize(
    "function, classes, height, width, scale",
    [
        ("upsample_cross_entropy", 19, 64, 128, 8),
        ("upsample_cross_entropy_dice", 150, 64, 64, 8),
        ("upsample_cross_entropy", 19, 256, 256, 2),
        ("upsample_cross_entropy_dice", 2, 8, 8, 128),
    ],
)
def test_peak_memory(function, classes, height, width, scale):
    """At most 4 times the low-resolution logits and 8 bytes per output pixel, all scratch included."""
    arguments = [function, *map(str, (classes, height, width, scale))]
    found = subprocess.run([sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, check=True)
    source, output = 2 * classes * height * width * 4, 2 * height * width * scale**2
    noise = 512 * 1024  # pages of code and heap that the first large call touches
    assert int(found.stdout) <= 4 * source + 8 * output + noise


SIZES = [((9, 20), (72, 160)), ((9, 20), (23, 67)), ((40, 30), (11, 7)), ((3, 3), (40, 90))]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("source, output", SIZES)
def test_larger_and_smaller_outputs(source, output, reduction):
    input, target = torch.randn(2, 6, *source) * 3, torch.randint(6, (2, *output))
    check(upsample_cross_entropy, stock_cross_entropy, input, target, reduction=reduction)
    if reduction == "mean":
        check(upsample_cross_entropy_dice, stock_dice, input, target)


@pytest.mark.parametrize(
    "ours, stock", [(upsample_cross_entropy, stock_cross_entropy), (upsample_cross_entropy_dice, stock_dice)]
)
@pytest.mark.parametrize("source, output", SIZES)
def test_confident_logits(source, output, ours, stock):
    """Only pixels where two classes nearly tie have errors: of so few the largest is luck, their norm is not."""
    input, target = torch.randn(8, 6, *source) * 200, torch.randint(6, (8, *output))

    def gradient(loss, dtype):
        leaf = input.to(dtype).requires_grad_()
        return torch.autograd.grad(loss(leaf, target), leaf)[0].double()

    exact = gradient(stock, torch.float64)
    error, error_of_stock = ((gradient(loss, torch.float32) - exact).norm() for loss in (ours, stock))
    assert error <= 2 * error_of_stock
