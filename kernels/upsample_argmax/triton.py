"""upsample_argmax in Triton: labels, and on request their probabilities, of ROWS x COLUMNS pixels of one cell row.

Grid and byte counts in README.md; the sampling rule in ../_cells.py.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastseg._triton import AotCase, on_device_of
from fastseg.kernels._cells import Axis, axis, blend, first_output, neighbours, sample, source_rows

LOG2_E = tl.constexpr(1.4426950408889634)


class Config(NamedTuple):
    rows: int  # output rows of a program, all in one cell row
    columns: int
    chunk: int  # classes read at a time
    warps: int


# Most output rows of a cell -> Config, the first that fits. A thread owns one column (two for single rows)
# and its rows: what it reads and interpolates horizontally serves them all.
CONFIGS = {
    1: Config(1, 256, 4, 4),
    2: Config(2, 128, 4, 4),
    4: Config(4, 128, 4, 4),
    None: Config(8, 128, 4, 4),
}


def config_of(rows: Axis) -> Config:
    return next(config for most, config in CONFIGS.items() if most is None or rows.fullest <= most)


# Not specialised on 1 or on divisibility: addresses would gain nothing, and every new size would be compiled anew.
_INTEGERS = (
    "image", "plane", "row", "column", "source_height", "source_width", "height", "width", "row_numerator",
    "row_denominator", "column_numerator", "column_denominator", "row_chunks", "column_blocks",
)  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def upsample_argmax_kernel(
    input,  # [N, C, h, w], any strides
    labels,  # [N, H, W] uint8 or int64
    probability,  # [N, H, W] fp32, or None
    image, plane, row, column,  # strides of input
    source_height, source_width, height, width,
    row_numerator, row_denominator, column_numerator, column_denominator,
    row_chunks, column_blocks,
    C: tl.constexpr, HALF: tl.constexpr, ROW_SPAN: tl.constexpr, COLUMN_SPAN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid: (N * (h + 1) * row_chunks * column_blocks,), column blocks fastest."""
    program = tl.program_id(0)
    block = program % column_blocks
    row_chunk = program // column_blocks % row_chunks
    cell = program // (column_blocks * row_chunks) % (source_height + 1)
    n = (program // (column_blocks * row_chunks) // (source_height + 1)).to(tl.int64)

    first = first_output(cell, source_height, height, row_numerator, row_denominator, HALF) + row_chunk * ROWS
    last = first_output(cell + 1, source_height, height, row_numerator, row_denominator, HALF)
    if first >= last:
        return
    y = first + tl.arange(0, ROWS)
    x = block * COLUMNS + tl.arange(0, COLUMNS)
    _, row_fraction = sample(y, source_height, row_numerator, row_denominator, HALF)
    column_cell, column_fraction = sample(x, source_width, column_numerator, column_denominator, HALF)
    top, bottom = neighbours(cell, source_height, ROW_SPAN)
    left, right = neighbours(tl.minimum(column_cell, source_width), source_width, COLUMN_SPAN)
    left, right = (left * column)[None, :], (right * column)[None, :]
    fraction = row_fraction[:, None]

    best = tl.full((ROWS, COLUMNS), -float("inf"), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    label = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, C, CHUNK):
        for k in tl.static_range(CHUNK):
            c = tl.minimum(start + k, C - 1)  # repeating the last class changes no label
            planes = input + n * image + tl.full((1, 1), c, tl.int64) * plane
            upper, lower = source_rows(planes, top * row, bottom * row, left, right, column_fraction[None, :])
            # + 0.0 makes -0 into 0, so that below equal values have equal bits
            value = blend(upper + 0.0, lower + 0.0, fraction)
            maximum = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
            changed = maximum.to(tl.int32, bitcast=True) != best.to(tl.int32, bitcast=True)
            label = tl.where(changed, c, label)
            if probability is not None:
                share = tl.exp2((value - maximum) * LOG2_E)
                if C % CHUNK != 0:
                    share = tl.where(start + k < C, share, 0.0)
                total = total * tl.exp2((best - maximum) * LOG2_E) + share
            best = maximum

    position = (n * height + y[:, None]) * width + x[None, :]
    inside = (y < last)[:, None] & (x < width)[None, :]
    tl.store(labels + position, label.to(labels.dtype.element_ty), mask=inside)
    if probability is not None:
        tl.store(probability + position, 1.0 / total, mask=inside)


def _launch(input: Tensor, size, scales, align_corners: bool, labels: Tensor, probability: Tensor | None) -> None:
    scale_height, scale_width = scales or (None, None)
    rows = axis(input.shape[2], size[0], scale_height, align_corners)
    columns = axis(input.shape[3], size[1], scale_width, align_corners)
    config = config_of(rows)
    row_chunks, column_blocks = triton.cdiv(rows.fullest, config.rows), triton.cdiv(size[1], config.columns)
    programs = input.shape[0] * (input.shape[2] + 1) * row_chunks * column_blocks
    if programs == 0:
        return
    with on_device_of(input):
        upsample_argmax_kernel[(programs,)](
            input, labels, probability, *input.stride(), rows.source, columns.source, rows.output, columns.output,
            rows.numerator, rows.denominator_bits, columns.numerator, columns.denominator_bits,
            row_chunks, column_blocks,
            C=input.shape[1], HALF=0.0 if align_corners else 0.5, ROW_SPAN=rows.span, COLUMN_SPAN=columns.span,
            ROWS=config.rows, COLUMNS=config.columns, CHUNK=config.chunk, num_warps=config.warps,
        )  # fmt: skip


def upsample_argmax(input, size, scales, align_corners, labels) -> None:
    """labels: [N, H, W], int64 or uint8."""
    _launch(input, size, scales, align_corners, labels, None)


def upsample_argmax_probability(input, size, scales, align_corners, labels, probability) -> None:
    """labels: [N, H, W], int64 or uint8; probability: [N, H, W] fp32."""
    _launch(input, size, scales, align_corners, labels, probability)


def _aot_case(config: Config, dtype: str, classes: int, output: str, with_probability: bool) -> AotCase:
    pointers = {"input": f"*{dtype}", "labels": f"*{output}"}
    if with_probability:
        pointers["probability"] = "*fp32"
    return AotCase(
        f"{config.rows}x{config.columns}-{dtype}-{classes}-{output}{'-probability' if with_probability else ''}",
        upsample_argmax_kernel,
        {
            **pointers,
            **dict.fromkeys(_INTEGERS, "i32"),
            **dict.fromkeys(("image", "plane", "row", "column", "row_denominator", "column_denominator"), "i64"),
        },
        {
            **({} if with_probability else {"probability": None}),
            **dict(C=classes, HALF=0.5, ROW_SPAN=1, COLUMN_SPAN=1),
            **dict(ROWS=config.rows, COLUMNS=config.columns, CHUNK=config.chunk),
        },
        num_warps=config.warps,
        divisible=tuple(pointers),
        max_registers=128,
    )


def aot_cases() -> list[AotCase]:
    tallest = CONFIGS[None]
    return [
        *(_aot_case(config, "fp32", 19, "u8", False) for config in CONFIGS.values()),
        _aot_case(tallest, "bf16", 19, "i64", False),
        _aot_case(tallest, "fp16", 1000, "i64", False),
        _aot_case(tallest, "bf16", 150, "u8", True),
    ]
