"""The rule of infinite and NaN logits at ignored pixels (CONTRIBUTING.md), for tests/ and tests/triton_interpreter."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastseg import ops

CLASSES, IGNORED = 3, 255
LAYOUTS = torch.contiguous_format, torch.channels_last


def _labels(height, width):
    labels = torch.arange(2 * height * width).view(2, height, width) % CLASSES
    labels[0, : height // 2] = IGNORED
    return labels


def _mask():
    mask = (_labels(8, 6) == 1).float().unsqueeze(1)
    mask[0, :, :4] = IGNORED
    return mask


# (function, target, options); one logit in the first row of the first image is not finite
INERT = {
    "focal_loss": (ops.focal_loss, _labels(8, 6), {}),
    "focal_loss without a sum": (ops.focal_loss, _labels(8, 6), dict(reduction="none")),
    "class balanced": (ops.focal_loss, _labels(8, 6), dict(alpha=torch.tensor([1.0, 2.0, 3.0]), gamma=0.0)),
    "dice_loss": (ops.dice_loss, _labels(8, 6), {}),
    "cross_entropy_dice": (ops.cross_entropy_dice, _labels(8, 6), dict(label_smoothing=0.1, per_image=True)),
    "binary_cross_entropy_dice": (ops.binary_cross_entropy_dice, _mask(), {}),
    "upsample_cross_entropy": (ops.upsample_cross_entropy, _labels(16, 12), dict(label_smoothing=0.1)),
    "upsample_cross_entropy without a sum": (ops.upsample_cross_entropy, _labels(16, 12), dict(reduction="none")),
    "upsample_cross_entropy_dice": (ops.upsample_cross_entropy_dice, _labels(16, 12), {}),
}


def check_inert(backend, values=(math.inf, -math.inf, math.nan), layouts=LAYOUTS):
    """Tests our own losses, with the gradient computed in the forward and in the backward."""

    @pytest.mark.parametrize("value", values)
    @pytest.mark.parametrize("name", INERT)
    def check(name, value):
        function, target, options = INERT[name]
        for layout in layouts:
            clean = torch.linspace(-2, 2, 2 * target.shape[0] * CLASSES * 24).view(2, -1, 8, 6)
            clean = clean[:, : 1 if function is ops.binary_cross_entropy_dice else CLASSES].cos()
            clean = clean.contiguous(memory_format=layout)
            hostile = clean.clone()
            hostile[0, -1, 0, 2] = value
            results = []
            for input in (clean, hostile):
                input.requires_grad_()
                loss = function(input, target, ignore_index=IGNORED, backend=backend, **options)
                early = torch.autograd.grad(loss.sum(), input, retain_graph=True)[0]
                late = torch.autograd.grad(loss.sum(), input, create_graph=True)[0]
                results.append((loss.detach(), early, late.detach()))
            for ours, expected in zip(*results[::-1]):
                torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)
            assert not results[1][1][0, :, 0].any() and results[1][1].any()

    return check


def check_as_stock(backend, values=(math.inf, -math.inf, math.nan), layouts=LAYOUTS):
    """Tests cross_entropy: 0 in the loss and NaN in the gradient."""

    @pytest.mark.parametrize("value", values)
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def check(reduction, value):
        for layout in layouts:
            input = torch.linspace(-2, 2, 2 * CLASSES * 48).cos().view(2, -1, 8, 6).contiguous(memory_format=layout)
            input[0, -1, 0, 2] = value
            input.requires_grad_()
            options = dict(ignore_index=IGNORED, reduction=reduction)
            losses = (
                ops.cross_entropy(input, _labels(8, 6), backend=backend, **options),
                F.cross_entropy(input, _labels(8, 6), **options),
            )
            torch.testing.assert_close(*losses)
            for create_graph in (False, True):
                ours, stock = (
                    torch.autograd.grad(loss.sum(), input, retain_graph=True, create_graph=create_graph)[0]
                    for loss in losses
                )
                torch.testing.assert_close(ours, stock, equal_nan=True)
                assert ours[0, :, 0, 2].isnan().any() == (value != -math.inf)  # -inf has probability 0

    return check
