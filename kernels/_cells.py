"""Shared by the Triton kernels of the upsample family: PyTorch's bilinear sampling rule, evaluated on the device.

Along an axis, output o lies at position (o + half) numerator / denominator - half; half is 1/2, 0 for
align_corners. Cell q holds the outputs with q - 1 <= position < q, cell 0 those before the first source
element. They read the source elements low = max(q - 1, 0) and high = min(low + span, source - 1) with weights
1 - fraction and fraction; the fraction is 0 in cell 0, as after PyTorch's clamping. span is 0 if the axis
keeps its size, else 1.

Positions are fp64 with one rounding each in `*`, `/` and `-`, which no compiler can fuse, so host and device
agree on the cell of every output. Triton passes Python floats as fp32, so the denominator is passed as the bits
of its fp64.
"""

import functools
import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Axis(NamedTuple):
    """One axis of an upsampling: arguments of the kernels."""

    source: int
    output: int
    numerator: int
    denominator_bits: int
    span: int
    fullest: int  # outputs of the fullest cell


@functools.lru_cache(maxsize=1024)
def axis(source: int, output: int, scale_factor: float | None, align_corners: bool) -> Axis:
    if source == output:
        numerator, denominator = 1, 1.0
    elif align_corners:
        numerator, denominator = (source - 1, float(output - 1)) if output > 1 else (0, 1.0)
    else:
        numerator, denominator = (1, scale_factor) if scale_factor else (source, float(output))
    half = 0.0 if align_corners else 0.5
    position = (torch.arange(output, dtype=torch.float64) + half) * numerator / denominator - half
    low = position.floor().clamp(-1, source - 1)
    fullest = int(low.unique_consecutive(return_counts=True)[1].max())
    (bits,) = struct.unpack("<q", struct.pack("<d", denominator))
    return Axis(source, output, numerator, bits, int(source != output), fullest)


@triton.jit
def sample(o, source, numerator, denominator_bits, HALF: tl.constexpr):
    """(cell, fraction) of the outputs `o`: int32 and fp32."""
    denominator = denominator_bits.to(tl.float64, bitcast=True)
    position = (o.to(tl.float64) + HALF) * numerator / denominator - HALF
    low = tl.minimum(tl.floor(position), source - 1.0)
    fraction = tl.minimum(position - low, 1.0).to(tl.float32)
    inside = position >= 0.0
    return tl.where(inside, low.to(tl.int32) + 1, 0), tl.where(inside, fraction, 0.0)


@triton.jit
def first_output(cell, source, output, numerator, denominator_bits, HALF: tl.constexpr):
    """The first output in `cell` or a later one, `output` if there is none. The estimate is at most one off."""
    denominator = denominator_bits.to(tl.float64, bitcast=True)
    steps = (cell.to(tl.float64) - 1.0 + HALF) * denominator / tl.maximum(numerator, 1) - HALF
    steps = tl.where(numerator == 0, tl.where(cell > 1, output * 1.0, 0.0), steps)  # all outputs are in cell 1
    first = tl.minimum(tl.maximum(tl.ceil(steps), 0.0), output * 1.0).to(tl.int32)
    before, _ = sample(tl.maximum(first - 1, 0), source, numerator, denominator_bits, HALF)
    here, _ = sample(first, source, numerator, denominator_bits, HALF)
    early = (first > 0) & (before >= cell)
    late = (first < output) & (here < cell)
    return first - early.to(tl.int32) + late.to(tl.int32)


@triton.jit
def neighbours(cell, source, SPAN: tl.constexpr):
    """(low, high) source elements of a cell, as int64."""
    low = tl.maximum(cell - 1, 0)
    return low.to(tl.int64), tl.minimum(low + SPAN, source - 1).to(tl.int64)


@triton.jit
def blend(first, second, fraction):
    """Two weights rather than first + fraction * difference: the difference of equal infinities is NaN."""
    return first * (1.0 - fraction) + second * fraction


@triton.jit
def source_rows(planes, top, bottom, left, right, fraction):
    """The source rows above and below, interpolated horizontally, fp32.

    planes: addresses of element (0, 0) of the classes, (CHUNK, 1); top, bottom: offsets of the rows; left, right:
    offsets of the columns, (1, LANES); fraction: (1, LANES). Returns two tensors (CHUNK, LANES).
    """
    upper_left = tl.load(planes + (top + left)).to(tl.float32)
    upper_right = tl.load(planes + (top + right)).to(tl.float32)
    lower_left = tl.load(planes + (bottom + left)).to(tl.float32)
    lower_right = tl.load(planes + (bottom + right)).to(tl.float32)
    return blend(upper_left, upper_right, fraction), blend(lower_left, lower_right, fraction)
