"""Convolution and transposed convolution as one implicit GEMM over rectangles of constant taps: see rectangles.py.

For the weight gradient see triton_weight.py, for depthwise weights triton_depthwise.py, for formulas README.md.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastseg import _library
from fastseg._triton import MAX_SHARED, AotCase, on_device_of
from fastseg.kernels.convolution.launch import (
    LARGE_SHARED,
    LEAST_COPY,
    is_channels_last,
    is_wide,
    packed,
    precision,
    processors,
    run_of,
    shared_memory,
    strides,
)
from fastseg.kernels.convolution.rectangles import plan
from fastseg.kernels.convolution.triton_depthwise import depthwise_aot_cases
from fastseg.kernels.convolution.triton_tiles import both, over_pixels, parts_aot_cases, pointers, spread
from fastseg.kernels.convolution.triton_weight import weight_aot_cases


class Config(NamedTuple):
    pixels: int
    out_channels: int
    channels: int  # summed per step
    warps: int
    stages: int


# (multiplied as, layout, outputs) -> Config; "widest" on GPUs with LARGE_SHARED shared memory. Rewritten by
# benchmarks/tune_convolution.py.
CONFIGS = {
    ("half", "channels_last", "few"): Config(128, 32, 64, 4, 4),
    ("half", "channels_last", "medium"): Config(128, 64, 64, 4, 4),
    ("half", "channels_last", "wide"): Config(128, 128, 64, 8, 3),
    ("half", "channels_last", "widest"): Config(128, 256, 64, 8, 3),
    ("half", "planes", "few"): Config(128, 32, 64, 4, 4),
    ("half", "planes", "medium"): Config(128, 64, 32, 4, 4),
    ("half", "planes", "wide"): Config(128, 128, 64, 8, 3),
    ("tf32", "channels_last", "few"): Config(128, 32, 32, 4, 4),
    ("tf32", "channels_last", "medium"): Config(128, 64, 32, 8, 4),
    ("tf32", "channels_last", "wide"): Config(128, 128, 32, 8, 3),
    ("tf32", "planes", "few"): Config(128, 32, 32, 4, 4),
    ("tf32", "planes", "medium"): Config(128, 64, 32, 4, 4),
    ("tf32", "planes", "wide"): Config(128, 128, 32, 8, 3),
    ("ieee", "channels_last", "few"): Config(64, 32, 16, 4, 3),
    ("ieee", "channels_last", "wide"): Config(64, 64, 16, 4, 3),
    ("ieee", "planes", "few"): Config(64, 32, 16, 4, 3),
    ("ieee", "planes", "wide"): Config(64, 64, 16, 4, 3),
}
LEAST_CHANNELS = 16  # that one tl.dot sums


def config_of(
    dtype: torch.dtype, multiplied: str, channels_last: bool, out_channels: int, channels: int, pixels: int,
    has_residual: bool, device: torch.device,
) -> Config:  # fmt: skip
    """The largest block that the outputs fill; a smaller one if there would be fewer blocks than processors.

    out_channels, channels: of one group; pixels: of all groups together.
    """
    found = _config_for_outputs(dtype, multiplied, channels_last, out_channels, pixels, has_residual, device)
    return found._replace(channels=min(found.channels, max(LEAST_CHANNELS, triton.next_power_of_2(channels))))


def _config_for_outputs(dtype, multiplied, channels_last, out_channels, pixels, has_residual, device) -> Config:
    kind = multiplied if dtype is torch.float32 else "half"
    layout = "channels_last" if channels_last else "planes"
    for name, more_than in (("widest", 128), ("wide", 64), ("medium", 32)):
        config = CONFIGS.get((kind, layout, name))
        if config is None or out_channels <= min(more_than, config.out_channels // 2):
            continue
        programs = triton.cdiv(pixels, config.pixels) * triton.cdiv(out_channels, config.out_channels)
        # A residual takes registers that the widest tile does not leave.
        fits = name != "widest" or (shared_memory(device) >= LARGE_SHARED and not has_residual)
        if fits and programs >= processors(device):
            return config
    smallest = "few" if out_channels <= 32 else "medium"
    return CONFIGS.get((kind, layout, smallest)) or CONFIGS[kind, layout, "few"]


@triton.jit
def read_inputs(
    input, corner, from_row, from_column, down, right, chunk, wanted,
    channels, height, width, input_channel, input_row, input_column,
    TESTED: tl.constexpr, EVEN: tl.constexpr, PRELOAD: tl.constexpr, RUN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """The tile of input pixels (down, right) of a block's first tap, at the channels `chunk`.

    wanted: False past the last step; used only if PRELOAD.
    """
    at = pointers(input, corner, down * input_row + right * input_column + chunk * input_channel, RUN, CHANNELS_LAST)
    if TESTED:
        row, column = from_row + down, from_column + right
        seen = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    else:
        seen = tl.full(corner.shape, True, tl.int1)
    if PRELOAD:
        seen = seen & wanted
    if TESTED or PRELOAD or not EVEN:
        return tl.load(at, both(seen, chunk < channels, RUN, CHANNELS_LAST), 0.0)
    else:
        return tl.load(at)


@triton.jit
def implicit_gemm_kernel(
    input,  # [N, C, H, W] of any strides
    weight,  # [groups, taps, K', C'] of last stride 1, filled up with zeros to whole blocks
    bias,  # [K] or None
    residual,  # [N, K, OH, OW] of any strides, or None
    output,  # [N, K, OH, OW] of any strides
    rectangles,  # [rectangles, 17] int32, see rectangles.py
    blocks,  # [programs / tiles, 2] int32
    images, channels, out_channels,  # N, and both numbers of channels of one group
    height, width, tiles, tiles_of_group,
    input_image, input_channel, input_row, input_column,
    weight_group, weight_tap, weight_channel,
    residual_image, residual_channel, residual_row, residual_column,
    output_image, output_channel, output_row, output_column,
    CHANNELS_LAST: tl.constexpr, TESTED: tl.constexpr, EVEN: tl.constexpr, PRELOAD: tl.constexpr, RELU: tl.constexpr,
    INPUT_RUN: tl.constexpr, OUTPUT_RUN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """BLOCK_P pixels of one rectangle by BLOCK_K output channels of one group. Grid: (blocks * tiles of channels,)."""
    program = tl.program_id(0)
    tile, entry = program % tiles, blocks + program // tiles * 2  # neighbours share their pixels
    group = tile // tiles_of_group
    k = tile % tiles_of_group * BLOCK_K + tl.arange(0, BLOCK_K)
    line = rectangles + tl.load(entry) * 17
    columns, pixels = tl.load(line), tl.load(line + 1)
    y, y_step, x, x_step = tl.load(line + 2), tl.load(line + 3), tl.load(line + 4), tl.load(line + 5)
    row, row_step, row_tap = tl.load(line + 6), tl.load(line + 7), tl.load(line + 8)
    column, column_step, column_tap = tl.load(line + 9), tl.load(line + 10), tl.load(line + 11)
    tap, tap_down, tap_right = tl.load(line + 12), tl.load(line + 13), tl.load(line + 14)
    taps_down, taps_right = tl.load(line + 15), tl.load(line + 16)
    number = tl.load(entry + 1)
    if WIDE:
        number, pixels, row_tap, column_tap = (
            number.to(tl.int64),
            pixels.to(tl.int64),
            row_tap.to(tl.int64),
            column_tap.to(tl.int64),
        )
        k = k.to(tl.int64)

    p = number * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < images * pixels
    p = tl.where(inside, p, 0)  # an address that exists
    n, q = p // pixels, p % pixels
    i, j = q // columns, q % columns
    from_row, from_column = row + i * row_step, column + j * column_step
    corner = n * input_image + from_row * input_row + from_column * input_column
    of_group = group.to(tl.int64) * channels * input_channel
    if not CHANNELS_LAST:
        of_group = tl.multiple_of(of_group, INPUT_RUN)
    input += of_group
    c = tl.arange(0, BLOCK_C)
    weights = weight + group.to(tl.int64) * weight_group + spread(c, k * weight_channel, CHANNELS_LAST)

    total = tl.zeros((BLOCK_P, BLOCK_K) if CHANNELS_LAST else (BLOCK_K, BLOCK_P), tl.float32)
    # One flat loop over taps and chunks of channels, so that loads of a tap overlap the products of the tap before.
    # Loads too narrow to be asynchronous copies are made into registers instead, one step earlier (PRELOAD).
    steps = taps_down * taps_right * tl.cdiv(channels, BLOCK_C)
    r, s, first = 0, 0, 0
    if PRELOAD:
        next_values = read_inputs(
            input, corner, from_row, from_column, 0, 0, c, steps > 0, channels, height, width,
            input_channel, input_row, input_column, TESTED, EVEN, PRELOAD, INPUT_RUN, CHANNELS_LAST,
        )  # fmt: skip
    for step in range(steps):
        if not PRELOAD:
            values = read_inputs(
                input, corner, from_row, from_column, r * row_tap, s * column_tap, first + c, True, channels, height,
                width, input_channel, input_row, input_column, TESTED, EVEN, PRELOAD, INPUT_RUN, CHANNELS_LAST,
            )  # fmt: skip
        factors = tl.load(weights + ((tap + r * tap_down + s * tap_right).to(tl.int64) * weight_tap + first))
        first += BLOCK_C
        next_tap = first >= channels
        first = tl.where(next_tap, 0, first)
        s += next_tap.to(tl.int32)
        next_row = s >= taps_right
        s = tl.where(next_row, 0, s)
        r += next_row.to(tl.int32)
        if PRELOAD:
            values = next_values
            next_values = read_inputs(
                input, corner, from_row, from_column, r * row_tap, s * column_tap, first + c, step + 1 < steps,
                channels, height, width, input_channel, input_row, input_column,
                TESTED, EVEN, PRELOAD, INPUT_RUN, CHANNELS_LAST,
            )  # fmt: skip
        if INTERPRETED:  # the interpreter has no arithmetic of half types
            values, factors = values.to(tl.float32), factors.to(tl.float32)
        if CHANNELS_LAST:
            total = tl.dot(values, factors, total, input_precision=PRECISION)
        else:
            total = tl.dot(factors, values, total, input_precision=PRECISION)

    exists = k < out_channels
    k += group * out_channels
    mask = both(inside, exists, OUTPUT_RUN, CHANNELS_LAST)
    y, x = y + i * y_step, x + j * x_step
    if bias is not None:
        total += over_pixels(tl.load(bias + k, exists, 0.0).to(tl.float32), CHANNELS_LAST)
    if residual is not None:
        corner = n * residual_image + y * residual_row + x * residual_column
        at = residual + spread(corner, k * residual_channel, CHANNELS_LAST)
        total += tl.load(at, mask, 0.0).to(tl.float32)
    if RELU:
        total = tl.where(total < 0.0, 0.0, total)  # keeps NaN, as torch does
    corner = n.to(tl.int64) * output_image + y * output_row + x * output_column
    to = pointers(output, corner, k * output_channel, OUTPUT_RUN, CHANNELS_LAST)
    tl.store(to, total.to(output.dtype.element_ty), mask)


def _launch(kind, input, weight, bias, residual, stride, padding, dilation, groups, size, relu, output) -> None:
    if output.numel() == 0:
        return
    images, out_channels, *_ = output.shape
    channels, out_channels = input.shape[1] // groups, out_channels // groups
    channels_last, multiplied = is_channels_last(input), precision(input.dtype)
    pixels = images * groups * size[0] * size[1]
    config = config_of(
        input.dtype, multiplied, channels_last, out_channels, channels, pixels, residual is not None, input.device
    )
    taps = packed(weight, groups, kind == "transposed", config.out_channels, config.channels)
    blocks = plan(
        kind, images, tuple(input.shape[2:]), tuple(size), tuple(weight.shape[2:]), tuple(stride), tuple(padding),
        tuple(dilation), config.pixels, input.device,
    )  # fmt: skip
    tiles_of_group = triton.cdiv(out_channels, config.out_channels)
    tiles = groups * tiles_of_group
    run = run_of(input, blocks.input_run)
    with on_device_of(input):
        implicit_gemm_kernel[(len(blocks.blocks) * tiles,)](
            input, taps, bias, residual, output, blocks.rectangles, blocks.blocks,
            images, channels, out_channels, *input.shape[2:], tiles, tiles_of_group,
            *strides(input), *taps.stride()[:3], *strides(residual), *strides(output),
            CHANNELS_LAST=channels_last, TESTED=blocks.tested, EVEN=channels % config.channels == 0,
            PRELOAD=not channels_last and run * input.element_size() < LEAST_COPY, RELU=relu,
            INPUT_RUN=run, OUTPUT_RUN=run_of(output, blocks.output_run),
            WIDE=is_wide(input, residual, output), PRECISION=multiplied,
            BLOCK_P=config.pixels, BLOCK_K=config.out_channels, BLOCK_C=config.channels,
            INTERPRETED=_library.interpreting(), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip


def dilated_conv2d(input, weight, bias, residual, stride, padding, dilation, groups, size, relu, output):
    """input [N, C, H, W], weight [K, C / groups, R, S], residual and output [N, K, *size]."""
    _launch("convolution", input, weight, bias, residual, stride, padding, dilation, groups, size, relu, output)


def conv_transpose2d(input, weight, bias, residual, stride, padding, dilation, groups, size, relu, output):
    """input [N, C, H, W], weight [C, K / groups, R, S], residual and output [N, K, *size]."""
    _launch("transposed", input, weight, bias, residual, stride, padding, dilation, groups, size, relu, output)


# --- ahead-of-time cases ---


def aot_cases() -> list[AotCase]:
    """Every configuration once, with aligned channels and no options; then the options."""
    half = "half", "channels_last", "wide"
    planes = "half", "planes", "wide"
    few = "half", "channels_last", "few"
    cases = [
        *(_case(*key, config) for key, config in CONFIGS.items()),
        _case(*half, CONFIGS[half], "residual", residual=True),
        _case(*half, CONFIGS[half], "tested", TESTED=True, EVEN=False),
        _case(*half, CONFIGS[half], "64 bits", WIDE=True),
        _case(*few, CONFIGS[few]._replace(channels=32), "few channels", EVEN=False),
        _case(*planes, CONFIGS[planes], "aligned", INPUT_RUN=8, OUTPUT_RUN=8, PRELOAD=False),
        _case(*planes, CONFIGS[planes], "tested", residual=True, TESTED=True, EVEN=False),
    ]
    return [*cases, *weight_aot_cases(), *depthwise_aot_cases(), *parts_aot_cases()]


def _case(kind, layout, outputs, config, what="", residual=False, **constexprs) -> AotCase:
    dtype, channels_last = "bf16" if kind == "half" else "fp32", layout == "channels_last"
    images = ("input", "residual", "output") if residual else ("input", "output")
    pointers = {name: f"*{dtype}" for name in (*images, "weight", "bias")} | dict(rectangles="*i32", blocks="*i32")
    constexprs = dict(
        TESTED=False, EVEN=True, RELU=True, INPUT_RUN=1, OUTPUT_RUN=1, WIDE=False, INTERPRETED=False,
        PRELOAD=not channels_last and kind == "half", PRECISION="ieee" if kind == "ieee" else "tf32",
        CHANNELS_LAST=channels_last, BLOCK_P=config.pixels, BLOCK_K=config.out_channels, BLOCK_C=config.channels,
    ) | constexprs  # fmt: skip
    constexprs |= {f"{image}_{'channel' if channels_last else 'column'}": 1 for image in images}
    if not residual:
        constexprs["residual"] = None
    sizes = [
        name
        for name in implicit_gemm_kernel.arg_names
        if name.islower() and name not in pointers and name not in constexprs
    ]
    strides = [name for name in sizes if name.endswith(("_image", "_row", "_column"))] if channels_last else []
    # mma takes over where an output tile has fewer rows than wgmma multiplies.
    rows = config.pixels if channels_last else config.out_channels
    return AotCase(
        " ".join(("dense", kind, layout, outputs, what)).strip().replace(" ", "-"), implicit_gemm_kernel,
        pointers | {name: "i32" for name in sizes}, constexprs, num_warps=config.warps, num_stages=config.stages,
        divisible=(*pointers, "channels", "out_channels", "weight_group", "weight_tap", "weight_channel", *strides),
        max_shared=LARGE_SHARED if outputs == "widest" else MAX_SHARED,
        tensor_cores=kind != "ieee" and rows >= 64, store_bits=128 if channels_last else 0,
        copy_bits=128 if channels_last or constexprs["INPUT_RUN"] == 8 else 0,
    )  # fmt: skip
