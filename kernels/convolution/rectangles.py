"""Rectangles of constant taps: which block of outputs reads which inputs through which taps. Does not import triton.

Along an axis outputs, inputs and taps form progressions: output `out + i out_step` reads input
`at + i at_step + j at_tap` through tap `tap + j tap_step`. A convolution is one of them, a transposed one has one per
phase (remainder of the output modulo the stride). Outputs i for which the same taps j lie inside of the input are an
interval; two axes' intervals make a rectangle. A rectangle is flattened over the whole batch and cut into blocks: only
taps that exist are visited, no zero is inserted, every output is written once, and no pixel is tested.

Where that would make many small rectangles (large kernels on small maps), one rectangle per phase with all taps is less
work, although its pixels must be tested: `Plan.tested`.

The tables of a shape are made once and stay on the device: their copy is the only host sync.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

_COST_OF_TESTS = 1.1  # of a block with tested pixels, relative to one without
_MOST_ELEMENTS = 8  # in an access of 16 bytes
_LEAST_BLOCKS = 8  # in a part of a weight gradient, so that writing it costs less than making it


class Progression(NamedTuple):
    """Output out + i out_step reads input at + i at_step + j at_tap through tap + j tap_step; i < outputs, j < taps."""

    out: int
    out_step: int
    outputs: int
    at: int
    at_step: int
    at_tap: int
    tap: int
    tap_step: int
    taps: int

    def reach(self, j: int, extent: int) -> tuple[int, int]:
        """(first i, one past the last) whose tap j lies in an input of `extent`."""
        first = -(-(0 - self.at - j * self.at_tap) // self.at_step)
        last = (extent - 1 - self.at - j * self.at_tap) // self.at_step + 1
        return min(max(first, 0), self.outputs), min(max(last, 0), self.outputs)

    def intervals(self, extent: int) -> Iterator[tuple[int, int, int, int]]:
        """(first i, one past the last, first j, one past the last): longest runs with the same taps inside."""
        reaches = [self.reach(j, extent) for j in range(self.taps)]
        cuts = sorted({0, self.outputs, *(edge for low, high in reaches if low < high for edge in (low, high))})
        for first, last in zip(cuts, cuts[1:]):
            inside = [j for j, (low, high) in enumerate(reaches) if low <= first and last <= high]
            yield first, last, min(inside, default=0), max(inside, default=-1) + 1

    def whole(self, extent: int) -> Iterator[tuple[int, int, int, int]]:
        """All outputs as one such run, with the taps that any of them needs."""
        some = [j for j in range(self.taps) if len(range(*self.reach(j, extent)))]
        if self.outputs:
            yield 0, self.outputs, min(some, default=0), max(some, default=-1) + 1


def convolution(size: int, taps: int, stride: int, padding: int, dilation: int) -> list[Progression]:
    """The one progression of `size` outputs along an axis."""
    return [Progression(0, 1, size, -padding, stride, dilation, 0, 1, taps)]


def transposed_convolution(size: int, taps: int, stride: int, padding: int, dilation: int) -> list[Progression]:
    """One per phase, as out = in * stride - padding + tap * dilation."""
    common = gcd(stride, dilation)
    step = stride // common  # from one tap of a phase to the next
    found = []
    for phase in range(min(stride, size)):
        outputs = -(-(size - phase) // stride)
        reaching = [tap for tap in range(min(step, taps)) if (phase + padding - tap * dilation) % stride == 0]
        if reaching:
            tap = reaching[0]
            at = (phase + padding - tap * dilation) // stride
            count = -(-(taps - tap) // step)
            found.append(Progression(phase, stride, outputs, at, 1, -(dilation // common), tap, step, count))
        else:
            found.append(Progression(phase, stride, outputs, 0, 1, 1, 0, step, 0))
    return found


AXES = {"convolution": convolution, "transposed": transposed_convolution}


class Rectangle(NamedTuple):
    """A row of the table: pixel p of image n is (i, j) = (p // columns, p % columns) of the rectangle."""

    columns: int
    pixels: int  # of one image
    y: int  # output (y + i y_step, x + j x_step)
    y_step: int
    x: int
    x_step: int
    row: int  # of the input, for the first tap; may lie outside if there are no taps or they are tested
    row_step: int
    row_tap: int
    column: int
    column_step: int
    column_tap: int
    tap: int  # r S + s of the first tap
    tap_down: int
    tap_right: int
    taps_down: int
    taps_right: int

    @property
    def taps(self) -> int:
        return self.taps_down * self.taps_right


class Plan(NamedTuple):
    rectangles: Tensor  # [rectangles, 17] int32, see `Rectangle`
    blocks: Tensor  # [programs, 2] int32: (rectangle, number of the block in it), those with most taps first
    tested: bool  # taps may lie outside of the input: the kernel must test pixels
    input_run: int  # length, up to 8, of runs of pixels that are neighbours in the input and start at a multiple of it
    output_run: int
    work: int  # taps times pixels, including those that pad the last block


def rectangles(
    kind: str,
    input_size: Sequence[int],
    output_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    tested: bool,
) -> list[Rectangle]:
    """The rectangles; every output lies in exactly one. kind: "convolution" or "transposed"."""
    down, right = (AXES[kind](output_size[i], kernel_size[i], stride[i], padding[i], dilation[i]) for i in (0, 1))
    runs = Progression.whole if tested else Progression.intervals
    columns = [(axis, run) for axis in right for run in runs(axis, input_size[1])]
    found = []
    for axis in down:
        for (top, bottom, r, r_end), (other, (left, end, s, s_end)) in product(runs(axis, input_size[0]), columns):
            height, width = r_end - r, s_end - s
            if not height or not width:
                height, width = 0, 1
            found.append(Rectangle(
                columns=end - left, pixels=(bottom - top) * (end - left),
                y=axis.out + top * axis.out_step, y_step=axis.out_step,
                x=other.out + left * other.out_step, x_step=other.out_step,
                row=axis.at + top * axis.at_step + r * axis.at_tap, row_step=axis.at_step, row_tap=axis.at_tap,
                column=other.at + left * other.at_step + s * other.at_tap,
                column_step=other.at_step, column_tap=other.at_tap,
                tap=(axis.tap + r * axis.tap_step) * kernel_size[1] + other.tap + s * other.tap_step,
                tap_down=axis.tap_step * kernel_size[1], tap_right=other.tap_step,
                taps_down=height, taps_right=width,
            ))  # fmt: skip
    return found


def _runs(found: list[Rectangle], input_size: Sequence[int], output_size: Sequence[int]) -> tuple[int, int]:
    """`Plan.input_run` and `Plan.output_run`."""
    inputs, outputs = gcd(_MOST_ELEMENTS, input_size[1]), gcd(_MOST_ELEMENTS, output_size[1])
    for rectangle in found:
        if rectangle.taps:
            steps = rectangle.column_tap if rectangle.taps_right > 1 else 0
            inputs = gcd(inputs, rectangle.columns, rectangle.column, steps) if rectangle.column_step == 1 else 1
        outputs = gcd(outputs, rectangle.columns, rectangle.x) if rectangle.x_step == 1 else 1
    return inputs, outputs


@lru_cache(maxsize=256)
def plan(
    kind: str,
    batch: int,
    input_size: tuple[int, int],
    output_size: tuple[int, int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    block: int,
    device: torch.device,
) -> Plan:
    """Blocks of `block` pixels that cover a map of this geometry. padding: (top, left), any integers."""
    geometry = kind, input_size, output_size, kernel_size, stride, padding, dilation

    def cost(found: list[Rectangle]) -> int:
        """In taps of a block; the overhead of a block counts as one more."""
        return sum(-(-batch * rectangle.pixels // block) * (rectangle.taps + 1) for rectangle in found)

    exact, whole = rectangles(*geometry, tested=False), rectangles(*geometry, tested=True)
    tested = cost(exact) > _COST_OF_TESTS * cost(whole)
    found = whole if tested else exact
    counts = torch.tensor([-(-batch * rectangle.pixels // block) for rectangle in found])
    index = torch.arange(len(found)).repeat_interleave(counts)
    number = torch.arange(len(index)) - (counts.cumsum(0) - counts)[index]
    taps = torch.tensor([rectangle.taps for rectangle in found])[index]
    # Rectangles of equal work go side by side: the phases of a transposed map, which share inputs and lines of output.
    order = torch.argsort((taps.max() - taps) * 2**32 + number, stable=True)
    blocks = torch.stack((index, number), 1)[order]
    runs = _runs(found, input_size, output_size)
    table = torch.tensor(found, dtype=torch.int32)
    work = int(taps.sum()) * block
    return Plan(table.to(device), blocks.to(device, torch.int32).contiguous(), tested, *runs, work)


def magic(divisor: int) -> tuple[int, int]:
    """(factor, shift) with n // divisor = n factor >> (31 + shift), 0 <= n < 2^31; factor as the int32 of its bits."""
    shift = (divisor - 1).bit_length()
    factor = 2 ** (31 + shift) // divisor + 1
    return (factor - 2**32 if factor >= 2**31 else factor), shift


class TapReach(NamedTuple):
    """A row of the table of the weight gradient: the outputs that one tap reaches, and the inputs that they read.

    Output (y + i, x + j) reads input (row + i stride, column + j stride); pixel p of image n is (i, j) =
    (p // columns, p % columns).
    """

    y: int
    x: int
    row: int
    column: int
    columns: int
    pixels: int  # of one image
    columns_factor: int
    columns_shift: int
    pixels_factor: int
    pixels_shift: int


def tap_reaches(
    input_size: Sequence[int],
    output_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[TapReach]:
    """The reaches of all taps in order."""
    down, right = (convolution(output_size[i], kernel_size[i], stride[i], padding[i], dilation[i])[0] for i in (0, 1))
    found = []
    for r, s in product(range(kernel_size[0]), range(kernel_size[1])):
        (y, bottom), (x, end) = down.reach(r, input_size[0]), right.reach(s, input_size[1])
        columns, pixels = max(0, end - x), max(0, bottom - y) * max(0, end - x)
        row, column = down.at + y * down.at_step + r * down.at_tap, right.at + x * right.at_step + s * right.at_tap
        divisors = magic(max(1, columns)), magic(max(1, pixels))
        found.append(TapReach(y, x, row, column, max(1, columns), pixels, *divisors[0], *divisors[1]))
    return found


class WeightPlan(NamedTuple):
    taps: Tensor  # [taps, 10] int32, see `TapReach`
    parts: Tensor  # [parts, 4] int32: (tap, first block of pixels, one past the last, slot), the longest first
    slots: Tensor  # [taps + 1] int32: the parts of a tap fill the slots from slots[tap] to slots[tap + 1]
    single: bool  # no tap has more than one part, and slots are taps
    input_run: int  # as in `Plan`
    output_run: int
    work: int  # pixels over all taps, including those that pad the last block


@lru_cache(maxsize=256)
def weight_plan(
    batch: int,
    input_size: tuple[int, int],
    output_size: tuple[int, int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    block: int,
    parts: int,
    device: torch.device,
) -> WeightPlan:
    """Cuts the outputs that each tap reaches into parts of equal length, about `parts` of them over all taps."""
    reaches = tap_reaches(input_size, output_size, kernel_size, stride, padding, dilation)
    blocks = [-(-batch * reach.pixels // block) for reach in reaches]
    length = max(_LEAST_BLOCKS, -(-sum(blocks) // parts))
    rows, slots = [], [0]
    for tap, count in enumerate(blocks):
        starts = range(0, count, length) or (0,)  # an empty part if the tap reaches nothing
        rows += [(tap, start, min(start + length, count), slots[-1] + i) for i, start in enumerate(starts)]
        slots.append(len(rows))
    rows.sort(key=lambda row: row[1] - row[2])
    inputs, outputs = gcd(_MOST_ELEMENTS, input_size[1]), gcd(_MOST_ELEMENTS, output_size[1])
    for reach in reaches:
        if reach.pixels:
            inputs = gcd(inputs, reach.columns, reach.column) if stride[1] == 1 else 1
            outputs = gcd(outputs, reach.columns, reach.x)
    tables = (torch.tensor(values, dtype=torch.int32).to(device) for values in (reaches, rows, slots))
    return WeightPlan(*tables, len(rows) == len(reaches), inputs, outputs, sum(blocks) * block)
