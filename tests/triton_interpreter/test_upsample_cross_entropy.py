"""The Triton kernels of the upsample losses in the interpreter, forward and backward, against the reference in fp64."""

import pytest
import torch

from fastseg.ops import upsample_cross_entropy, upsample_cross_entropy_dice
from fastseg.testing import assert_within_policy, max_error

# (input, output height and width, align_corners)
SHAPES = [
    ((2, 5, 3, 4), (24, 32), False),
    ((1, 5, 9, 5), (18, 10), False),  # two strips of source rows
    ((1, 2, 1, 17), (8, 136), False),  # two tiles of source columns
    ((1, 4, 3, 9), (17, 65), True),
    ((1, 3, 6, 7), (3, 4), False),  # smaller: most cells are empty
    ((1, 3, 4, 5), (4, 5), False),
    ((1, 2, 2, 1), (9, 25), False),  # more outputs in a cell than a program takes at once
]


def call(function, arguments, dtype, backend, **options):
    """(outputs, gradient of input) in `dtype`."""
    tensors = {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    # .to() keeps channels_last
    tensors["input"] = tensors["input"].detach().clone(memory_format=torch.preserve_format).requires_grad_()
    output = function(**tensors, **options, backend=backend)
    torch.manual_seed(3)
    grad_output = torch.randn(output.shape, dtype=torch.float64).to(torch.bfloat16).to(output.dtype)
    (gradient,) = torch.autograd.grad(output, tensors["input"], grad_output)
    return output.detach(), gradient


def compare(function, arguments, **options):
    """Ours in the input's dtype, stock being the reference backend in the same dtype, both against it in fp64."""
    dtype = arguments["input"].dtype
    ours = call(function, arguments, dtype, "triton", **options)
    stock = call(function, arguments, dtype, "reference", **options)
    exact = call(function, arguments, torch.float64, "reference", **options)
    for name, one, two, three in zip(("output", "gradient"), ours, stock, exact):
        # the interpreter truncates to bf16 where a GPU rounds to nearest: twice the error of one rounding
        if dtype == torch.bfloat16:
            allowed = 2 * max_error(two, three) + 2 * torch.finfo(dtype).eps * three.abs().max()
            assert max_error(one, three) <= allowed, name
        else:
            assert_within_policy(one, two, three, name)
    return ours


def make(shape, size, dtype=torch.float32, ignored=True, **options):
    labels = torch.randint(shape[1], (shape[0], *size))
    if ignored:
        labels[torch.rand(labels.shape) < 0.2] = -100
    return dict(input=(2 * torch.randn(shape)).to(dtype), target=labels, **options)


@pytest.mark.parametrize("shape, size, align_corners", SHAPES)
def test_cross_entropy(shape, size, align_corners):
    compare(upsample_cross_entropy, make(shape, size), align_corners=align_corners)


def test_losses_of_pixels():
    compare(upsample_cross_entropy, make((2, 3, 2, 3), (16, 24)), reduction="none")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype):
    compare(upsample_cross_entropy, make((1, 5, 2, 3), (16, 24), dtype))
    compare(upsample_cross_entropy_dice, make((1, 5, 2, 3), (16, 24), dtype))


def test_every_option():
    size = (11, 19)
    arguments = make((2, 5, 3, 5), size, ignored=False, weight=0.5 + torch.rand(5), pixel_weight=torch.rand(2, *size))
    arguments["target"] = arguments["target"].to(torch.int32)
    compare(upsample_cross_entropy, arguments, label_smoothing=0.2, reduction="sum", ignore_index=2)
    compare(upsample_cross_entropy_dice, arguments, label_smoothing=0.1, ce_weight=0.7, dice_weight=1.3, per_image=True)


@pytest.mark.parametrize("squared", [True, False])
def test_dice(squared):
    compare(upsample_cross_entropy_dice, make((2, 5, 3, 4), (24, 32)), squared=squared)


def test_dice_with_align_corners():
    compare(upsample_cross_entropy_dice, make((1, 4, 3, 4), (9, 13)), align_corners=True)


def test_scale_factor():
    arguments = make((1, 4, 3, 5), (11, 18))
    compare(upsample_cross_entropy, arguments, scale_factor=3.7)


def test_channels_last_gives_channels_last():
    arguments = make((2, 5, 3, 4), (24, 32))
    arguments["input"] = arguments["input"].to(memory_format=torch.channels_last)
    _, gradient = compare(upsample_cross_entropy, arguments)
    assert gradient.is_contiguous(memory_format=torch.channels_last) and not gradient.is_contiguous()


def test_strided_and_expanded_tensors():
    arguments = make((1, 4, 3, 10), (24, 40))
    arguments["input"] = torch.randn(1, 4, 3, 1).expand(1, 4, 3, 10)
    arguments["target"] = torch.randint(4, (1, 40, 24)).transpose(1, 2)
    compare(upsample_cross_entropy, arguments)


def test_labels_out_of_range_count_for_nothing():
    arguments = make((1, 4, 3, 4), (24, 32), ignored=False)
    arguments["target"][0, 3:9] = -100
    expected = call(upsample_cross_entropy, arguments, torch.float32, "triton")
    arguments["target"][0, 3:6], arguments["target"][0, 6:9] = 4, -1
    for one, two in zip(call(upsample_cross_entropy, arguments, torch.float32, "triton"), expected):
        assert torch.equal(one, two)


def test_infinite_logits():
    """A class masked out by -inf away from the border, where PyTorch's rule multiplies nothing by 0."""
    arguments = make((1, 4, 5, 6), (40, 48))
    arguments["input"][0, 2, 2:4, 2:4] = float("-inf")
    arguments["target"][arguments["target"] == 2] = 1
    compare(upsample_cross_entropy, arguments)


def test_large_logits_do_not_overflow():
    arguments = make((1, 4, 3, 5), (24, 40))
    arguments["input"] = 1e4 * arguments["input"]
    compare(upsample_cross_entropy, arguments, reduction="none")


def test_nothing_to_do():
    output, gradient = call(upsample_cross_entropy, make((0, 3, 4, 4), (8, 8)), torch.float32, "triton")
    assert output.isnan() and gradient.shape == (0, 3, 4, 4)
    arguments = make((1, 3, 4, 4), (8, 8))
    arguments["target"].fill_(-100)
    output, gradient = call(upsample_cross_entropy, arguments, torch.float32, "triton")
    assert output.isnan() and (gradient == 0).all()
