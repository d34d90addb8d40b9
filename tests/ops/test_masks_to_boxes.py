"""masks_to_boxes: against a search in NumPy, which is torchvision's definition; empty masks."""

import pytest
import torch

from fastseg.ops import PackedMasks, masks_to_boxes, pack_masks
from tests.contract import Case, Contract
from tests.ops._masks import WIDTHS, ellipses, noise


def brute_force(masks):
    """torchvision's boxes: the extremes of the pixels that are not 0; zeros if there are none."""
    boxes = torch.zeros(len(masks), 4, device=masks.device)
    for box, mask in zip(boxes, masks.detach()):
        y, x = torch.where(mask != 0)
        if len(x):
            box[:] = torch.stack([x.min(), y.min(), x.max(), y.max()])
    return boxes


CONTRACTS = [
    Contract(
        function=masks_to_boxes,
        stock=brute_force,
        cases=[
            Case("masks", lambda make: dict(masks=make.floating(3, 9, 40))),
            Case("no masks", lambda make: dict(masks=make.floating(0, 9, 40))),
            Case("no pixels", lambda make: dict(masks=make.floating(2, 0, 40))),
        ],
        rejected=(torch.int64, torch.complex64),
        exact=True,
    )
]


@pytest.mark.sanitized
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width, backend, device):
    masks = noise(8, 11, width, density=0.02).to(device)
    expected = brute_force(masks)
    packed = PackedMasks(pack_masks(masks).words, width)
    for given_masks in (masks, masks.to(torch.uint8) * 7, masks.half(), packed):
        assert torch.equal(masks_to_boxes(given_masks, backend=backend), expected)


def test_single_pixels_everywhere(device):
    """One pixel per mask, at every place of a word."""
    pixels = torch.eye(3 * 67, dtype=torch.bool, device=device).view(-1, 3, 67)
    boxes = masks_to_boxes(pixels)
    x, y = torch.arange(67).repeat(3), torch.arange(3).repeat_interleave(67)
    assert torch.equal(boxes.cpu(), torch.stack([x, y, x, y], 1).float())


def test_an_empty_mask_gives_zeros(device):
    masks = ellipses(4, 30, 40).to(device)
    masks[2] = False
    assert masks_to_boxes(masks)[2].tolist() == [0, 0, 0, 0]
    assert torch.equal(masks_to_boxes(masks), brute_force(masks))


def test_nan_is_not_zero():
    masks = torch.zeros(1, 4, 4)
    masks[0, 1, 2] = torch.nan
    assert masks_to_boxes(masks).tolist() == [[2, 1, 2, 1]]


@pytest.mark.parametrize(
    "masks, error, message",
    [
        ([1], TypeError, "masks is list; allowed: torch.Tensor"),
        (torch.zeros(4, 4), RuntimeError, r"masks has shape \(4, 4\); allowed: \(N, H, W\)"),
        (torch.zeros(1, 4, 4).long(), RuntimeError, "masks has dtype int64"),
    ],
)
def test_bad_arguments_are_named(masks, error, message):
    with pytest.raises(error, match=f"fastseg.ops.masks_to_boxes: {message}"):
        masks_to_boxes(masks)
