"""focal_loss: contract cases, golden values, digits near p = 1. Code shared with cross_entropy is tested there."""

import pytest
import torch
import torch.nn.functional as F

from fastseg.ops import focal_loss
from tests.contract import Case, Contract
from tests.ops.test_cross_entropy import DTYPES, IGNORE, maps


def focal_definition(input, target, alpha=None, gamma=2.0, ignore_index=IGNORE, reduction="mean"):
    """The loss from its formula."""
    valid = target != ignore_index
    label = torch.where(valid, target, 0)
    surprise = F.cross_entropy(input, label, reduction="none")
    loss = (1 - torch.exp(-surprise)) ** gamma * surprise
    loss = loss if alpha is None else loss * alpha[label]
    loss = torch.where(valid, loss, 0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / valid.sum()


CONTRACTS = [
    Contract(
        function=focal_loss,
        stock=focal_definition,
        dtypes=DTYPES,
        cases=[
            Case("maps", maps),
            Case("alpha", lambda make: maps(make, alpha=make.constant(5), reduction="sum")),
            Case("gamma", lambda make: maps(make, gamma=0.7, reduction="none")),
            Case("cross_entropy", lambda make: maps(make, gamma=0.0)),
        ],
    ),
]


def test_golden_focal():
    foreground = torch.tensor([0.9, 0.2, 0.6, 0.1])
    logits = torch.stack([torch.zeros(4), foreground.logit()], dim=1)
    target = torch.tensor([1, 0, 1, 0])
    assert focal_loss(logits, target, reduction="sum").item() == pytest.approx(0.0927651, abs=1e-7)
    alpha = torch.tensor([0.75, 0.25])
    assert focal_loss(logits, target, alpha, reduction="sum").item() == pytest.approx(0.0281809, abs=1e-7)


def test_focal_keeps_its_digits_as_p_goes_to_one():
    gap = torch.tensor([5.0, 12.0, 20.0, 60.0, 90.0], dtype=torch.float64)
    logits = torch.stack([gap, torch.zeros_like(gap)], dim=1)
    exact = torch.sigmoid(-gap) ** 2 * F.softplus(-gap)
    loss = focal_loss(logits.float(), torch.zeros(5, dtype=torch.int64), reduction="none")
    assert ((loss - exact).abs() <= 1e-6 * exact + 1e-37).all()
    input = logits.float().requires_grad_()
    gradient = torch.autograd.grad(
        focal_loss(input, torch.zeros(5, dtype=torch.int64), gamma=0.5, reduction="sum"), input
    )[0]
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(alpha=0.25), TypeError, "alpha is float; allowed: torch.Tensor"),
        (dict(alpha=torch.ones(4)), RuntimeError, r"alpha has shape \(4,\); allowed: \(3\)"),
        (dict(alpha=torch.ones(3, requires_grad=True)), RuntimeError, "alpha requires grad"),
        (dict(gamma=-1.0), ValueError, "gamma=-1.0; allowed: 0 or more"),
        (dict(gamma=float("nan")), ValueError, "gamma=nan"),
        (dict(reduction="median"), ValueError, "reduction='median'"),
        (dict(target=torch.zeros(2, 4)), RuntimeError, "focal_loss: target has dtype float32"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    call = dict(input=torch.randn(2, 3, 4), target=torch.zeros(2, 4, dtype=torch.int64)) | arguments
    with pytest.raises(error, match=message):
        focal_loss(**call)
