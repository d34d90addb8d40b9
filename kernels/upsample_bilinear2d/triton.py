"""Bilinear upsampling and the bilinear transposed convolution in Triton, forward and backward: method in README.md.

One kernel for each direction serves both memory formats (tensors come with their strides) and both ops, which differ in
where outputs lie in the source and in what is around it.
"""

import functools
import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseg._layout import is_channels_last
from fastseg._triton import AotCase, on_device_of


class Config(NamedTuple):
    elements: int  # of a tile
    strip: int  # source rows of a program, one after the other
    rows: int  # most output rows of one source row that a program writes; of the gradient: not used
    warps: int


CONFIGS = {"forward": Config(512, 4, 16, 4), "gradient": Config(512, 4, 0, 4)}
MOST_LANES = 64  # outputs that a source element sums up at a time
MOST_CHANNELS = 64  # of a tile, where channels are innermost


# Not specialised on: every factor would be compiled anew.
_STEPS = {
    "row_step": "i64", "row_inverse": "i64", "row_before": "i32",
    "column_step": "i64", "column_inverse": "i64", "column_before": "i32",
}  # fmt: skip


class Axis(NamedTuple):
    """Output o lies at (o + twice_before / 2) step - half in the source."""

    source: int
    output: int
    step_bits: int  # of the fp64: Triton passes Python floats as fp32
    inverse_bits: int  # of 1 / step, 0 for 0
    twice_before: int
    half: float
    zero: int  # 1 if the source is surrounded by zeros, 0 if by copies of its border
    span: int  # from one tap of an output to the other: 0 where the axis keeps its size
    fullest: int  # outputs between two neighbouring elements, as many as there are anywhere
    readers: int  # outputs that read the same element; those at the border may have more


def _axis(source: int, output: int, step: float, twice_before: int, half: float, zero: int) -> Axis:
    bits = struct.unpack("<2q", struct.pack("<2d", step, 1 / step if step else 0.0))
    place = (torch.arange(output, dtype=torch.float64) + twice_before / 2) * step - half
    low = place.floor().clamp(-zero, source - 1).long() + zero
    counts = torch.bincount(low, minlength=source + zero)
    pairs = counts[1:] + counts[:-1] if len(counts) > 1 else counts
    readers = int((pairs[1:-1] if len(pairs) > 2 else pairs).max())
    span = int(zero or source != output)
    return Axis(source, output, *bits, twice_before, half, zero, span, int(counts.max()), max(1, readers))


@functools.lru_cache(maxsize=1024)
def interpolating_axis(source: int, output: int, scale_factor: float | None, align_corners: bool) -> Axis:
    if source == output:
        step = 1.0
    elif align_corners:
        step = (source - 1) / (output - 1) if output > 1 else 0.0
    else:
        step = 1 / scale_factor if scale_factor else source / output
    return _axis(source, output, step, *((0, 0.0) if align_corners else (1, 0.5)), zero=0)


@functools.lru_cache(maxsize=1024)
def deconvolving_axis(source: int, output: int, kernel: int, stride: int, padding: int) -> Axis:
    twice_centre = 2 * stride - (2 if kernel % 2 else 1)
    return _axis(source, output, 1 / stride, 2 * padding - twice_centre, 0.0, zero=1)


# In the kernels: ZERO and HALF are an axis' `zero` and `half`, the same for both axes.


@triton.jit
def position(o, step_bits, twice_before, HALF: tl.constexpr):
    """fp64, not yet clamped."""
    step = step_bits.to(tl.int64).to(tl.float64, bitcast=True)  # 0 comes in 32 bits
    return (o.to(tl.float64) + twice_before * 0.5) * step - HALF


@triton.jit
def clamped(place, source, ZERO: tl.constexpr):
    return tl.minimum(tl.maximum(place, -1.0 * ZERO), source - 1.0 + ZERO)


@triton.jit
def first_at(target, output, step_bits, inverse_bits, twice_before, HALF: tl.constexpr):
    """The first output at source position `target` or later, `output` if there is none. The estimate is off by at most
    one. It needs no division, which in fp64 would take as long as everything else.
    """
    inverse = inverse_bits.to(tl.int64).to(tl.float64, bitcast=True)
    steps = (target.to(tl.float64) + HALF) * inverse - twice_before * 0.5
    steps = tl.where(inverse_bits == 0, tl.where(target > 0, output * 1.0, 0.0), steps)  # all lie at 0
    first = tl.minimum(tl.maximum(tl.ceil(steps), 0.0), output * 1.0).to(tl.int32)
    early = (first > 0) & (position(first - 1, step_bits, twice_before, HALF) >= target)
    late = (first < output) & (position(first, step_bits, twice_before, HALF) < target)
    return first - early.to(tl.int32) + late.to(tl.int32)


@triton.jit
def weighted(value, weight, ZERO: tl.constexpr):
    """value * weight. If ZERO, a weight of 0 gives 0 even for NaN; else torch multiplies by 0, too."""
    product = value * weight
    return tl.where(weight == 0.0, 0.0, product) if ZERO else product


@triton.jit
def tile_of(program, tiles, rows, chunks, CHANNELS: tl.constexpr):
    """(tile, row, channels (CHANNELS,) as int64, image as int64) of a program; tiles fastest, images slowest."""
    tile = program % tiles
    row = program // tiles % rows
    channels = program // tiles // rows % chunks * CHANNELS + tl.arange(0, CHANNELS)
    return tile, row, channels.to(tl.int64), (program // tiles // rows // chunks).to(tl.int64)


@triton.jit
def expanded_row(
    planes, row, left, right, left_weight, right_weight, valid, source_height, row_stride, ZERO: tl.constexpr
):
    """Source row `row` at the columns of a tile, fp32 (CHANNELS, COLUMNS); 0 if there is no such row."""
    inside_left, inside_right = valid, valid
    if ZERO:
        inside = (row >= 0) & (row < source_height)
        inside_left = valid & inside & (left_weight != 0.0)
        inside_right = valid & inside & (right_weight != 0.0)
    planes += row.to(tl.int64) * row_stride
    first = tl.load(planes + left, mask=inside_left, other=0.0).to(tl.float32)
    second = tl.load(planes + right, mask=inside_right, other=0.0).to(tl.float32)
    return first * left_weight + second * right_weight


@triton.jit(do_not_specialize=(*_STEPS, "strips", "chunks", "parts"))
def upsample_kernel(
    input,  # [N, C, h, w], any strides
    output,  # [N, C, H, W]
    image, channel, row, column,  # strides of input
    output_image, output_channel, output_row, output_column,
    source_height, source_width, height, width,
    row_step, row_inverse, row_before, column_step, column_inverse, column_before,
    C, tiles, strips, chunks, parts,
    HALF: tl.constexpr, ROW_SPAN: tl.constexpr, COLUMN_SPAN: tl.constexpr, ZERO: tl.constexpr,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, STRIP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: (N * chunks * strips * parts * tiles,). A program owns CHANNELS x COLUMNS outputs of every row that lies
    between source row k and the next, for STRIP values of k; if there are many, rows from `part` * ROWS on.
    """
    tile, strip, channels, n = tile_of(tl.program_id(0), tiles, strips * parts, chunks, CHANNELS)
    part, strip = strip % parts, strip // parts
    x = tile * COLUMNS + tl.arange(0, COLUMNS)
    place = clamped(position(x, column_step, column_before, HALF), source_width, ZERO)
    low = tl.minimum(tl.floor(place).to(tl.int32), source_width - 1)
    high = low + COLUMN_SPAN
    right_weight = (place - low).to(tl.float32)
    left_weight = 1.0 - right_weight
    if ZERO:
        left_weight = tl.where(low >= 0, left_weight, 0.0)
        right_weight = tl.where(high < source_width, right_weight, 0.0)
    left = tl.maximum(low, 0).to(tl.int64)[None, :] * column
    right = tl.minimum(high, source_width - 1).to(tl.int64)[None, :] * column
    left_weight, right_weight = left_weight[None, :], right_weight[None, :]
    valid = (channels < C)[:, None] & (x < width)[None, :]
    planes = input + n * image + channels[:, None] * channel
    to = output + n * output_image + channels[:, None] * output_channel + x.to(tl.int64)[None, :] * output_column
    for step in range(STRIP):
        k = strip * STRIP + step
        upper = k - ZERO
        begin = tl.where(k == 0, 0, first_at(upper, height, row_step, row_inverse, row_before, HALF))
        end = first_at(upper + 1, height, row_step, row_inverse, row_before, HALF)
        end = tl.where(k == source_height - 1 + ZERO, height, end)
        end = tl.where(k < source_height + ZERO, end, 0)
        begin += part * ROWS
        end = tl.minimum(end, begin + ROWS)
        if begin < end:
            lower = upper + ROW_SPAN
            if ZERO == 0:
                lower = tl.minimum(lower, source_height - 1)
            above = expanded_row(planes, upper, left, right, left_weight, right_weight, valid, source_height, row, ZERO)
            below = expanded_row(planes, lower, left, right, left_weight, right_weight, valid, source_height, row, ZERO)
            for number in range(end - begin):
                y = begin + number
                here = clamped(position(y, row_step, row_before, HALF), source_height, ZERO)
                weight = (here - upper).to(tl.float32)
                value = weighted(above, 1.0 - weight, ZERO) + weighted(below, weight, ZERO)
                tl.store(to + y.to(tl.int64) * output_row, value.to(output.dtype.element_ty), mask=valid)


@triton.jit
def readers(i, source, output, step_bits, inverse_bits, twice_before, HALF: tl.constexpr, ZERO: tl.constexpr):
    """(begin, end) of the outputs that read source element i."""
    begin = first_at(i - 1, output, step_bits, inverse_bits, twice_before, HALF)
    end = first_at(i + 1, output, step_bits, inverse_bits, twice_before, HALF)
    if ZERO == 0:  # the first and the last element also have all outputs before and after them
        begin = tl.where(i == 0, 0, begin)
        end = tl.where(i == source - 1, output, end)
    return begin, tl.where(i < source, end, begin)


@triton.jit
def share(o, i, source, step_bits, twice_before, HALF: tl.constexpr, ZERO: tl.constexpr):
    """The weight of source element i in output o."""
    place = clamped(position(o, step_bits, twice_before, HALF), source, ZERO)
    return tl.maximum(1.0 - tl.abs(place - i), 0.0).to(tl.float32)


@triton.jit(do_not_specialize=(*_STEPS, "strips", "chunks"))
def upsample_gradient_kernel(
    grad_output,  # [N, C, H, W], any strides
    grad_input,  # [N, C, h, w]
    image, channel, row, column,  # strides of grad_output
    input_image, input_channel, input_row, input_column,  # of grad_input
    source_height, source_width, height, width,
    row_step, row_inverse, row_before, column_step, column_inverse, column_before,
    C, tiles, strips, chunks,
    HALF: tl.constexpr, ZERO: tl.constexpr,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Grid: (N * chunks * strips * tiles,). A program owns CHANNELS x COLUMNS elements of STRIP source rows and gathers
    the outputs that read them: first over their rows, for LANES columns of each element at a time.
    """
    tile, strip, channels, n = tile_of(tl.program_id(0), tiles, strips, chunks, CHANNELS)
    j = tile * COLUMNS + tl.arange(0, COLUMNS)
    first, last = readers(j, source_width, width, column_step, column_inverse, column_before, HALF, ZERO)
    parts = tl.cdiv(tl.max(last - first, 0), LANES)
    owned = channels < C
    planes = grad_output + n * image + (channels * channel)[:, None, None]
    valid = owned[:, None] & (j < source_width)[None, :]
    to = grad_input + n * input_image + channels[:, None] * input_channel + j.to(tl.int64)[None, :] * input_column
    for step in range(tl.minimum(STRIP, source_height - strip * STRIP)):
        i = strip * STRIP + step
        begin, end = readers(i, source_height, height, row_step, row_inverse, row_before, HALF, ZERO)
        total = tl.zeros((CHANNELS, COLUMNS), tl.float32)
        for part in range(parts):
            x = first[:, None] + part * LANES + tl.arange(0, LANES)[None, :]
            weight = share(x, j[:, None], source_width, column_step, column_before, HALF, ZERO)
            weight = tl.where(x < last[:, None], weight, 0.0)[None, :, :]
            read = owned[:, None, None] & (weight != 0.0)
            offset = (x.to(tl.int64) * column)[None, :, :]
            lanes = tl.zeros((CHANNELS, COLUMNS, LANES), tl.float32)
            for number in range(end - begin):
                y = begin + number
                here = share(y, i, source_height, row_step, row_before, HALF, ZERO)
                value = tl.load(planes + y.to(tl.int64) * row + offset, mask=read, other=0.0).to(tl.float32)
                lanes += tl.where(here == 0.0, 0.0, value * here)  # NaN may be there
            total += tl.sum(lanes * weight, 2)
        tl.store(to + i.to(tl.int64) * input_row, total.to(grad_input.dtype.element_ty), mask=valid)


# --- launchers ---


def _power_of_two(count: int, most: int) -> int:
    return min(most, triton.next_power_of_2(count))


def _tile(elements: int, channels: int, columns: int, channels_last: bool) -> tuple[int, int]:
    """(channels, columns) of a tile, powers of two: long along what is innermost in memory."""
    if channels_last:
        inner = _power_of_two(channels, min(MOST_CHANNELS, elements))
        return inner, _power_of_two(columns, elements // inner)
    inner = _power_of_two(columns, elements)
    return _power_of_two(channels, elements // inner), inner


def _numbers(rows: Axis, columns: Axis) -> tuple:
    return (
        rows.source, columns.source, rows.output, columns.output,
        rows.step_bits, rows.inverse_bits, rows.twice_before,
        columns.step_bits, columns.inverse_bits, columns.twice_before,
    )  # fmt: skip


def _forward(input: Tensor, output: Tensor, rows: Axis, columns: Axis) -> None:
    config, (images, C) = CONFIGS["forward"], input.shape[:2]
    channels, width = _tile(config.elements, C, columns.output, is_channels_last(output))
    chunks, tiles = triton.cdiv(C, channels), triton.cdiv(columns.output, width)
    parts = triton.cdiv(
        rows.fullest + 1, config.rows
    )  # by rounding, the device may find one more output in an interval
    strip = config.strip if parts == 1 else 1
    strips = triton.cdiv(rows.source + rows.zero, strip)
    if images == 0:
        return
    with on_device_of(input):
        upsample_kernel[(images * chunks * strips * parts * tiles,)](
            input, output, *input.stride(), *output.stride(), *_numbers(rows, columns), C, tiles, strips, chunks, parts,
            HALF=rows.half, ROW_SPAN=rows.span, COLUMN_SPAN=columns.span, ZERO=rows.zero,
            CHANNELS=channels, COLUMNS=width, STRIP=strip, ROWS=config.rows, num_warps=config.warps,
        )  # fmt: skip


def _gradient(grad_output: Tensor, grad_input: Tensor, rows: Axis, columns: Axis) -> None:
    config, (images, C) = CONFIGS["gradient"], grad_output.shape[:2]
    lanes = _power_of_two(columns.readers, MOST_LANES)
    channels, width = _tile(config.elements // lanes, C, columns.source, is_channels_last(grad_input))
    chunks, tiles = triton.cdiv(C, channels), triton.cdiv(columns.source, width)
    strips = triton.cdiv(rows.source, config.strip)
    if images == 0:
        return
    with on_device_of(grad_output):
        upsample_gradient_kernel[(images * chunks * strips * tiles,)](
            grad_output, grad_input, *grad_output.stride(), *grad_input.stride(), *_numbers(rows, columns),
            C, tiles, strips, chunks, HALF=rows.half, ZERO=rows.zero,
            CHANNELS=channels, COLUMNS=width, LANES=lanes, STRIP=config.strip, num_warps=config.warps,
        )  # fmt: skip


def _interpolating(source: Tensor, output: Tensor, scales, align_corners: bool) -> tuple[Axis, Axis]:
    height, width = scales or (None, None)
    return (
        interpolating_axis(source.shape[2], output.shape[2], height, align_corners),
        interpolating_axis(source.shape[3], output.shape[3], width, align_corners),
    )


def _deconvolving(source: Tensor, output: Tensor, kernel_size, stride, padding) -> tuple[Axis, Axis]:
    rows, columns = zip(source.shape[2:], output.shape[2:], kernel_size, stride, padding)
    return deconvolving_axis(*rows), deconvolving_axis(*columns)


def upsample(input, scales, align_corners, output) -> None:
    """input: [N, C, h, w]; output: [N, C, H, W]. Any strides, here and below."""
    _forward(input, output, *_interpolating(input, output, scales, align_corners))


def upsample_backward(grad_output, scales, align_corners, grad_input) -> None:
    """grad_output: [N, C, H, W]; grad_input: [N, C, h, w]."""
    _gradient(grad_output, grad_input, *_interpolating(grad_input, grad_output, scales, align_corners))


def conv_transpose(input, kernel_size, stride, padding, output) -> None:
    """input: [N, C, h, w]; output: [N, C, H, W]."""
    _forward(input, output, *_deconvolving(input, output, kernel_size, stride, padding))


def conv_transpose_backward(grad_output, kernel_size, stride, padding, grad_input) -> None:
    """grad_output: [N, C, H, W]; grad_input: [N, C, h, w]."""
    _gradient(grad_output, grad_input, *_deconvolving(grad_input, grad_output, kernel_size, stride, padding))


# --- ahead-of-time cases ---

_SIZES = ("source_height", "source_width", "height", "width")


def _aot_case(name: str, dtype: str, channels_last: bool, zero: int, factor: int, **limits) -> AotCase:
    """Of 64 channels, 64 x 128 pixels, upsampled by `factor`, as the launchers would have it."""
    forward = name.startswith("forward")
    tensors = ("input", "output") if forward else ("grad_output", "grad_input")
    written = "output_" if forward else "input_"
    strides = [f"{prefix}{dim}" for prefix in ("", written) for dim in ("image", "channel", "row", "column")]
    unit = [f"{prefix}{'channel' if channels_last else 'column'}" for prefix in ("", written)]
    config = CONFIGS["forward" if forward else "gradient"]
    integers = [*strides, *_SIZES, "C", "tiles", "strips", "chunks", *(["parts"] if forward else [])]
    axis = (
        deconvolving_axis(128, 128 * factor, 2 * factor, factor, factor // 2)
        if zero
        else interpolating_axis(128, 128 * factor, None, False)
    )
    constexprs = dict(HALF=axis.half, ZERO=zero, STRIP=config.strip, **dict.fromkeys(unit, 1))
    if forward:
        channels, columns = _tile(config.elements, 64, axis.output, channels_last)
        constexprs |= dict(ROW_SPAN=1, COLUMN_SPAN=1, CHANNELS=channels, COLUMNS=columns, ROWS=config.rows)
    else:
        lanes = _power_of_two(axis.readers, MOST_LANES)
        channels, columns = _tile(config.elements // lanes, 64, axis.source, channels_last)
        constexprs |= dict(CHANNELS=channels, COLUMNS=columns, LANES=lanes)
    signature = {name: f"*{dtype}" for name in tensors} | {name: "i32" for name in integers if name not in unit}
    return AotCase(
        f"{name}-{dtype}-x{factor}{'-channels_last' if channels_last else ''}{'-zero' if zero else ''}",
        upsample_kernel if forward else upsample_gradient_kernel,
        signature | _STEPS,
        constexprs,
        num_warps=config.warps,
        divisible=(*tensors, *(name for name in (*strides, *_SIZES, "C") if name not in unit)),
        **limits,
    )


def aot_cases() -> list[AotCase]:
    return [
        _aot_case(name, dtype, channels_last, zero, factor, max_registers=96)
        for name in ("forward", "gradient")
        for dtype, zero, factor in (("fp32", 0, 8), ("fp32", 0, 2), ("bf16", 0, 8), ("fp32", 1, 8))
        for channels_last in (False, True)
    ]
