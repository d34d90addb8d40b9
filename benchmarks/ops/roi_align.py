"""roi_align of 512 boxes of one image: forward, or forward and backward for a given gradient.

The shape of a case is that of the feature map, its name the number of bins along each side.
"""

import torch
import torch.nn.functional as F

import fastseg.ops
from benchmarks import peers
from benchmarks.checks import in_double
from benchmarks.harness import MEMORY_FORMATS, Case, Peer, Target, differentiable
from benchmarks.ops.max_pool2d import receive
from fastseg._dtypes import HALF
from fastseg.testing import assert_within_policy

BOXES, SCALE, SAMPLES = 512, 0.25, 2


def make(bins, backward=True):
    def build(shape, device, dtype, layout):
        """The map, the gradient of the output (None for the forward alone), boxes of 25 to 180 pixels, and the number
        of bins.
        """
        image = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=MEMORY_FORMATS[layout])
        extent = torch.tensor([shape[3], shape[2]]) / SCALE
        centre, side = torch.rand(BOXES, 2) * extent, torch.exp(3.2 + 2 * torch.rand(BOXES, 2))
        low, high = (centre - side / 2).clamp(min=0), torch.minimum(centre + side / 2, extent)
        boxes = torch.cat([torch.zeros(BOXES, 1), low, high], 1).to(device)
        if not backward:
            return image, None, boxes, bins
        gradient = torch.randn(BOXES, shape[1], bins, bins, device=device).to(dtype)
        return image, gradient.contiguous(memory_format=MEMORY_FORMATS[layout]), boxes, bins

    return build


def finish(output, gradient):
    return output if gradient is None else receive(output, gradient)


def ours(image, gradient, boxes, bins):
    return finish(fastseg.ops.roi_align(image, boxes, bins, SCALE, SAMPLES), gradient)


def torchvision_roi_align(image, gradient, boxes, bins):
    from torchvision.ops import roi_align

    return finish(roi_align(image, boxes.to(image.dtype), bins, SCALE, SAMPLES), gradient)


def grid_sample(image, gradient, boxes, bins):
    """All samples by grid_sample, then their means: equal except for samples outside the map. Half types are computed
    in fp32: the backward of grid_sample in bfloat16 and channels_last crashes torch 2.14.
    """
    height, width = image.shape[2:]
    dtype, image = image.dtype, image.float() if image.dtype in HALF else image
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
    return finish(means.to(dtype), gradient)


def verifier(stock):
    """The gradient within the policy, or the value if there is no gradient; tests check the other values."""

    def verify(case, inputs):
        results = []
        for function, arguments in ((case.ours, inputs), (stock, inputs), (stock, in_double(inputs))):
            arguments = differentiable(arguments, backward=case.backward)
            result = function(*arguments)
            if case.backward:
                result.backward()
            results.append(arguments[0].grad if case.backward else result)
        try:
            assert_within_policy(*results, "gradient" if case.backward else "value")
        except AssertionError as error:
            return str(error)
        return None

    return verify


def minimal_bytes(bins, backward=True):
    def count(shape, dtype):
        """Map and output once, and the same for their gradients."""
        return dtype.itemsize * (1 + backward) * (torch.Size(shape).numel() + BOXES * shape[1] * bins * bins)

    return count


TORCHVISION = Peer(torchvision_roi_align, missing=peers.missing("torchvision"))


def case(bins, layout="contiguous", targets=(), backward=True, **options):
    return Case(
        "roi_align", (1, 256, 200, 336), make(bins, backward), ours,
        {"grid_sample": Peer(grid_sample), "torchvision": TORCHVISION}, minimal_bytes(bins, backward),
        verifier(grid_sample), name=f"{bins}x{bins}" if backward else f"{bins}x{bins} forward", layout=layout,
        targets=targets, backward=backward, quick_shape=(1, 16, 25, 42), **options,
    )  # fmt: skip


def on_gpu(value):
    return Target("speedup", value, "torchvision", allocator="default", device="cuda")


PLANES = Target("speedup", 15, "torchvision"), on_gpu(1)
INTERLEAVED = Target("speedup", 25, "torchvision"), on_gpu(1)
CASES = [
    case(7, targets=PLANES),
    case(7, "channels_last", INTERLEAVED),
    case(14, targets=PLANES),
    case(14, "channels_last", INTERLEAVED),
    case(7, "channels_last", dtype=torch.bfloat16),
    case(7, targets=(on_gpu(1.5),), backward=False),
    case(7, "channels_last", (on_gpu(1.5),), backward=False),
]
