"""The tables of the Triton convolutions: which outputs read which inputs through which taps."""

import random

import pytest
import torch

from fastseg.kernels.convolution.rectangles import (
    Rectangle,
    TapReach,
    magic,
    plan,
    rectangles,
    tap_reaches,
    weight_plan,
)

CPU = torch.device("cpu")


def _geometry(seed):
    """(kind, input size, output size, kernel size, stride, padding, dilation), each axis drawn independently."""
    rng = random.Random(seed)
    kind = rng.choice(("convolution", "transposed"))
    axes = []
    for _ in range(2):
        taps, stride, dilation = rng.randint(1, 5), rng.randint(1, 4), rng.choice((1, 1, 2, 3, 5, 12))
        extent, padding = rng.randint(1, 9), rng.randint(0, 14)
        if kind == "convolution":
            most = (extent + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        else:
            most = (extent - 1) * stride - padding + dilation * (taps - 1) + 1 + max(stride, dilation)
        axes.append((extent, max(1, most - rng.randint(0, 2)), taps, stride, padding, dilation))
    return kind, *zip(*axes)


def _taps_by_definition(kind, input_size, output_size, kernel_size, stride, padding, dilation):
    """{(y, x): {(tap, row, column)}} of all outputs and the inputs inside."""
    found = {(y, x): set() for y in range(output_size[0]) for x in range(output_size[1])}
    small, large = (output_size, input_size) if kind == "convolution" else (input_size, output_size)
    for r in range(kernel_size[0]):
        for s in range(kernel_size[1]):
            for i in range(small[0]):
                for j in range(small[1]):
                    y = i * stride[0] - padding[0] + r * dilation[0]
                    x = j * stride[1] - padding[1] + s * dilation[1]
                    if 0 <= y < large[0] and 0 <= x < large[1]:
                        output, source = ((i, j), (y, x)) if kind == "convolution" else ((y, x), (i, j))
                        found[output].add((r * kernel_size[1] + s, *source))
    return found


def _taps_of(rectangle, pixel, input_size, tested):
    """The output of pixel `pixel`, and its taps in the order of the kernel."""
    i, j = divmod(pixel, rectangle.columns)
    row, column = rectangle.row + i * rectangle.row_step, rectangle.column + j * rectangle.column_step
    taps = set()
    for r in range(rectangle.taps_down):
        for s in range(rectangle.taps_right):
            place = row + r * rectangle.row_tap, column + s * rectangle.column_tap
            inside = 0 <= place[0] < input_size[0] and 0 <= place[1] < input_size[1]
            assert inside or tested
            if inside:
                taps.add((rectangle.tap + r * rectangle.tap_down + s * rectangle.tap_right, *place))
    return (rectangle.y + i * rectangle.y_step, rectangle.x + j * rectangle.x_step), taps


@pytest.mark.parametrize("tested", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_every_output_is_covered_once_by_its_taps(seed, tested):
    geometry = _geometry(seed)
    expected = _taps_by_definition(*geometry)
    for rectangle in rectangles(*geometry, tested=tested):
        for pixel in range(rectangle.pixels):
            output, taps = _taps_of(rectangle, pixel, geometry[1], tested)
            assert expected.pop(output) == taps  # fails if another rectangle had this output
    assert not expected


@pytest.mark.parametrize("seed", range(40))
def test_blocks_cover_every_pixel_of_the_batch_once_the_longest_first(seed):
    geometry = _geometry(seed)
    made = plan(geometry[0], 3, *geometry[1:], 16, CPU)
    rows = [Rectangle(*row) for row in made.rectangles.tolist()]
    assert rows == rectangles(*geometry, tested=made.tested)
    blocks = made.blocks.tolist()
    assert sorted(blocks) == [
        [index, number] for index, row in enumerate(rows) for number in range(-(-3 * row.pixels // 16))
    ]
    taps = [rows[index].taps for index, _ in blocks]
    assert taps == sorted(taps, reverse=True)
    assert made.work == sum(taps) * 16


@pytest.mark.parametrize("seed", range(60))
def test_runs_are_neighbours_in_memory(seed):
    geometry = _geometry(seed)
    if seed % 2:  # random sizes rarely have runs
        size = 16, 16
        geometry = "convolution", size, size, (3, 3), (1, 1), (4, 4), (4, 4) if seed % 4 == 1 else (1, 2)
    kind, (_, width), (_, out_width), *_ = geometry
    made = plan(kind, 2, *geometry[1:], 16, CPU)
    for row in map(lambda values: Rectangle(*values), made.rectangles.tolist()):
        for first in range(0, 2 * row.pixels, made.input_run):
            places = [divmod(p % row.pixels, row.columns) for p in range(first, first + made.input_run)]
            for s in range(row.taps_right if row.taps else 0):
                columns = [row.column + j * row.column_step + s * row.column_tap for _, j in places]
                assert columns == list(range(columns[0], columns[0] + made.input_run))
                assert columns[0] % made.input_run == 0 and width % made.input_run == 0
        for first in range(0, 2 * row.pixels, made.output_run):
            places = [divmod(p % row.pixels, row.columns) for p in range(first, first + made.output_run)]
            columns = [row.x + j * row.x_step for _, j in places]
            assert columns == list(range(columns[0], columns[0] + made.output_run))
            assert columns[0] % made.output_run == 0 and out_width % made.output_run == 0
    if seed % 4 == 1:
        assert made.input_run == made.output_run == 4


def test_pixels_are_tested_only_where_rectangles_would_be_more_work():
    size = 65, 65
    arguments = (3, 3), (1, 1)
    assert not plan("convolution", 8, size, size, *arguments, (36, 36), (36, 36), 128, CPU).tested
    assert not plan("convolution", 8, (64, 64), (64, 64), *arguments, (2, 2), (2, 2), 128, CPU).tested
    assert plan("convolution", 1, (16, 16), (16, 16), (15, 15), (1, 1), (7, 7), (1, 1), 128, CPU).tested


def test_only_the_needed_taps_are_visited():
    share = {}
    for rate in (12, 24, 36):
        made = plan("convolution", 8, (65, 65), (65, 65), (3, 3), (1, 1), (rate, rate), (rate, rate), 128, CPU)
        share[rate] = made.work / (9 * 8 * 65 * 65)
    assert share[36] < 0.41 and share[24] < 0.58 and share[12] < 0.78


@pytest.mark.parametrize("seed", range(40))
def test_the_outputs_that_a_tap_reaches(seed):
    kind, *geometry = _geometry(seed)
    if kind == "transposed":
        geometry[:2] = geometry[1::-1]
    by_output = _taps_by_definition("convolution", *geometry)
    expected = {(tap, output, (row, column)) for output, taps in by_output.items() for tap, row, column in taps}
    _, _, kernel_size, stride, *_ = geometry
    found = set()
    for tap, reach in enumerate(tap_reaches(*geometry)):
        for pixel in range(reach.pixels):
            i, j = divmod(pixel, reach.columns)
            found.add((tap, (reach.y + i, reach.x + j), (reach.row + i * stride[0], reach.column + j * stride[1])))
    assert found == expected


@pytest.mark.parametrize("parts", [1, 5, 1000])
@pytest.mark.parametrize("seed", range(10))
def test_parts_of_a_weight_gradient(seed, parts):
    kind, *geometry = _geometry(seed)
    made = weight_plan(30, *geometry, 16, parts, CPU)
    taps = [TapReach(*row) for row in made.taps.tolist()]
    rows = made.parts.tolist()
    assert sorted(row[3] for row in rows) == list(range(len(rows)))
    for tap, reach in enumerate(taps):
        own = sorted(row[1:] for row in rows if row[0] == tap)
        first, last = made.slots[tap].item(), made.slots[tap + 1].item()
        assert [slot for *_, slot in own] == list(range(first, last))
        ends = [0, *(end for _, end, _ in own)]
        assert [start for start, *_ in own] == ends[:-1] and ends[-1] == -(-30 * reach.pixels // 16)
    assert made.single == (len(rows) == len(taps))


def test_division_by_multiplication():
    rng = random.Random(0)
    some = (rng.randrange(1, 2**31) for _ in range(300))
    for divisor in (1, 2, 3, 5, 7, 64, 65, 4225, 2**16 - 1, 2**30 + 1, 2**31 - 1, *some):
        factor, shift = magic(divisor)
        assert -(2**31) <= factor < 2**31
        factor %= 2**32
        for number in (0, 1, divisor - 1, divisor, 2 * divisor - 1, 2**31 - 1, 2**31 - 2, rng.randrange(2**31)):
            if number < 2**31:
                assert ((number << 1) * factor >> 32) >> shift == number // divisor
