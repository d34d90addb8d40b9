"""Tiles of pixels by channels whose last axis is the contiguous one: channels in channels_last, pixels in NCHW."""

import triton
import triton.language as tl

from fastseg._triton import AotCase
from fastseg.kernels.convolution.launch import weight_strides


@triton.jit
def spread(pixels, channels, CHANNELS_LAST: tl.constexpr):
    """pixels + channels as a tile: [pixels, channels] in channels_last, [channels, pixels] else."""
    if CHANNELS_LAST:
        return pixels[:, None] + channels[None, :]
    else:
        return pixels[None, :] + channels[:, None]


@triton.jit
def over_pixels(channels, CHANNELS_LAST: tl.constexpr):
    """Values of channels as a tile that broadcasts over the pixels."""
    if CHANNELS_LAST:
        return channels[None, :]
    else:
        return channels[:, None]


@triton.jit
def pointers(base, pixels, channels, RUN: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """base + `spread` offsets; in NCHW runs of RUN pixels are neighbours in memory and start at multiples of that.

    A hint of alignment binds to the operation that makes the value, so it is given here, where the sum is made. Offsets
    are added first: with 32 bits, a tile of them takes half the registers of a tile of pointers.
    """
    if CHANNELS_LAST:
        return (base + pixels)[:, None] + channels[None, :]
    else:
        offsets = tl.max_contiguous(tl.multiple_of(pixels[None, :] + channels[:, None], (1, RUN)), (1, RUN))
        return base + offsets


@triton.jit
def both(pixels, channels, RUN: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """pixels & channels as a tile; in NCHW they are the same for all pixels of a run."""
    if CHANNELS_LAST:
        return pixels[:, None] & channels[None, :]
    else:
        return tl.max_constancy(pixels[None, :] & channels[:, None], (1, RUN))


@triton.jit
def divided(number, divisor, magic, shift, WIDE: tl.constexpr):
    """number // divisor for 0 <= number < 2^31, by a multiplication: see rectangles.magic. WIDE: for any number."""
    if WIDE:
        return number // divisor
    else:
        doubled = number.to(tl.uint32) << 1
        return (tl.umulhi(doubled, magic.to(tl.uint32, bitcast=True)) >> shift.to(tl.uint32)).to(tl.int32)


@triton.jit
def add_parts_kernel(
    parts,  # [slots, elements] fp32
    slots,  # [taps + 1] int32: slots[tap] to slots[tap + 1] belong to a tap
    grad_weight,  # [K, channels, taps] of any strides
    elements, channels, blocks, weight_out, weight_channel, weight_tap,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The second stage of a weight gradient: adds a tap's parts, always in the same order. Grid: (taps * blocks,)."""
    tap = tl.program_id(0) // blocks
    e = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = e < elements
    total = tl.zeros((BLOCK,), tl.float32)
    first = tl.load(slots + tap)
    from_parts = parts + first.to(tl.int64) * elements + e
    for _ in range(tl.load(slots + tap + 1) - first):
        total += tl.load(from_parts, inside, 0.0)
        from_parts += elements
    k, c = (e // channels).to(tl.int64), e % channels
    to = grad_weight + k * weight_out + c * weight_channel + tap.to(tl.int64) * weight_tap
    tl.store(to, total.to(grad_weight.dtype.element_ty), inside)


BLOCK_OF_ELEMENTS, WARPS_OF_ELEMENTS = 512, 4


def add_parts(parts, slots, grad_weight) -> None:
    """parts [slots, K * C / groups] fp32, slots [taps + 1] -> grad_weight [K, C / groups, R, S], dense."""
    elements, channels = parts.shape[1], grad_weight.shape[1]
    blocks = triton.cdiv(elements, BLOCK_OF_ELEMENTS)
    add_parts_kernel[((len(slots) - 1) * blocks,)](
        parts, slots, grad_weight, elements, channels, blocks, *weight_strides(grad_weight),
        BLOCK=BLOCK_OF_ELEMENTS, num_warps=WARPS_OF_ELEMENTS,
    )  # fmt: skip


def parts_aot_cases() -> list[AotCase]:
    pointers = {"parts": "*fp32", "slots": "*i32", "grad_weight": "*bf16"}
    sizes = ("elements", "channels", "blocks", "weight_out", "weight_channel", "weight_tap")
    constexprs = dict(BLOCK=BLOCK_OF_ELEMENTS, weight_tap=1)
    signature = pointers | {name: "i32" for name in sizes if name not in constexprs}
    return [AotCase(
        "weight-parts", add_parts_kernel, signature, constexprs, num_warps=WARPS_OF_ELEMENTS,
        divisible=(*pointers, "elements", "channels"), max_registers=64,
    )]  # fmt: skip
