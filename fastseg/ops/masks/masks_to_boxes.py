"""masks_to_boxes: the tight box around each mask, as torchvision.ops.masks_to_boxes gives it.

x1 = min x, y1 = min y, x2 = max x, y2 = max y   over the pixels (x, y) of a mask; zeros if it has none
"""

import torch
from torch import Tensor

from fastseg import _check
from fastseg.ops.masks.pack_masks import UNPACKED, pack_masks
from fastseg.ops.masks.packed import PackedMasks
from fastseg.ops.masks.statistics import mask_statistics_op

_NAME = "masks_to_boxes"


def masks_to_boxes(masks: PackedMasks | Tensor, *, backend: str = "auto") -> Tensor:
    """The tight box around every mask: torchvision.ops.masks_to_boxes, which fails on empty masks.

    Args:
        masks: `PackedMasks`, or (N, H, W) of bool, uint8, float32, float16, bfloat16 or float64, where every element
            that is not 0 (also NaN) belongs to its mask. Any strides.
        backend: "auto", "cpu", "cuda" or "reference".

    Returns:
        float32 (N, 4), boxes x1, y1, x2, y2 in pixels, the last column and row included (x2 = max x). An empty mask
        gives zeros. `PackedMasks.boxes` are integer boxes whose ends lie one past the last pixel.

    Raises:
        RuntimeError: another dtype or shape.
        TypeError: neither `PackedMasks` nor a tensor.
    """
    if isinstance(masks, PackedMasks):
        boxes = masks.boxes if backend == "auto" else mask_statistics_op(masks.words, backend=backend)[1]
    else:
        _check.tensor(_NAME, "masks", masks)
        _check.dtype(_NAME, "masks", masks, UNPACKED)
        _check.shape(_NAME, "masks", masks, ("N", "H", "W"))
        binary = masks != 0 if masks.is_floating_point() else masks
        boxes = pack_masks(binary, backend=backend).boxes
    occupied = boxes[:, 2:] > boxes[:, :2]
    return torch.cat([boxes[:, :2], boxes[:, 2:] - occupied.to(torch.int32)], 1).to(torch.float32)
