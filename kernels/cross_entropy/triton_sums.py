"""Small kernels before and after the sweep of cross_entropy: denominator from the labels, final sum, scaling."""

import triton
import triton.language as tl
from torch import Tensor

from fastseg._reduction import MEAN, MEAN_OF_COUNT
from fastseg._triton import DEBUG, AotCase, on_device_of
from fastseg.kernels._columns import pixel_weights, valid_labels

COUNT_BLOCK = 4096  # labels per program of denominator_kernel
SCALE_BLOCK = 4096  # elements per turn of a program of scale_kernel
SCALE_PROGRAMS = 512  # few enough to start and stop in microseconds if there is nothing to do
FINISH_BLOCK = 2048  # partial sums per turn of finish_kernel


@triton.jit
def denominator_kernel(
    target,  # [count] int64, int32 or uint8
    class_weight,  # [C] or None
    pixel_weight,  # [count] or None
    weight_sums,  # [programs] fp32
    count, ignore_index,
    C: tl.constexpr, COUNT_ONLY: tl.constexpr, BLOCK: tl.constexpr, DEBUG: tl.constexpr,
):  # fmt: skip
    """The denominator of a mean, from labels and weights."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = position < count
    label, valid = valid_labels(tl.load(target + position, mask=inside, other=0), inside, ignore_index, C, DEBUG)
    label_weight, each = pixel_weights(class_weight, pixel_weight, label, position, valid)
    tl.store(weight_sums + tl.program_id(0), tl.sum(each if COUNT_ONLY else each * label_weight, 0))


@triton.jit
def finish_kernel(
    loss_sums,  # [count] fp32 or None
    weight_sums,  # [count] fp32
    loss,  # [] fp32 or None
    denominator,  # [] fp32
    count,
    MEAN: tl.constexpr,
    ZERO_IF_EMPTY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up the partial sums of all programs, always in the same order."""
    losses = tl.zeros((BLOCK,), tl.float32)
    weights = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        weights += tl.load(weight_sums + place, mask=place < count, other=0.0)
        if loss_sums is not None:
            losses += tl.load(loss_sums + place, mask=place < count, other=0.0)
    divisor = tl.sum(weights, 0)
    tl.store(denominator, divisor)
    if loss is not None:
        total = tl.sum(losses, 0)
        if MEAN:
            mean = total / divisor
            if ZERO_IF_EMPTY:
                mean = tl.where(divisor == 0.0, 0.0, mean)
            total = mean
        tl.store(loss, total)


@triton.jit
def scale_kernel(values, factor, count, BLOCK: tl.constexpr):
    """values[0:count] *= factor[0]; does not access them if it is 1. Any number of programs."""
    scale = tl.load(factor).to(tl.float32)
    if scale != 1.0:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, count, tl.num_programs(0) * BLOCK):
            place = start + tl.arange(0, BLOCK)
            scaled = tl.load(values + place, mask=place < count, other=0.0).to(tl.float32) * scale
            tl.store(values + place, scaled.to(values.dtype.element_ty), mask=place < count)


def takes_mean(reduction: int) -> bool:
    return reduction in (MEAN, MEAN_OF_COUNT)


def finish(sums: Tensor, loss: Tensor | None, denominator: Tensor, reduction: int, zero_if_empty: bool) -> None:
    """Loss and denominator from the sums of all programs, [2, programs], or [1, programs] without losses."""
    loss_sums, weight_sums = sums if loss is not None else (None, sums[0])
    with on_device_of(sums):
        finish_kernel[(1,)](
            loss_sums, weight_sums, loss, denominator, weight_sums.numel(), MEAN=takes_mean(reduction),
            ZERO_IF_EMPTY=zero_if_empty, BLOCK=FINISH_BLOCK, num_warps=8,
        )  # fmt: skip


def count_denominator(target, weight, pixel_weight, ignore_index, reduction, classes, denominator) -> None:
    """Writes the denominator of a mean."""
    programs = triton.cdiv(target.numel(), COUNT_BLOCK)
    sums = denominator.new_empty((1, programs))
    if programs:
        with on_device_of(target):
            denominator_kernel[(programs,)](
                target, weight, pixel_weight, sums, target.numel(), ignore_index,
                C=classes, COUNT_ONLY=reduction != MEAN, BLOCK=COUNT_BLOCK, DEBUG=DEBUG, num_warps=8, debug=DEBUG,
            )  # fmt: skip
    finish(sums, None, denominator, reduction, False)


def scale_in_place(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor [], for a dense gradient of any layout; moves nothing if factor is 1; no host sync."""
    if gradient.numel():
        with on_device_of(gradient):
            programs = min(triton.cdiv(gradient.numel(), SCALE_BLOCK), SCALE_PROGRAMS)
            scale_kernel[(programs,)](gradient, factor, gradient.numel(), BLOCK=SCALE_BLOCK, num_warps=8)


def small_aot_cases() -> list[AotCase]:
    return [
        AotCase(
            "denominator", denominator_kernel,
            dict(target="*i64", class_weight="*fp32", weight_sums="*fp32", count="i32", ignore_index="i32"),
            dict(pixel_weight=None, C=19, COUNT_ONLY=False, BLOCK=COUNT_BLOCK, DEBUG=False),
            num_warps=8, divisible=("target", "class_weight", "weight_sums", "count"),
        ),
        AotCase(
            "finish", finish_kernel,
            dict(loss_sums="*fp32", weight_sums="*fp32", loss="*fp32", denominator="*fp32", count="i32"),
            dict(MEAN=True, ZERO_IF_EMPTY=False, BLOCK=FINISH_BLOCK), num_warps=8,
        ),
        AotCase(
            "scale", scale_kernel, dict(values="*bf16", factor="*fp32", count="i32"), dict(BLOCK=SCALE_BLOCK),
            num_warps=8, divisible=("values", "factor", "count"), load_bits=128, store_bits=128,
        ),
    ]  # fmt: skip
