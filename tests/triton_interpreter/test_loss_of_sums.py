"""loss_of_sums in Triton against the reference; scalars cross to the kernel in fp32."""

import pytest
import torch

from fastseg._op import REGISTRY
from fastseg.kernels.cross_entropy_dice import triton_loss
from tests.ops.test_loss_of_sums import _sums


@pytest.mark.parametrize("images, classes", [(3, 5), (1, 19), (0, 4), (2, 9)])
@pytest.mark.parametrize("include_background", [True, False])
@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("ce_weight, dice_weight, denominator", [(1.0, 0.5, 7.0), (0.0, 2.0, 0.0), (0.5, 0.0, 0.0)])
def test_matches_the_reference(
    images, classes, include_background, per_image, ce_weight, dice_weight, denominator, monkeypatch
):
    monkeypatch.setattr(triton_loss, "MOST_CLASSES", 4)  # several blocks of classes
    sums = _sums(images, classes, denominator)
    for zero_if_empty in (False, True):
        options = ce_weight, dice_weight, 2.0**-10, include_background, per_image, zero_if_empty
        forward, backward = REGISTRY["loss_of_sums"], REGISTRY["loss_of_sums_backward"]
        for dtype in (torch.float32, torch.bfloat16):
            losses = [forward(*sums, *options, dtype, backend=backend) for backend in ("triton", "reference")]
            torch.testing.assert_close(*losses, equal_nan=True)
        slope = torch.tensor(1.5)
        gradients = [backward(*sums, slope, *options, backend=backend) for backend in ("triton", "reference")]
        for ours, expected in zip(*gradients):
            torch.testing.assert_close(ours, expected, equal_nan=True)
