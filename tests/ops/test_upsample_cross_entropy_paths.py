"""upsample_cross_entropy on the CPU where its methods for exponentials meet (see its README).

Along a row, or pixel by pixel: which one runs depends on how far apart the logits of a cell's ends lie (60, or 42 with
Dice).
"""

import importlib

import pytest
import torch

from fastseg._op import REGISTRY
from fastseg.ops import upsample_cross_entropy, upsample_cross_entropy_dice
from tests.ops.test_upsample_cross_entropy import check, stock_cross_entropy, stock_dice

upsample_module = importlib.import_module("fastseg.ops.upsample_cross_entropy")  # the package has the function's name
HALF_TYPES = [torch.bfloat16, torch.float16]


def spread_logits(spread: float, shape, dtype) -> torch.Tensor:
    """Logits in [-spread / 2, spread / 2], both ends taken at every source pixel, by different classes."""
    input = (torch.rand(shape) - 0.5) * spread * 0.9
    first, second = torch.rand(shape).topk(2, dim=1).indices.split(1, dim=1)
    return input.scatter(1, first, spread / 2).scatter(1, second, -spread / 2).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES], ids=str)
@pytest.mark.parametrize("spread", [5.0, 41.5, 42.5, 59.0, 61.0, 90.0])
@pytest.mark.parametrize("output", [(24, 40), (24, 5), (7, 43), (3, 40)])
def test_spreads(spread, dtype, output):
    torch.manual_seed(1)
    input, target = spread_logits(spread, (2, 6, 3, 5), dtype), torch.randint(6, (2, *output))
    target[torch.rand(target.shape) < 0.1] = -100
    weight = (torch.rand(6) + 0.1).to(dtype)
    for options in ({}, {"reduction": "none"}, {"label_smoothing": 0.2}, {"weight": weight}):
        check(upsample_cross_entropy, stock_cross_entropy, input, target, **options)
    for squared in (True, False):
        check(upsample_cross_entropy_dice, stock_dice, input, target, squared=squared)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("function", [upsample_cross_entropy, upsample_cross_entropy_dice])
@pytest.mark.parametrize("scale", [1.5, 2, 4, 7.9, 8, 20])
@pytest.mark.parametrize("align_corners", [False, True])
def test_half_types_lose_nothing_but_their_last_rounding(function, dtype, scale, align_corners):
    """The arithmetic adds less than a twentieth of what rounding the result costs."""
    torch.manual_seed(2)
    input = (torch.randn(2, 11, 9, 17) * 3).to(dtype)
    height, width = (round(extent * scale) for extent in input.shape[2:])
    target = torch.randint(11, (2, -(-height // 5), -(-width // 7)))
    target = target.repeat_interleave(5, 1).repeat_interleave(7, 2)[:, :height, :width].contiguous()
    target[:, height // 2 : height // 2 + 9] = -100  # whole rows without a label
    gradients = {}
    for kind in (dtype, torch.float32):
        leaf = input.to(kind).requires_grad_()
        loss = function(leaf, target, align_corners=align_corners)
        # A power of two, so that fp16 gradients are normal numbers.
        gradients[kind] = torch.autograd.grad(loss, leaf, torch.tensor(2.0**12).to(loss))[0].float()
    exact = gradients[torch.float32]
    rounding = torch.finfo(dtype).eps / 2
    allowed = rounding * exact.abs() * 1.01 + rounding / 20 * exact.abs().max()
    assert (gradients[dtype] - exact).abs().sub(allowed).max() <= 0


def test_rows_of_few_last_pixels():
    """Every remainder of cells by lanes."""
    torch.manual_seed(3)
    for width in range(1, 36):
        for scale in (2, 3, 8, 11):
            input = torch.randn(2, 3, 4, width)  # enough numbers that stock's own error is not 0 by luck
            target = torch.randint(3, (2, 4 * scale, width * scale))
            check(upsample_cross_entropy, stock_cross_entropy, input, target)
            check(upsample_cross_entropy_dice, stock_dice, input, target)
            check(upsample_cross_entropy, stock_cross_entropy, input, target, align_corners=True, reduction="none")


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("function", [upsample_cross_entropy, upsample_cross_entropy_dice])
@pytest.mark.parametrize("scale", [3, 6.5, 8, 20])
@pytest.mark.parametrize("classes", [2, 33, 70])
def test_half_losses_are_those_of_float(function, dtype, scale, classes):
    """The loss of half types is that of the same logits in float."""
    torch.manual_seed(3)
    input = (torch.randn(2, classes, 6, 19) * 3).to(dtype)
    height, width = (round(extent * scale) for extent in input.shape[2:])
    target = torch.randint(classes, (2, -(-height // 3), -(-width // 5)))
    target = target.repeat_interleave(3, 1).repeat_interleave(5, 2)[:, :height, :width].contiguous()
    target[torch.rand(target.shape) < 0.1] = 255
    target[0, : height // 3] = 255
    with torch.autocast("cpu", dtype=torch.bfloat16):  # losses of half types come in float
        loss = function(input, target, ignore_index=255)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, function(input.float(), target, ignore_index=255), rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", [
    {}, {"ce_weight": 0.0}, {"dice_weight": 0.0}, {"ce_weight": 1e-9, "dice_weight": 3.0}, {"ce_weight": -0.5},
    {"squared": False, "include_background": False, "smooth": 1.0}, {"per_image": True}, {"label_smoothing": 0.3},
    {"ignore_index": 0}, {"pixel_weight": torch.linspace(0, 1, 4480).view(2, 40, 56)},
    {"pixel_weight": torch.zeros(2, 40, 56)},
], ids=lambda options: " ".join(options) or "plain")  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dice_in_one_call_is_the_two_steps(options, dtype, monkeypatch):
    """Statistics, loss and gradient from one call of C++, against the ops that other devices and many ranks take."""
    torch.manual_seed(4)
    input, target = torch.randn(2, 5, 5, 7).to(dtype).requires_grad_(), torch.randint(5, (2, 40, 56))
    results = []
    for in_one_call in (True, False):
        if not in_one_call:
            monkeypatch.setattr(upsample_module, "_in_one_call", lambda _: False)
        loss = upsample_cross_entropy_dice(input, target, **options)
        gradient = torch.autograd.grad(loss, input, torch.tensor(0.3).to(loss), retain_graph=True)[0]
        again = torch.autograd.grad(loss, input, torch.tensor(0.3).to(loss))[0]
        torch.testing.assert_close(again, gradient, rtol=0, atol=0, equal_nan=True)
        results.append((loss.detach(), gradient))
    (loss, gradient), (expected, expected_gradient) = results
    assert torch.equal(loss, expected) or (loss.isnan() and expected.isnan())
    largest = expected_gradient.abs().nan_to_num().max().item()
    tolerance = 4 * torch.finfo(dtype).eps * largest
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=tolerance, equal_nan=True)


def test_dice_in_one_call_differentiates_twice():
    """Against the reference in fp64: the gradient that the forward computed is not used."""
    torch.manual_seed(5)
    input, target, direction = torch.randn(1, 4, 3, 5), torch.randint(4, (1, 24, 40)), torch.randn(1, 4, 3, 5)
    products = []
    for dtype in (torch.float32, torch.float64):
        leaf = input.to(dtype).requires_grad_()
        gradient = torch.autograd.grad(upsample_cross_entropy_dice(leaf, target), leaf, create_graph=True)[0]
        products.append(torch.autograd.grad((gradient * direction).sum(), leaf)[0].double())
    product, exact = products
    assert exact.abs().max() > 1e-4
    torch.testing.assert_close(product, exact, rtol=0, atol=1e-5 * exact.abs().max().item())


def test_dice_without_a_gradient_makes_none():
    """If it was not computed in the forward, the backward computes it."""
    input, target = torch.randn(1, 3, 4, 5), torch.randint(3, (1, 32, 40))
    op, options = REGISTRY["upsample_cross_entropy_dice"], (None, None, None, False, -100, 0.0, True)
    arguments = input, target, *options, 1.0, 1.0, 1e-6, True, False, False
    loss, _, gradient = op(*arguments, False, torch.float32)
    assert gradient.numel() == 0
    leaf = input.clone().requires_grad_()
    late, early = (op(leaf, *arguments[1:], made, torch.float32) for made in (False, True))
    assert torch.equal(late[0], loss) and torch.equal(early[0], loss)
    late, early = (torch.autograd.grad(result[0], leaf)[0] for result in (late, early))
    torch.testing.assert_close(late, early, rtol=1e-5, atol=1e-8)
