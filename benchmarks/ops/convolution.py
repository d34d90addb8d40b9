"""dilated_conv2d and conv_transpose2d: forward, and the gradients of input and weight for a given gradient."""

from dataclasses import dataclass, field
from math import prod

import torch
import torch.nn.functional as F

import fastseg.ops
from benchmarks import peers
from benchmarks.checks import in_double
from benchmarks.harness import MEMORY_FORMATS, Case, Inputs, Target, differentiable
from benchmarks.ops.max_pool2d import receive
from fastseg._bilinear import bilinear_kernel
from fastseg.ops.convolution.routes import visited_share
from fastseg.testing import assert_within_policy


@dataclass(frozen=True)
class Layer:
    """A convolution; `weight` is the shape (K, C / groups, R, S), for a transposed one (C, K / groups, R, S)."""

    weight: tuple[int, int, int, int]
    numbers: dict = field(default_factory=dict)
    transposed: bool = False
    bilinear: bool = False  # fixed weights

    def ours(self, image, weight):
        function = fastseg.ops.conv_transpose2d if self.transposed else fastseg.ops.dilated_conv2d
        return function(image, weight, **self.numbers)

    def stock(self, image, weight):
        function = F.conv_transpose2d if self.transposed else F.conv2d
        return function(image, weight, **self.numbers)

    def step(self, function):
        def run(image, weight, gradient):
            weight = weight.detach().requires_grad_(not self.bilinear)  # a new leaf: no gradient is accumulated
            return receive(function(image, weight), gradient)

        return run

    def make(self, shape, device, dtype, layout):
        options = {"memory_format": MEMORY_FORMATS[layout]}
        image = torch.randn(shape, device=device).to(dtype).contiguous(**options)
        if self.bilinear:
            weight = torch.zeros(self.weight, device=device)
            channels = torch.arange(self.weight[0])
            diagonal = 0 if self.weight[1] == 1 else channels
            weight[channels, diagonal] = bilinear_kernel(self.weight[-1]).to(device)
        else:
            weight = torch.randn(self.weight, device=device) / prod(self.weight[1:]) ** 0.5
        weight = weight.to(dtype)
        return image, weight, torch.randn_like(self.stock(image, weight)).contiguous(**options)

    def output_shape(self, shape):
        return self.stock(torch.empty(shape, device="meta"), torch.empty(self.weight, device="meta")).shape

    def minimal_bytes(self, shape, dtype):
        """Forward and backward: input, output, weight and their gradients."""
        maps = prod(shape) + prod(self.output_shape(shape))
        return dtype.itemsize * (2 * maps + (1 if self.bilinear else 2) * prod(self.weight))

    def flops(self, shape):
        """FLOPs of the taps inside the image, forward and backward; fixed bilinear weights: two taps per axis."""
        output = self.output_shape(shape)
        if self.bilinear:
            return 2 * 8.0 * prod(output)
        big, small = (output, shape) if self.transposed else (shape, output)
        defaults = {"stride": 1, "padding": 0, "dilation": 1}
        numbers = [self.numbers.get(name, default) for name, default in defaults.items()]
        share = prod(visited_share(big[axis], small[axis], self.weight[axis], *numbers) for axis in (2, 3))
        return 3 * 2.0 * prod(self.weight[1:]) * small[0] * small[2] * small[3] * self.weight[0] * share

    def verify(self, case: Case, inputs: Inputs) -> str | None:
        """Output and gradients within the policy."""
        found = []
        for function, arguments in ((self.ours, inputs), (self.stock, inputs), (self.stock, in_double(inputs))):
            image, weight, gradient = differentiable(arguments, backward=True)
            weight = weight.detach().requires_grad_(not self.bilinear)
            output = function(image, weight)
            leaves = [image] if self.bilinear else [image, weight]
            found.append([output.detach(), *torch.autograd.grad(output, leaves, gradient)])
        try:
            for what, *values in zip(("output", "gradient of the input", "gradient of the weight"), *found):
                assert_within_policy(*values, what)
        except AssertionError as error:
            return str(error)
        return None


def case(
    name,
    shape,
    weight,
    *targets,
    transposed=False,
    bilinear=False,
    layout="contiguous",
    dtype=torch.float32,
    quick_shape=None,
    devices=("cpu", "cuda"),
    **numbers,
):
    layer = Layer(weight, numbers, transposed, bilinear)
    return Case(
        "convolution", shape, layer.make, layer.step(layer.ours), peers.stock(layer.step(layer.stock)),
        layer.minimal_bytes, layer.verify, name=name, layout=layout, dtype=dtype, flops=layer.flops, targets=targets,
        quick_shape=quick_shape, devices=devices,
    )  # fmt: skip


def faster(factor, on_gpu=None):
    """Targets: speedups over the best stock on the CPU, and on a GPU."""
    gpu = () if on_gpu is None else (Target("speedup", on_gpu, allocator="default", device="cuda"),)
    return Target("speedup", factor), *gpu


def aspp(rate, *targets, size=65, images=1, **options):
    return case(
        f"ASPP rate {rate}",
        (images, 2048, size, size),
        (256, 2048, 3, 3),
        *targets,
        padding=rate,
        dilation=rate,
        quick_shape=(1, 2048, 17, 17),
        **options,
    )


def depthwise(what, rate, *targets, size=65, channels=256, kernel=3, stride=1, **options):
    return case(
        f"depthwise {what}",
        (1, channels, size, size),
        (channels, 1, kernel, kernel),
        *targets,
        padding=rate * (kernel // 2),
        dilation=rate,
        groups=channels,
        stride=stride,
        quick_shape=(1, channels, 17, 17),
        **options,
    )


def upsampling(what, factor, *targets, size=64, channels=21, dense=True, **options):
    """FCN's layers: kernel 2 factor, padding factor / 2."""
    weight = channels, channels if dense else 1, 2 * factor, 2 * factor
    groups = {} if dense else {"groups": channels}
    return case(
        f"transposed {what}",
        (1, channels, size, size),
        weight,
        *targets,
        transposed=True,
        stride=factor,
        padding=factor // 2,
        quick_shape=(1, channels, 9, 9),
        **groups,
        **options,
    )


CASES = [
    aspp(36, *faster(2.1)),
    aspp(36, *faster(2.1), layout="channels_last"),
    aspp(24, *faster(1.15)),
    aspp(24, *faster(1.15), layout="channels_last"),
    aspp(12, *faster(1.1)),
    aspp(12, *faster(1.1), layout="channels_last"),
    aspp(18, *faster(1.8), size=33),
    aspp(18, *faster(1.8), size=33, layout="channels_last"),
    case("rate 2", (1, 512, 64, 64), (512, 512, 3, 3), *faster(1.0), padding=2, dilation=2,
         quick_shape=(1, 512, 17, 17)),
    case("rate 12", (1, 512, 41, 41), (1024, 512, 3, 3), *faster(1.0), padding=12, dilation=12,
         quick_shape=(1, 512, 17, 17)),
    depthwise("rate 12", 12, *faster(12, on_gpu=3)),
    depthwise("rate 6", 6, *faster(12)),
    depthwise("rate 6", 6, *faster(1.0), layout="channels_last"),
    depthwise("3x3", 1, *faster(5, on_gpu=3)),
    depthwise("3x3", 1, *faster(5), layout="channels_last"),
    depthwise("3x3 stride 2", 1, *faster(1.0), stride=2),
    depthwise("rate 12", 12, *faster(20), dtype=torch.bfloat16),
    depthwise("3x3", 1, *faster(20), dtype=torch.bfloat16),
    upsampling("learned x8", 8, *faster(4, on_gpu=10)),
    upsampling("bilinear x8", 8, *faster(4, on_gpu=10), bilinear=True),
    upsampling("bilinear x2", 2, *faster(1.0), bilinear=True),
    upsampling("learned x32", 32, *faster(1.0, on_gpu=10), size=16),
    upsampling("per channel x8", 8, *faster(7), dense=False),
    upsampling("per channel x2", 2, *faster(1.0), dense=False),
    case("2x2 stride 2", (1, 256, 64, 64), (256, 128, 2, 2), *faster(1.0), transposed=True, stride=2,
         quick_shape=(1, 256, 9, 9)),
    # GPU only: a training run would use cuDNN in bf16.
    aspp(36, *faster(1, 2.2)[1:], images=8, dtype=torch.bfloat16, layout="channels_last", devices=("cuda",)),
    aspp(24, *faster(1, 1.6)[1:], images=8, dtype=torch.bfloat16, layout="channels_last", devices=("cuda",)),
    case("rate 2", (8, 512, 64, 64), (512, 512, 3, 3), *faster(1, 0.95)[1:], padding=2, dilation=2,
         dtype=torch.bfloat16, layout="channels_last", quick_shape=(1, 512, 17, 17), devices=("cuda",)),
]  # fmt: skip
