"""`fastseg.nn`: every loss module equals its functional op, and behaves as a torch module."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import fastseg
from fastseg.testing import assert_within_policy

CLASSES = 4
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.25])


def data_for(name, ignored=True):
    """Logits, and labels at twice their size for the upsampling loss; ``ignored``: some labels are 255."""
    generator = torch.Generator().manual_seed(0)
    scale = 2 if name.startswith("upsample") else 1
    logits = torch.randn(2, CLASSES, 6, 7, generator=generator)
    labels = torch.randint(0, CLASSES, (2, 6 * scale, 7 * scale), generator=generator)
    if ignored:
        labels[:, 0] = 255
    return logits, labels


# module, its functional op, and arguments that differ from every default
CASES = {
    "cross_entropy": (
        fastseg.nn.CrossEntropyLoss,
        "cross_entropy",
        dict(weight=WEIGHT, ignore_index=255, reduction="sum", label_smoothing=0.1, zero_if_empty=True),
    ),
    "dice": (
        fastseg.nn.DiceLoss,
        "dice_loss",
        dict(
            weight=WEIGHT,
            ignore_index=255,
            include_background=False,
            squared=False,
            smooth=1.0,
            per_image=True,
            reduction="none",
        ),
    ),
    "cross_entropy_dice": (
        fastseg.nn.CrossEntropyDiceLoss,
        "cross_entropy_dice",
        dict(
            weight=WEIGHT,
            ce_weight=0.3,
            dice_weight=0.7,
            ignore_index=255,
            label_smoothing=0.1,
            include_background=False,
            squared=False,
            smooth=1.0,
            per_image=True,
            zero_if_empty=True,
        ),
    ),
    "focal": (
        fastseg.nn.FocalLoss,
        "focal_loss",
        dict(alpha=WEIGHT, gamma=1.5, ignore_index=255, reduction="none", zero_if_empty=True),
    ),
    "upsample_cross_entropy": (
        fastseg.nn.UpsampleCrossEntropyLoss,
        "upsample_cross_entropy",
        dict(
            scale_factor=2,
            align_corners=True,
            weight=WEIGHT,
            ignore_index=255,
            reduction="none",
            label_smoothing=0.1,
            zero_if_empty=True,
        ),
    ),
}
PIXEL_WEIGHTED = [name for name in CASES if name != "dice"]


@pytest.mark.parametrize("name", CASES)
def test_module_passes_every_argument_on(name):
    module, op, arguments = CASES[name]
    logits, labels = data_for(name)
    function = getattr(fastseg.ops, op)
    expected = function(logits, labels, **arguments)
    assert torch.equal(module(**arguments)(logits, labels), expected)
    for left_out in arguments:
        others = {key: value for key, value in arguments.items() if key != left_out}
        data = data_for(name, ignored="ignore_index" in others)
        assert torch.equal(module(**others)(*data), function(*data, **others)), left_out


@pytest.mark.parametrize("name", PIXEL_WEIGHTED)
def test_pixel_weight_is_passed_on(name):
    module, op, arguments = CASES[name]
    logits, labels = data_for(name)
    pixel_weight = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1))
    expected = getattr(fastseg.ops, op)(logits, labels, pixel_weight=pixel_weight, **arguments)
    result = module(**arguments)(logits, labels, pixel_weight=pixel_weight)
    assert torch.equal(result, expected)
    assert not torch.equal(result, module(**arguments)(logits, labels))


@pytest.mark.parametrize("name", CASES)
def test_defaults_are_those_of_the_functional_op(name):
    module, op, arguments = CASES[name]
    given = inspect.signature(module).parameters
    functional = inspect.signature(getattr(fastseg.ops, op)).parameters
    for argument in arguments:
        assert given[argument].default == functional[argument].default, argument
    missing = set(functional) - set(given) - {"input", "target", "pixel_weight", "backend"}
    assert not missing, f"{module.__name__} does not offer {missing}"


@pytest.mark.parametrize("name", CASES)
def test_state_moves_copies_and_pickles(name):
    module, _, arguments = CASES[name]
    loss = module(**arguments)
    logits, labels = data_for(name)
    expected = loss(logits, labels)
    weight_name = "alpha" if name == "focal" else "weight"
    assert list(loss.state_dict()) == [weight_name]
    assert torch.equal(copy.deepcopy(loss)(logits, labels), expected)
    assert torch.equal(pickle.loads(pickle.dumps(loss))(logits, labels), expected)
    assert getattr(copy.deepcopy(loss).double(), weight_name).dtype == torch.float64
    assert not list(loss.parameters())
    assert list(module().state_dict()) == []


@pytest.mark.parametrize("name", CASES)
def test_gradient_reaches_the_logits(name):
    module, _, arguments = CASES[name]
    logits, labels = data_for(name)
    logits.requires_grad_()
    module(**arguments)(logits, labels).sum().backward()
    assert logits.grad.abs().sum() > 0


def test_repr_shows_the_arguments():
    loss = fastseg.nn.CrossEntropyDiceLoss(dice_weight=0.5, ignore_index=255)
    assert repr(loss).startswith("CrossEntropyDiceLoss(ce_weight=1.0, dice_weight=0.5, ignore_index=255, ")
    assert repr(fastseg.nn.CrossEntropyLoss()) == repr(nn.CrossEntropyLoss())


@pytest.mark.parametrize(
    "arguments",
    [dict(), dict(weight=WEIGHT, ignore_index=255), dict(reduction="sum"), dict(label_smoothing=0.2)],
)
def test_cross_entropy_loss_equals_stock(arguments):
    assert issubclass(fastseg.nn.CrossEntropyLoss, nn.CrossEntropyLoss)
    ours, stock = fastseg.nn.CrossEntropyLoss(**arguments), nn.CrossEntropyLoss(**arguments)
    logits, labels = data_for("cross_entropy", ignored="ignore_index" in arguments)
    results = []
    for loss, dtype in ((ours, torch.float32), (stock, torch.float32), (stock, torch.float64)):
        input = logits.to(dtype, copy=True).requires_grad_()
        value = copy.deepcopy(loss).to(dtype)(input, labels)
        value.backward()
        results.append((value, input.grad))
    assert_within_policy(*[value for value, _ in results], "loss")
    assert_within_policy(*[gradient for _, gradient in results], "gradient")


def test_cross_entropy_loss_takes_the_positional_arguments_of_stock():
    stock = list(inspect.signature(nn.CrossEntropyLoss).parameters.values())
    ours = list(inspect.signature(fastseg.nn.CrossEntropyLoss).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(stock)]] == [(p.name, p.default) for p in stock]
