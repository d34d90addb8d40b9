"""loss_of_sums: from the Dice and cross-entropy sums to the loss and back, against autograd of the plain arithmetic."""

import pytest
import torch

from fastseg._op import REGISTRY
from fastseg.kernels.cross_entropy_dice import reference


def _sums(images, classes, denominator):
    statistics = [torch.rand(images, classes, dtype=torch.float64) for _ in range(3)]
    return *statistics, torch.tensor(3.0, dtype=torch.float64), torch.tensor(denominator, dtype=torch.float64)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("images, classes", [(3, 5), (1, 19), (0, 4), (2, 300)])
@pytest.mark.parametrize("include_background", [True, False])
@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("ce_weight, dice_weight, denominator", [(1.0, 0.7, 7.0), (0.0, 2.0, 0.0), (0.5, 0.0, 2.0)])
def test_loss_of_sums_and_its_gradient(
    backend, images, classes, include_background, per_image, ce_weight, dice_weight, denominator
):
    sums = [value.requires_grad_(i in (0, 1, 3)) for i, value in enumerate(_sums(images, classes, denominator))]
    options = ce_weight, dice_weight, 1e-3, include_background, per_image, True
    loss = REGISTRY["loss_of_sums"](*sums, *options, torch.float64, backend=backend)
    expected = reference.loss_of_sums(*sums, *options, torch.float64)
    torch.testing.assert_close(loss, expected)
    slope = torch.tensor(1.7, dtype=torch.float64)
    wanted = [sums[i] for i in (0, 1, 3)]
    gradients = torch.autograd.grad(loss, wanted, slope)
    plain = torch.autograd.grad(expected, wanted, slope, allow_unused=True) if expected.requires_grad else [None] * 3
    for gradient, other, tensor in zip(gradients, plain, wanted):
        torch.testing.assert_close(gradient, torch.zeros_like(tensor) if other is None else other)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("zero_if_empty, expected", [(False, float("nan")), (True, 0.0)])
def test_a_mean_over_nothing(backend, zero_if_empty, expected):
    options = 1.0, 1.0, 1e-3, True, True, zero_if_empty
    loss = REGISTRY["loss_of_sums"](*_sums(0, 4, 0.0), *options, torch.float32, backend=backend)
    torch.testing.assert_close(loss, torch.tensor(expected), equal_nan=True)


@pytest.mark.parametrize(
    "position, change, message",
    [
        (0, lambda value: value.float(), "intersection has dtype float32"),
        (1, lambda value: value[:, :2], "prediction has shape"),
        (4, lambda value: value.reshape(1), "denominator has shape"),
    ],
)
def test_bad_sums_are_named(position, change, message):
    sums = list(_sums(2, 3, 1.0))
    sums[position] = change(sums[position])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastseg.loss_of_sums(*sums, 1.0, 1.0, 1e-3, True, False, False, torch.float32)
