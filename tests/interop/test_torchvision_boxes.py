"""nms, batched_nms, masks_to_boxes and paste_masks against torchvision's own."""

import pytest
import torch

from fastseg import ops
from fastseg.testing import assert_within_policy

vision = pytest.importorskip("torchvision").ops
paste_masks_in_image = pytest.importorskip("torchvision.models.detection.roi_heads").paste_masks_in_image

FLOATS = (torch.float32, torch.float64)


def some_boxes(count, dtype=torch.float32, integer=False):
    """Boxes that are near each other or have no area; `integer`: with integer coordinates."""
    low, size = torch.rand(count, 2, dtype=dtype) * 60 - 10, torch.rand(count, 2, dtype=dtype) ** 2 * 50
    size[::17] = 0
    boxes = torch.cat([low, low + size], 1)
    return boxes.round() if integer else boxes


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("threshold", [0, 0.3, 0.5, 1 / 3, 1])
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 1000])
def test_nms(count, threshold, integer, dtype):
    boxes, scores = some_boxes(count, dtype, integer), torch.rand(count, dtype=dtype)
    if integer:
        scores = (scores * 10).round()  # with ties
    assert torch.equal(ops.nms(boxes, scores, threshold), vision.nms(boxes, scores, threshold))


def test_nms_of_what_is_not_finite():
    values = torch.tensor([0.0, 1, 5, float("inf"), -float("inf"), float("nan")])
    boxes, scores = values[torch.randint(6, (300, 4))], torch.rand(300)
    assert torch.equal(ops.nms(boxes, scores, 0.5), vision.nms(boxes, scores, 0.5))
    boxes, scores = some_boxes(300), values[torch.randint(6, (300,))]
    assert torch.equal(ops.nms(boxes, scores, 0.5), vision.nms(boxes, scores, 0.5))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [0, 1, 300, 1500])  # above 1000 boxes torchvision loops over classes
def test_batched_nms(count, dtype):
    """Boxes for which torchvision's offset per class does not round."""
    boxes, classes = (some_boxes(count, dtype, integer=True) + 10).clamp(min=0), torch.randint(7, (count,))
    scores = torch.randperm(count).to(dtype)
    for threshold in (0.1, 0.5):
        found = ops.batched_nms(boxes, scores, classes, threshold)
        assert torch.equal(found, vision.batched_nms(boxes, scores, classes, threshold))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
@pytest.mark.parametrize("size", [(0, 5, 6), (7, 1, 1), (20, 37, 70)])
def test_masks_to_boxes(size, dtype):
    masks = (torch.rand(size) > 0.97).to(dtype)
    masks[::4] = 0
    expected = vision.masks_to_boxes(masks)
    found = ops.masks_to_boxes(masks)
    assert torch.equal(found, expected) and found.dtype == expected.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("cells", [1, 2, 14, 28])
def test_paste_masks(cells, dtype):
    """Boxes that overlap the image, as those of a network; torchvision fails for others."""
    height, width = image = 50, 71
    low = torch.rand(30, 2) * torch.tensor([width + 8, height + 8]) - 10
    size = torch.rand(30, 2) ** 2 * 60
    size[::5] = 0
    boxes = torch.cat([low, (low + size).clamp(min=1)], 1)
    boxes[::3] = boxes[::3].round()
    boxes[::7] = torch.tensor([40.0, 5, 20, 30])  # with negative sizes
    masks = torch.rand(30, 1, cells, cells).to(dtype)
    found = ops.paste_masks(masks, boxes, image, convention="torchvision", output="soft")
    stock, exact = (paste_masks_in_image(values, boxes, image)[:, 0] for values in (masks, masks.double()))
    assert_within_policy(found, stock, exact)
    bits = ops.paste_masks(masks, boxes, image, convention="torchvision", output="bool")
    certain = (exact - 0.5).abs() > 1e-5
    assert torch.equal(bits[certain], (exact > 0.5)[certain])
