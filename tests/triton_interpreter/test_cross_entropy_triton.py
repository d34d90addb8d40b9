"""cross_entropy and focal_loss in Triton: contract, class counts of every configuration, hostile labels, NaN rules."""

import pytest
import torch
import torch.nn.functional as F

from fastseg.kernels.cross_entropy import triton as kernels
from fastseg.ops import cross_entropy, focal_loss
from tests.contract import Case, Contract, Make
from tests.ops import test_cross_entropy, test_focal_loss
from tests.ops.test_focal_loss import focal_definition
from tests.test_contract import _compare
from tests.triton_interpreter.contracts import check_contracts

test_contracts = check_contracts([*test_cross_entropy.CONTRACTS, *test_focal_loss.CONTRACTS])


def labels(make, classes):
    return make.labels(2, 3, 5, classes=classes, ignored=255)


@pytest.mark.parametrize("classes, label_smoothing", [(1, 0.0), (2, 0.1), (19, 0.0), (19, 0.1), (70, 0.0)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_class_counts(classes, label_smoothing, layout):
    def arguments(make):
        call = dict(input=make.floating(2, classes, 3, 5), target=labels(make, classes), ignore_index=255)
        return call | dict(weight=make.constant(classes), label_smoothing=label_smoothing)

    contract = Contract(cross_entropy, F.cross_entropy, [Case("call", arguments)])
    _compare(contract, contract.cases[0], Make(torch.float32, layout=layout), backend="triton")


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss(gamma):
    def arguments(make):
        call = dict(input=make.floating(2, 6, 3, 5), target=labels(make, 6), ignore_index=255)
        return call | dict(alpha=make.constant(6), gamma=gamma)

    contract = Contract(focal_loss, focal_definition, [Case("call", arguments)])
    _compare(contract, contract.cases[0], Make(torch.float32), backend="triton")


@pytest.mark.parametrize("rows", [False, True])
def test_more_classes_than_registers_hold(rows, monkeypatch):
    """The sweep in steps, which only several hundred classes reach, on 21 classes in steps of 8."""
    monkeypatch.setattr(kernels, "config_of", lambda pixel, classes: kernels.Config(4, 8, 32, 4))
    layout = "channels_last" if rows else "contiguous"

    def arguments(make):
        logits = make.floating(1, 21, 4, 8)
        with torch.no_grad():
            logits[:, :8] = -float("inf")  # a whole first step without a finite logit
        target = 8 + make.labels(1, 4, 8, classes=13)
        return dict(input=logits, target=target)

    contract = Contract(cross_entropy, F.cross_entropy, [Case("call", arguments)])
    _compare(contract, contract.cases[0], Make(torch.float32, layout=layout), backend="triton")

    def smoothed(make):
        call = dict(input=make.floating(1, 21, 4, 8), target=make.labels(1, 4, 8, classes=21), weight=make.constant(21))
        return call | dict(label_smoothing=0.2)

    contract = Contract(cross_entropy, F.cross_entropy, [Case("call", smoothed)])
    _compare(contract, contract.cases[0], Make(torch.float32, layout=layout), backend="triton")

    def focal_arguments(make):
        return dict(input=make.floating(1, 21, 4, 8), target=make.labels(1, 4, 8, classes=21))

    contract = Contract(focal_loss, focal_definition, [Case("call", focal_arguments)])
    _compare(contract, contract.cases[0], Make(torch.float32, layout=layout), backend="triton")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_hostile_labels_contribute_nothing(dtype):
    """Also those that a cast to 32 bits would bring back into range."""
    input = torch.randn(1, 4, 3, 3, requires_grad=True)
    target = torch.randint(4, (1, 3, 3))
    hostile = target.clone()
    bad = {
        torch.int64: [4, -1, 2**32 + 1, -(2**63)],
        torch.int32: [4, -1, 2**31 - 1, -(2**31)],
        torch.uint8: [4, 5, 200, 255],
    }
    hostile[0, 0], hostile[0, 1, 0] = torch.tensor(bad[dtype][:3]), bad[dtype][3]
    target[0, 0], target[0, 1, 0] = -100, -100
    ours = cross_entropy(input, hostile.to(dtype), backend="triton")
    (ours_gradient,) = torch.autograd.grad(ours, input)
    stock = F.cross_entropy(input, target)
    (stock_gradient,) = torch.autograd.grad(stock, input)
    torch.testing.assert_close(ours, stock)
    torch.testing.assert_close(ours_gradient, stock_gradient)
    assert (ours_gradient[0, :, 0] == 0).all()


@pytest.mark.parametrize("zero_if_empty", [False, True])
@pytest.mark.parametrize("pixels", [0, 3])
def test_mean_over_nothing(zero_if_empty, pixels):
    input = torch.randn(2, 4, pixels, requires_grad=True)
    target = torch.full((2, pixels), -100)
    loss = cross_entropy(input, target, zero_if_empty=zero_if_empty, backend="triton")
    (gradient,) = torch.autograd.grad(loss, input)
    assert loss.item() == 0 if zero_if_empty else loss.isnan()
    assert gradient.shape == input.shape and (gradient == 0).all()


def test_scaling_of_the_saved_gradient():
    for factor in (1.0, 0.5, float("nan")):
        for dtype in (torch.float32, torch.bfloat16):
            gradient = torch.randn(5, 7, 11).to(dtype).transpose(0, 2)
            expected = gradient * factor
            kernels.scale_in_place(gradient, torch.tensor(factor))
            assert torch.equal(gradient.isnan(), expected.isnan())
            assert torch.equal(gradient[~gradient.isnan()], expected[~expected.isnan()])


def test_same_bits_twice():
    input, target = torch.randn(2, 5, 700), torch.randint(5, (2, 700))
    first, second = (cross_entropy(input, target, backend="triton") for _ in range(2))
    assert torch.equal(first, second)
