"""Softmax cross entropy against probabilities in Triton: formulas in README.md, columns in ../_columns.py."""

import torch
import triton
import triton.language as tl

from fastseg._reduction import MEAN, NONE
from fastseg._triton import AotCase, on_device_of
from fastseg.kernels._columns import (
    Config,
    chunk_classes,
    chunk_weights,
    column_max,
    column_sum,
    exponentials,
    online_softmax,
    read_column,
)
from fastseg.kernels._views import pixel_views
from fastseg.kernels.cross_entropy.triton_sums import finish

# (layout of the logits, most classes) -> Config, the first that fits. Logits and targets of STEP classes are held
# together, so a thread has about half the pixels that it has with labels. With more classes than STEP a first sweep
# takes the softmax online, a second the products, and the gradients read both tensors again (from L2).
CONFIGS = {
    ("planes", 8): Config(1, 8, 512, 4),
    ("planes", 32): Config(1, 32, 256, 4),
    ("planes", 64): Config(4, 64, 64, 4),
    ("planes", 256): Config(16, 256, 32, 8),
    ("planes", None): Config(16, 128, 32, 8),
    ("rows", 64): Config(16, 64, 64, 4),
    ("rows", 256): Config(32, 256, 32, 4),
    ("rows", 1024): Config(128, 1024, 8, 8),
    ("rows", None): Config(512, 2048, 4, 8),
}


def config_of(pixel: int, classes: int) -> Config:
    """For logits whose neighbouring pixels lie `pixel` elements apart: 1 in planes, more in rows (channels_last)."""
    layout = "planes" if pixel == 1 else "rows"
    return next(
        config for (name, most), config in CONFIGS.items() if name == layout and (most is None or classes <= most)
    )


@triton.jit
def weighted_targets(
    targets, start, class_weight, label_smoothing, C: tl.constexpr, CHUNK: tl.constexpr, SMOOTHING: tl.constexpr
):
    """w_c ((1 - s) target_c + s / C) of a column of targets; 0 from class C on."""
    values = ()
    for k in tl.static_range(len(targets)):
        classes = chunk_classes(start, k, CHUNK)
        value = targets[k]
        if SMOOTHING:
            value = value * (1.0 - label_smoothing) + tl.where(classes < C, label_smoothing / C, 0.0)
        if class_weight is not None:
            value = value * chunk_weights(class_weight, classes, C)
        values = values + (value,)
    return values


@triton.jit
def target_products(weighted, column, start, origin, C: tl.constexpr, CHUNK: tl.constexpr):
    """Sum over a column of weighted target times (logit - origin): (BLOCK_P,)."""
    terms = ()
    for k in tl.static_range(len(column)):
        # not 0 times the -inf of a missing class; 0 times the -inf of a logit is NaN, as in stock
        missing = chunk_classes(start, k, CHUNK) >= C
        terms = terms + (tl.where(missing, 0.0, weighted[k] * (column[k] - origin[None, :])),)
    return column_sum(terms)


@triton.jit
def write_gradients(
    column, targets, start, pointers, target_pointers, inside, plane, target_plane, class_weight, label_smoothing,
    largest, log_total, ratio, factor,
    C: tl.constexpr, CHUNK: tl.constexpr, SMOOTHING: tl.constexpr,
):  # fmt: skip
    """To logits (e^(logit_c - largest) ratio - weighted target_c) factor, to targets w_c (1 - s) (-log p_c) factor."""
    if pointers is not None:
        values = exponentials(column, largest)
        weighted = weighted_targets(targets, start, class_weight, label_smoothing, C, CHUNK, SMOOTHING)
        for k in tl.static_range(len(column)):
            classes = chunk_classes(start, k, CHUNK)
            gradient = (values[k] * ratio[None, :] - weighted[k]) * factor[None, :]
            addresses = pointers[None, :] + classes.to(tl.int64) * plane
            tl.store(addresses, gradient.to(pointers.dtype.element_ty), mask=inside[None, :] & (classes < C))
    if target_pointers is not None:
        for k in tl.static_range(len(column)):
            classes = chunk_classes(start, k, CHUNK)
            slope = log_total[None, :] - (column[k] - largest[None, :])
            if SMOOTHING:
                slope = slope * (1.0 - label_smoothing)
            if class_weight is not None:
                slope = slope * chunk_weights(class_weight, classes, C)
            addresses = target_pointers[None, :] + classes.to(tl.int64) * target_plane
            gradient = (slope * factor[None, :]).to(target_pointers.dtype.element_ty)
            tl.store(addresses, gradient, mask=inside[None, :] & (classes < C))


@triton.jit
def cross_entropy_probabilities_kernel(
    logits,  # [N, C, P], element (n, c, p) at n * image + c * plane + p * PIXEL
    target,  # [N, C, P], strides target_image, target_plane, TARGET_PIXEL
    class_weight,  # [C] fp32 or None
    pixel_weight,  # [N, P] fp32 or None
    grad_loss,  # [N, P] fp32 without reduction, [] with one, None for 1
    pixel_loss,  # [N, P] fp32, or None: not wanted
    partial_sums,  # [2, programs] fp32: loss, pixels; or None
    gradient,  # [N, C, P], strides gradient_image, gradient_plane, GRADIENT_PIXEL; or None
    target_gradient,  # [N, C, P], strides target_gradient_image, target_gradient_plane, TARGET_GRADIENT_PIXEL; or None
    pixels, blocks, image, plane, target_image, target_plane, gradient_image, gradient_plane,
    target_gradient_image, target_gradient_plane, scale, label_smoothing,
    C: tl.constexpr, PIXEL: tl.constexpr, TARGET_PIXEL: tl.constexpr, GRADIENT_PIXEL: tl.constexpr,
    TARGET_GRADIENT_PIXEL: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, BLOCK_P: tl.constexpr,
    PER_PIXEL: tl.constexpr, SMOOTHING: tl.constexpr,
):  # fmt: skip
    """Those of loss and gradients that are not None, of BLOCK_P pixels of one image. Grid: (images * blocks,)."""
    program = tl.program_id(0)
    n = (program // blocks).to(tl.int64)
    first = (program % blocks).to(tl.int64) * BLOCK_P
    p = tl.arange(0, BLOCK_P)
    inside = p < pixels - first
    position = n * pixels + first + p
    pointers = logits + n * image + first * PIXEL + p * PIXEL
    target_pointers = target + n * target_image + first * TARGET_PIXEL + p * TARGET_PIXEL

    HELD: tl.constexpr = C <= STEP
    if HELD:
        column = read_column(pointers, inside, plane, 0, C, C, CHUNK)
        targets = read_column(target_pointers, inside, target_plane, 0, C, C, CHUNK, 0.0)
        weighted = weighted_targets(targets, 0, class_weight, label_smoothing, C, CHUNK, SMOOTHING)
        largest = column_max(column)
        total = column_sum(exponentials(column, largest))
        share = column_sum(weighted)
        product = target_products(weighted, column, 0, largest, C, CHUNK)
    else:
        largest, total = online_softmax(pointers, inside, plane, C, STEP, CHUNK)
        share = tl.zeros_like(total)
        product = tl.zeros_like(total)
        for start in range(0, C, STEP):
            column = read_column(pointers, inside, plane, start, C, STEP, CHUNK)
            targets = read_column(target_pointers, inside, target_plane, start, C, STEP, CHUNK, 0.0)
            weighted = weighted_targets(targets, start, class_weight, label_smoothing, C, CHUNK, SMOOTHING)
            share += column_sum(weighted)
            product += target_products(weighted, column, start, largest, C, CHUNK)
    log_total = tl.log(total)
    each = tl.where(inside, 1.0, 0.0)
    if pixel_weight is not None:
        each = tl.load(pixel_weight + position, mask=inside, other=0.0)
    # An infinite target of a class far below the largest has an infinite loss, not infinity times log 1.
    loss = (tl.where(log_total == 0.0, 0.0, share * log_total) - product) * each
    if pixel_loss is not None:
        tl.store(pixel_loss + position, loss, mask=inside)
    if partial_sums is not None:
        tl.store(partial_sums + program, tl.sum(tl.where(inside, loss, 0.0), 0))
        tl.store(partial_sums + tl.num_programs(0) + program, tl.sum(tl.where(inside, 1.0, 0.0), 0))
    if gradient is not None or target_gradient is not None:
        factor = each * scale
        if grad_loss is not None:
            if PER_PIXEL:
                factor *= tl.load(grad_loss + position, mask=inside, other=0.0)
            else:
                factor *= tl.load(grad_loss)
        ratio = share / total
        gradients = None
        target_gradients = None
        if gradient is not None:
            gradients = gradient + n * gradient_image + first * GRADIENT_PIXEL + p * GRADIENT_PIXEL
        if target_gradient is not None:
            target_gradients = target_gradient + n * target_gradient_image + (first + p) * TARGET_GRADIENT_PIXEL
        if HELD:
            write_gradients(
                column,
                targets,
                0,
                gradients,
                target_gradients,
                inside,
                gradient_plane,
                target_gradient_plane,
                class_weight,
                label_smoothing,
                largest,
                log_total,
                ratio,
                factor,
                C,
                CHUNK,
                SMOOTHING,
            )
        else:
            for start in range(0, C, STEP):
                column = read_column(pointers, inside, plane, start, C, STEP, CHUNK)
                targets = read_column(target_pointers, inside, target_plane, start, C, STEP, CHUNK, 0.0)
                write_gradients(
                    column,
                    targets,
                    start,
                    gradients,
                    target_gradients,
                    inside,
                    gradient_plane,
                    target_gradient_plane,
                    class_weight,
                    label_smoothing,
                    largest,
                    log_total,
                    ratio,
                    factor,
                    C,
                    CHUNK,
                    SMOOTHING,
                )


def _constexprs(
    classes: int,
    pixel: int,
    target_pixel: int,
    gradient_pixel: int,
    target_gradient_pixel: int,
    reduction: int,
    label_smoothing: float,
) -> tuple[dict, int]:
    """(compile-time arguments of cross_entropy_probabilities_kernel, number of warps)."""
    chunk, step, block, warps = config_of(pixel, classes)
    constexprs = dict(
        C=classes, PIXEL=pixel, TARGET_PIXEL=target_pixel, GRADIENT_PIXEL=gradient_pixel,
        TARGET_GRADIENT_PIXEL=target_gradient_pixel, CHUNK=chunk, STEP=step, BLOCK_P=block,
        PER_PIXEL=reduction == NONE, SMOOTHING=label_smoothing > 0,
    )  # fmt: skip
    return constexprs, warps


def _run(
    input,
    target,
    weight,
    pixel_weight,
    reduction,
    label_smoothing,
    *,
    grad_loss=None,
    loss=None,
    grad_input=None,
    grad_target=None,
) -> None:
    """Writes those of loss ([N, ...] without reduction, else []), grad_input and grad_target that are not None."""
    input, target, *gradients = pixel_views(input, target, grad_input, grad_target)
    images, classes, pixels = input.shape
    strides = [(0, 0, 1) if tensor is None else tensor.stride() for tensor in (input, target, *gradients)]
    image_and_plane = [stride for one in strides for stride in one[:2]]
    constexprs, warps = _constexprs(classes, *(stride[2] for stride in strides), reduction, label_smoothing)
    blocks = triton.cdiv(pixels, constexprs["BLOCK_P"])
    reduced = loss is not None and reduction != NONE
    sums = loss.new_empty((2, images * blocks)) if reduced else None
    scale = 1.0 / (images * pixels) if reduction == MEAN and pixels else 1.0
    if images * blocks:
        with on_device_of(input):
            cross_entropy_probabilities_kernel[(images * blocks,)](
                input, target, weight, pixel_weight, grad_loss, None if reduced else loss, sums, *gradients,
                pixels, blocks, *image_and_plane, scale, label_smoothing, **constexprs, num_warps=warps,
            )  # fmt: skip
    if reduced:
        finish(sums, loss, torch.empty_like(loss), reduction, False)


def forward(
    input, target, weight, pixel_weight, reduction, label_smoothing, to_input, to_target, loss, grad_input, grad_target
) -> None:
    gradients = dict(grad_input=grad_input if to_input else None, grad_target=grad_target if to_target else None)
    _run(input, target, weight, pixel_weight, reduction, label_smoothing, loss=loss, **gradients)


def backward(
    input,
    target,
    weight,
    pixel_weight,
    grad_loss,
    reduction,
    label_smoothing,
    to_input,
    to_target,
    grad_input,
    grad_target,
) -> None:
    gradients = dict(grad_input=grad_input if to_input else None, grad_target=grad_target if to_target else None)
    _run(input, target, weight, pixel_weight, reduction, label_smoothing, grad_loss=grad_loss, **gradients)


# --- ahead-of-time cases ---

_WHAT = {  # the outputs of a launch
    "forward": dict(partial_sums="*fp32"),
    "with_gradient": dict(partial_sums="*fp32", gradient="*{dtype}"),
    "backward": dict(grad_loss="*fp32", gradient="*{dtype}", target_gradient="*{target}"),
    "target": dict(grad_loss="*fp32", target_gradient="*{target}"),
}
_OPTIONAL = ("class_weight", "pixel_weight", "grad_loss", "pixel_loss", "partial_sums", "gradient", "target_gradient")


def _case(
    what: str,
    dtype: str,
    classes: int,
    target: str = "",
    rows: bool = False,
    weights: bool = False,
    label_smoothing: float = 0.0,
    **limits,
) -> AotCase:
    target = target or dtype
    pixel = classes if rows else 1
    constexprs, warps = _constexprs(classes, *[pixel] * 4, MEAN, label_smoothing)
    pointers = {name: kind.format(dtype=dtype, target=target) for name, kind in _WHAT[what].items()}
    pointers |= dict(logits=f"*{dtype}", target=f"*{target}")
    if weights:
        pointers |= dict(class_weight="*fp32", pixel_weight="*fp32")
    tensors = ("", "target_", "gradient_", "target_gradient_")
    sizes = dict(pixels="i32", blocks="i32", **{f"{tensor}image": "i32" for tensor in tensors})
    planes = {f"{tensor}plane": "i32" for tensor in tensors}
    absent = {name: None for name in _OPTIONAL if name not in pointers}
    flags = dict(rows=rows, weights=weights, smoothing=label_smoothing)
    return AotCase(
        name="-".join(["probabilities", what, dtype, target, str(classes), *filter(flags.get, flags)]),
        kernel=cross_entropy_probabilities_kernel,
        signature={**pointers, **sizes, **({} if rows else planes), "scale": "fp32", "label_smoothing": "fp32"},
        constexprs={**constexprs, **({name: 1 for name in planes} if rows else {}), **absent},
        num_warps=warps,
        divisible=(*pointers, *(name for name in (*sizes, *([] if rows else planes)) if name != "blocks")),
        **limits,
    )


def probability_aot_cases() -> list[AotCase]:
    wide = dict(load_bits=64, store_bits=64, max_registers=128)
    both = dict(load_bits=64, store_bits=64, max_registers=168)
    rows = dict(rows=True, max_registers=128)
    return [
        _case("forward", "fp32", 19, load_bits=64, max_registers=128),
        _case("backward", "fp32", 19, **both),
        _case("backward", "fp16", 19, load_bits=32, store_bits=32, max_registers=128),
        _case("target", "fp32", 19, **wide),
        _case("with_gradient", "bf16", 19, load_bits=32, store_bits=32, max_registers=128),
        _case("with_gradient", "bf16", 19, target="fp32", load_bits=32, store_bits=32, max_registers=128),
        *(_case("with_gradient", "fp32", classes, **wide) for classes in (19, 64, 150, 300)),
        _case("with_gradient", "fp32", 2, load_bits=128, max_registers=64),
        _case("with_gradient", "fp32", 32, **dict(wide, max_registers=176)),
        *(_case("with_gradient", "fp32", classes, **rows) for classes in (19, 64, 150, 1000, 5000)),
        _case("backward", "fp32", 150, **dict(rows, max_registers=136)),
        _case("backward", "fp32", 19, weights=True, label_smoothing=0.1, max_registers=168),
        _case("backward", "fp32", 300, weights=True, label_smoothing=0.1, max_registers=168),
    ]
