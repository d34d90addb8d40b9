"""roi_align of 512 boxes of one image's finest pyramid level, forward, and backward for a gradient that is there.

The shape of a case is that of the feature map, its name the number of bins along each side.
"""

import torch
import torch.nn.functional as F

import fastseg.ops
from benchmarks import peers
from benchmarks.checks import in_double
from benchmarks.harness import MEMORY_FORMATS, Case, Peer, Target, differentiable
from benchmarks.ops.max_pool2d import receive
from fastseg.testing import assert_within_policy

BOXES, SCALE, SAMPLES = 512, 0.25, 2


def make(bins):
    def build(shape, device, dtype, layout):
        """The map, the gradient of the output, boxes of 25 to 180 pixels, and how many bins."""
        image = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=MEMORY_FORMATS[layout])
        extent = torch.tensor([shape[3], shape[2]]) / SCALE
        centre, side = torch.rand(BOXES, 2) * extent, torch.exp(3.2 + 2 * torch.rand(BOXES, 2))
        low, high = (centre - side / 2).clamp(min=0), torch.minimum(centre + side / 2, extent)
        boxes = torch.cat([torch.zeros(BOXES, 1), low, high], 1).to(device)
        gradient = torch.randn(BOXES, shape[1], bins, bins, device=device).to(dtype)
        return image, gradient.contiguous(memory_format=MEMORY_FORMATS[layout]), boxes, bins

    return build


def ours(image, gradient, boxes, bins):
    return receive(fastseg.ops.roi_align(image, boxes, bins, SCALE, SAMPLES), gradient)


def torchvision_roi_align(image, gradient, boxes, bins):
    from torchvision.ops import roi_align

    return receive(roi_align(image, boxes.to(image.dtype), bins, SCALE, SAMPLES), gradient)


def grid_sample(image, gradient, boxes, bins):
    """Every sample of the one image by grid_sample, then their means: equal but for samples outside of the map."""
    height, width = image.shape[2:]
    boxes = boxes.to(image.dtype)
    place = (torch.arange(bins * SAMPLES, device=image.device, dtype=image.dtype) + 0.5) / (bins * SAMPLES)
    axes = []
    for low, high, size in ((boxes[:, 1], boxes[:, 3], width), (boxes[:, 2], boxes[:, 4], height)):
        low, high = low * SCALE, high * SCALE
        at = low[:, None] + place * (high - low).clamp(min=1)[:, None]
        axes.append((at.clamp(0, size - 1) * 2 + 1) / size - 1)
    grid = torch.stack(torch.broadcast_tensors(axes[0][:, None, :], axes[1][:, :, None]), -1)
    samples = F.grid_sample(image, grid.flatten(0, 1)[None], padding_mode="border", align_corners=False)
    means = F.avg_pool2d(samples, SAMPLES)[0].unflatten(1, (BOXES, bins)).transpose(0, 1)
    return receive(means, gradient)


def verifier(plain):
    """The gradient within the policy; values are held to it by the tests."""

    def verify(case, inputs):
        gradients = []
        for function, arguments in ((case.ours, inputs), (plain, inputs), (plain, in_double(inputs))):
            arguments = differentiable(arguments, backward=True)
            function(*arguments).backward()
            gradients.append(arguments[0].grad)
        try:
            assert_within_policy(*gradients, "gradient")
        except AssertionError as error:
            return str(error)
        return None

    return verify


def minimal_bytes(bins):
    def count(shape, dtype):
        """Map, its gradient, output and the output's gradient once."""
        return dtype.itemsize * 2 * (torch.Size(shape).numel() + BOXES * shape[1] * bins * bins)

    return count


TORCHVISION = Peer(torchvision_roi_align, missing=peers.missing("torchvision"))


def case(bins, layout="contiguous", targets=(), **options):
    return Case(
        "roi_align", (1, 256, 200, 336), make(bins), ours,
        {"grid_sample": Peer(grid_sample), "torchvision": TORCHVISION}, minimal_bytes(bins),
        verifier(grid_sample), name=f"{bins}x{bins}", layout=layout,
        targets=targets, quick_shape=(1, 16, 25, 42), **options,
    )  # fmt: skip


PLANES, INTERLEAVED = (Target("speedup", 15, "torchvision"),), (Target("speedup", 25, "torchvision"),)
CASES = [
    case(7, targets=PLANES),
    case(7, "channels_last", INTERLEAVED),
    case(14, targets=PLANES),
    case(14, "channels_last", INTERLEAVED),
    case(7, "channels_last", dtype=torch.bfloat16),
]
