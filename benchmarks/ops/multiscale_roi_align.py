"""multiscale_roi_align of 512 boxes of one image over four pyramid levels, forward and backward, 7 x 7 bins.

The shape of a case is that of the finest level. All levels are one flat tensor, so that their gradient is one, too.
"""

import torch

import fastseg.ops
from benchmarks import peers
from benchmarks.harness import MEMORY_FORMATS, Case, Peer
from benchmarks.ops.max_pool2d import receive
from benchmarks.ops.roi_align import BOXES, SAMPLES, verifier

BINS, SCALES = 7, [1 / 4, 1 / 8, 1 / 16, 1 / 32]
CANONICAL_SCALE, CANONICAL_LEVEL = 224, 4


def level_shapes(shape):
    return [(shape[0], shape[1], max(1, shape[2] >> level), max(1, shape[3] >> level)) for level in range(len(SCALES))]


def make(shape, device, dtype, layout):
    """The cells of all levels, the gradient of the output, boxes from 16 pixels to half the image, level shapes,
    memory format.
    """
    shapes, memory_format = level_shapes(shape), MEMORY_FORMATS[layout]
    cells = torch.randn(sum(map(torch.Size.numel, map(torch.Size, shapes))), device=device).to(dtype)
    extent = torch.tensor([shape[3], shape[2]]) / SCALES[0]
    centre, side = torch.rand(BOXES, 2) * extent, 16 * (extent / 32) ** torch.rand(BOXES, 2)
    low, high = (centre - side / 2).clamp(min=0), torch.minimum(centre + side / 2, extent)
    boxes = torch.cat([torch.zeros(BOXES, 1), low, high], 1).to(device)
    gradient = torch.randn(BOXES, shape[1], BINS, BINS, device=device).to(dtype)
    return cells, gradient.contiguous(memory_format=memory_format), boxes, shapes, layout


def levels_of(cells, shapes, layout):
    parts = cells.split([torch.Size(shape).numel() for shape in shapes])
    if layout == "channels_last":
        return [part.view(n, h, w, c).permute(0, 3, 1, 2) for part, (n, c, h, w) in zip(parts, shapes)]
    return [part.view(shape) for part, shape in zip(parts, shapes)]


def ours(cells, gradient, boxes, shapes, layout):
    return receive(
        fastseg.ops.multiscale_roi_align(levels_of(cells, shapes, layout), boxes, BINS, SCALES, SAMPLES), gradient
    )


def level_by_level(cells, gradient, boxes, shapes, layout):
    """One call of our roi_align for the boxes of each level; results are joined by index, as detectors do."""
    sides = (boxes[:, 3:] - boxes[:, 1:3]).prod(1).sqrt()
    wanted = (CANONICAL_LEVEL + torch.log2(sides / CANONICAL_SCALE) + 1e-6).floor().clamp(2, 5).long() - 2
    output = torch.zeros_like(gradient)
    for place, (level, scale) in enumerate(zip(levels_of(cells, shapes, layout), SCALES)):
        chosen = (wanted == place).nonzero()[:, 0]
        part = fastseg.ops.roi_align(level, boxes[chosen].to(level.dtype), BINS, scale, SAMPLES)
        output = output.index_copy(0, chosen, part)
    return receive(output, gradient)


def torchvision_pooler(cells, gradient, boxes, shapes, layout):
    from torchvision.ops import MultiScaleRoIAlign

    names = [str(level) for level in range(len(shapes))]
    pooler = MultiScaleRoIAlign(names, BINS, SAMPLES)
    image = shapes[0][2] * 4, shapes[0][3] * 4
    output = pooler(dict(zip(names, levels_of(cells, shapes, layout))), [boxes[:, 1:].to(cells.dtype)], [image])
    return receive(output, gradient)


def minimal_bytes(shape, dtype):
    """Levels and output once, and the same for their gradients."""
    cells = sum(torch.Size(level).numel() for level in level_shapes(shape))
    return dtype.itemsize * 2 * (cells + BOXES * shape[1] * BINS * BINS)


def case(layout="contiguous"):
    contestants = {
        "fastseg level by level": Peer(level_by_level, ours=True),
        "torchvision": Peer(torchvision_pooler, missing=peers.missing("torchvision")),
    }
    return Case(
        "multiscale_roi_align", (1, 256, 200, 336), make, ours, contestants, minimal_bytes, verifier(level_by_level),
        name="7x7, 4 levels", layout=layout, quick_shape=(1, 16, 25, 42),
    )  # fmt: skip


CASES = [case(), case("channels_last")]
