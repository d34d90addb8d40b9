"""Convolutions of any geometry, drawn at random, against fp64: outputs and gradients, in both directions."""

import random

import pytest
import torch
import torch.nn.functional as F

from fastseg import ops
from fastseg.testing import assert_within_policy
from tests.models.verification import together

DTYPES = torch.float32, torch.float32, torch.bfloat16, torch.float16


def drawn(draw: random.Random, transposed: bool):
    """(image shape, weight shape, the other numbers) of a call that stock accepts."""
    groups = draw.choice((1, 1, 2, 3, 5))
    per_group = 1 if draw.random() < 0.4 else draw.randint(1, 4)
    out_per_group = per_group if draw.random() < 0.6 else draw.randint(1, 4)
    kernel = [draw.choice((1, 2, 3, 3, 5, 8)) for _ in range(2)]
    stride = [draw.choice((1, 1, 2, 3, 8)) for _ in range(2)]
    dilation = [draw.choice((1, 1, 2, 5, 12)) for _ in range(2)]
    padding = [draw.choice((0, 1, dilation[axis] * (kernel[axis] // 2), draw.randint(0, 9))) for axis in (0, 1)]
    size = [draw.randint(1, 12) for _ in range(2)]
    numbers = dict(stride=tuple(stride), padding=tuple(padding), dilation=tuple(dilation), groups=groups)
    for axis in (0, 1):
        span = dilation[axis] * (kernel[axis] - 1) + 1
        if transposed:
            numbers.setdefault("output_padding", [0, 0])[axis] = draw.randint(0, max(stride[axis], dilation[axis]) - 1)
            least = (2 * padding[axis] - span - numbers["output_padding"][axis] + 1) // stride[axis] + 2
        else:
            least = span - 2 * padding[axis]
        size[axis] = max(size[axis], least)
    image = draw.randint(1, 3), groups * per_group, *size
    weight = (groups * per_group, out_per_group) if transposed else (groups * out_per_group, per_group)
    return image, (*weight, *kernel), numbers


def results(function, image, weight, bias, grad, numbers):
    leaves = [value.detach().requires_grad_() for value in (image, weight, bias)]
    output = function(*leaves, **numbers)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.expand_as(output))]


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("seed", range(8))
def test_any_geometry(seed, transposed):
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    ours, stock = (ops.conv_transpose2d, F.conv_transpose2d) if transposed else (ops.dilated_conv2d, F.conv2d)
    for _ in range(12):
        shape, weight_shape, numbers = drawn(draw, transposed)
        out_channels = weight_shape[1] * numbers["groups"] if transposed else weight_shape[0]
        dtype, layout = draw.choice(DTYPES), draw.choice((torch.contiguous_format, torch.channels_last))
        image, weight, bias = (
            torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
            for size in (shape, weight_shape, (out_channels,))
        )
        image = image.contiguous(memory_format=layout)
        grad = torch.randn(stock(image, weight, bias, **numbers).shape, generator=generator, dtype=torch.float64)
        grad = grad.to(dtype)[..., :1] if draw.random() < 0.2 else grad.to(dtype)  # some of stride 0
        # The bias is added separately: with one torch crashes in channels_last for, among others, stride (1, 8),
        # padding (1, 3), dilation (5, 12) and a kernel of 2x1.
        biased = lambda image, weight, bias: stock(image, weight, None, **numbers) + bias.view(-1, 1, 1)  # noqa: E731
        exact = results(biased, image.double(), weight.double(), bias.double(), grad.double(), {})
        # bf16 and fp16 by stock in fp32: its results in half types differ between processors
        by_stock = results(biased, image.float(), weight.float(), bias.float(), grad.float(), {})
        by_stock = [value.to(dtype) for value in by_stock]
        found = results(ours, image, weight, bias, grad, numbers)
        call = f"{shape}, {weight_shape}, {dtype}, {layout}, {numbers}"
        output, *gradients = zip(found, by_stock, exact)
        assert_within_policy(*output, f"output of {call}")
        assert_within_policy(
            *together(gradients), f"gradients of {call}"
        )  # some have one number, whose error is random
