"""sigmoid_focal_loss and binary_cross_entropy_dice in Triton: the contract, several turns, bad masks, empty input."""

import pytest
import torch

from fastseg.kernels.binary_cross_entropy_dice import triton as statistics_kernels
from fastseg.ops import binary_cross_entropy_dice, sigmoid_focal_loss
from tests.contract import Make
from tests.ops import test_binary_cross_entropy_dice, test_sigmoid_focal_loss
from tests.test_contract import _compare
from tests.triton_interpreter.contracts import check_contracts

test_sigmoid_focal_loss_contract = check_contracts(test_sigmoid_focal_loss.CONTRACTS)
test_binary_cross_entropy_dice_contract = check_contracts(test_binary_cross_entropy_dice.CONTRACTS)


def test_several_blocks_per_program(monkeypatch):
    monkeypatch.setattr(statistics_kernels, "ENOUGH_PROGRAMS", 1)
    case = test_binary_cross_entropy_dice.case("turns", 2, 70, 91, ignored=255, per_image=True)
    contract = test_binary_cross_entropy_dice.CONTRACTS[0]
    _compare(contract, case, Make(torch.float32), backend="triton")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_bad_masks_contribute_nothing(dtype):
    input = torch.randn(2, 3, 5, requires_grad=True)
    target = torch.randint(2, (2, 3, 5)).to(dtype)
    target[0, 0] = 255
    expected = binary_cross_entropy_dice(input, target, ignore_index=255, backend="triton")
    (gradient,) = torch.autograd.grad(expected, input)
    target[0, 0] = 2 if dtype == torch.uint8 else -1
    assert torch.equal(binary_cross_entropy_dice(input, target, backend="triton"), expected)
    assert gradient.isfinite().all() and (gradient[0, 0] == 0).all()


def test_nan_in_ignored_pixels_reaches_nothing():
    input = torch.randn(1, 20)
    input[0, :5] = float("nan")
    input.requires_grad_()
    target = torch.randint(2, (1, 20))
    target[0, :5] = 255
    loss = binary_cross_entropy_dice(input, target, ignore_index=255, backend="triton")
    (gradient,) = torch.autograd.grad(loss, input)
    assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty(shape):
    input = torch.randn(shape, requires_grad=True)
    targets = torch.zeros(shape)
    assert sigmoid_focal_loss(input, targets, reduction="mean", backend="triton").item() == 0
    assert sigmoid_focal_loss(input, targets, backend="triton").shape == shape
    loss = binary_cross_entropy_dice(input, targets, zero_if_empty=True, backend="triton")
    assert torch.autograd.grad(loss, input)[0].shape == shape
