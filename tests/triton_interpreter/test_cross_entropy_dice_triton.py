"""cross_entropy_dice, dice_loss in Triton: contract, class counts of every configuration, several turns, bad labels."""

import pytest
import torch

from fastseg.kernels.cross_entropy_dice import triton as kernels
from fastseg.ops import cross_entropy_dice, dice_loss
from tests.contract import Contract, Make
from tests.ops.test_cross_entropy_dice import CONTRACTS, case, plain_cross_entropy_dice
from tests.test_contract import _compare
from tests.triton_interpreter.contracts import check_contracts

test_contracts = check_contracts(CONTRACTS)


def compare(entry, layout="contiguous", dtype=torch.float32):
    contract = Contract(cross_entropy_dice, plain_cross_entropy_dice, [entry])
    _compare(contract, entry, Make(dtype, layout=layout), backend="triton")


@pytest.mark.parametrize("classes", [1, 2, 40, 70])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_class_counts(classes, layout):
    compare(case("call", 2, 3, 5, classes=classes, ignored=255), layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_several_blocks_per_program(layout, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "ENOUGH_PROGRAMS", 1)
    compare(case("call", 2, 29, 37, classes=3, ignored=255, per_image=True), layout, dtype)


def test_nan_in_ignored_pixels_reaches_nothing():
    input = torch.randn(1, 3, 4, 4)
    input[:, :, 0] = float("nan")
    input.requires_grad_()
    target = torch.randint(3, (1, 4, 4))
    target[:, 0] = 255
    loss = cross_entropy_dice(input, target, ignore_index=255, backend="triton")
    (gradient,) = torch.autograd.grad(loss, input)
    assert loss.isfinite() and gradient.isfinite().all() and (gradient[:, :, 0] == 0).all()


@pytest.mark.parametrize("label", [3, -1, 2**32 + 1, -(2**63)])
def test_bad_labels_contribute_nothing(label):
    input = torch.randn(1, 3, 4, 4, requires_grad=True)
    target = torch.randint(3, (1, 4, 4))
    target[0, 1] = -100
    expected = cross_entropy_dice(input, target, backend="triton")
    (expected_gradient,) = torch.autograd.grad(expected, input)
    target[0, 1] = label
    loss = cross_entropy_dice(input, target, backend="triton")
    (gradient,) = torch.autograd.grad(loss, input)
    assert torch.equal(loss, expected) and torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)])
def test_empty(shape):
    input = torch.randn(shape, requires_grad=True)
    target = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
    assert dice_loss(input, target, backend="triton").item() == 0
    loss = cross_entropy_dice(input, target, zero_if_empty=True, backend="triton")
    assert loss.item() == 0
    assert torch.autograd.grad(loss, input)[0].shape == shape
