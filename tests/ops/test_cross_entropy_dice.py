"""cross_entropy_dice and dice_loss: golden values, plain PyTorch, hostile input, process groups."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastseg
from fastseg.testing import assert_within_policy
from tests.contract import Case, Contract, Make
from tests.ops._ranks import on_two_ranks

SMOOTH = 1e-6


def plain_dice_loss(
    input,
    target,
    weight=None,
    *,
    ignore_index=-100,
    include_background=True,
    squared=True,
    smooth=SMOOTH,
    per_image=False,
    reduction="mean",
):
    """The definition, written with stock PyTorch on (N, C, ...) input."""
    classes = input.size(1)
    valid = (target != ignore_index).unsqueeze(1)
    truth = F.one_hot(target.long().where(valid.squeeze(1), 0), classes).movedim(-1, 1) * valid
    autocast = torch.is_autocast_enabled(input.device.type)  # losses come out of autocast in fp32
    p = torch.where(valid, input, 0).softmax(1, dtype=torch.float32 if autocast else None) * valid
    p, truth = (values.reshape(*input.shape[:2], -1) for values in (p, truth.to(p.dtype)))
    dims = 2 if per_image else (0, 2)
    prediction = (p * p if squared else p).sum(dims)
    loss = 1 - (2 * (p * truth).sum(dims) + smooth) / (prediction + truth.sum(dims) + smooth)
    weight = input.new_ones(classes) if weight is None else weight
    if not include_background:
        loss, weight = loss[..., 1:], weight[1:]
    loss = loss * weight
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return (loss.sum(-1) / weight.sum()).mean()


def plain_cross_entropy(input, target, weight, *, ignore_index, label_smoothing, pixel_weight):
    if pixel_weight is None:
        return F.cross_entropy(input, target.long(), weight, ignore_index=ignore_index, label_smoothing=label_smoothing)
    valid = target != ignore_index
    label = target.long().where(valid, 0)
    loss = F.cross_entropy(input, label, weight, label_smoothing=label_smoothing, reduction="none")
    share = pixel_weight * valid
    class_weight = 1 if weight is None else weight[label]
    return (share * loss).sum() / (share * class_weight).sum()


def plain_cross_entropy_dice(
    input,
    target,
    weight=None,
    *,
    ce_weight=1.0,
    dice_weight=1.0,
    ignore_index=-100,
    label_smoothing=0.0,
    pixel_weight=None,
    **dice,
):
    cross_entropy = plain_cross_entropy(
        input, target, weight, ignore_index=ignore_index, label_smoothing=label_smoothing, pixel_weight=pixel_weight
    )
    return ce_weight * cross_entropy + dice_weight * plain_dice_loss(input, target, ignore_index=ignore_index, **dice)


def maps(make: Make, *shape, classes, ignored=None, **options):
    """Logits (N, C, ...) and labels (N, ...) of the shape (N, ...) given."""
    images, *extent = shape
    return dict(
        input=make.floating(images, classes, *extent),
        target=make.labels(*shape, classes=classes, ignored=ignored),
        **({} if ignored is None else {"ignore_index": ignored}),
        **options,
    )


def case(name, *shape, small=True, **options):
    return Case(name, functools.partial(lambda make, **kw: maps(make, *shape, **kw), **options), small)


DICE_CASES = [
    case("plain", 2, 3, 4, classes=3),
    case("ignored", 2, 3, 5, classes=4, ignored=255),
    case("ignored_in_range", 2, 3, 5, classes=4, ignored=1),
    case("linear", 2, 3, 4, classes=3, squared=False, smooth=1.0),
    case("per_image", 3, 4, 2, classes=3, per_image=True, ignored=-1),
    case("no_background", 2, 5, classes=4, include_background=False),
    case("none", 2, 3, 4, classes=3, reduction="none"),
    case("none_per_image", 2, 3, 4, classes=3, reduction="none", per_image=True),
    case("sum", 2, 3, 4, classes=3, reduction="sum", per_image=True),
    Case("weighted", lambda make: maps(make, 2, 3, 4, classes=3, weight=make.constant(3))),
    case("rows", 23, classes=3),
    case("volumes", 1, 2, 3, 2, classes=2, per_image=True),
    case("odd_size", 2, 33, 37, classes=19, ignored=255, small=False),
    case("many_classes", 1, 5, 31, classes=150, ignored=255, small=False),
]
BOTH_CASES = [
    case("plain", 2, 3, 4, classes=3),
    case("ignored", 2, 3, 5, classes=4, ignored=255),
    case("smoothing", 2, 3, 4, classes=3, label_smoothing=0.1, ignored=-100),
    Case("weighted", lambda make: maps(make, 2, 3, 4, classes=3, weight=make.constant(3), label_smoothing=0.2)),
    Case(
        "pixel_weight",
        lambda make: maps(
            make, 2, 3, 4, classes=3, ignored=9, pixel_weight=make.constant(2, 3, 4), weight=make.constant(3)
        ),
    ),
    case("linear", 2, 3, 4, classes=3, squared=False, smooth=0.5, ce_weight=0.25, dice_weight=2.0),
    case("per_image", 3, 4, 2, classes=3, per_image=True, include_background=False),
    case("rows", 23, classes=3),
    case("odd_size", 2, 33, 37, classes=19, ignored=255, small=False),
    case("many_classes", 1, 5, 31, classes=150, ignored=255, label_smoothing=0.1, small=False),
]
# fp64 has no reference of higher precision; gradcheck and test_fp64 hold it.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CONTRACTS = [
    Contract(fastseg.ops.cross_entropy_dice, plain_cross_entropy_dice, BOTH_CASES, dtypes=DTYPES),
    Contract(fastseg.ops.dice_loss, plain_dice_loss, DICE_CASES, dtypes=DTYPES),
]


# --- golden values ---

FOREGROUND = torch.tensor([[0.9, 0.2], [0.6, 0.1]], dtype=torch.float64)
GOLDEN_INPUT = torch.stack([torch.log(1 - FOREGROUND), torch.log(FOREGROUND)]).unsqueeze(0)
GOLDEN_TARGET = torch.tensor([[[1, 0], [1, 0]]])


def test_golden_dice():
    squared = fastseg.ops.dice_loss(GOLDEN_INPUT, GOLDEN_TARGET, smooth=0, reduction="none")
    assert squared.tolist() == pytest.approx([0.0607735, 0.0683230], abs=5e-8)
    mean = fastseg.ops.dice_loss(GOLDEN_INPUT, GOLDEN_TARGET, smooth=0)
    assert mean.item() == pytest.approx(0.0645482, abs=5e-8)
    linear = fastseg.ops.dice_loss(GOLDEN_INPUT, GOLDEN_TARGET, smooth=0, squared=False, include_background=False)
    assert linear.item() == pytest.approx(0.2105263, abs=5e-8)


def test_golden_cross_entropy():
    only_cross_entropy = functools.partial(fastseg.ops.cross_entropy_dice, dice_weight=0)
    one = only_cross_entropy(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64), torch.tensor(0))
    assert one.item() == pytest.approx(0.4076060, abs=5e-8)
    rows = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]], dtype=torch.float64)
    weighted = only_cross_entropy(rows, torch.tensor([0, 1]), torch.tensor([1.0, 3.0, 1.0]))
    assert weighted.item() == pytest.approx(1.1576060, abs=5e-8)


# --- labels, layouts, empty input ---


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_label_dtypes(dtype, device):
    arguments = maps(Make(torch.float32, device), 2, 5, 7, classes=6, ignored=255)
    expected = fastseg.ops.cross_entropy_dice(**arguments)
    arguments["target"] = arguments["target"].to(dtype)
    assert torch.equal(fastseg.ops.cross_entropy_dice(**arguments), expected)


@pytest.mark.sanitized
@pytest.mark.parametrize("label", [3, -1, 2**40])
def test_label_out_of_range_raises(label):
    input = torch.randn(2, 3, 4, 40)
    target = torch.zeros(2, 4, 40, dtype=torch.int64)
    target[1, 3, 39] = label
    for backend in ("cpu", "reference"):
        for function in (fastseg.ops.dice_loss, fastseg.ops.cross_entropy_dice):
            with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
                function(input, target, backend=backend)


def test_layouts_agree_bitwise(device):
    """The layout changes only how a tile is loaded."""
    make = Make(torch.float32, device)
    arguments = maps(make, 2, 20, 23, classes=21, ignored=255)
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        leaf = arguments["input"].detach().contiguous(memory_format=memory_format).requires_grad_()
        loss = fastseg.ops.cross_entropy_dice(**{**arguments, "input": leaf})
        found.append((loss, *torch.autograd.grad(loss, leaf)))
        assert found[-1][1].is_contiguous(memory_format=memory_format)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_everything_ignored():
    input = torch.randn(2, 3, 4, 5, requires_grad=True)
    target = torch.full((2, 4, 5), 255)
    loss = fastseg.ops.cross_entropy_dice(input, target, ignore_index=255)
    assert loss.isnan()
    assert torch.equal(torch.autograd.grad(loss, input)[0], torch.zeros_like(input))
    assert fastseg.ops.cross_entropy_dice(input, target, ignore_index=255, zero_if_empty=True).item() == 0
    assert fastseg.ops.dice_loss(input, target, ignore_index=255).item() == 0


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (0, 3)])
@pytest.mark.parametrize("per_image", [False, True])
def test_empty_batch(shape, per_image):
    input = torch.randn(shape, requires_grad=True)
    target = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
    loss = fastseg.ops.cross_entropy_dice(input, target, zero_if_empty=True, per_image=per_image)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, input)[0].shape == shape
    assert fastseg.ops.cross_entropy_dice(input, target, per_image=per_image).isnan()


def test_absent_class():
    """Neither true nor predicted: no loss. Only predicted: full loss."""
    input = torch.full((1, 3, 8), -200.0)
    input[:, 0] = 0
    input[:, 1, :2] = 0.0
    target = torch.zeros(1, 8, dtype=torch.int64)
    losses = fastseg.ops.dice_loss(input, target, reduction="none")
    assert losses[2].item() == 0
    assert losses[1].item() == pytest.approx(1, abs=1e-5)


def test_ignored_pixels_may_hold_anything(device):
    make = Make(torch.float32, device)
    arguments = maps(make, 2, 4, 9, classes=5, ignored=255, label_smoothing=0.1)
    clean = arguments["input"]
    hidden = (arguments["target"] == 255).unsqueeze(1)
    for poison in (math.nan, math.inf, -math.inf):
        dirty = torch.where(hidden, poison, clean.detach()).requires_grad_()
        for leaf, expected in ((dirty, clean),):
            ours = fastseg.ops.cross_entropy_dice(**{**arguments, "input": leaf})
            wanted = fastseg.ops.cross_entropy_dice(**{**arguments, "input": expected})
            assert torch.equal(ours, wanted)
            assert torch.equal(torch.autograd.grad(ours, leaf)[0], torch.autograd.grad(wanted, expected)[0])


def test_nan_and_infinity_reach_the_loss():
    target = torch.tensor([[0, 1, 2]])
    for poison, expected in ((math.nan, math.isnan), (math.inf, math.isnan)):
        input = torch.zeros(1, 3, 3)
        input[0, 1, 1] = poison
        assert expected(fastseg.ops.cross_entropy_dice(input, target).item())
    input = torch.zeros(1, 3, 3)
    input[0, 1, 1] = -math.inf  # a label with probability 0
    assert fastseg.ops.cross_entropy_dice(input, target).item() == math.inf


def test_large_logits_keep_their_digits():
    """With logits far from zero the only error is that of shifting them in fp32."""
    make = Make(torch.float32)
    arguments = maps(make, 2, 6, 7, classes=5)
    for shift in (0.0, 64.0, -512.0):
        leaf = (arguments["input"].detach() + shift).requires_grad_()
        double = leaf.detach().double().requires_grad_()
        results = [
            torch.autograd.grad(function(value, arguments["target"]), value)[0]
            for function, value in (
                (fastseg.ops.cross_entropy_dice, leaf),
                (plain_cross_entropy_dice, leaf),
                (plain_cross_entropy_dice, double),
            )
        ]
        assert_within_policy(*results, "gradient")


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.name)
def test_fp64(contract):
    for one_case in contract.cases:
        arguments = one_case.arguments(Make(torch.float64))
        leaf = arguments["input"]
        results = [function(**arguments) for function in (contract.function, contract.stock)]
        torch.testing.assert_close(*results, rtol=1e-13, atol=1e-15)
        gradients = [torch.autograd.grad(result.sum(), leaf)[0] for result in results]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


# derandomized: a tolerance of twice stock's error is a matter of luck when stock's own error happens to be tiny
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    images=st.integers(1, 3),
    classes=st.integers(1, 40),
    pixels=st.integers(1, 300),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([0.0, 1.0, 30.0, 300.0]),
    squared=st.booleans(),
    per_image=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    interleaved=st.booleans(),
    ignored=st.sampled_from([-100, 0, 255]),
)
def test_equals_the_reference(
    images, classes, pixels, seed, scale, squared, per_image, smoothing, interleaved, ignored
):
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(images, classes, pixels, generator=generator) * scale
    if interleaved:
        input = input.transpose(1, 2).contiguous().transpose(1, 2)
    target = torch.randint(classes, (images, pixels), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.3] = ignored
    options = dict(ignore_index=ignored, squared=squared, per_image=per_image, label_smoothing=smoothing)
    if not (target != ignored).any():
        options["zero_if_empty"] = True

    def run(dtype, backend):
        leaf = input.to(dtype).requires_grad_()
        loss = fastseg.ops.cross_entropy_dice(leaf, target, **options, backend=backend)
        return loss, torch.autograd.grad(loss, leaf)[0]

    ours, stock, exact = run(torch.float32, "auto"), run(torch.float32, "reference"), run(torch.float64, "reference")
    for what, *values in zip(("loss", "gradient"), ours, stock, exact):
        assert_within_policy(*values, what)


@pytest.mark.parametrize("input", [torch.zeros(0, 6)[:, ::2], torch.zeros(0, 3, 4, 5).mT, torch.zeros(2, 3, 4, 0).mT])
def test_empty_inputs_of_any_strides(input):
    loss = fastseg.ops.dice_loss(input, torch.zeros(input[:, 0].shape, dtype=torch.int64))
    torch.testing.assert_close(loss, torch.tensor(0.0))


# --- errors ---


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(target=torch.zeros(2, 4, 5)), RuntimeError, "target has dtype float32"),
        (dict(target=torch.zeros(2, 5, 4, dtype=torch.int64)), RuntimeError, r"target has shape \(2, 5, 4\)"),
        (dict(weight=torch.ones(4)), RuntimeError, r"weight has shape \(4,\); allowed: \(3\)"),
        (dict(pixel_weight=torch.ones(2, 4)), RuntimeError, "pixel_weight has shape"),
        (dict(pixel_weight=torch.ones(2, 4, 5, requires_grad=True)), RuntimeError, "pixel_weight requires grad"),
        (dict(label_smoothing=1.5), ValueError, "label_smoothing=1.5"),
        (dict(smooth=-1.0), ValueError, "smooth=-1.0"),
        (dict(input=[1.0]), TypeError, "input is list"),
        (dict(input=torch.zeros(())), ValueError, r"input has shape \(\)"),
        (
            dict(input=torch.zeros(2, 0, 4, 5)),
            ValueError,
            r"input has shape \(2, 0, 4, 5\); allowed: .* C of at least 1",
        ),
        (dict(input=torch.zeros(2, 1, 4, 5), include_background=False), ValueError, "include_background=False"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    arguments = dict(input=torch.zeros(2, 3, 4, 5), target=torch.zeros(2, 4, 5, dtype=torch.int64)) | changes
    with pytest.raises(error, match=message):
        fastseg.ops.cross_entropy_dice(**arguments)


# --- process groups ---


def _loss_on_rank(rank, group, options):
    """Loss and gradient of this rank's half of the batch, and a shared parameter's gradient under DDP averaging."""
    input, target = _whole_batch()
    half = slice(0, 1) if rank == 0 else slice(1, 4)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    leaf = input[half].requires_grad_()
    loss = fastseg.ops.cross_entropy_dice(leaf * scale, target[half], process_group=group, ignore_index=255, **options)
    grads = torch.autograd.grad(loss, (leaf, scale))
    return loss.item(), grads[0].detach(), grads[1].item()


def _whole_batch():
    make = Make(torch.float64, seed=3)
    return make.floating(4, 3, 5, 6).detach(), make.labels(4, 5, 6, classes=3, ignored=255)


@pytest.mark.parametrize("options", [{}, {"per_image": True}, {"squared": False, "label_smoothing": 0.1}], ids=str)
def test_process_group_is_the_loss_of_the_whole_batch(options):
    input, target = _whole_batch()
    leaf, scale = input.requires_grad_(), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    loss = fastseg.ops.cross_entropy_dice(leaf * scale, target, ignore_index=255, **options)
    gradient, scale_gradient = torch.autograd.grad(loss, (leaf, scale))
    ranks = on_two_ranks(_loss_on_rank, options)
    for rank_loss, _, _ in ranks:
        assert rank_loss == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(torch.cat([rank[1] for rank in ranks]), 2 * gradient, rtol=1e-12, atol=1e-15)
    averaged = sum(rank[2] for rank in ranks) / 2  # the parameter's gradient under DistributedDataParallel
    assert averaged == pytest.approx(scale_gradient.item(), rel=1e-12)


def _dice_on_rank(rank, group, options):
    input, target = _whole_batch()
    half = slice(0, 1) if rank == 0 else slice(1, 4)
    leaf = input[half].requires_grad_()
    loss = fastseg.ops.dice_loss(leaf, target[half], process_group=group, ignore_index=255, **options)
    return loss.item(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("options", [{}, {"per_image": True}, {"per_image": True, "reduction": "sum"}], ids=str)
def test_dice_process_group(options):
    input, target = _whole_batch()
    leaf = input.requires_grad_()
    loss = fastseg.ops.dice_loss(leaf, target, ignore_index=255, **options)
    ranks = on_two_ranks(_dice_on_rank, options)
    assert [rank[0] for rank in ranks] == pytest.approx([loss.item()] * 2, rel=1e-12)
    gradient = torch.autograd.grad(loss, leaf)[0]
    torch.testing.assert_close(torch.cat([rank[1] for rank in ranks]), 2 * gradient, rtol=1e-12, atol=1e-15)
