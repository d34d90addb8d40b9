"""Softmax statistics and their gradient in Triton: launchers, the table of configurations, ahead-of-time cases."""

from typing import NamedTuple

import torch
import triton

from fastseg._triton import DEBUG, AotCase, on_device_of
from fastseg.kernels._views import pixel_views
from fastseg.kernels.cross_entropy_dice import triton_loss
from fastseg.kernels.cross_entropy_dice.triton_kernels import (
    finish_statistics_kernel,
    softmax_statistics_backward_kernel,
    softmax_statistics_kernel,
)


class Config(NamedTuple):
    """CHUNK classes per tile of BLOCK_P pixels; FOLD: pixels of a tile that one thread holds and adds up by itself."""

    chunk: int
    block: int
    fold: int
    warps: int


# (layout, most classes) -> Config, the first that fits. All classes of a pixel stay in the registers of its block.
CONFIGS = {
    ("half planes", 32): Config(1, 512, 4, 4),  # of 2-byte elements: 8 bytes per thread and access, as in fp32
    ("planes", 32): Config(1, 256, 2, 4),
    ("planes", 64): Config(4, 128, 4, 4),
    ("planes", 256): Config(16, 64, 4, 8),
    ("planes", 1024): Config(64, 16, 4, 8),
    ("planes", 4096): Config(256, 4, 4, 8),
    ("aligned rows", 64): Config(16, 64, 1, 4),  # rows that 16-byte accesses can walk
    ("rows", 64): Config(4, 128, 4, 4),
    ("rows", 256): Config(32, 32, 2, 4),
    ("rows", 1024): Config(128, 8, 1, 8),
    ("rows", 4096): Config(512, 4, 1, 8),
}
ENOUGH_PROGRAMS = 1024  # to fill a GPU; with more blocks of pixels than that, a program takes several
MOST_TURNS = 8  # blocks of pixels per program: enough to make the last sum over its lanes cheap
FINISH_ROWS, FINISH_COLUMNS = 16, 64  # programs and sums that finish_statistics_kernel reads at once


def config_of(pixel: int, classes: int, itemsize: int) -> Config:
    """For logits with neighbouring pixels `pixel` elements apart: 1 in planes (NCHW), more in rows (channels_last)."""
    if pixel == 1:
        names = ("planes",) if itemsize == 4 else ("half planes", "planes")
    else:
        names = ("rows",) if pixel % 4 else ("aligned rows", "rows")
    return next(config for (layout, most), config in CONFIGS.items() if layout in names and classes <= most)


def _constexprs(classes: int, pixel: int, itemsize: int, label_smoothing: float, squared: bool) -> tuple[dict, Config]:
    config = config_of(pixel, classes, itemsize)
    constexprs = dict(
        C=classes, PIXEL=pixel, CHUNK=config.chunk, BLOCK_P=config.block, SMOOTHING=label_smoothing > 0, SQUARED=squared
    )
    return constexprs, config


def softmax_statistics(
    input,
    target,
    weight,
    pixel_weight,
    ignore_index,
    label_smoothing,
    squared,
    intersection,
    prediction,
    truth,
    numerator,
    denominator,
) -> None:
    """intersection, prediction, truth: [N, C] fp64; numerator, denominator: [] fp64."""
    (logits,) = pixel_views(input, may_join=False)
    images, classes, pixels = logits.shape
    image, plane, pixel = logits.stride()
    constexprs, config = _constexprs(classes, pixel, logits.element_size(), label_smoothing, squared)
    blocks = triton.cdiv(pixels, config.block)
    turns = max(1, min(MOST_TURNS, images * blocks // ENOUGH_PROGRAMS))
    groups = triton.cdiv(blocks, turns)
    class_sums = logits.new_empty((images, groups, 3, classes), dtype=torch.float32)
    pixel_sums = logits.new_empty((images * groups, 2), dtype=torch.float32)
    with on_device_of(input):
        if images * groups:
            softmax_statistics_kernel[(images * groups,)](
                logits, target, weight, pixel_weight, class_sums, pixel_sums,
                pixels, groups, turns, image, plane, ignore_index, label_smoothing,
                **constexprs, FOLD=config.fold, DEBUG=DEBUG, num_warps=config.warps, debug=DEBUG,
            )  # fmt: skip
        if images * groups:
            finish_statistics_kernel[(images, triton.cdiv(3 * classes, FINISH_COLUMNS))](
                class_sums, pixel_sums, intersection, prediction, truth, numerator, denominator, images, groups,
                classes, ROWS=FINISH_ROWS, COLUMNS=FINISH_COLUMNS,
            )  # fmt: skip
        else:
            for sums in (intersection, prediction, truth, numerator, denominator):
                sums.zero_()


def softmax_statistics_backward(
    input,
    target,
    weight,
    pixel_weight,
    grad_intersection,
    grad_prediction,
    grad_numerator,
    ignore_index,
    label_smoothing,
    squared,
    grad_input,
) -> None:
    logits, gradient = pixel_views(input, grad_input, may_join=False)
    images, classes, pixels = logits.shape
    constexprs, config = _constexprs(classes, logits.stride(2), logits.element_size(), label_smoothing, squared)
    blocks = triton.cdiv(pixels, config.block)
    if images * blocks:
        with on_device_of(input):
            softmax_statistics_backward_kernel[(images * blocks,)](
                logits, target, weight, pixel_weight, grad_intersection, grad_prediction, grad_numerator, gradient,
                pixels, blocks, *logits.stride()[:2], *gradient.stride()[:2],
                *grad_intersection.stride(), *grad_prediction.stride(), ignore_index, label_smoothing,
                **constexprs, GRADIENT_PIXEL=gradient.stride(2), DEBUG=DEBUG, num_warps=config.warps, debug=DEBUG,
            )  # fmt: skip


# --- ahead-of-time cases ---


def _case(
    kernel,
    dtype: str,
    classes: int,
    rows: bool = False,
    weights: bool = False,
    squared: bool = True,
    label_smoothing: float = 0.0,
    **limits,
) -> AotCase:
    pixel = classes if rows else 1
    constexprs, config = _constexprs(classes, pixel, 4 if dtype == "fp32" else 2, label_smoothing, squared)
    pointers = dict(logits=f"*{dtype}", target="*i64")
    pointers |= dict(class_weight="*fp32", pixel_weight="*fp32") if weights else {}
    sizes = dict(pixels="i32", image="i32")
    others = {}
    if kernel is softmax_statistics_kernel:
        pointers |= dict(class_sums="*fp32", pixel_sums="*fp32")
        others = dict(groups="i32", turns="i32")
        constexprs |= dict(FOLD=config.fold)
    else:
        pointers |= dict(
            grad_intersection="*fp64", grad_prediction="*fp64", grad_numerator="*fp64", gradient=f"*{dtype}"
        )
        sizes |= dict(gradient_image="i32")
        others = dict(blocks="i32", intersection_image="i32", prediction_image="i32")
        constexprs |= dict(GRADIENT_PIXEL=pixel, intersection_class=1, prediction_class=1)
    planes = [name for name in ("plane", "gradient_plane") if name in kernel.arg_names]
    sizes |= {} if rows else dict.fromkeys(planes, "i32")
    constexprs |= dict.fromkeys(planes, 1) if rows else {}
    constexprs |= {} if weights else dict(class_weight=None, pixel_weight=None)
    flags = dict(rows=rows, weights=weights, linear=not squared, smoothing=label_smoothing)
    return AotCase(
        name="-".join([kernel.__name__, dtype, str(classes), *(flag for flag, value in flags.items() if value)]),
        kernel=kernel,
        signature={**pointers, **sizes, **others, "ignore_index": "i32", "label_smoothing": "fp32"},
        constexprs={**constexprs, "DEBUG": False},
        num_warps=config.warps,
        divisible=(*pointers, *sizes),
        **limits,
    )


def aot_cases() -> list[AotCase]:
    forward, backward = softmax_statistics_kernel, softmax_statistics_backward_kernel
    return [
        _case(forward, "fp32", 19, max_registers=144, load_bits=64),
        _case(forward, "bf16", 19, load_bits=64),
        _case(forward, "fp32", 150, max_registers=168, load_bits=128),
        _case(forward, "fp32", 1000, load_bits=128),
        _case(forward, "fp32", 19, rows=True, max_registers=168),
        _case(forward, "bf16", 64, rows=True, max_registers=168, load_bits=128),
        _case(forward, "fp32", 1000, rows=True, load_bits=128),
        _case(forward, "fp32", 19, weights=True, squared=False, label_smoothing=0.1),
        *(_case(backward, "fp32", classes, max_registers=128, store_bits=64) for classes in (2, 19, 21)),
        *(_case(backward, "fp32", classes, max_registers=168, store_bits=128) for classes in (64, 150, 1000)),
        _case(backward, "bf16", 19, max_registers=168, store_bits=64),
        _case(backward, "fp32", 19, rows=True, max_registers=168),
        _case(backward, "bf16", 64, rows=True, max_registers=168, store_bits=128),
        _case(backward, "fp32", 19, weights=True, squared=False, label_smoothing=0.1, store_bits=64),
        AotCase(
            "finish", finish_statistics_kernel,
            dict(class_sums="*fp32", pixel_sums="*fp32", intersection="*fp64", prediction="*fp64", truth="*fp64",
                 numerator="*fp64", denominator="*fp64", images="i32", groups="i32", C="i32"),
            dict(ROWS=FINISH_ROWS, COLUMNS=FINISH_COLUMNS),
        ),
        *triton_loss.aot_cases(),
    ]  # fmt: skip
