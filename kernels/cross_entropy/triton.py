"""Softmax cross entropy and focal loss in Triton: formulas and byte counts in README.md, columns in ../_columns.py."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg._reduction import MEAN, NONE
from fastseg._triton import DEBUG, AotCase, on_device_of
from fastseg.kernels._columns import (
    LOG2_E,
    Config,
    chunk_classes,
    chunk_weights,
    column_max,
    column_sum,
    exponentials,
    online_softmax,
    pixel_weights,
    read_column,
    valid_labels,
    weight_sum,
    weighted_logits,
)
from fastseg.kernels._views import pixel_views
from fastseg.kernels.cross_entropy.triton_probabilities import probability_aot_cases
from fastseg.kernels.cross_entropy.triton_sums import (
    count_denominator,
    finish,
    scale_in_place,
    small_aot_cases,
    takes_mean,
)

__all__ = ["CONFIGS", "aot_cases", "backward", "forward", "scale_in_place"]


# (layout, most classes) -> Config, the first that fits. While all C classes fit in STEP they are read once and stay in
# registers; with more, a first sweep takes the softmax online and the gradient reads the logits again (from L2).
CONFIGS = {
    ("planes", 8): Config(1, 8, 1024, 4),
    ("planes", 32): Config(1, 32, 512, 4),
    ("planes", 64): Config(4, 64, 128, 4),
    ("planes", 256): Config(16, 256, 64, 8),
    ("planes", None): Config(16, 128, 64, 8),
    ("aligned rows", 64): Config(16, 64, 128, 4),  # rows that 16-byte accesses can walk
    ("rows", 64): Config(4, 64, 128, 4),
    ("rows", 256): Config(32, 256, 32, 4),
    ("rows", 1024): Config(128, 1024, 8, 4),
    ("rows", None): Config(512, 4096, 4, 8),
}


def config_of(pixel: int, classes: int) -> Config:
    """For logits with neighbouring pixels `pixel` elements apart: 1 in planes (NCHW), more in rows (channels_last)."""
    names = ("planes",) if pixel == 1 else ("rows",) if pixel % 4 else ("aligned rows", "rows")
    return next(
        config for (layout, most), config in CONFIGS.items() if layout in names and (most is None or classes <= most)
    )


@triton.jit
def other_exponentials(column, start, label, largest, CHUNK: tl.constexpr):
    """Sum over a column of e^(logit - largest) without the label's own: (BLOCK_P,)."""
    values = exponentials(column, largest)
    terms = ()
    for k in tl.static_range(len(column)):
        classes = chunk_classes(start, k, CHUNK)
        terms = terms + (tl.where(classes == label[None, :], 0.0, values[k]),)
    return column_sum(terms)


@triton.jit
def focal(label_gap, others, gamma):
    """(loss, f) of a pixel: (1 - p)^gamma (-log p), and f in dloss/dlogit_c = f (p_c - [c = label]).

    label_gap: largest logit minus the label's; others: sum of the other e^(logit - largest). 1 - p comes from `others`,
    so it keeps its digits as p goes to 1; so does -log p = log(1 + others) where the label leads.
    """
    target = tl.exp2(-label_gap * LOG2_E)
    total = target + others
    miss = others / total
    one_plus = 1.0 + others
    log1p = tl.where(one_plus == 1.0, others, tl.log(one_plus) * others / (one_plus - 1.0))
    surprise = tl.where(label_gap == 0.0, log1p, label_gap + tl.log(total))
    modulation = tl.exp2(gamma * tl.log2(miss))
    ratio = tl.where(miss > 0.0, surprise / miss, 1.0)  # -log p / (1 - p) -> 1 as p -> 1
    bounded = tl.where(target > 0.0, target / total * ratio, 0.0)
    return modulation * surprise, modulation * (1.0 + gamma * bounded)


@triton.jit
def write_gradient(
    column, start, pointers, inside, plane, class_weight, label, largest,
    probability_scale, target_scale, uniform_scale,
    C: tl.constexpr, CHUNK: tl.constexpr, SMOOTHING: tl.constexpr, INERT: tl.constexpr,
):  # fmt: skip
    """Stores e^(logit_c - largest) probability_scale - [c = label] target_scale - w_c uniform_scale.

    INERT: 0 where the pixel is ignored (label -1), whatever its logits are.
    """
    values = exponentials(column, largest)
    for k in tl.static_range(len(column)):
        classes = chunk_classes(start, k, CHUNK)
        gradient = values[k] * probability_scale[None, :]
        gradient -= tl.where(classes == label[None, :], target_scale[None, :], 0.0)
        if SMOOTHING:
            gradient -= chunk_weights(class_weight, classes, C) * uniform_scale[None, :]
        if INERT:
            gradient = tl.where(label[None, :] >= 0, gradient, 0.0)
        addresses = pointers[None, :] + classes.to(tl.int64) * plane
        tl.store(addresses, gradient.to(pointers.dtype.element_ty), mask=inside[None, :] & (classes < C))


@triton.jit
def cross_entropy_kernel(
    logits,  # [N, C, P], element (n, c, p) at n * image + c * plane + p * PIXEL
    target,  # [N, P] int64, int32 or uint8
    class_weight,  # [C] or None
    pixel_weight,  # [N, P] or None
    pixel_loss,  # [N, P] fp32, or None: not wanted
    partial_sums,  # [2, programs] fp32: loss, weights; or None
    gradient,  # [N, C, P], strides gradient_image, gradient_plane, GRADIENT_PIXEL; or None
    grad_loss,  # [N, P] fp32 without reduction, [] with one, None for 1
    denominator,  # [] fp32 under a mean, else None
    pixels, blocks, image, plane, gradient_image, gradient_plane,
    ignore_index, label_smoothing, gamma,
    C: tl.constexpr, PIXEL: tl.constexpr, GRADIENT_PIXEL: tl.constexpr,
    CHUNK: tl.constexpr, STEP: tl.constexpr, BLOCK_P: tl.constexpr,
    PER_PIXEL: tl.constexpr, SMOOTHING: tl.constexpr, FOCAL: tl.constexpr, COUNT_ONLY: tl.constexpr,
    ZERO_IF_EMPTY: tl.constexpr, INERT: tl.constexpr, DEBUG: tl.constexpr,
):  # fmt: skip
    """Loss, gradient, or both, of BLOCK_P pixels of one image. Grid: (images * blocks,)."""
    program = tl.program_id(0)
    n = (program // blocks).to(tl.int64)
    first = (program % blocks).to(tl.int64) * BLOCK_P
    p = tl.arange(0, BLOCK_P)
    inside = p < pixels - first
    position = n * pixels + first + p
    label, valid = valid_labels(tl.load(target + position, mask=inside, other=0), inside, ignore_index, C, DEBUG)
    pointers = logits + n * image + first * PIXEL + p * PIXEL

    HELD: tl.constexpr = C <= STEP
    if HELD:
        column = read_column(pointers, inside, plane, 0, C, C, CHUNK)
        largest = column_max(column)
        total = column_sum(exponentials(column, largest))
    else:
        largest, total = online_softmax(pointers, inside, plane, C, STEP, CHUNK)
    own = tl.load(pointers + label.to(tl.int64) * plane, mask=valid, other=0.0).to(tl.float32)
    label_weight, each = pixel_weights(class_weight, pixel_weight, label, position, valid)
    log_total = tl.log(total)
    loss = label_weight * ((largest - own) + log_total)
    target_share = label_weight
    probability_share = label_weight
    uniform_share = 0.0
    if FOCAL:
        others = tl.zeros_like(total)
        if HELD:
            others = other_exponentials(column, 0, label, largest, CHUNK)
        else:
            for start in range(0, C, STEP):
                column = read_column(pointers, inside, plane, start, C, STEP, CHUNK)
                others += other_exponentials(column, start, label, largest, CHUNK)
        focal_loss, factor = focal(largest - own, others, gamma)
        loss = label_weight * focal_loss
        target_share = label_weight * factor
        probability_share = target_share
    if SMOOTHING:
        uniform = tl.zeros_like(total)
        if HELD:
            uniform = weighted_logits(column, 0, class_weight, largest, C, CHUNK)
        else:
            for start in range(0, C, STEP):
                column = read_column(pointers, inside, plane, start, C, STEP, CHUNK)
                uniform += weighted_logits(column, start, class_weight, largest, C, CHUNK)
        all_weights = weight_sum(class_weight, C)
        uniform_share = label_smoothing / C
        loss = (1.0 - label_smoothing) * loss + uniform_share * (all_weights * log_total - uniform)
        target_share = (1.0 - label_smoothing) * label_weight
        probability_share = target_share + uniform_share * all_weights

    if pixel_loss is not None:
        tl.store(pixel_loss + position, tl.where(valid, loss * each, 0.0), mask=inside)
    if partial_sums is not None:
        counted = each if COUNT_ONLY else each * label_weight
        tl.store(partial_sums + program, tl.sum(tl.where(valid, loss * each, 0.0), 0))
        tl.store(partial_sums + tl.num_programs(0) + program, tl.sum(counted, 0))
    if gradient is not None:
        scale = each
        if denominator is not None:
            divisor = tl.load(denominator)
            if ZERO_IF_EMPTY:
                divisor = tl.where(divisor == 0.0, 1.0, divisor)
            scale /= divisor
        if grad_loss is not None:
            if PER_PIXEL:
                scale *= tl.load(grad_loss + position, mask=inside, other=0.0)
            else:
                scale *= tl.load(grad_loss)
        probability_scale = tl.where(valid, scale * probability_share, 0.0) / total
        target_scale = tl.where(valid, scale * target_share, 0.0)
        uniform_scale = tl.where(valid, scale * uniform_share, 0.0)
        targets = gradient + n * gradient_image + first * GRADIENT_PIXEL + p * GRADIENT_PIXEL
        if HELD:
            write_gradient(
                column,
                0,
                targets,
                inside,
                gradient_plane,
                class_weight,
                label,
                largest,
                probability_scale,
                target_scale,
                uniform_scale,
                C,
                CHUNK,
                SMOOTHING,
                INERT,
            )
        else:
            for start in range(0, C, STEP):
                column = read_column(pointers, inside, plane, start, C, STEP, CHUNK)
                write_gradient(
                    column,
                    start,
                    targets,
                    inside,
                    gradient_plane,
                    class_weight,
                    label,
                    largest,
                    probability_scale,
                    target_scale,
                    uniform_scale,
                    C,
                    CHUNK,
                    SMOOTHING,
                    INERT,
                )


# --- launchers ---


def _constexprs(
    classes: int,
    pixel: int,
    gradient_pixel: int,
    reduction: int,
    label_smoothing: float,
    gamma: float,
    zero_if_empty: bool,
    inert_ignored: bool,
) -> tuple[dict, int]:
    """(compile-time arguments of cross_entropy_kernel, number of warps)."""
    chunk, step, block, warps = config_of(pixel, classes)
    constexprs = dict(
        C=classes, PIXEL=pixel, GRADIENT_PIXEL=gradient_pixel, CHUNK=chunk, STEP=step, BLOCK_P=block,
        PER_PIXEL=reduction == NONE, SMOOTHING=gamma == 0 and label_smoothing > 0, FOCAL=gamma > 0,
        COUNT_ONLY=reduction != MEAN, ZERO_IF_EMPTY=zero_if_empty, INERT=inert_ignored,
    )  # fmt: skip
    return constexprs, warps


class _Call(NamedTuple):
    """The arguments of the loss and of its gradient; input [N, C, P], the others contiguous, in fp32."""

    input: Tensor
    target: Tensor
    weight: Tensor | None
    pixel_weight: Tensor | None
    ignore_index: int
    reduction: int
    label_smoothing: float
    gamma: float
    zero_if_empty: bool
    inert_ignored: bool


def _launch(
    call: _Call, *, pixel_loss=None, partial_sums=None, gradient=None, grad_loss=None, denominator=None
) -> None:
    images, classes, pixels = call.input.shape
    image, plane, pixel = call.input.stride()
    gradient_image, gradient_plane, gradient_pixel = (0, 0, 1) if gradient is None else gradient.stride()
    constexprs, warps = _constexprs(
        classes,
        pixel,
        gradient_pixel,
        call.reduction,
        call.label_smoothing,
        call.gamma,
        call.zero_if_empty,
        call.inert_ignored,
    )
    blocks = triton.cdiv(pixels, constexprs["BLOCK_P"])
    if images * blocks == 0:
        return
    with on_device_of(call.input):
        cross_entropy_kernel[(images * blocks,)](
            call.input, call.target, call.weight, call.pixel_weight, pixel_loss, partial_sums, gradient, grad_loss,
            denominator, pixels, blocks, image, plane, gradient_image, gradient_plane, call.ignore_index,
            call.label_smoothing, call.gamma, **constexprs, DEBUG=DEBUG, num_warps=warps, debug=DEBUG,
        )  # fmt: skip


def forward(
    input,
    target,
    weight,
    pixel_weight,
    ignore_index,
    reduction,
    label_smoothing,
    gamma,
    zero_if_empty,
    inert_ignored,
    with_gradient,
    loss,
    denominator,
    gradient,
) -> None:
    """loss: [N, ...] without reduction, else []; denominator: []; gradient: like input, if with_gradient.

    The gradient comes from the same read of the logits, and needs a reduction.
    """
    logits, gradient = pixel_views(input, gradient if with_gradient else None)
    options = ignore_index, reduction, label_smoothing, gamma, zero_if_empty, inert_ignored
    call = _Call(logits, target, weight, pixel_weight, *options)
    images, classes, pixels = logits.shape
    blocks = triton.cdiv(pixels, config_of(logits.stride(2), classes).block)
    sums = logits.new_empty((2, images * blocks), dtype=torch.float32)  # loss and weights of every program
    mean_of = denominator if with_gradient and takes_mean(reduction) else None
    if mean_of is not None:
        count_denominator(target, weight, pixel_weight, ignore_index, reduction, classes, denominator)
    pixel_loss = loss if reduction == NONE else None
    _launch(call, pixel_loss=pixel_loss, partial_sums=sums, gradient=gradient, denominator=mean_of)
    finish(sums, None if reduction == NONE else loss, denominator, reduction, zero_if_empty)


def backward(
    input,
    target,
    weight,
    pixel_weight,
    grad_loss,
    denominator,
    ignore_index,
    reduction,
    label_smoothing,
    gamma,
    zero_if_empty,
    inert_ignored,
    grad_input,
) -> None:
    """grad_loss: [N, ...] without reduction, else []; grad_input: like input."""
    logits, gradient = pixel_views(input, grad_input)
    options = ignore_index, reduction, label_smoothing, gamma, zero_if_empty, inert_ignored
    call = _Call(logits, target, weight, pixel_weight, *options)
    _launch(call, gradient=gradient, grad_loss=grad_loss, denominator=denominator if takes_mean(reduction) else None)


# --- ahead-of-time cases ---

_WHAT = {  # the outputs of a launch
    "forward": dict(partial_sums="*fp32"),
    "with_gradient": dict(partial_sums="*fp32", gradient="*{dtype}", denominator="*fp32"),
    "backward": dict(gradient="*{dtype}", grad_loss="*fp32", denominator="*fp32"),
}
_OPTIONAL = ("class_weight", "pixel_weight", "pixel_loss", "partial_sums", "gradient", "grad_loss", "denominator")


def _case(
    what: str,
    dtype: str,
    classes: int,
    rows: bool = False,
    weights: bool = False,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    target: str = "i64",
    debug: bool = False,
    **limits,
) -> AotCase:
    pixel = classes if rows else 1
    constexprs, warps = _constexprs(classes, pixel, pixel, MEAN, label_smoothing, gamma, False, gamma > 0)
    pointers = {name: kind.format(dtype=dtype) for name, kind in _WHAT[what].items()}
    pointers |= dict(logits=f"*{dtype}", target=f"*{target}")
    if weights:
        pointers |= dict(class_weight="*fp32", pixel_weight="*fp32")
    sizes = dict(pixels="i32", blocks="i32", image="i32", gradient_image="i32")
    sizes |= {} if rows else dict(plane="i32", gradient_plane="i32")
    absent = {name: None for name in _OPTIONAL if name not in pointers}
    flags = dict(rows=rows, weights=weights, smoothing=label_smoothing, focal=gamma, debug=debug)
    options = [flag for flag, value in flags.items() if value]
    return AotCase(
        name="-".join([what, dtype, target, str(classes), *options]),
        kernel=cross_entropy_kernel,
        signature={**pointers, **sizes, "ignore_index": "i32", "label_smoothing": "fp32", "gamma": "fp32"},
        constexprs={**constexprs, **(dict(plane=1, gradient_plane=1) if rows else {}), **absent, "DEBUG": debug},
        num_warps=warps,
        divisible=(*pointers, *(name for name in sizes if name != "blocks")),
        debug=debug,
        **limits,
    )


def aot_cases() -> list[AotCase]:
    wide = dict(load_bits=128, store_bits=128, max_registers=128)
    half = dict(load_bits=64, store_bits=64, max_registers=128)  # 8 bytes of a plane: 16 would double the registers
    return [
        _case("forward", "fp32", 19, max_registers=128, load_bits=128),
        _case("forward", "bf16", 19, max_registers=128, load_bits=64),
        _case("backward", "fp32", 19, **wide),
        _case("backward", "fp16", 19, **half),
        _case("with_gradient", "fp32", 2, max_registers=128, store_bits=128),
        *(_case("with_gradient", "fp32", classes, **wide) for classes in (19, 64, 150, 300)),
        _case("with_gradient", "fp32", 21, **dict(wide, max_registers=136)),
        _case("with_gradient", "bf16", 19, **half),
        *(_case("with_gradient", "fp32", classes, rows=True, max_registers=168) for classes in (19, 150, 5000)),
        *(_case("with_gradient", "bf16", classes, rows=True, **wide) for classes in (64, 1000)),
        _case("with_gradient", "fp32", 19, weights=True, label_smoothing=0.1, target="u8", max_registers=168),
        _case("with_gradient", "fp32", 19, weights=True, gamma=2.0, target="i32", max_registers=168),
        _case("forward", "fp32", 19, debug=True, load_bits=128),
        *small_aot_cases(),
        *probability_aot_cases(),
    ]
