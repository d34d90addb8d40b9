"""Launchers, tables of configurations and ahead-of-time cases of the Triton kernels of the upsample losses.

The functions take the arguments of the ops of fastseg/ops/upsample_cross_entropy.py, shapes as there. Nothing here
reads data on the host; sums over programs are taken by torch in fp64, always in the same order.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastseg._triton import DEBUG, AotCase, on_device_of
from fastseg.kernels._cells import Axis, axis
from fastseg.kernels.cross_entropy_dice import triton_loss
from fastseg.kernels.cross_entropy_dice.arithmetic import mean_or_nan
from fastseg.kernels.upsample_cross_entropy.triton_kernels import (
    GRADIENT_INTEGERS,
    SOFTMAX_INTEGERS,
    upsample_gradient_kernel,
    upsample_softmax_kernel,
)


class SoftmaxConfig(NamedTuple):
    rows: int  # output rows of a program, all in one cell row
    columns: int
    chunk: int  # classes at a time
    warps: int


class GradientConfig(NamedTuple):
    cells: int  # neighbouring cells of a program: one more than the source columns it owns
    lanes: int  # output columns of a cell at a time
    chunk: int  # classes of a program
    warps: int


# By the most output rows (columns) of a cell; the first that fits. A thread of the softmax owns one or two columns.
SOFTMAX_CONFIGS = {
    1: SoftmaxConfig(1, 256, 4, 4),
    2: SoftmaxConfig(2, 256, 4, 4),
    4: SoftmaxConfig(4, 128, 4, 4),
    None: SoftmaxConfig(8, 128, 4, 4),
}
GRADIENT_CONFIGS = {
    1: GradientConfig(128, 1, 4, 4),
    2: GradientConfig(64, 2, 4, 4),
    4: GradientConfig(32, 4, 4, 4),
    8: GradientConfig(16, 8, 4, 4),
    None: GradientConfig(8, 16, 4, 4),
}
CONFIGS = {"softmax": SOFTMAX_CONFIGS, "gradient": GRADIENT_CONFIGS}
STRIP = 8  # source rows of a program of the gradient; it recomputes one cell row in STRIP + 1
# Most output rows of the gradient at a time, without and with label smoothing, whose weights take more registers.
GRADIENT_ROWS, SMOOTHED_ROWS = 4, 2


def _first_fit(configs: dict, size: int):
    return next(config for most, config in configs.items() if most is None or size <= most)


class Plan(NamedTuple):
    """Arguments of both kernels."""

    rows: Axis
    columns: Axis
    softmax: SoftmaxConfig
    gradient: GradientConfig
    integers: tuple  # source and output sizes and sampling rules
    constexprs: dict
    programs: int  # of the softmax kernel, for one image
    row_chunks: int
    column_blocks: int


def _plan(
    input: Tensor, target: Tensor, scale_factors, align_corners: bool, label_smoothing: float, squared: bool
) -> Plan:
    classes, source_height, source_width = input.shape[1:]
    scale_height, scale_width = scale_factors or (None, None)
    rows = axis(source_height, target.shape[1], scale_height, align_corners)
    columns = axis(source_width, target.shape[2], scale_width, align_corners)
    softmax = _first_fit(SOFTMAX_CONFIGS, rows.fullest)
    row_chunks, column_blocks = triton.cdiv(rows.fullest, softmax.rows), triton.cdiv(columns.output, softmax.columns)
    return Plan(
        rows, columns, softmax, _first_fit(GRADIENT_CONFIGS, columns.fullest),
        (
            rows.source, columns.source, rows.output, columns.output,
            rows.numerator, rows.denominator_bits, columns.numerator, columns.denominator_bits,
        ),
        dict(
            C=classes, HALF=0.0 if align_corners else 0.5, ROW_SPAN=rows.span, COLUMN_SPAN=columns.span,
            SMOOTHING=label_smoothing > 0, SQUARED=squared,
        ),
        (source_height + 1) * row_chunks * column_blocks, row_chunks, column_blocks,
    )  # fmt: skip


def _softmax(
    plan: Plan, input, target, weight, pixel_weight, ignore_index, label_smoothing, *, losses=None, sums=None,
    class_sums=None, log_total=None, grad_intersection=None, grad_prediction=None, mean_gradient=None,
) -> None:  # fmt: skip
    programs = input.shape[0] * plan.programs
    if programs == 0:
        return
    config = plan.softmax
    with on_device_of(input):
        upsample_softmax_kernel[(programs,)](
            input, target, weight, pixel_weight, losses, sums, class_sums, log_total, grad_intersection,
            grad_prediction, mean_gradient, *input.stride(), *plan.integers, plan.row_chunks, plan.column_blocks,
            ignore_index, label_smoothing, **plan.constexprs, ROWS=config.rows, COLUMNS=config.columns,
            CHUNK=config.chunk, DEBUG=DEBUG, num_warps=config.warps, debug=DEBUG,
        )  # fmt: skip


def _gradient(
    plan: Plan, input, target, weight, pixel_weight, ignore_index, label_smoothing, gradient, *, grad_losses=None,
    grad_numerator=None, grad_intersection=None, grad_prediction=None,
) -> None:  # fmt: skip
    """Writes the gradient of `input`: the softmax once more, then the gather."""
    config = plan.gradient
    rows = min(SMOOTHED_ROWS if plan.constexprs["SMOOTHING"] else GRADIENT_ROWS, plan.softmax.rows)
    strips = triton.cdiv(plan.rows.source, STRIP)
    tiles = triton.cdiv(plan.columns.source, config.cells - 1)
    programs = input.shape[0] * triton.cdiv(input.shape[1], config.chunk) * strips * tiles
    if programs == 0:
        return
    log_total = input.new_empty(target.shape, dtype=torch.float32)
    mean_gradient = torch.empty_like(log_total) if grad_intersection is not None else None
    _softmax(
        plan, input, target, weight, pixel_weight, ignore_index, label_smoothing, log_total=log_total,
        grad_intersection=grad_intersection, grad_prediction=grad_prediction, mean_gradient=mean_gradient,
    )  # fmt: skip
    with on_device_of(input):
        upsample_gradient_kernel[(programs,)](
            input, target, weight, pixel_weight, grad_losses, grad_numerator, log_total, grad_intersection,
            grad_prediction, mean_gradient, gradient, *input.stride(), *gradient.stride(), *plan.integers,
            triton.cdiv(plan.rows.fullest, rows), triton.cdiv(plan.columns.fullest, config.lanes), strips, tiles,
            ignore_index, label_smoothing, **plan.constexprs, ROWS=rows, CELLS=config.cells, LANES=config.lanes,
            CHUNK=config.chunk, STRIP=STRIP, num_warps=config.warps,
        )  # fmt: skip


# --- the ops ---


def loss(
    input, target, weight, pixel_weight, scale_factors, align_corners, ignore_index, label_smoothing, mean,
    zero_if_empty, with_gradient, loss, count, gradient,
) -> None:  # fmt: skip
    """loss: []; count: [] fp64, the denominator of a mean; gradient: fp32, like input, count * that of the loss."""
    plan = _plan(input, target, scale_factors, align_corners, label_smoothing, True)
    partial = input.new_empty((2, input.shape[0] * plan.programs), dtype=torch.float32)
    _softmax(plan, input, target, weight, pixel_weight, ignore_index, label_smoothing, sums=partial)
    numerator, denominator = (part.sum(dtype=torch.float64) for part in partial)
    loss.copy_(mean_or_nan(numerator, denominator, zero_if_empty) if mean else numerator)
    count.copy_(denominator) if mean else count.fill_(1)
    if with_gradient:
        _gradient(plan, input, target, weight, pixel_weight, ignore_index, label_smoothing, gradient)


def pixels(
    input, target, weight, pixel_weight, scale_factors, align_corners, ignore_index, label_smoothing, losses
) -> None:
    """losses: [N, H, W] fp32."""
    plan = _plan(input, target, scale_factors, align_corners, label_smoothing, True)
    _softmax(plan, input, target, weight, pixel_weight, ignore_index, label_smoothing, losses=losses)


def pixels_backward(
    input, target, weight, pixel_weight, grad_losses, scale_factors, align_corners, ignore_index, label_smoothing,
    grad_input,
) -> None:  # fmt: skip
    """grad_losses: [N, H, W]; a tensor with strides of 0 is read as one number."""
    plan = _plan(input, target, scale_factors, align_corners, label_smoothing, True)
    one_number = grad_losses.numel() > 0 and all(stride == 0 for stride in grad_losses.stride())
    given = (
        dict(grad_numerator=grad_losses[0, 0, 0].double()) if one_number else dict(grad_losses=grad_losses.contiguous())
    )
    _gradient(plan, input, target, weight, pixel_weight, ignore_index, label_smoothing, grad_input, **given)


def statistics(
    input, target, weight, pixel_weight, scale_factors, align_corners, ignore_index, label_smoothing, squared,
    intersection, prediction, truth, numerator, denominator,
) -> None:  # fmt: skip
    """intersection, prediction, truth: [N, C] fp64; numerator, denominator: [] fp64."""
    plan = _plan(input, target, scale_factors, align_corners, label_smoothing, squared)
    images, classes = input.shape[:2]
    partial = input.new_empty((2, images * plan.programs), dtype=torch.float32)
    class_sums = input.new_empty((images, plan.programs, 3, classes), dtype=torch.float32)
    _softmax(
        plan, input, target, weight, pixel_weight, ignore_index, label_smoothing, sums=partial, class_sums=class_sums
    )
    for sums, part in zip((intersection, prediction, truth), class_sums.unbind(2)):
        torch.sum(part, 1, dtype=torch.float64, out=sums)
    for total, part in zip((numerator, denominator), partial):
        torch.sum(part, 0, dtype=torch.float64, out=total)


def statistics_backward(
    input, target, weight, pixel_weight, grad_intersection, grad_prediction, grad_numerator, scale_factors,
    align_corners, ignore_index, label_smoothing, squared, grad_input,
) -> None:  # fmt: skip
    plan = _plan(input, target, scale_factors, align_corners, label_smoothing, squared)
    _gradient(
        plan, input, target, weight, pixel_weight, ignore_index, label_smoothing, grad_input,
        grad_numerator=grad_numerator, grad_intersection=grad_intersection, grad_prediction=grad_prediction,
    )  # fmt: skip


def dice_loss(
    input, target, weight, pixel_weight, scale_factors, align_corners, ignore_index, label_smoothing, squared,
    ce_weight, dice_weight, smooth, include_background, per_image, zero_if_empty, with_gradient, loss, unit, gradient,
) -> None:  # fmt: skip
    """loss: []; unit: [] fp64, here 1; gradient: fp32, like input, that of the loss."""
    sums = input.new_empty((3, *input.shape[:2]), dtype=torch.float64).unbind(0)
    totals = input.new_empty((2,), dtype=torch.float64).unbind(0)
    call = input, target, weight, pixel_weight
    options = scale_factors, align_corners, ignore_index, label_smoothing, squared
    dice_options = ce_weight, dice_weight, smooth, include_background, per_image, zero_if_empty
    statistics(*call, *options, *sums, *totals)
    triton_loss.loss_of_sums(*sums, *totals, *dice_options, loss)
    unit.fill_(1)
    if with_gradient:
        gradients = [torch.empty_like(sums[0]), torch.empty_like(sums[0]), torch.empty_like(unit)]
        triton_loss.loss_of_sums_backward(*sums, totals[1], unit, *dice_options, *gradients)
        statistics_backward(*call, *gradients, *options, gradient)


# --- ahead of time ---

_STRIDES = (
    "image", "plane", "row", "column", "gradient_image", "gradient_plane", "gradient_row", "gradient_column",
    "row_denominator", "column_denominator",
)  # fmt: skip
_POINTERS = {
    "class_weight": "*fp32", "pixel_weight": "*fp32", "losses": "*fp32", "sums": "*fp32", "class_sums": "*fp32",
    "log_total": "*fp32", "grad_losses": "*fp32", "grad_numerator": "*fp64", "grad_intersection": "*fp64",
    "grad_prediction": "*fp64", "mean_gradient": "*fp32",
}  # fmt: skip


def _aot_case(name: str, kernel, integers, dtype: str, given: tuple[str, ...], constexprs: dict, warps: int) -> AotCase:
    """given: which of the optional tensors there are; label smoothing and Dice follow from `constexprs` and these."""
    pointers = {"input": f"*{dtype}", "target": "*i64", **{key: _POINTERS[key] for key in given}}
    if kernel is upsample_gradient_kernel:
        pointers |= {"log_total": "*fp32", "gradient": f"*{dtype}"}
    signature = {**pointers, "label_smoothing": "fp32"}
    signature |= {key: "i64" if key in _STRIDES else "i32" for key in integers}
    absent = {key: None for key in _POINTERS if key in kernel.arg_names and key not in signature}
    return AotCase(
        name,
        kernel,
        signature,
        dict(C=19, HALF=0.5, ROW_SPAN=1, COLUMN_SPAN=1, SMOOTHING=False, SQUARED=True) | constexprs | absent,
        num_warps=warps,
        divisible=tuple(pointers),
    )


def _softmax_case(name: str, config: SoftmaxConfig, dtype: str, *given: str, **constexprs) -> AotCase:
    constexprs |= dict(ROWS=config.rows, COLUMNS=config.columns, CHUNK=config.chunk, DEBUG=False)
    name = f"softmax-{config.rows}x{config.columns}-{name}"
    return _aot_case(name, upsample_softmax_kernel, SOFTMAX_INTEGERS, dtype, given, constexprs, config.warps)


def _gradient_case(name: str, rows: int, config: GradientConfig, dtype: str, *given: str, **constexprs) -> AotCase:
    constexprs |= dict(ROWS=rows, CELLS=config.cells, LANES=config.lanes, CHUNK=config.chunk, STRIP=STRIP)
    name = f"gradient-{rows}-{config.cells}x{config.lanes}-{name}"
    return _aot_case(name, upsample_gradient_kernel, GRADIENT_INTEGERS, dtype, given, constexprs, config.warps)


def aot_cases() -> list[AotCase]:
    weights, dice = ("class_weight", "pixel_weight"), ("grad_intersection", "grad_prediction", "mean_gradient")
    tall, wide = SOFTMAX_CONFIGS[None], GRADIENT_CONFIGS[8]
    return [
        *(_softmax_case("sums", config, "fp32", "sums") for config in SOFTMAX_CONFIGS.values()),
        _softmax_case("losses", tall, "fp16", "losses", *weights, C=1000, SMOOTHING=True),
        _softmax_case("statistics", tall, "bf16", "sums", "class_sums", *weights, C=150),
        _softmax_case("dice", tall, "fp32", "log_total", *dice),
        _softmax_case("dice-linear", tall, "fp32", "log_total", *dice, SQUARED=False),
        *(
            _gradient_case("sums", min(GRADIENT_ROWS, config.lanes), config, "fp32", "grad_numerator")
            for config in GRADIENT_CONFIGS.values()
        ),
        _gradient_case("losses", SMOOTHED_ROWS, wide, "fp16", "grad_losses", *weights, C=1000, SMOOTHING=True),
        _gradient_case("dice", GRADIENT_ROWS, wide, "bf16", "grad_numerator", *dice, *weights, C=150),
        _gradient_case("dice-linear", GRADIENT_ROWS, wide, "fp32", "grad_numerator", *dice, SQUARED=False),
    ]
