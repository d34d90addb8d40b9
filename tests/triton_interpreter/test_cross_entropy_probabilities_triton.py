"""cross_entropy of probabilities in Triton: contract, class counts of every configuration, mixed layouts and dtypes."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastseg.kernels.cross_entropy import triton_probabilities as kernels
from fastseg.ops import cross_entropy
from tests.contract import Case, Contract, Make
from tests.ops.test_cross_entropy_probabilities import (
    CONTRACTS,
    HOSTILE_LOGITS,
    HOSTILE_TARGETS,
    both,
    results,
)
from tests.test_contract import _compare
from tests.triton_interpreter.contracts import check_contracts

test_contracts = check_contracts(CONTRACTS)


def compare(arguments, layout="contiguous"):
    contract = Contract(cross_entropy, F.cross_entropy, [Case("call", arguments)])
    _compare(contract, contract.cases[0], Make(torch.float32, layout=layout), backend="triton")


@pytest.mark.parametrize("classes, label_smoothing", [(1, 0.0), (2, 0.1), (19, 0.0), (19, 0.1), (70, 0.0)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_class_counts(classes, label_smoothing, layout):
    def arguments(make):
        return both(make, 2, classes, 3, 5, weight=make.constant(classes), label_smoothing=label_smoothing)

    compare(arguments, layout)


@pytest.mark.parametrize("layouts", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_layouts_of_two_tensors(layouts, reduction):
    def arguments(make):
        call = both(make, 2, 6, 5, 9, reduction=reduction)
        for name, last in zip(("input", "target"), layouts):
            form = torch.channels_last if last else torch.contiguous_format
            call[name] = call[name].detach().contiguous(memory_format=form).requires_grad_()
        return call

    compare(arguments)


@pytest.mark.parametrize("target_dtype", [torch.float32, torch.float16])
def test_half_logits(target_dtype):
    input, target = torch.randn(2, 5, 40).half(), torch.rand(2, 5, 40).to(target_dtype)
    ours = results(cross_entropy, input, target, backend="triton")
    for one, two in zip(ours, results(cross_entropy, input, target, backend="cpu")):
        assert one.dtype == two.dtype
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_more_classes_than_registers_hold(rows, weighted, monkeypatch):
    """The sweep in steps, which only several hundred classes reach, on 21 classes in steps of 8."""
    monkeypatch.setattr(kernels, "config_of", lambda pixel, classes: kernels.Config(4, 8, 32, 4))

    def arguments(make):
        options = dict(weight=make.constant(21), label_smoothing=0.2) if weighted else {}
        return both(make, 1, 21, 4, 8, **options)

    compare(arguments, "channels_last" if rows else "contiguous")


@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_hostile_values_as_stock(label_smoothing, steps, monkeypatch):
    if steps:
        monkeypatch.setattr(kernels, "config_of", lambda pixel, classes: kernels.Config(1, 1, 128, 4))
    pairs = list(itertools.product(HOSTILE_LOGITS.values(), HOSTILE_TARGETS.values()))
    input = torch.tensor([logits for logits, _ in pairs]).T.unsqueeze(0)
    target = torch.tensor([target for _, target in pairs]).T.unsqueeze(0)
    options = dict(weight=torch.tensor([0.5, 2.0, 0.0]), label_smoothing=label_smoothing, reduction="none")
    ours = results(cross_entropy, input, target, backend="triton", **options)
    torch.testing.assert_close(ours, results(F.cross_entropy, input, target, **options), equal_nan=True)


@pytest.mark.parametrize("zero_if_empty", [False, True])
def test_mean_over_nothing(zero_if_empty):
    input, target = torch.randn(0, 4, 3, requires_grad=True), torch.rand(0, 4, 3)
    loss = cross_entropy(input, target, zero_if_empty=zero_if_empty, backend="triton")
    assert loss.item() == 0 if zero_if_empty else loss.isnan()
    assert torch.autograd.grad(loss, input)[0].shape == input.shape
    assert cross_entropy(input, target, reduction="sum", backend="triton").item() == 0


def test_same_bits_twice():
    input, target = torch.randn(2, 5, 700), torch.rand(2, 5, 700)
    first, second = (cross_entropy(input, target, backend="triton") for _ in range(2))
    assert torch.equal(first, second)
