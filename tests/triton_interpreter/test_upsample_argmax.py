"""The Triton kernel of upsample_argmax in the interpreter, and the sampling rule that the upsample kernels share."""

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fastseg.kernels._cells import axis, first_output, sample
from fastseg.ops import upsample_argmax
from fastseg.testing import allowed_error, assert_within_policy


@triton.jit
def sampling_kernel(
    cells, fractions, firsts, source, output, numerator, denominator_bits, HALF: tl.constexpr, BLOCK: tl.constexpr
):
    o = tl.arange(0, BLOCK)
    cell, fraction = sample(o, source, numerator, denominator_bits, HALF)
    tl.store(cells + o, cell, mask=o < output)
    tl.store(fractions + o, fraction, mask=o < output)
    tl.store(firsts + o, first_output(o, source, output, numerator, denominator_bits, HALF), mask=o <= source + 1)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    "source, output, scale_factor",
    [(5, 40, None), (5, 41, 8.3), (7, 21, 3.0), (1, 9, None), (9, 1, None), (30, 11, None), (30, 11, 0.37),
     (6, 6, None), (12, 12, 1.05), (33, 97, None)],
)  # fmt: skip
def test_sampling_rule(source, output, scale_factor, align_corners):
    cells, fractions = torch.empty(128, dtype=torch.int32), torch.empty(128)
    firsts = torch.empty(128, dtype=torch.int32)
    rule = axis(source, output, scale_factor, align_corners)
    half = 0.0 if align_corners else 0.5
    sampling_kernel[(1,)](
        cells, fractions, firsts, source, output, rule.numerator, rule.denominator_bits, HALF=half, BLOCK=128
    )
    cells, fractions, firsts = cells[:output].long(), fractions[:output].double(), firsts[: source + 2].long()
    ramp = torch.arange(source, dtype=torch.float64)
    scales = (None, None) if scale_factor is None else (1.0, scale_factor)
    expected = torch.ops.aten.upsample_bilinear2d(ramp.view(1, 1, 1, -1), [1, output], align_corners, *scales).flatten()
    low = (cells - 1).clamp(min=0)
    high = (low + rule.span).clamp(max=source - 1)
    assert torch.allclose((1 - fractions) * ramp[low] + fractions * ramp[high], expected, rtol=0, atol=1e-6 * source)
    assert (cells.diff() >= 0).all() and 0 <= cells.min() and cells.max() <= source
    assert torch.equal(firsts, torch.searchsorted(cells, torch.arange(source + 2)))
    assert rule.fullest == cells.bincount().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "shape, arguments",
    [
        ((2, 5, 3, 9), dict(scale_factor=8)),
        ((1, 4, 3, 40), dict(size=(23, 130), align_corners=True)),
        ((1, 7, 4, 30), dict(scale_factor=(2, 3.7))),
        ((1, 3, 6, 9), dict(size=(6, 9))),
        ((1, 3, 9, 20), dict(scale_factor=0.5)),
    ],
)
def test_labels(shape, arguments, dtype, channels_last):
    input = torch.randn(shape).to(dtype)
    input = input.to(memory_format=torch.channels_last) if channels_last else input
    labels = upsample_argmax(input, **arguments, backend="triton")
    exact = F.interpolate(input.double(), mode="bilinear", **arguments)
    single = F.interpolate(input.float(), mode="bilinear", **arguments)
    assert (exact.amax(1) - exact.gather(1, labels[:, None])[:, 0]).max() <= 2 * allowed_error(single, exact)
    assert torch.equal(upsample_argmax(input, **arguments, dtype=torch.uint8, backend="triton").long(), labels)


@pytest.mark.parametrize("scale_factor", [1, 4, 8])
def test_first_maximum_wins_ties(scale_factor):
    input = torch.randint(-2, 3, (1, 9, 5, 20)).float()
    input[input == 0] = torch.where(torch.rand(int((input == 0).sum())) < 0.5, 0.0, -0.0)  # equal, with other bits
    expected = F.interpolate(input, scale_factor=scale_factor, mode="bilinear").argmax(1)
    assert torch.equal(upsample_argmax(input, scale_factor=scale_factor, backend="triton"), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_hostile_values(value):
    input = torch.randint(-8, 9, (1, 5, 6, 12)).float()
    input[torch.rand(input.shape) < 0.05] = value
    expected = F.interpolate(input, scale_factor=8, mode="bilinear").argmax(1)
    assert torch.equal(upsample_argmax(input, scale_factor=8, backend="triton"), expected)


@pytest.mark.parametrize("classes", [4, 6])
def test_probability(classes):
    input = 3 * torch.randn(1, classes, 4, 9)
    labels, probability = upsample_argmax(input, scale_factor=8, return_probability=True, backend="triton")
    assert torch.equal(labels, upsample_argmax(input, scale_factor=8))
    exact = F.interpolate(input.double(), scale_factor=8, mode="bilinear").softmax(1).amax(1)
    single = F.interpolate(input, scale_factor=8, mode="bilinear").softmax(1).amax(1)
    assert_within_policy(probability, single, exact)


def test_no_image():
    assert upsample_argmax(torch.randn(0, 3, 4, 4), size=8, backend="triton").shape == (0, 8, 8)
