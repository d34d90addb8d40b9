"""roi_pool and its gradient in plain PyTorch: the definition of the op."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg._dtypes import accumulator
from fastseg._rois import invalid_index, memory_format, without_image

_NAME = "roi_pool"
_FAR = 2.0**30  # cells, to which the ends of boxes are clamped


def _round(value: Tensor) -> Tensor:
    """Rounds halves away from 0, as C does (torch rounds them to even), and clamps."""
    return (value.trunc() + ((value - value.trunc()).abs() >= 0.5) * value.sign()).clamp(-_FAR, _FAR)


def bin_members(low: Tensor, high: Tensor, scale: float, bins: int, size: int) -> Tensor:
    """[K, bins, size]: which cells each bin has, for boxes that extend from `low` [K] to `high` in the image."""
    start, end = _round(low * scale), _round(high * scale)
    length = torch.clamp(end - start + 1, min=1) / bins
    place = torch.arange(bins, device=low.device, dtype=low.dtype)
    start, length = start[:, None], length[:, None]
    first = ((place * length).floor() + start)[..., None]
    last = (((place + 1) * length).ceil() + start)[..., None]
    cell = torch.arange(size, device=low.device, dtype=low.dtype)
    return (cell >= first) & (cell < last)  # all False where a box is NaN


def roi_pool(
    input: Tensor, boxes: Tensor, output_size: Sequence[int], spatial_scale: float, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """Each bin's last NaN, else its first maximum, and its index in the plane; 0 and -1 for a bin without cells."""
    boxes = boxes.to(accumulator(input.dtype))
    images, channels, height, width = input.shape
    invalid = invalid_index(_NAME, boxes, images) | ~boxes[:, 1:].isfinite().all(1)
    image = torch.where(invalid, 0.0, boxes[:, 0]).long()
    rows = bin_members(boxes[:, 2], boxes[:, 4], spatial_scale, output_size[0], height)
    columns = bin_members(boxes[:, 1], boxes[:, 3], spatial_scale, output_size[1], width)
    members = rows[:, :, None, :, None] & columns[:, None, :, None, :] & ~invalid.view(-1, 1, 1, 1, 1)
    members = members.flatten(3)[:, None]  # [K, 1, PH, PW, cells]
    planes = input.flatten(2)
    cells = planes[image] if images else planes.new_zeros(boxes.shape[0], channels, height * width)
    cells = cells[:, :, None, None]  # [K, C, 1, 1, cells]
    order = torch.arange(height * width, device=input.device)
    is_nan = members & cells.isnan()
    last_nan = torch.where(is_nan, order, -1).amax(-1)
    values = torch.where(members & ~cells.isnan(), cells, -torch.inf)
    largest = values.amax(-1, keepdim=True)
    first = torch.where(members & (values == largest), order, height * width).amin(-1)
    index = torch.where(last_nan >= 0, last_nan, first)
    has_cells = members.any(-1).expand_as(index)
    taken = cells.expand(*index.shape, -1).gather(-1, torch.where(has_cells, index, 0)[..., None])[..., 0]
    layout = memory_format(channels_last)
    output = torch.where(has_cells, taken, 0.0).contiguous(memory_format=layout)
    return output, torch.where(has_cells, index, -1).int().contiguous(memory_format=layout)


def roi_pool_backward(
    grad_output: Tensor, argmax: Tensor, boxes: Tensor, size: Sequence[int], spatial_scale: float, channels_last: bool
) -> Tensor:
    """Each gradient added at the index of its maximum, in the plane of the image of its box."""
    images, height, width = size
    channels, dtype = grad_output.shape[1], accumulator(grad_output.dtype)
    invalid = without_image(boxes, images)  # the forward has checked the index
    image = torch.where(invalid, 0.0, boxes[:, 0]).long()
    counts = (argmax >= 0) & (argmax < height * width) & ~invalid.view(-1, 1, 1, 1)
    plane = image[:, None] * channels + torch.arange(channels, device=boxes.device)
    place = plane[..., None] * (height * width) + torch.where(counts, argmax, 0).flatten(2)
    values = torch.where(counts, grad_output.to(dtype), 0.0).flatten(2)
    total = values.new_zeros(images * channels * height * width)
    if images:
        total = total.index_add(0, place.flatten(), values.flatten())
    total = total.view(images, channels, height, width).to(grad_output.dtype)
    return total.contiguous(memory_format=memory_format(channels_last))
