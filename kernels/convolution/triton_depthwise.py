"""The three maps for depthwise weights [C, 1, R, S]: bound by memory, so every output gathers its taps from the caches.

In the transposed map an output reads every (stride / gcd(stride, dilation))-th tap. The first of them depends only on
the output's remainder modulo the stride: it is computed, not searched.
"""

from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastseg._triton import AotCase, on_device_of
from fastseg.kernels.convolution.launch import is_channels_last, is_wide, processors, run_of, strides
from fastseg.kernels.convolution.triton_tiles import add_parts, both, over_pixels, pointers, spread


class Config(NamedTuple):
    pixels: int
    channels: int
    warps: int


# (layout, most pixels of an output plane) -> Config; the first entry that fits is taken
CONFIGS = {
    ("planes", 256): Config(256, 4, 4),
    ("planes", None): Config(1024, 1, 4),
    ("channels_last", None): Config(32, 64, 4),
}
# The same for the gradient of the weight, where a tile has taps as a third axis.
WEIGHT_CONFIGS = {
    ("planes", None): Config(256, 1, 4),
    ("channels_last", None): Config(8, 32, 4),
}
MOST_TAPS = 16  # of such a tile
MOST_UNROLLED = 9  # taps
PROGRAMS_PER_PROCESSOR = 8


def config_of(table: dict, channels_last: bool, channels: int, pixels: int) -> Config:
    """A block as large as the table says, of no more channels than there are."""
    layout = "channels_last" if channels_last else "planes"
    rows = ((most, config) for (name, most), config in table.items() if name == layout)
    found = next(config for most, config in rows if most is None or pixels <= most)
    fitting = min(found.channels, triton.next_power_of_2(channels))
    return found._replace(channels=fitting, pixels=found.pixels * found.channels // fitting)


class Axis(NamedTuple):
    """How outputs reach inputs along an axis; programs are compiled for it."""

    transposed: bool
    stride: int
    dilation: int
    common: int  # gcd of both
    inverse: int  # of dilation / common modulo stride / common
    count: int  # most taps that an output has
    tap_step: int  # from one of them to the next
    input_step: int


def axis_of(transposed: bool, taps: int, stride: int, dilation: int) -> Axis:
    if not transposed:
        return Axis(False, stride, dilation, 1, 0, taps, 1, dilation)
    common = gcd(stride, dilation)
    step = stride // common
    inverse = pow(dilation // common, -1, step) if step > 1 else 0
    return Axis(True, stride, dilation, common, inverse, -(-taps // step), step, -(dilation // common))


@triton.jit
def reach(o, padding, AXIS: tl.constexpr):
    """(first tap, the input that it reads) of outputs o along an `Axis`; the tap is -1 where there is none."""
    stride: tl.constexpr = AXIS[1]
    dilation: tl.constexpr = AXIS[2]
    common: tl.constexpr = AXIS[3]
    inverse: tl.constexpr = AXIS[4]
    step: tl.constexpr = AXIS[6]
    if AXIS[0]:
        place = o + padding  # = input * stride + tap * dilation
        tap = place // common % step * inverse % step
        # Where there is a tap this division is exact, so it is the same for negative numbers however it rounds.
        return tl.where(place % common == 0, tap, -1), (place - tap * dilation) // stride
    else:
        return tl.zeros_like(o), o * stride - padding


@triton.jit
def depthwise_kernel(
    input,  # [N, C, H, W] of any strides
    weight,  # [C, taps] of any strides
    bias,  # [C] or None
    residual,  # [N, C, OH, OW] of any strides, or None
    output,  # [N, C, OH, OW] of any strides
    channels, height, width, out_width, pixels, tiles, programs_of_plane, blocks_of_program,
    padding_row, padding_column, input_image, input_channel, input_row, input_column, weight_channel, weight_tap,
    residual_image, residual_channel, residual_row, residual_column,
    output_image, output_channel, output_row, output_column,
    DOWN: tl.constexpr, RIGHT: tl.constexpr, R: tl.constexpr, S: tl.constexpr, UNROLL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INPUT_RUN: tl.constexpr, OUTPUT_RUN: tl.constexpr, RELU: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Both maps: some blocks of BLOCK_P outputs of BLOCK_C planes. Grid: (images * tiles * programs_of_plane,).

    DOWN, RIGHT: the two `Axis`.
    """
    program = tl.program_id(0)
    n = (program // (tiles * programs_of_plane)).to(tl.int64)
    inner = program % (tiles * programs_of_plane)
    if CHANNELS_LAST:
        tile, first = inner % tiles, inner // tiles
    else:  # neighbouring programs share cache lines
        tile, first = inner // programs_of_plane, inner % programs_of_plane
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    of_tile = c < channels
    from_image, to_image = n * input_image, n * output_image
    if not CHANNELS_LAST:
        from_image, to_image = tl.multiple_of(from_image, INPUT_RUN), tl.multiple_of(to_image, OUTPUT_RUN)
    input += from_image
    output += to_image
    if residual is not None:
        residual += n * residual_image
    wide_c = c.to(tl.int64) if WIDE else c
    for block in range(first * blocks_of_program, (first + 1) * blocks_of_program):
        if WIDE:
            p = tl.full((BLOCK_P,), block, tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
        else:
            p = block * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = p < pixels
        y, x = p // out_width, p % out_width
        first_r, from_row = reach(y, padding_row, DOWN)
        first_s, from_column = reach(x, padding_column, RIGHT)
        total = spread(tl.zeros((BLOCK_P,), tl.float32), tl.zeros((BLOCK_C,), tl.float32), CHANNELS_LAST)
        for tap in tl.range(0, DOWN[5] * RIGHT[5], loop_unroll_factor=UNROLL):
            j, i = tap // RIGHT[5], tap % RIGHT[5]
            row, column = from_row + j * DOWN[7], from_column + i * RIGHT[7]
            seen = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            if DOWN[0]:
                r, s = first_r + j * DOWN[6], first_s + i * RIGHT[6]
                seen = seen & (first_r >= 0) & (r < R) & (first_s >= 0) & (s < S)
                offsets = spread((r * S + s) * weight_tap, wide_c * weight_channel, CHANNELS_LAST)
                factors = tl.load(weight + offsets, both(seen, of_tile, 1, CHANNELS_LAST), 0.0).to(tl.float32)
            else:
                factors = tl.load(weight + tap * weight_tap + c * weight_channel, of_tile, 0.0).to(tl.float32)
                factors = over_pixels(factors, CHANNELS_LAST)
            offset = row * input_row + column * input_column
            at = pointers(input, offset, wide_c * input_channel, INPUT_RUN, CHANNELS_LAST)
            values = tl.load(at, both(seen, of_tile, INPUT_RUN, CHANNELS_LAST), 0.0).to(tl.float32)
            total += values * factors
        mask = both(inside, of_tile, OUTPUT_RUN, CHANNELS_LAST)
        if bias is not None:
            total += over_pixels(tl.load(bias + c, of_tile, 0.0).to(tl.float32), CHANNELS_LAST)
        if residual is not None:
            offsets = spread(y * residual_row + x * residual_column, wide_c * residual_channel, CHANNELS_LAST)
            total += tl.load(residual + offsets, mask, 0.0).to(tl.float32)
        if RELU:
            total = tl.where(total < 0.0, 0.0, total)  # keeps NaN, as torch does
        to = pointers(output, y * output_row + x * output_column, wide_c * output_channel, OUTPUT_RUN, CHANNELS_LAST)
        tl.store(to, total.to(output.dtype.element_ty), mask)


@triton.jit
def depthwise_grad_weight_kernel(
    input,  # [N, C, H, W] of any strides
    grad_output,  # [N, C, OH, OW] of any strides
    parts,  # [taps, splits, C] fp32
    channels, height, width, out_width, pixels, blocks_of_image, blocks, blocks_of_part,
    padding_row, padding_column, stride_row, stride_column, dilation_row, dilation_column,
    input_image, input_channel, input_row, input_column, grad_image, grad_channel, grad_row, grad_column,
    R: tl.constexpr, S: tl.constexpr, CHANNELS_LAST: tl.constexpr, INPUT_RUN: tl.constexpr, OUTPUT_RUN: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of one part of the pixels, for BLOCK_T taps of BLOCK_C channels. Grid: (splits, tiles, blocks of taps)."""
    split = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    of_tile, exists = c < channels, t < R * S
    r, s = t // S, t % S
    wide_c = c.to(tl.int64) if WIDE else c
    axis: tl.constexpr = 1 if CHANNELS_LAST else 2  # of the pixels in a tile [taps, pixels, channels] or [.., pixels]
    first = split * blocks_of_part
    total = tl.zeros((BLOCK_T, BLOCK_P, BLOCK_C) if CHANNELS_LAST else (BLOCK_T, BLOCK_C, BLOCK_P), tl.float32)
    for block in range(first, tl.minimum(first + blocks_of_part, blocks)):
        p = tl.full((BLOCK_P,), block, tl.int64 if WIDE else tl.int32)
        n, p = p // blocks_of_image, p % blocks_of_image * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = p < pixels
        y, x = p // out_width, p % out_width
        offset = n * grad_image + y * grad_row + x * grad_column
        at = pointers(grad_output, offset, wide_c * grad_channel, OUTPUT_RUN, CHANNELS_LAST)
        gradients = tl.load(at, both(inside, of_tile, OUTPUT_RUN, CHANNELS_LAST), 0.0).to(tl.float32)
        row = (y * stride_row - padding_row)[None, :] + (r * dilation_row)[:, None]  # [taps, pixels]
        column = (x * stride_column - padding_column)[None, :] + (s * dilation_column)[:, None]
        seen = inside[None, :] & exists[:, None] & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        offset = (n * input_image)[None, :] + row * input_row + column * input_column
        if CHANNELS_LAST:
            offsets = offset[:, :, None] + (wide_c * input_channel)[None, None, :]
            mask = seen[:, :, None] & of_tile[None, None, :]
        else:
            offsets = offset[:, None, :] + (wide_c * input_channel)[None, :, None]
            offsets = tl.max_contiguous(tl.multiple_of(offsets, (1, 1, INPUT_RUN)), (1, 1, INPUT_RUN))
            mask = tl.max_constancy(seen[:, None, :] & of_tile[None, :, None], (1, 1, INPUT_RUN))
        values = tl.load(input + offsets, mask, 0.0)
        total += values.to(tl.float32) * gradients[None, :, :]
    place = (t.to(tl.int64) * tl.num_programs(0) + split)[:, None] * channels + c[None, :]
    tl.store(parts + place, tl.sum(total, axis), exists[:, None] & of_tile[None, :])


def _run(stride: int, padding: int, dilation: int, taps: int, *sizes: int) -> int:
    """The longest run of outputs, up to 8, that through every tap reads inputs which start at a multiple of it."""
    return gcd(8, padding, dilation if taps > 1 else 0, *sizes) if stride == 1 else 1


def _launch(transposed, input, weight, bias, residual, stride, padding, dilation, size, relu, output) -> None:
    if output.numel() == 0:
        return
    images, channels, height, width = input.shape
    kernel_size, pixels = weight.shape[2:], size[0] * size[1]
    channels_last = is_channels_last(input)
    taps = weight.reshape(channels, -1)
    if channels_last:
        taps = taps.t().contiguous().t()  # channels innermost, as in the images
    config = config_of(CONFIGS, channels_last, channels, pixels)
    tiles, blocks = triton.cdiv(channels, config.channels), triton.cdiv(pixels, config.pixels)
    # If there are programs enough, each takes several blocks of a plane, which then stays in its processor's cache.
    spare = images * tiles * blocks // (PROGRAMS_PER_PROCESSOR * processors(input.device))
    blocks_of_program = 1 if channels_last else min(blocks, max(1, spare))
    programs_of_plane = triton.cdiv(blocks, blocks_of_program)
    down, right = (axis_of(transposed, kernel_size[i], stride[i], dilation[i]) for i in (0, 1))
    run = _run(stride[1], padding[1], dilation[1], kernel_size[1], width, size[1])
    with on_device_of(input):
        depthwise_kernel[(images * tiles * programs_of_plane,)](
            input, taps, bias, residual, output, channels, height, width, size[1], pixels, tiles, programs_of_plane,
            blocks_of_program, *padding, *strides(input), *taps.stride(), *strides(residual), *strides(output),
            DOWN=tuple(down), RIGHT=tuple(right), R=kernel_size[0], S=kernel_size[1],
            UNROLL=min(down.count * right.count, MOST_UNROLLED), CHANNELS_LAST=channels_last,
            INPUT_RUN=run_of(input, run), OUTPUT_RUN=run_of(output, gcd(8, size[1])), RELU=relu,
            WIDE=is_wide(input, residual, output), BLOCK_P=config.pixels, BLOCK_C=config.channels,
            num_warps=config.warps,
        )  # fmt: skip


def dilated_conv2d(input, weight, bias, residual, stride, padding, dilation, size, relu, output):
    """input [N, C, H, W], weight [C, 1, R, S], residual and output [N, C, *size]."""
    _launch(False, input, weight, bias, residual, stride, padding, dilation, size, relu, output)


def conv_transpose2d(input, weight, bias, residual, stride, padding, dilation, size, relu, output):
    """input [N, C, H, W], weight [C, 1, R, S], residual and output [N, C, *size]."""
    _launch(True, input, weight, bias, residual, stride, padding, dilation, size, relu, output)


def conv2d_grad_weight(input, grad_output, stride, padding, dilation, kernel_size, grad_weight):
    """input [N, C, H, W], grad_output [N, C, OH, OW] -> grad_weight [C, 1, R, S]."""
    if input.shape[0] == 0:
        grad_weight.zero_()
        return
    images, channels, height, width = input.shape
    out_height, out_width = grad_output.shape[2:]
    taps, pixels, channels_last = kernel_size[0] * kernel_size[1], out_height * out_width, is_channels_last(input)
    config = config_of(WEIGHT_CONFIGS, channels_last, channels, pixels)
    tiles, depth = triton.cdiv(channels, config.channels), min(MOST_TAPS, triton.next_power_of_2(taps))
    deep = triton.cdiv(taps, depth)
    blocks_of_image = triton.cdiv(pixels, config.pixels)
    blocks = images * blocks_of_image
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors(input.device), tiles * deep)
    blocks_of_part = triton.cdiv(blocks, min(wanted, blocks))
    splits = triton.cdiv(blocks, blocks_of_part)
    parts = input.new_empty((taps * splits, channels), dtype=torch.float32)
    run = _run(stride[1], padding[1], dilation[1], kernel_size[1], width, out_width)
    with on_device_of(input):
        depthwise_grad_weight_kernel[(splits, tiles, deep)](
            input, grad_output, parts, channels, height, width, out_width, pixels, blocks_of_image, blocks,
            blocks_of_part, *padding, *stride, *dilation, *strides(input), *strides(grad_output),
            R=kernel_size[0], S=kernel_size[1], CHANNELS_LAST=channels_last, INPUT_RUN=run_of(input, run),
            OUTPUT_RUN=run_of(grad_output, gcd(8, out_width)), WIDE=is_wide(input, grad_output),
            BLOCK_T=depth, BLOCK_P=config.pixels, BLOCK_C=config.channels, num_warps=config.warps,
        )  # fmt: skip
        add_parts(parts, _slots(taps, splits, input.device), grad_weight)


@lru_cache(maxsize=256)
def _slots(taps: int, splits: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, taps * splits + 1, splits, dtype=torch.int32).to(device)


# --- ahead-of-time cases ---


def depthwise_aot_cases() -> list[AotCase]:
    cases = []
    for dtype in ("bf16", "fp32"):
        run = 16 // (2 if dtype == "bf16" else 4)
        for layout, most in CONFIGS:
            cases.append(_case(dtype, layout, CONFIGS[layout, most], f"{most or 'any'}", run))
        for layout, most in WEIGHT_CONFIGS:
            cases.append(_weight_case(dtype, layout, WEIGHT_CONFIGS[layout, most], run))
    return [
        *cases,
        _case("fp32", "planes", CONFIGS["planes", None], "unaligned", 1, residual=True, WIDE=True),
        _case("fp32", "planes", CONFIGS["planes", None], "transposed", 1, transposed=True),
        _case("bf16", "channels_last", CONFIGS["channels_last", None], "transposed", 1, transposed=True, residual=True),
        _case("bf16", "channels_last", config_of(CONFIGS, True, 21, 4225), "few", 1),
        _weight_case("fp32", "planes", WEIGHT_CONFIGS["planes", None], 1),
    ]


def _case(dtype, layout, config, what, run, transposed=False, residual=False, **constexprs) -> AotCase:
    """A kernel of 3x3 taps at rate 4, or the transposed one of 16x16 taps at stride 8."""
    channels_last = layout == "channels_last"
    axis = tuple(axis_of(True, 16, 8, 1) if transposed else axis_of(False, 3, 1, 4))
    images = ("input", "residual", "output") if residual else ("input", "output")
    pointers = {name: f"*{dtype}" for name in (*images, "weight", "bias")}
    size = 16 if transposed else 3
    constexprs = dict(
        DOWN=axis, RIGHT=axis, R=size, S=size, UNROLL=min(axis[5] ** 2, MOST_UNROLLED), CHANNELS_LAST=channels_last,
        INPUT_RUN=1 if channels_last else run, OUTPUT_RUN=1 if channels_last else run, RELU=True, WIDE=False,
        BLOCK_P=config.pixels, BLOCK_C=config.channels,
    ) | constexprs  # fmt: skip
    constexprs |= {f"{image}_{'channel' if channels_last else 'column'}": 1 for image in images}
    constexprs |= {"weight_channel" if channels_last else "weight_tap": 1} | ({} if residual else {"residual": None})
    wide = 128 if channels_last or run > 1 else 0
    return AotCase(
        f"depthwise-{dtype}-{layout}-{what}", depthwise_kernel,
        pointers | _sizes(depthwise_kernel, pointers, constexprs), constexprs, num_warps=config.warps,
        divisible=_divisible(pointers, constexprs, depthwise_kernel),
        max_registers=192, load_bits=wide if channels_last else 0, store_bits=wide,
    )  # fmt: skip


def _weight_case(dtype, layout, config, run) -> AotCase:
    channels_last, kernel = layout == "channels_last", depthwise_grad_weight_kernel
    pointers = dict(input=f"*{dtype}", grad_output=f"*{dtype}", parts="*fp32")
    constexprs = dict(
        R=3, S=3, CHANNELS_LAST=channels_last, INPUT_RUN=1 if channels_last else run,
        OUTPUT_RUN=1 if channels_last else run, WIDE=False, BLOCK_T=16, BLOCK_P=config.pixels, BLOCK_C=config.channels,
        stride_row=1, stride_column=1,
    )  # fmt: skip
    constexprs |= {f"{image}_{'channel' if channels_last else 'column'}": 1 for image in ("input", "grad")}
    return AotCase(
        f"depthwise-weight-{dtype}-{layout}-{run}", kernel, pointers | _sizes(kernel, pointers, constexprs), constexprs,
        num_warps=config.warps, divisible=_divisible(pointers, constexprs, kernel), max_registers=128,
        load_bits=128 if channels_last or run > 1 else 0,
    )  # fmt: skip


def _sizes(kernel, pointers: dict, constexprs: dict) -> dict[str, str]:
    return {
        name: "i32" for name in kernel.arg_names if name.islower() and name not in pointers and name not in constexprs
    }


def _divisible(pointers: dict, constexprs: dict, kernel) -> list[str]:
    """Pointers, and in channels_last all strides of images and the weight."""
    ends = ("_image", "_row", "_column", "_tap") if constexprs["CHANNELS_LAST"] else ()
    names = [name for name in kernel.arg_names if name.endswith(ends) and not name.startswith(("pad", "dil", "stride"))]
    return [*pointers, "channels", *(name for name in names if name not in constexprs)] if ends else [*pointers]
