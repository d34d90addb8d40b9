"""Gradient of a convolution's weight: one GEMM per tap over the outputs that the tap reaches, without atomics.

The pixels are cut into parts, each of which writes a sum of its own in fp32; a second stage adds them in order.
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
    precision,
    processors,
    run_of,
    shared_memory,
    strides,
    weight_strides,
)
from fastseg.kernels.convolution.rectangles import weight_plan
from fastseg.kernels.convolution.triton_tiles import add_parts, both, divided, pointers


class Config(NamedTuple):
    out_channels: int
    channels: int
    pixels: int  # summed per step
    warps: int
    stages: int


# (multiplied as, layout, numbers of channels) -> Config; "few" for either number, "widest" on GPUs with LARGE_SHARED
# shared memory, see `config_of`. Rewritten by benchmarks/tune_convolution.py.
CONFIGS = {
    ("half", "channels_last", "few"): Config(32, 128, 64, 4, 3),
    ("half", "channels_last", "wide"): Config(128, 128, 64, 8, 3),
    ("half", "channels_last", "widest"): Config(128, 256, 64, 8, 3),
    ("half", "planes", "few"): Config(32, 128, 32, 4, 4),
    ("half", "planes", "wide"): Config(128, 128, 32, 8, 3),
    ("tf32", "channels_last", "few"): Config(32, 128, 32, 4, 4),
    ("tf32", "channels_last", "wide"): Config(128, 128, 32, 8, 3),
    ("tf32", "planes", "few"): Config(32, 128, 32, 4, 4),
    ("tf32", "planes", "wide"): Config(128, 128, 32, 8, 3),
    ("ieee", "channels_last", "wide"): Config(64, 64, 16, 4, 3),
    ("ieee", "planes", "wide"): Config(64, 64, 16, 4, 3),
}
PARTS_PER_PROCESSOR = 4


@triton.jit
def read_reach(line, WIDE: tl.constexpr):
    """The row of the table of taps that starts at `line`."""
    pixels = tl.load(line + 5)
    if WIDE:
        pixels = pixels.to(tl.int64)
    return (
        tl.load(line), tl.load(line + 1), tl.load(line + 2), tl.load(line + 3), tl.load(line + 4), pixels,
        tl.load(line + 6), tl.load(line + 7), tl.load(line + 8), tl.load(line + 9),
    )  # fmt: skip


@triton.jit
def read_pixels(
    input, grad_output, reach, block, images, k, c, of_out, of_in,
    input_image, input_channel, input_row, input_column, grad_image, grad_channel, grad_row, grad_column,
    stride_row, stride_column,
    CHANNELS_LAST: tl.constexpr, INPUT_RUN: tl.constexpr, OUTPUT_RUN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Tiles of the gradient and of the input: a block of the pixels that a tap reaches."""
    y, x, row, column, columns, pixels, columns_factor, columns_shift, pixels_factor, pixels_shift = reach
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < images * pixels
    n = divided(p, pixels, pixels_factor, pixels_shift, WIDE)
    q = p - n * pixels
    i = divided(q, columns, columns_factor, columns_shift, WIDE)
    j = q - i * columns
    offset = n * grad_image + (y + i) * grad_row + (x + j) * grad_column
    at = pointers(grad_output, offset, k * grad_channel, OUTPUT_RUN, CHANNELS_LAST)
    gradients = tl.load(at, both(inside, of_out, OUTPUT_RUN, CHANNELS_LAST), 0.0)
    offset = n * input_image + (row + i * stride_row) * input_row + (column + j * stride_column) * input_column
    at = pointers(input, offset, c * input_channel, INPUT_RUN, CHANNELS_LAST)
    return gradients, tl.load(at, both(inside, of_in, INPUT_RUN, CHANNELS_LAST), 0.0)


@triton.jit
def grad_weight_kernel(
    input,  # [N, C, H, W] of any strides
    grad_output,  # [N, K, OH, OW] of any strides
    to,  # [slots, K, C / groups] of any strides
    taps,  # [taps, 10] int32, see rectangles.TapReach
    parts,  # [parts, 4] int32
    images, channels, out_channels, tiles, tiles_out, tiles_in,  # channels and tiles_* of one group
    input_image, input_channel, input_row, input_column,
    grad_image, grad_channel, grad_row, grad_column,
    to_slot, to_out, to_channel, stride_row, stride_column,
    CHANNELS_LAST: tl.constexpr, INPUT_RUN: tl.constexpr, OUTPUT_RUN: tl.constexpr, PRELOAD: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """BLOCK_K output by BLOCK_C input channels of one tap, over one part of its pixels. Grid: (parts * tiles,)."""
    program = tl.program_id(0)
    tile, part = program % tiles, parts + program // tiles * 4
    tap, start, end, slot = tl.load(part), tl.load(part + 1), tl.load(part + 2), tl.load(part + 3)
    reach = read_reach(taps + tap * 10, WIDE)
    if WIDE:
        start, end = start.to(tl.int64), end.to(tl.int64)
    group = (tile // (tiles_out * tiles_in)).to(tl.int64)
    k = tile // tiles_in % tiles_out * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tile % tiles_in * BLOCK_C + tl.arange(0, BLOCK_C)
    of_out, of_in = k < out_channels, c < channels
    grad_of_group, input_of_group = group * out_channels * grad_channel, group * channels * input_channel
    if not CHANNELS_LAST:
        grad_of_group = tl.multiple_of(grad_of_group, OUTPUT_RUN)
        input_of_group = tl.multiple_of(input_of_group, INPUT_RUN)
    grad_output += grad_of_group
    input += input_of_group
    if WIDE:
        wide_k, wide_c = k.to(tl.int64), c.to(tl.int64)
    else:
        wide_k, wide_c = k, c

    total = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    if PRELOAD:  # as in triton.py
        next_gradients, next_values = read_pixels(
            input, grad_output, reach, start, images, wide_k, wide_c, of_out, of_in,
            input_image, input_channel, input_row, input_column, grad_image, grad_channel, grad_row, grad_column,
            stride_row, stride_column, CHANNELS_LAST, INPUT_RUN, OUTPUT_RUN, WIDE, BLOCK_P,
        )  # fmt: skip
    for block in range(start, end):
        if PRELOAD:
            gradients, values = next_gradients, next_values
            next_gradients, next_values = read_pixels(
                input, grad_output, reach, block + 1, images, wide_k, wide_c, of_out, of_in,
                input_image, input_channel, input_row, input_column, grad_image, grad_channel, grad_row, grad_column,
                stride_row, stride_column, CHANNELS_LAST, INPUT_RUN, OUTPUT_RUN, WIDE, BLOCK_P,
            )  # fmt: skip
        else:
            gradients, values = read_pixels(
                input, grad_output, reach, block, images, wide_k, wide_c, of_out, of_in,
                input_image, input_channel, input_row, input_column, grad_image, grad_channel, grad_row, grad_column,
                stride_row, stride_column, CHANNELS_LAST, INPUT_RUN, OUTPUT_RUN, WIDE, BLOCK_P,
            )  # fmt: skip
        if INTERPRETED:  # the interpreter has no arithmetic of half types
            gradients, values = gradients.to(tl.float32), values.to(tl.float32)
        if CHANNELS_LAST:
            total = tl.dot(tl.trans(gradients), values, total, input_precision=PRECISION)
        else:
            total = tl.dot(gradients, tl.trans(values), total, input_precision=PRECISION)
    place = slot.to(tl.int64) * to_slot + (group * out_channels + k)[:, None] * to_out + (c * to_channel)[None, :]
    tl.store(to + place, total.to(to.dtype.element_ty), of_out[:, None] & of_in[None, :])


def config_of(multiplied: str, channels_last: bool, out_channels: int, channels: int, device: torch.device) -> Config:
    """out_channels, channels: of one group."""
    layout = "channels_last" if channels_last else "planes"
    few = CONFIGS.get((multiplied, layout, "few"))
    if few is None or min(out_channels, channels) > few.out_channels:
        wide, widest = CONFIGS[multiplied, layout, "wide"], CONFIGS.get((multiplied, layout, "widest"))
        fits = widest is not None and channels >= widest.channels and shared_memory(device) >= LARGE_SHARED
        return widest if fits else wide
    narrow, wide = few.out_channels, few.channels
    return few._replace(
        out_channels=narrow if out_channels <= narrow else wide, channels=narrow if channels <= narrow else wide
    )


def conv2d_grad_weight(input, grad_output, stride, padding, dilation, groups, kernel_size, grad_weight):
    """input [N, C, H, W], grad_output [N, K, OH, OW] -> grad_weight [K, C / groups, R, S]."""
    if input.shape[0] == 0:
        grad_weight.zero_()
        return
    images, out_channels, channels = len(input), grad_output.shape[1] // groups, input.shape[1] // groups
    channels_last, multiplied = is_channels_last(input), precision(input.dtype)
    kind = multiplied if input.element_size() == 4 else "half"
    config = config_of(kind, channels_last, out_channels, channels, input.device)
    tiles_out, tiles_in = triton.cdiv(out_channels, config.out_channels), triton.cdiv(channels, config.channels)
    tiles = groups * tiles_out * tiles_in
    wanted = triton.cdiv(PARTS_PER_PROCESSOR * processors(input.device), tiles)
    work = weight_plan(
        images, tuple(input.shape[2:]), tuple(grad_output.shape[2:]), tuple(kernel_size), tuple(stride),
        tuple(padding), tuple(dilation), config.pixels, wanted, input.device,
    )  # fmt: skip
    if work.single:
        to = grad_weight
        to_out, to_channel, to_slot = weight_strides(grad_weight)
    else:
        elements = groups * out_channels * channels
        to = input.new_empty((len(work.parts), elements), dtype=torch.float32)
        to_out, to_channel, to_slot = channels, 1, elements
    runs = run_of(input, work.input_run), run_of(grad_output, work.output_run)
    with on_device_of(input):
        grad_weight_kernel[(len(work.parts) * tiles,)](
            input, grad_output, to, work.taps, work.parts, images, channels, out_channels, tiles, tiles_out, tiles_in,
            *strides(input), *strides(grad_output), to_slot, to_out, to_channel, *stride,
            CHANNELS_LAST=channels_last, INPUT_RUN=runs[0], OUTPUT_RUN=runs[1],
            PRELOAD=not channels_last and min(runs) * input.element_size() < LEAST_COPY,
            WIDE=is_wide(input, grad_output), PRECISION=multiplied,
            BLOCK_K=config.out_channels, BLOCK_C=config.channels, BLOCK_P=config.pixels,
            INTERPRETED=_library.interpreting(), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        if not work.single:
            add_parts(to, work.slots, grad_weight)


# --- ahead-of-time cases ---


def weight_aot_cases() -> list[AotCase]:
    half, few, planes = (
        ("half", *rest) for rest in (("channels_last", "wide"), ("channels_last", "few"), ("planes", "wide"))
    )
    return [
        *(_case(*key, config) for key, config in CONFIGS.items()),
        _case(*half, CONFIGS[half], "64 bits", WIDE=True),
        _case(*few, config_of("half", True, 256, 21, torch.device("cpu")), "few inputs"),
        _case(*few, config_of("half", True, 21, 21, torch.device("cpu")), "few of both"),
        _case(*planes, CONFIGS[planes], "aligned", INPUT_RUN=4, OUTPUT_RUN=4, PRELOAD=False),
    ]


def _case(kind, layout, outputs, config, what="", **constexprs) -> AotCase:
    dtype, channels_last = "bf16" if kind == "half" else "fp32", layout == "channels_last"
    pointers = dict(input=f"*{dtype}", grad_output=f"*{dtype}", to="*fp32", taps="*i32", parts="*i32")
    constexprs = dict(
        INPUT_RUN=1, OUTPUT_RUN=1, WIDE=False, INTERPRETED=False, CHANNELS_LAST=channels_last,
        PRELOAD=not channels_last and kind == "half", PRECISION="ieee" if kind == "ieee" else "tf32",
        BLOCK_K=config.out_channels, BLOCK_C=config.channels, BLOCK_P=config.pixels, to_channel=1,
    ) | constexprs  # fmt: skip
    constexprs |= {f"{image}_{'channel' if channels_last else 'column'}": 1 for image in ("input", "grad")}
    sizes = [
        name
        for name in grad_weight_kernel.arg_names
        if name.islower() and name not in pointers and name not in constexprs
    ]
    images = [name for name in sizes if name.startswith(("input_", "grad_"))] if channels_last else []
    wide = kind == "half" and channels_last  # tf32 tiles are transposed on the way to shared memory, 4 bytes at a time
    return AotCase(
        " ".join(("weight", kind, layout, outputs, what)).strip().replace(" ", "-"), grad_weight_kernel,
        pointers | {name: "i32" for name in sizes}, constexprs, num_warps=config.warps, num_stages=config.stages,
        divisible=(*pointers, "channels", "out_channels", "to_slot", "to_out", *images),
        max_shared=LARGE_SHARED if outputs == "widest" else MAX_SHARED,
        tensor_cores=kind != "ieee" and config.out_channels >= 64, store_bits=128,
        copy_bits=128 if wide else 64 if constexprs["INPUT_RUN"] == 4 else 0,
    )  # fmt: skip
