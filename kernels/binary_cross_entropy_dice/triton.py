"""Sigmoid statistics and their gradient in Triton: formulas in README.md."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastseg._triton import DEBUG, AotCase, on_device_of
from fastseg.kernels._sigmoid import sigmoid_parts


class Config(NamedTuple):
    block: int
    warps: int


CONFIGS = {"any": Config(1024, 4)}  # 8 pixels per thread: two accesses of 16 bytes in fp32, one in half types
ENOUGH_PROGRAMS = 2048  # to fill a GPU; with more blocks of pixels than that, a program takes several
MOST_TURNS = 16


@triton.jit
def masked_pixels(input, target, pixel_weight, place, inside, ignore_index, IGNORES: tl.constexpr,
                  INTEGER: tl.constexpr, DEBUG: tl.constexpr):  # fmt: skip
    """(logits, truth, weight, which pixels count) in fp32, 0 where a pixel does not count.

    A pixel with an integer target other than 0 and 1 does not count, like one with `ignore_index`.
    """
    truth = tl.load(target + place, mask=inside, other=0)
    valid = inside
    if IGNORES:
        valid &= truth.to(tl.float32) != ignore_index
    if INTEGER:
        binary = (truth == 0) | (truth == 1)
        if DEBUG:
            tl.device_assert(binary | (valid == 0), "fastseg: an integer mask holds a value other than 0 and 1")
        valid &= binary
    z = tl.where(valid, tl.load(input + place, mask=inside, other=0.0).to(tl.float32), 0.0)
    y = tl.where(valid, truth.to(tl.float32), 0.0)
    weight = tl.where(valid, 1.0, 0.0)
    if pixel_weight is not None:
        weight = tl.where(valid, tl.load(pixel_weight + place, mask=inside, other=0.0), 0.0)
    return z, y, weight, valid


@triton.jit
def sigmoid_statistics_kernel(
    input, target,  # [N, P]
    pos_weight,  # [] fp32 or None
    pixel_weight,  # [N, P] fp32 or None
    sums,  # [N, groups, 5] fp32: intersection, prediction, truth, numerator, denominator
    pixels, groups, turns, ignore_index,
    IGNORES: tl.constexpr, INTEGER: tl.constexpr, SQUARED: tl.constexpr, BLOCK: tl.constexpr, DEBUG: tl.constexpr,
):  # fmt: skip
    """Statistics of `turns` blocks of one image. Grid: (N * groups,)."""
    program = tl.program_id(0).to(tl.int64)
    factor = 1.0
    if pos_weight is not None:
        factor = tl.load(pos_weight)
    intersection = tl.zeros((BLOCK,), tl.float32)
    prediction = tl.zeros((BLOCK,), tl.float32)
    truth = tl.zeros((BLOCK,), tl.float32)
    numerator = tl.zeros((BLOCK,), tl.float32)
    denominator = tl.zeros((BLOCK,), tl.float32)
    for turn in range(turns):
        first = (program % groups * turns + turn) * BLOCK
        offset = tl.arange(0, BLOCK)
        inside = offset < pixels - first
        place = program // groups * pixels + first + offset
        z, y, weight, valid = masked_pixels(
            input, target, pixel_weight, place, inside, ignore_index, IGNORES, INTEGER, DEBUG
        )
        p, _, hinge, log_term = sigmoid_parts(z)
        p = tl.where(valid, p, 0.0)
        positive = 1.0 + (factor - 1.0) * y
        intersection += p * y
        prediction += p * p if SQUARED else p
        truth += y * y if SQUARED else y
        numerator += weight * (((1.0 - y) * z + positive * hinge) + positive * log_term)
        denominator += weight
    tl.store(sums + 5 * program, tl.sum(intersection, 0))
    tl.store(sums + 5 * program + 1, tl.sum(prediction, 0))
    tl.store(sums + 5 * program + 2, tl.sum(truth, 0))
    tl.store(sums + 5 * program + 3, tl.sum(numerator, 0))
    tl.store(sums + 5 * program + 4, tl.sum(denominator, 0))


@triton.jit
def sigmoid_statistics_backward_kernel(
    input, target,  # [N, P]
    pos_weight,  # [] fp32 or None
    pixel_weight,  # [N, P] fp32 or None
    grad_intersection, grad_prediction,  # [N] fp64, strides intersection_image, prediction_image
    grad_numerator,  # [] fp64
    gradient,  # [N, P]
    pixels, blocks, intersection_image, prediction_image, ignore_index,
    IGNORES: tl.constexpr, INTEGER: tl.constexpr, SQUARED: tl.constexpr, BLOCK: tl.constexpr, DEBUG: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK pixels of one image. Grid: (N * blocks,)."""
    program = tl.program_id(0).to(tl.int64)
    n = program // blocks
    first = program % blocks * BLOCK
    offset = tl.arange(0, BLOCK)
    inside = offset < pixels - first
    place = n * pixels + first + offset
    z, y, weight, valid = masked_pixels(
        input, target, pixel_weight, place, inside, ignore_index, IGNORES, INTEGER, DEBUG
    )
    p, q, _, _ = sigmoid_parts(z)
    factor = 1.0
    if pos_weight is not None:
        factor = tl.load(pos_weight)
    of_intersection = tl.load(grad_intersection + n * intersection_image).to(tl.float32)
    of_prediction = tl.load(grad_prediction + n * prediction_image).to(tl.float32)
    of_prediction = 2.0 * of_prediction * p if SQUARED else of_prediction
    dice = p * q * (of_intersection * y + of_prediction)
    cross_entropy = (1.0 - y) * p - factor * y * q  # for pos_weight 1 this is p - y, without its cancellation
    result = dice + tl.load(grad_numerator).to(tl.float32) * weight * cross_entropy
    tl.store(gradient + place, tl.where(valid, result, 0.0).to(gradient.dtype.element_ty), mask=inside)


# --- launchers ---


def _mask(target):
    """The target, bool viewed as uint8."""
    return target.view(torch.uint8) if target.dtype == torch.bool else target


def _constexprs(target, ignore_index, squared) -> dict:
    return dict(IGNORES=ignore_index is not None, INTEGER=not target.is_floating_point(), SQUARED=squared, DEBUG=DEBUG)


def sigmoid_statistics(
    input,
    target,
    pos_weight,
    pixel_weight,
    ignore_index,
    squared,
    intersection,
    prediction,
    truth,
    numerator,
    denominator,
) -> None:
    """intersection, prediction, truth: [N] fp64; numerator, denominator: [] fp64."""
    images, pixels = input.shape
    config = CONFIGS["any"]
    blocks = triton.cdiv(pixels, config.block)
    turns = max(1, min(MOST_TURNS, images * blocks // ENOUGH_PROGRAMS))
    groups = triton.cdiv(blocks, turns)
    sums = input.new_empty((images, groups, 5), dtype=torch.float32)
    if images * groups:
        with on_device_of(input):
            sigmoid_statistics_kernel[(images * groups,)](
                input, _mask(target), pos_weight, pixel_weight, sums,
                pixels, groups, turns, ignore_index or 0.0, **_constexprs(target, ignore_index, squared),
                BLOCK=config.block, num_warps=config.warps, debug=DEBUG,
            )  # fmt: skip
    per_image = sums.sum(1, dtype=torch.float64)  # [N, 5]
    for k, output in enumerate((intersection, prediction, truth)):
        output.copy_(per_image[:, k])
    for k, output in enumerate((numerator, denominator)):
        output.copy_(per_image[:, 3 + k].sum())


def sigmoid_statistics_backward(
    input,
    target,
    pos_weight,
    pixel_weight,
    grad_intersection,
    grad_prediction,
    grad_numerator,
    ignore_index,
    squared,
    grad_input,
) -> None:
    images, pixels = input.shape
    config = CONFIGS["any"]
    blocks = triton.cdiv(pixels, config.block)
    if images * blocks:
        with on_device_of(input):
            sigmoid_statistics_backward_kernel[(images * blocks,)](
                input, _mask(target), pos_weight, pixel_weight,
                grad_intersection, grad_prediction, grad_numerator, grad_input,
                pixels, blocks, grad_intersection.stride(0), grad_prediction.stride(0), ignore_index or 0.0,
                **_constexprs(target, ignore_index, squared), BLOCK=config.block, num_warps=config.warps, debug=DEBUG,
            )  # fmt: skip


# --- ahead-of-time cases ---


def _case(kernel, dtype: str, target: str, weights: bool, squared: bool, debug: bool = False, **limits) -> AotCase:
    config = CONFIGS["any"]
    pointers = dict(input=f"*{dtype}", target=f"*{target}")
    pointers |= dict(pos_weight="*fp32", pixel_weight="*fp32") if weights else {}
    scalars = dict(pixels="i32", ignore_index="fp32")
    if kernel is sigmoid_statistics_kernel:
        pointers |= dict(sums="*fp32")
        scalars |= dict(groups="i32", turns="i32")
    else:
        pointers |= dict(
            grad_intersection="*fp64", grad_prediction="*fp64", grad_numerator="*fp64", gradient=f"*{dtype}"
        )
        scalars |= dict(blocks="i32", intersection_image="i32", prediction_image="i32")
    constexprs = dict(
        IGNORES=True, INTEGER=not target.startswith(("fp", "bf")), SQUARED=squared, BLOCK=config.block, DEBUG=debug,
        **({} if weights else dict(pos_weight=None, pixel_weight=None)),
    )  # fmt: skip
    flags = [flag for flag, value in dict(weights=weights, linear=not squared, debug=debug).items() if value]
    return AotCase(
        "-".join([kernel.__name__, dtype, target, *flags]), kernel, {**pointers, **scalars}, constexprs,
        num_warps=config.warps, divisible=(*pointers, "pixels"), debug=debug, max_registers=128, **limits,
    )  # fmt: skip


def aot_cases() -> list[AotCase]:
    forward, backward = sigmoid_statistics_kernel, sigmoid_statistics_backward_kernel
    return [
        _case(forward, "fp32", "fp32", False, True, load_bits=128),
        _case(forward, "bf16", "bf16", False, True, load_bits=128),
        _case(forward, "fp32", "u8", True, False, load_bits=32),
        _case(forward, "fp32", "i64", True, False, debug=True, load_bits=128),
        _case(backward, "fp32", "fp32", False, True, store_bits=128),
        _case(backward, "bf16", "bf16", False, True, store_bits=128),
        _case(backward, "fp16", "u8", True, False, store_bits=128),
    ]
