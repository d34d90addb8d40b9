"""sigmoid_focal_loss: golden values, torchvision's expression, hostile input."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastseg
from fastseg.testing import assert_within_policy
from tests.contract import Case, Contract, Make


def plain_sigmoid_focal_loss(inputs, targets, alpha=0.25, gamma=2, reduction="none"):
    """What torchvision.ops.sigmoid_focal_loss is documented to compute (torchvision is not a dependency)."""
    p = torch.sigmoid(inputs)
    cross_entropy = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = cross_entropy * (1 - p_t) ** gamma
    if alpha >= 0:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    if reduction == "none":
        return loss
    if reduction == "sum" or loss.numel() == 0:
        return loss.sum()
    return loss.mean()


def arguments(make, *shape, **options):
    targets = make.labels(*shape, classes=2).to(make.dtype)
    return dict(inputs=make.floating(*shape), targets=targets, **options)


def case(name, *shape, small=True, **options):
    return Case(name, lambda make: arguments(make, *shape, **options), small)


CONTRACTS = [
    Contract(
        fastseg.ops.sigmoid_focal_loss,
        plain_sigmoid_focal_loss,
        [
            case("plain", 2, 1, 3, 4),
            case("mean", 2, 3, 3, 4, reduction="mean"),
            case("sum", 2, 3, 5, reduction="sum"),
            case("no_alpha", 7, alpha=-1),
            case("gamma_zero", 7, gamma=0, reduction="mean"),
            case("gamma_half", 7, gamma=0.5, alpha=1.0),
            case("gamma_three", 4, 30, gamma=3.0, reduction="sum"),
            Case(
                "soft_targets",
                lambda make: dict(inputs=make.floating(4, 30), targets=make.constant(4, 30, low=0, high=1)),
            ),
            case("long", 3, 577, small=False),
            case("scalar"),
        ],
        # fp64 has no reference of higher precision; gradcheck and test_fp64 hold it.
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
    )
]


def test_golden():
    p = torch.tensor([[0.9, 0.2], [0.6, 0.1]], dtype=torch.float64)
    inputs, targets = torch.log(p / (1 - p)), torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    for backend in ("auto", "reference"):
        loss = fastseg.ops.sigmoid_focal_loss(inputs, targets, reduction="sum", backend=backend)
        assert loss.item() == pytest.approx(0.0281809, abs=5e-8)
        loss = fastseg.ops.sigmoid_focal_loss(inputs, targets, alpha=-1, backend=backend)
        assert loss.sum().item() == pytest.approx(0.0927651, abs=5e-8)


@pytest.mark.parametrize("one_case", CONTRACTS[0].cases, ids=lambda one_case: one_case.name)
def test_fp64(one_case):
    values = one_case.arguments(Make(torch.float64))
    results = [function(**values) for function in (fastseg.ops.sigmoid_focal_loss, plain_sigmoid_focal_loss)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-15)
    gradients = [torch.autograd.grad(result.sum(), values["inputs"])[0] for result in results]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-15)


def test_confident_logits_keep_their_digits():
    """Losses of 1e-9 to 1e-35 are right to fp32 relative precision: no 1 - p is taken."""
    inputs = torch.tensor([-40.0, -20.0, -10.0, 10.0, 20.0, 40.0])
    targets = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    ours = fastseg.ops.sigmoid_focal_loss(inputs, targets, gamma=1).double()
    missed = torch.exp(-inputs.double().abs()) / (1 + torch.exp(-inputs.double().abs()))
    alpha = torch.where(targets == 1, 0.25, 0.75).double()
    torch.testing.assert_close(ours, -alpha * missed * torch.log1p(-missed), rtol=1e-6, atol=0)


@pytest.mark.sanitized
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    values=st.lists(
        st.floats(-100, 100, width=32) | st.sampled_from([math.inf, -math.inf, math.nan, 0.0, -0.0]), max_size=70
    ),
    gamma=st.sampled_from([0.0, 1.0, 2.0, 2.5]),
    alpha=st.sampled_from([-1.0, 0.0, 0.25]),
    positive=st.booleans(),
)
def test_hostile_values(values, gamma, alpha, positive):
    inputs = torch.tensor(values, dtype=torch.float32)
    targets = torch.full_like(inputs, float(positive))
    ours = fastseg.ops.sigmoid_focal_loss(inputs, targets, alpha, gamma)
    stock = plain_sigmoid_focal_loss(inputs, targets, alpha, gamma)
    against = (-inputs if positive else inputs).double()  # BCE is softplus of it; stock's subtracts and keeps no digit
    exact = against.sigmoid() ** gamma * F.softplus(against, threshold=40)
    exact = exact * (1.0 if alpha < 0 else alpha if positive else 1 - alpha)
    assert torch.equal(ours.isnan(), stock.isnan())
    finite = inputs.isfinite()
    assert_within_policy(ours[finite], stock[finite], exact[finite])


def test_channels_last_is_kept(device):
    values = arguments(Make(torch.float32, device, "channels_last"), 2, 3, 4, 5)
    loss = fastseg.ops.sigmoid_focal_loss(**values)
    assert loss.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(loss, fastseg.ops.sigmoid_focal_loss(values["inputs"].contiguous(), values["targets"]))


def test_gradient_of_targets_comes_from_plain_pytorch():
    make = Make(torch.float64)
    inputs, targets = make.floating(5), make.constant(5, low=0.1, high=0.9).requires_grad_()
    ours = fastseg.ops.sigmoid_focal_loss(inputs, targets, reduction="sum")
    stock = plain_sigmoid_focal_loss(inputs, targets, reduction="sum")
    for one, two in zip(torch.autograd.grad(ours, (inputs, targets)), torch.autograd.grad(stock, (inputs, targets))):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    "inputs, targets",
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_mixed_dtypes_promote(inputs, targets, reduction):
    values = torch.randn(9).to(inputs), torch.rand(9).to(targets)
    loss = fastseg.ops.sigmoid_focal_loss(*values, reduction=reduction)
    assert loss.dtype == torch.promote_types(inputs, targets)
    exact = plain_sigmoid_focal_loss(values[0].double(), values[1].double(), reduction=reduction)
    precision = torch.finfo(torch.promote_types(inputs, torch.float32)).eps
    torch.testing.assert_close(loss.double(), exact, rtol=8 * precision, atol=precision)


def test_empty():
    for shape in ((0,), (2, 0, 3)):
        empty = torch.zeros(shape, requires_grad=True)
        assert fastseg.ops.sigmoid_focal_loss(empty, torch.zeros(shape)).shape == shape
        loss = fastseg.ops.sigmoid_focal_loss(empty, torch.zeros(shape), reduction="mean")
        assert loss.item() == 0
        assert torch.autograd.grad(loss, empty)[0].shape == shape


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(targets=torch.zeros(4)), ValueError, r"targets has shape \(4,\); allowed: \(3,\)"),
        (dict(targets=torch.zeros(3, dtype=torch.int64)), RuntimeError, "targets has dtype int64"),
        (dict(reduction="avg"), ValueError, "reduction='avg'"),
        (dict(alpha=1.5), ValueError, "alpha=1.5"),
        (dict(inputs=3.0), TypeError, "inputs is float"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        fastseg.ops.sigmoid_focal_loss(**(dict(inputs=torch.zeros(3), targets=torch.zeros(3)) | changes))


def test_outputs_of_another_dtype_are_refused():
    """The error comes before anything is written: two bytes per element would not fit into one."""
    inputs, targets = torch.randn(9), torch.ones(9)
    with pytest.raises(ValueError, match="dtype=torch.uint8; allowed"):
        torch.ops.fastseg.sigmoid_focal_loss(inputs, targets, 0.25, 2.0, False, torch.uint8)
    loss, gradient = torch.zeros(9, dtype=torch.uint8), torch.zeros(9, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="loss must be float32"):
        torch.ops.fastseg._sigmoid_focal_loss(inputs, targets, 0.25, 2.0, False, torch.uint8, loss)
    with pytest.raises(RuntimeError, match="grad_inputs must be like inputs"):
        torch.ops.fastseg._sigmoid_focal_loss_backward(inputs, targets, torch.ones(()), 0.25, 2.0, gradient)
