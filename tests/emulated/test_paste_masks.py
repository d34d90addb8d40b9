"""The CUDA kernels of paste_masks and upsample_masks, run on the CPU: the same bits as those of the C++ kernels."""

import pytest
import torch

from fastseg.kernels.paste_masks.reference import BOOLEAN, PACKED, SOFT
from fastseg.ops.masks.paste_masks import paste_masks_op, upsample_masks_op
from tests.ops.test_paste_masks import SIZES, VALUES, random_masks

FORMS = (PACKED, BOOLEAN, SOFT)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
kernels = torch.ops.fastseg_emulator


def compare(kernel, op, *arguments):
    expected = op(*arguments, backend="cpu")
    output = torch.full_like(expected, 7)
    kernel(*arguments, output)
    torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("torchvision", [False, True])
@pytest.mark.parametrize("width", [1, 31, 32, 33, 101])
def test_pasting(width, torchvision, form):
    masks, boxes = random_masks(8, (9, 13), (150, width))
    compare(kernels._paste_masks, paste_masks_op, masks, boxes, 150, width, 0.4, torchvision, form)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pasting_of_every_dtype(dtype):
    masks, boxes = random_masks(8, (28, 28), (70, 101), dtype=dtype)
    compare(kernels._paste_masks, paste_masks_op, masks, boxes.float(), 70, 101, 0.5, False, PACKED)


@pytest.mark.parametrize("torchvision", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_hostile_boxes(seed, torchvision):
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(VALUES)
    boxes = values[torch.randint(len(values), (40, 4), generator=generator)]
    masks = torch.tensor([0.0, 0.5, 1.0, float("nan"), float("inf")])[torch.randint(5, (40, 3, 2), generator=generator)]
    for form in FORMS:
        compare(kernels._paste_masks, paste_masks_op, masks, boxes, 9, 37, 0.5, torchvision, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SIZES)
def test_upsampling(name, form):
    logits, sizes = torch.randn(3, 17, 23), SIZES[name]
    padded = sizes.get("padded_size", (17, 23))
    arguments = logits, padded, sizes.get("input_size", padded), *sizes["size"], -0.25, form
    compare(kernels._upsample_masks, upsample_masks_op, *arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_upsampling_of_every_dtype(dtype):
    logits = torch.randn(2, 17, 23).to(dtype)
    compare(kernels._upsample_masks, upsample_masks_op, logits, (34, 46), (30, 46), 60, 70, 0.0, PACKED)


def test_empty():
    for form in FORMS:
        compare(kernels._paste_masks, paste_masks_op, torch.zeros(0, 3, 3), torch.zeros(0, 4), 5, 5, 0.5, False, form)
        compare(kernels._upsample_masks, upsample_masks_op, torch.zeros(0, 3, 3), (3, 3), (3, 3), 5, 5, 0.0, form)
