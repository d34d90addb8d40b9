"""The public ops with an equivalent in stock PyTorch, and these equivalents, for `host` and `sweep`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import fastseg.ops
from benchmarks.harness import OURS, Inputs, first_tensor, step
from benchmarks.inputs import IGNORED, logits
from benchmarks.ops import (
    binary_cross_entropy_dice,
    confusion_matrix,
    cross_entropy,
    cross_entropy_dice,
    max_pool2d,
    max_unpool2d,
    sigmoid_focal_loss,
    upsample_argmax,
    upsample_cross_entropy,
)

STOCK = "stock"
SCALE = 4  # of the upsampling ops
SMOOTH = {"smooth": cross_entropy_dice.SMOOTH}
LABELLED = {"ignore_index": IGNORED}
FLOATING = (torch.float32,) * 3 + (torch.bfloat16,)


@dataclass(frozen=True)
class Workload:
    """Our public function and its stock equivalent, for the same inputs.

    `make`: as in `Case`. `channels`: least and largest number of classes or channels. `dtypes`: one is drawn.
    """

    name: str
    make: Callable[..., Inputs]
    ours: Callable
    stock: Callable
    channels: tuple[int, int] = (2, 150)
    dtypes: tuple[torch.dtype, ...] = FLOATING
    differentiable: bool = True

    def contestants(self, backend: str) -> dict[str, Callable]:
        return {OURS: partial(self.ours, backend=backend), STOCK: self.stock}

    def steps(self, inputs: Inputs, backward: bool, backend: str) -> dict[str, Callable]:
        """Each contestant as a call without arguments."""
        gradient = torch.ones_like(first_tensor(self.stock(*inputs))) if backward else None
        return {name: step(run, inputs, backward, gradient) for name, run in self.contestants(backend).items()}


def one_image(*arguments):
    return (logits(*arguments),)


def pooled(shape, *arguments):
    """Values of shape `shape` and int64 indices, from a 2x2 pooling."""
    batch, channels, height, width = shape
    values, _, indices, _ = max_unpool2d.make((batch, channels, 2 * height, 2 * width), *arguments)
    return values, indices


def convolved(name: str, taps: int, across: bool, function: str = "dilated_conv2d", **numbers) -> Workload:
    """A convolution with as many output as input channels: over all of them (`across`), or depthwise."""

    def make(shape, device, dtype, layout):
        channels = shape[1]
        weight = torch.randn(channels, channels if across else 1, taps, taps, device=device) / channels
        return *one_image(shape, device, dtype, layout), weight.to(dtype)

    def run(convolve, image, weight, **options):
        return convolve(image, weight, **numbers, **options, groups=1 if across else image.shape[1])

    stock = F.conv2d if function == "dilated_conv2d" else F.conv_transpose2d
    return Workload(
        f"{function} {name}",
        make,
        partial(run, getattr(fastseg.ops, function)),
        partial(run, stock),
        channels=(1, 64 if across else 256),
    )


def loss(module, name: str, channels=(2, 150), **options) -> Workload:
    """A loss of `benchmarks/ops`: its inputs and its stock expression."""
    ours = partial(getattr(fastseg.ops, name), **options)
    return Workload(name, module.make, ours, getattr(module, f"stock_{name}"), channels)


def upsampled_loss(name: str, **options) -> Workload:
    stock = getattr(upsample_cross_entropy, f"stock_{name}")
    return Workload(
        name,
        partial(upsample_cross_entropy.make, scale=SCALE),
        partial(getattr(fastseg.ops, name), **LABELLED, **options),
        partial(stock, align_corners=False),
    )


def pool(name: str, indices: bool, **window) -> Workload:
    options = window | {"return_indices": indices}
    ours = partial(fastseg.ops.max_pool2d, **options)
    return Workload(f"max_pool2d {name}", one_image, ours, partial(F.max_pool2d, **options), channels=(1, 256))


POOLS = {"2x2": max_pool2d.SEGNET, "3x3 s2": max_pool2d.RESNET, "3x3 s1": max_pool2d.RESNET | {"stride": 1}}

WORKLOADS = [
    loss(cross_entropy, "cross_entropy", **LABELLED),
    Workload(
        "cross_entropy probabilities", cross_entropy.make_probabilities, fastseg.ops.cross_entropy, F.cross_entropy
    ),
    loss(cross_entropy, "focal_loss", **LABELLED),
    loss(cross_entropy_dice, "cross_entropy_dice", **LABELLED, **SMOOTH),
    loss(cross_entropy_dice, "dice_loss", **LABELLED, **SMOOTH),
    loss(binary_cross_entropy_dice, "binary_cross_entropy_dice", (1, 150), **SMOOTH),
    loss(sigmoid_focal_loss, "sigmoid_focal_loss", (1, 150), reduction="mean"),
    upsampled_loss("upsample_cross_entropy"),
    upsampled_loss("upsample_cross_entropy_dice", **SMOOTH),
    Workload(
        "upsample_argmax", partial(upsample_argmax.make, scale=SCALE),
        partial(fastseg.ops.upsample_argmax, dtype=torch.uint8),
        partial(upsample_argmax.stock_upsample_argmax, align_corners=False), differentiable=False,
    ),
    Workload(
        "upsample_bilinear2d", one_image, partial(fastseg.ops.upsample_bilinear2d, scale_factor=SCALE),
        partial(F.interpolate, scale_factor=SCALE, mode="bilinear"), channels=(1, 256),
    ),
    convolved("3x3 rate 6", 3, True, padding=6, dilation=6),
    convolved("depthwise 3x3", 3, False, padding=1),
    convolved("depthwise 3x3 s2", 3, False, padding=1, stride=2),
    convolved("depthwise 3x3 rate 6", 3, False, padding=6, dilation=6),
    convolved("4x4 s2", 4, True, "conv_transpose2d", padding=1, stride=2),
    convolved("depthwise 4x4 s2", 4, False, "conv_transpose2d", padding=1, stride=2),
    *(pool(name, False, **window) for name, window in POOLS.items()),
    *(pool(f"{name} indices", True, **window) for name, window in POOLS.items()),
    Workload(
        "max_unpool2d", pooled, partial(fastseg.ops.max_unpool2d, kernel_size=2),
        partial(F.max_unpool2d, kernel_size=2), channels=(1, 256),
    ),
    Workload(
        "confusion_matrix", confusion_matrix.make, partial(fastseg.ops.confusion_matrix, **LABELLED),
        confusion_matrix.bincount, dtypes=(torch.int64, torch.uint8), differentiable=False,
    ),
]  # fmt: skip


def named(name: str) -> Workload:
    return next(workload for workload in WORKLOADS if workload.name == name)
