"""binary_cross_entropy_dice: golden values, plain PyTorch, hostile input, process groups."""

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


def plain_binary_cross_entropy_dice(
    input,
    target,
    *,
    bce_weight=1.0,
    dice_weight=1.0,
    pos_weight=None,
    ignore_index=None,
    squared=True,
    smooth=SMOOTH,
    per_image=False,
    pixel_weight=None,
):
    """The definition, written with stock PyTorch."""
    if torch.is_autocast_enabled(input.device.type):
        input = input.float()  # losses come out of autocast in fp32
    valid = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    y = torch.where(valid, target, 0).to(input.dtype)
    logits = torch.where(valid, input, 0)
    share = valid.to(input.dtype) if pixel_weight is None else pixel_weight * valid
    if pos_weight is not None:
        pos_weight = torch.as_tensor(pos_weight, dtype=input.dtype, device=input.device)
    loss = F.binary_cross_entropy_with_logits(logits, y, pos_weight=pos_weight, reduction="none")
    cross_entropy = (share * loss).sum() / share.sum()
    p, y = ((values * valid).reshape(input.size(0) if per_image else 1, -1) for values in (logits.sigmoid(), y))
    prediction, truth = (p * p, y * y) if squared else (p, y)
    dice = 1 - (2 * (p * y).sum(1) + smooth) / (prediction.sum(1) + truth.sum(1) + smooth)
    return bce_weight * cross_entropy + dice_weight * dice.mean()


def arguments(make, *shape, ignored=None, dtype=None, **options):
    target = make.labels(*shape, classes=2, ignored=ignored).to(make.dtype if dtype is None else dtype)
    options = options if ignored is None else dict(options, ignore_index=ignored)
    return dict(input=make.floating(*shape), target=target, **options)


def case(name, *shape, small=True, **options):
    return Case(name, lambda make: arguments(make, *shape, **options), small)


CONTRACTS = [
    Contract(
        fastseg.ops.binary_cross_entropy_dice,
        plain_binary_cross_entropy_dice,
        [
            case("plain", 2, 1, 3, 4),
            case("bool", 2, 3, 4, dtype=torch.bool),
            case("uint8_ignored", 2, 3, 4, dtype=torch.uint8, ignored=255),
            case("int64_ignored", 2, 3, 4, dtype=torch.int64, ignored=-1, per_image=True),
            case("float_ignored", 2, 3, 4, ignored=255, pos_weight=3.0),
            case("linear", 3, 7, squared=False, smooth=1.0, bce_weight=0.5, dice_weight=2.0),
            Case("pixel_weight", lambda make: arguments(make, 2, 3, 4, pixel_weight=make.constant(2, 3, 4))),
            Case("soft", lambda make: dict(input=make.floating(2, 5), target=make.constant(2, 5, low=0, high=1))),
            case("only_dice", 2, 1, 3, 4, bce_weight=0),
            case("long", 3, 577, per_image=True, small=False),
        ],
        # fp64 has no reference of higher precision; gradcheck and test_fp64 hold it.
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
    )
]


def test_golden():
    p = torch.tensor([[[0.9, 0.2], [0.6, 0.1]]], dtype=torch.float64)
    input, target = torch.log(p / (1 - p)), torch.tensor([[[1, 0], [1, 0]]])
    loss = functools.partial(fastseg.ops.binary_cross_entropy_dice, input, target, smooth=0)
    for backend in ("auto", "reference"):
        assert loss(dice_weight=0, backend=backend).item() == pytest.approx(0.2361726, abs=5e-8)
        assert loss(bce_weight=0, backend=backend).item() == pytest.approx(0.0683230, abs=5e-8)
        assert loss(bce_weight=0, squared=False, backend=backend).item() == pytest.approx(0.2105263, abs=5e-8)


@pytest.mark.parametrize("one_case", CONTRACTS[0].cases, ids=lambda one_case: one_case.name)
def test_fp64(one_case):
    values = one_case.arguments(Make(torch.float64))
    functions = fastseg.ops.binary_cross_entropy_dice, plain_binary_cross_entropy_dice
    results = [function(**values) for function in functions]
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-15)
    gradients = [torch.autograd.grad(result, values["input"])[0] for result in results]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    images=st.integers(1, 3),
    pixels=st.integers(1, 1200),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    squared=st.booleans(),
    per_image=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bool, torch.uint8, torch.int32, torch.int64, torch.bfloat16]),
)
def test_equals_the_reference(images, pixels, seed, scale, squared, per_image, dtype):
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(images, pixels, generator=generator) * scale
    target = torch.randint(2, (images, pixels), generator=generator).to(dtype)

    def run(compute, backend):
        leaf = input.to(compute).requires_grad_()
        loss = fastseg.ops.binary_cross_entropy_dice(
            leaf, target, squared=squared, per_image=per_image, backend=backend
        )
        return loss, torch.autograd.grad(loss, leaf)[0]

    ours, stock, exact = run(torch.float32, "auto"), run(torch.float32, "reference"), run(torch.float64, "reference")
    for what, *values in zip(("loss", "gradient"), ours, stock, exact):
        assert_within_policy(*values, what)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_integer_masks_must_be_binary(dtype):
    target = torch.zeros(2, 700, dtype=dtype)
    target[1, 699] = 255
    for backend in ("cpu", "reference"):
        with pytest.raises(IndexError, match="Target 255 is out of bounds"):
            fastseg.ops.binary_cross_entropy_dice(torch.zeros(2, 700), target, backend=backend)
        fastseg.ops.binary_cross_entropy_dice(torch.zeros(2, 700), target, ignore_index=255, backend=backend)


def test_ignored_pixels_may_hold_anything(device):
    values = arguments(Make(torch.float32, device), 2, 40, ignored=255, pos_weight=2.0)
    hidden = values["target"] == 255
    for poison in (math.nan, math.inf, -math.inf):
        dirty = torch.where(hidden, poison, values["input"].detach()).requires_grad_()
        ours = fastseg.ops.binary_cross_entropy_dice(**{**values, "input": dirty})
        wanted = fastseg.ops.binary_cross_entropy_dice(**values)
        assert torch.equal(ours, wanted)
        expected = torch.autograd.grad(wanted, values["input"])[0]
        assert torch.equal(torch.autograd.grad(ours, dirty)[0], expected)


def test_nothing_left():
    input, target = torch.randn(2, 5, requires_grad=True), torch.full((2, 5), 255)
    loss = fastseg.ops.binary_cross_entropy_dice(input, target, ignore_index=255)
    assert loss.isnan()
    assert torch.equal(torch.autograd.grad(loss, input)[0], torch.zeros_like(input))
    assert fastseg.ops.binary_cross_entropy_dice(input, target, ignore_index=255, zero_if_empty=True).item() == 0
    for shape in ((0, 5), (2, 0)):
        empty = torch.zeros(shape, requires_grad=True)
        loss = fastseg.ops.binary_cross_entropy_dice(empty, torch.zeros(shape), zero_if_empty=True)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, empty)[0].shape == shape


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(target=torch.zeros(2, 4)), RuntimeError, r"target has shape \(2, 4\); allowed: \(2, 3\)"),
        (dict(target=torch.zeros(2, 3, dtype=torch.complex64)), RuntimeError, "target has dtype complex64"),
        (dict(target=torch.zeros(2, 3, requires_grad=True)), RuntimeError, "target requires grad"),
        (dict(pos_weight=torch.ones(2)), RuntimeError, "pos_weight has shape"),
        (dict(pixel_weight=torch.ones(3)), RuntimeError, "pixel_weight has shape"),
        (dict(smooth=-1.0), ValueError, "smooth=-1.0"),
        (dict(input=torch.zeros(())), ValueError, r"input has shape \(\)"),
        (dict(input=None), TypeError, "input is NoneType"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        fastseg.ops.binary_cross_entropy_dice(**(dict(input=torch.zeros(2, 3), target=torch.zeros(2, 3)) | changes))


def _whole_batch():
    values = arguments(Make(torch.float64, seed=3), 4, 1, 5, 6, ignored=255)
    return values["input"].detach(), values["target"]


def _loss_on_rank(rank, group, options):
    input, target = _whole_batch()
    half = slice(0, 1) if rank == 0 else slice(1, 4)
    leaf = input[half].requires_grad_()
    loss = fastseg.ops.binary_cross_entropy_dice(leaf, target[half], process_group=group, ignore_index=255, **options)
    return loss.item(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("options", [{}, {"per_image": True}], ids=str)
def test_process_group_is_the_loss_of_the_whole_batch(options):
    input, target = _whole_batch()
    leaf = input.requires_grad_()
    loss = fastseg.ops.binary_cross_entropy_dice(leaf, target, ignore_index=255, **options)
    gradient = torch.autograd.grad(loss, leaf)[0]
    ranks = on_two_ranks(_loss_on_rank, options)
    assert [rank[0] for rank in ranks] == pytest.approx([loss.item()] * 2, rel=1e-12)
    torch.testing.assert_close(torch.cat([rank[1] for rank in ranks]), 2 * gradient, rtol=1e-12, atol=1e-15)
