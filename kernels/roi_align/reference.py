"""roi_align and its gradient in plain PyTorch: the definition of the op.

Along each axis a box is a matrix, [bins, cells]: the weight of each cell in each bin. Everything else is sums of
products.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg._dtypes import accumulator
from fastseg._rois import invalid_index, memory_format

_NAME = "roi_align"
_MOST = 2.0**40  # samples in a bin: with more, those in the map weigh less than any rounding
_PRECISE = 4096  # samples in a bin whose positions fp32 can represent
_NEAR = 8  # adaptive samples within one cell of a cell, at most: they are more than half a cell apart


def axis_weights(
    low: Tensor, high: Tensor, scale: float, aligned: bool, bins: int, sampling_ratio: int, size: int
) -> Tensor:
    """[K, bins, size] weights for boxes that extend from `low` [K] to `high` in image coordinates."""
    offset = 0.5 if aligned else 0.0
    start = low * scale - offset
    length = high * scale - offset - start
    if not aligned:
        length = torch.where(length < 1, 1.0, length)  # NaN stays
    bin = length / bins
    samples = torch.full_like(bin, sampling_ratio) if sampling_ratio > 0 else bin.ceil()
    is_box = start.isfinite() & bin.isfinite() & (samples > 0) & (samples <= _MOST)
    start, bin, samples = (torch.where(is_box, value, 1.0) for value in (start, bin, samples))
    weights = _mean_of_samples(start, bin, samples, bins, sampling_ratio, size)
    if start.dtype == torch.float32 and sampling_ratio <= 0:
        exact = _mean_of_samples(start.double(), bin.double(), samples.double(), bins, sampling_ratio, size)
        weights = torch.where((samples > _PRECISE)[:, None, None], exact.float(), weights)
    return torch.where(is_box[:, None, None], weights, 0.0)


def _mean_of_samples(start, bin, samples, bins: int, sampling_ratio: int, size: int) -> Tensor:
    """The weights of each cell in each bin: each sample is shared by the two cells on either side of it."""
    start, bin, samples = (value.view(-1, 1, 1, 1) for value in (start, bin, samples))
    place = torch.arange(bins, device=start.device, dtype=start.dtype).view(1, -1, 1, 1)
    cell = torch.arange(size, device=start.device, dtype=start.dtype).view(1, 1, -1, 1)
    origin = start + place * bin
    if sampling_ratio > 0:
        sample = torch.arange(sampling_ratio, device=start.device, dtype=start.dtype)
    else:  # only samples near the cell
        nearest = ((cell - 1 - origin) * (samples / bin)).floor() - 2
        sample = torch.where(bin > 1, nearest, 0.0) + torch.arange(_NEAR, device=start.device, dtype=start.dtype)
    at = origin + (sample + 0.5) * bin / samples
    counts = (sample >= 0) & (sample < samples) & (at >= -1) & (at <= size)
    share = 1 - (at.clamp(0, size - 1) - cell).abs()
    return torch.where(counts & (share > 0), share, 0.0).sum(-1) / samples.squeeze(-1)


def _factors(boxes: Tensor, level: int, size, bins, images: int, spatial_scales, level_areas, sampling_ratio, aligned):
    """Rows [images, K, PH, H] and columns [K, PW, W] of a level; rows are 0 for boxes of other images or levels."""
    _, x1, y1, x2, y2 = boxes.unbind(1)
    area = (x2 - x1).double() * (y2 - y1).double()
    own = torch.zeros_like(area, dtype=torch.int64)
    for least in level_areas:
        own = own + (area >= least)
    invalid = invalid_index(_NAME, boxes, images)
    image = torch.where(invalid, -1.0, boxes[:, 0].trunc())
    scale, rows, columns = spatial_scales[level], *size
    along_y = axis_weights(y1, y2, scale, aligned, bins[0], sampling_ratio, rows)
    along_x = axis_weights(x1, x2, scale, aligned, bins[1], sampling_ratio, columns)
    is_own = (image == torch.arange(images, device=boxes.device)[:, None]) & (own == level)
    return along_y * is_own[:, :, None, None], along_x


def _sum_of_products(equation: str, rows: Tensor, values: Tensor, columns: Tensor) -> Tensor:
    """The einsum, in which a value of weight 0 does not count even if it is NaN or infinite."""
    total = torch.einsum(equation, rows, torch.where(values.isfinite(), values, 0.0), columns)
    dtype, reached = total.dtype, [(factor > 0).to(total.dtype) for factor in (rows, columns)]
    for special, found in (
        (torch.inf, values == torch.inf),
        (-torch.inf, values == -torch.inf),
        (torch.nan, values.isnan()),
    ):
        count = torch.einsum(equation, reached[0], found.to(dtype), reached[1])
        total = total + torch.where(count > 0, special, 0.0)
    return total


def roi_align(
    input: Tensor,
    input1: Tensor | None,
    input2: Tensor | None,
    input3: Tensor | None,
    input4: Tensor | None,
    boxes: Tensor,
    output_size: Sequence[int],
    spatial_scales: Sequence[float],
    level_areas: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    channels_last: bool,
) -> Tensor:
    """out[k] = rows[k] @ input[image of k] @ columns[k].T, on the level of each box."""
    boxes = boxes.to(accumulator(input.dtype))
    sampling = spatial_scales, level_areas, sampling_ratio, aligned
    images = input.shape[0]
    invalid_index(_NAME, boxes, images)
    output = boxes.new_zeros(boxes.shape[0], input.shape[1], *output_size)
    for level, maps in enumerate((input, input1, input2, input3, input4)[: len(spatial_scales)]):
        rows, columns = _factors(boxes, level, maps.shape[2:], output_size, images, *sampling)
        for image, own_rows in zip(maps.to(boxes.dtype), rows):
            output = output + _sum_of_products("kpy,cyx,kqx->kcpq", own_rows, image, columns)
    return output.to(input.dtype).contiguous(memory_format=memory_format(channels_last))


def roi_align_backward(
    grad_output: Tensor,
    boxes: Tensor,
    sizes: Sequence[int],
    spatial_scales: Sequence[float],
    level_areas: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    channels_last: bool,
) -> tuple[Tensor, ...]:
    """grad_input[image] = the sum over its boxes of rows[k].T @ grad_output[k] @ columns[k]."""
    boxes = boxes.to(accumulator(grad_output.dtype))
    sampling = spatial_scales, level_areas, sampling_ratio, aligned
    images, channels, values = sizes[0], grad_output.shape[1], grad_output.to(boxes.dtype)
    gradients = []
    for level, size in enumerate(zip(sizes[1::2], sizes[2::2])):
        rows, columns = _factors(boxes, level, size, grad_output.shape[2:], images, *sampling)
        found = [_sum_of_products("kpy,kcpq,kqx->cyx", own_rows, values, columns) for own_rows in rows]
        gradient = torch.stack(found) if found else values.new_zeros(0, channels, *size)
        gradient = gradient.to(grad_output.dtype)
        gradients.append(gradient.contiguous(memory_format=memory_format(channels_last)))
    return *gradients, *[grad_output.new_empty(0) for _ in range(5 - len(gradients))]
