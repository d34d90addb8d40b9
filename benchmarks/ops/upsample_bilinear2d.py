"""upsample_bilinear2d: forward, and backward for a given gradient. The shape of a case is that of the output."""

from functools import partial

import torch
import torch.nn.functional as F

import fastseg.ops
from benchmarks import peers
from benchmarks.checks import in_double
from benchmarks.harness import MEMORY_FORMATS, Case, Inputs, Target, differentiable
from benchmarks.ops.max_pool2d import receive
from benchmarks.ops.upsample_cross_entropy import low_resolution
from fastseg.testing import assert_within_policy


def make(shape, device, dtype, layout, scale):
    """The image and the gradient of the upsampled one."""
    options = {"memory_format": MEMORY_FORMATS[layout]}
    image = torch.randn(low_resolution(shape, scale), device=device).to(dtype).contiguous(**options)
    return image, torch.randn(shape, device=device).to(dtype).contiguous(**options)


def stock(image, gradient, align_corners):
    size = gradient.shape[2:]
    return receive(F.interpolate(image, size, mode="bilinear", align_corners=align_corners), gradient)


def ours(image, gradient, align_corners):
    output = fastseg.ops.upsample_bilinear2d(image, gradient.shape[2:], align_corners=align_corners)
    return receive(output, gradient)


def minimal_bytes(shape, dtype, scale):
    """Image read and output written, gradient of the output read and that of the image written."""
    return 2 * dtype.itemsize * (torch.Size(shape).numel() + torch.Size(low_resolution(shape, scale)).numel())


def verifier(align_corners):
    """Output and gradient within the policy."""

    def verify(case: Case, inputs: Inputs) -> str | None:
        outputs, gradients = [], []
        for function, upsample, arguments in (
            (case.ours, fastseg.ops.upsample_bilinear2d, inputs),
            (partial(stock, align_corners=align_corners), partial(F.interpolate, mode="bilinear"), inputs),
            (partial(stock, align_corners=align_corners), partial(F.interpolate, mode="bilinear"), in_double(inputs)),
        ):
            image, gradient = arguments = differentiable(arguments, backward=True)
            outputs.append(upsample(image.detach(), gradient.shape[2:], align_corners=align_corners))
            function(*arguments).backward()
            gradients.append(image.grad)
        try:
            assert_within_policy(*outputs, "output")
            assert_within_policy(*gradients, "gradient")
        except AssertionError as error:
            return str(error)
        return None

    return verify


def case(shape, scale, align_corners=False, more_peers=None, **options):
    return Case(
        "upsample_bilinear2d", shape, partial(make, scale=scale), partial(ours, align_corners=align_corners),
        peers.stock(partial(stock, align_corners=align_corners)) | (more_peers or {}),
        partial(minimal_bytes, scale=scale), verifier(align_corners),
        name=f"x{scale:g}" + (" align_corners" if align_corners else ""), **options,
    )  # fmt: skip


TARGETS = (
    Target("speedup", 1.5),
    Target("speedup", 1.5, allocator="default"),
    Target("bandwidth", 0.85, allocator="default", device="cuda"),
)
CITYSCAPES, ADE, FEATURES = (2, 19, 512, 1024), (1, 150, 512, 512), (4, 256, 128, 128)
CASES = [
    case(CITYSCAPES, 8, targets=TARGETS),
    case(CITYSCAPES, 8, layout="channels_last", targets=TARGETS),
    case(CITYSCAPES, 8, align_corners=True, targets=TARGETS),
    case(CITYSCAPES, 8, dtype=torch.bfloat16, more_peers=peers.ours_in_float32(partial(ours, align_corners=False))),
    case(CITYSCAPES, 8, dtype=torch.bfloat16, layout="channels_last"),
    case(ADE, 4, targets=TARGETS),
    case(ADE, 4, layout="channels_last", targets=TARGETS),
    case(FEATURES, 2),
    case(FEATURES, 2, layout="channels_last"),
    case((2, 21, 513, 513), 7.9),
    case((2, 64, 128, 128), 0.5),
    case((2, 64, 128, 128), 0.5, layout="channels_last"),
]
