"""paste_masks and upsample_masks in plain PyTorch: the definitions of the ops."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg._dtypes import accumulator

PACKED, BOOLEAN, SOFT = range(3)  # forms of the output: bits, 32 to an int32; a bool for each pixel; its value
_MOST = 1e300  # numbers below it count as finite


def paste_masks(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float, torchvision: bool, form: int
) -> Tensor:
    """Masks (N, h, w) pasted into boxes (N, 4), x1, y1, x2, y2, of an image; half types in fp32."""
    values = masks.to(accumulator(masks.dtype))
    boxes = boxes.to(values.dtype)
    rows, row_inside = _taps(boxes[:, 1], boxes[:, 3], values.shape[1], height, torchvision)
    columns, column_inside = _taps(boxes[:, 0], boxes[:, 2], values.shape[2], width, torchvision)
    values = F.pad(values, (1, 1, 1, 1))
    values = _mix(_mix(values, rows).mT, columns).mT
    inside = row_inside[:, :, None] & column_inside[:, None]
    values = torch.where(inside, values, 0)
    return _written(values, inside & (values > threshold if torchvision else values >= threshold), form)


def _taps(low: Tensor, high: Tensor, cells: int, size: int, torchvision: bool) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """For every pixel along an axis, (N, size): the lower of two neighbours in the mask with a zero on each side, the
    share of the other one, and whether the mask reaches the pixel.
    """
    if torchvision:  # the padded mask; the box grows in proportion, its ends are cut to integers, both inclusive
        centre, half = (high + low) * 0.5, (high - low) * 0.5 * ((cells + 2) / cells)
        begin, last = (centre - half).double().trunc(), (centre + half).double().trunc()
        extent, scale, shift = last - begin + 1, cells + 2, 1.5
    else:
        begin = low.double()
        extent, scale, shift = high.double() - begin, cells, 0.5
    valid = (begin.abs() < _MOST) & (extent > 0) & (extent < _MOST)
    pixel = torch.arange(size, dtype=torch.float64, device=low.device) + 0.5
    place = (pixel - begin[:, None]) / extent[:, None] * scale - shift
    inside = valid[:, None] & (place > -1) & (place < cells)
    place = torch.where(inside, place, 0)
    first = place.floor()
    return (first.long() + 1, place - first), inside


def _mix(values: Tensor, taps: tuple[Tensor, Tensor]) -> Tensor:
    """(N, rows, columns) to (N, size, columns)."""
    first, share = taps
    index = first[:, :, None].expand(-1, -1, values.shape[2])
    low, high = values.gather(1, index), values.gather(1, index + 1)
    return (1 - share).to(values.dtype)[:, :, None] * low + share.to(values.dtype)[:, :, None] * high


def upsample_masks(
    logits: Tensor, padded_size, input_size, height: int, width: int, threshold: float, form: int
) -> Tensor:
    """Interpolates (N, h, w) to padded_size and the first input_size of that to (height, width); half types in fp32."""
    values = logits.to(accumulator(logits.dtype))[:, None]
    if values.shape[0]:
        values = F.interpolate(values, size=tuple(padded_size), mode="bilinear", align_corners=False)
        values = values[..., : input_size[0], : input_size[1]]
        values = F.interpolate(values, size=(height, width), mode="bilinear", align_corners=False)
    else:
        values = values.new_empty(0, 1, height, width)
    return _written(values[:, 0], values[:, 0] > threshold, form)


def _written(values: Tensor, belongs: Tensor, form: int) -> Tensor:
    if form == SOFT:
        return values
    if form == BOOLEAN:
        return belongs
    bits = F.pad(belongs.long(), (0, -belongs.shape[2] % 32)).unflatten(2, (-1, 32))
    return (bits << torch.arange(32, device=bits.device)).sum(3).to(torch.int32)
