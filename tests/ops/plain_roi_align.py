"""RoI align sample by sample in plain PyTorch, like torchvision's kernel: tests compare our ops with it."""

import math

import torch

from fastseg._dtypes import accumulator


def _samples(start, length, bins, count, size):
    """(low cells, upper cells, weight of the upper ones, 1 or 0 for samples outside) of bins * count samples."""
    place = torch.arange(bins, dtype=start.dtype)[:, None]
    at = start + place * (length / bins) + (torch.arange(count, dtype=start.dtype) + 0.5) * (length / bins) / count
    at = at.flatten()
    inside = (at >= -1) & (at <= size)
    at = torch.where(inside, at.clamp(min=0), 0)
    low = at.long().clamp(max=size - 1)
    last = low >= size - 1
    upper = torch.where(last, low, low + 1)
    return low, upper, torch.where(last, 0, at - low), inside.to(start.dtype)


def plain_roi_align(input, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False):
    if not isinstance(boxes, torch.Tensor) and not boxes:
        boxes = input.new_zeros(0, 5)
    if not isinstance(boxes, torch.Tensor):
        boxes = torch.cat([torch.cat([torch.full_like(own[:, :1], i), own], 1) for i, own in enumerate(boxes)])
    bin_rows, bin_columns = (output_size, output_size) if isinstance(output_size, int) else output_size
    compute = accumulator(input.dtype)
    images, channels, height, width = input.shape
    found = []
    for box in boxes.to(compute).cpu():
        offset = 0.5 if aligned else 0.0
        left, top, right, bottom = (box[1:] * spatial_scale - offset).unbind()
        across, down = right - left, bottom - top
        if not aligned:
            across, down = across.clamp(min=1), down.clamp(min=1)
        rows = sampling_ratio if sampling_ratio > 0 else math.ceil(down / bin_rows)
        columns = sampling_ratio if sampling_ratio > 0 else math.ceil(across / bin_columns)
        if rows <= 0 or columns <= 0:
            found.append(input.new_zeros(channels, bin_rows, bin_columns, dtype=compute) + 0 * input.sum().to(compute))
            continue
        low_y, high_y, ly, inside_y = _samples(top, down, bin_rows, rows, height)
        low_x, high_x, lx, inside_x = _samples(left, across, bin_columns, columns, width)
        image = input[int(box[0])].to(compute)
        ly, lx = ly[:, None].to(image.device), lx.to(image.device)
        upper = image[:, low_y][:, :, low_x] * (1 - lx) + image[:, low_y][:, :, high_x] * lx
        lower = image[:, high_y][:, :, low_x] * (1 - lx) + image[:, high_y][:, :, high_x] * lx
        samples = (upper * (1 - ly) + lower * ly) * (inside_y[:, None] * inside_x).to(image.device)
        found.append(samples.view(channels, bin_rows, rows, bin_columns, columns).mean((2, 4)))
    if not found:
        return input.sum() * 0 + input.new_zeros(0, channels, bin_rows, bin_columns)
    return torch.stack(found).to(input.dtype)


def plain_multiscale_roi_align(
    inputs, boxes, output_size, spatial_scales, sampling_ratio=2, aligned=False, canonical_scale=224, canonical_level=4
):
    """Level by level, by torchvision's rule, written as in torchvision."""
    if not isinstance(boxes, torch.Tensor):
        boxes = torch.cat([torch.cat([torch.full_like(own[:, :1], i), own], 1) for i, own in enumerate(boxes)])
    least, most = (-int(math.log2(spatial_scales[place])) for place in (0, -1))
    sides = ((boxes[:, 3] - boxes[:, 1]) * (boxes[:, 4] - boxes[:, 2])).sqrt()
    level = torch.floor(canonical_level + torch.log2(sides / canonical_scale) + 1e-6).clamp(least, most) - least
    total = 0
    for place, (input, scale) in enumerate(zip(inputs, spatial_scales)):
        own = plain_roi_align(input, boxes, output_size, scale, sampling_ratio, aligned)
        total = total + own * (level == place).to(own.device, own.dtype).view(-1, 1, 1, 1)
    return total
