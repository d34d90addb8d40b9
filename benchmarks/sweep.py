"""`python -m benchmarks.run sweep`: is `backend="auto"` ever slower than stock? On random calls.

The calls go through all ops with a stock equivalent, at random sizes, in either layout, forward only or with backward;
half of them under the default allocator, half under `fastseg.tune_allocator()`. A call is lost if "auto" takes more
than 15% and more than 5 us longer than stock eager, in two measurements.

On a busy machine use `--threads 1`: a call with several threads ends only when the last of them has got a core.
"""

import argparse
import math
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import fastseg
from benchmarks import harness, measure, results, table
from benchmarks.harness import OURS
from benchmarks.progress import progress
from benchmarks.workloads import STOCK, WORKLOADS, Workload

SMALLEST, LARGEST = 200, 6_000_000  # elements of the image or the logits (the upsampled ones, if the op upsamples)
MAX_IMAGES = 4
FEWEST, BUDGET = 4, 0.2  # turns, and seconds for both contestants; four times that to confirm a lost call
SHARE, SECONDS = 0.15, 5e-6  # a lost call is slower by more than both
MAX_LOST_SHARE = 0.05  # the target: share of the calls
GROUPS = ("op", "layout", "passes", "dtype", "allocator", "size")


@dataclass(frozen=True)
class Call:
    """A workload at one size."""

    workload: Workload
    shape: harness.Shape
    dtype: torch.dtype
    layout: str
    backward: bool

    def inputs(self) -> harness.Inputs:
        return self.workload.make(self.shape, torch.device("cpu"), self.dtype, self.layout)


def log_uniform(draw: random.Random, low: float, high: float) -> float:
    return math.exp(draw.uniform(math.log(low), math.log(high)))


def drawn_shape(draw: random.Random, channels: tuple[int, int]) -> harness.Shape:
    """(N, C, H, W) with a random number of elements; images are at least 2 x 2, and up to twice as wide as high."""
    elements = log_uniform(draw, SMALLEST, LARGEST)
    images = draw.randint(1, MAX_IMAGES)
    fewest, most = channels
    count = round(log_uniform(draw, fewest, max(fewest, min(most, elements / images / 4))))
    pixels = elements / images / count
    height = max(2, round(math.sqrt(pixels * log_uniform(draw, 0.5, 1))))
    return images, count, height, max(2, round(pixels / height))


def drawn(draw: random.Random, workload: Workload) -> Call:
    return Call(
        workload,
        drawn_shape(draw, workload.channels),
        draw.choice(workload.dtypes),
        draw.choice(list(harness.MEMORY_FORMATS)),
        workload.differentiable and draw.random() < 0.5,
    )


def decade(elements: int) -> str:
    power = len(str(elements)) - 1
    return f"1e{power} to 1e{power + 1} elements"


def is_lost(ours: float, stock: float) -> bool:
    return ours > (1 + SHARE) * stock and ours > stock + SECONDS


def measured(call: Call, allocator: str) -> dict:
    """The record of a call; its ratio is our time / stock's."""
    inputs = call.inputs()
    steps = call.workload.steps(inputs, call.backward, "auto")
    for factor in (1, 4):
        timings = measure.measure_turns(steps, factor * FEWEST, factor * BUDGET)
        ours, stock = timings[OURS].median, timings[STOCK].median
        lost = is_lost(ours, stock)
        if not lost:
            break
    return {
        "op": call.workload.name,
        "shape": call.shape,
        "elements": inputs[0].numel(),  # the number that the limits of "auto" compare
        "size": decade(inputs[0].numel()),
        "dtype": str(call.dtype).removeprefix("torch."),
        "layout": call.layout,
        "passes": "forward and backward" if call.backward else "forward",
        "allocator": allocator,
        "fastseg_us": ours * 1e6,
        "stock_us": stock * 1e6,
        "ratio": ours / stock,
        "lost": lost,
    }


def records_of(calls: list[Call]) -> Iterator[dict]:
    """Measures the first half of the calls under the default allocator, the others under the tuned one, which stays."""
    half = len(calls) // 2
    for number, call in enumerate(progress(calls)):
        if number == half:
            fastseg.tune_allocator()
        yield measured(call, "tuned" if number >= half else "default")


LOST_HEADER = ["lost call", "elements", "fastseg us", "stock us", "ours / stock"]
SHARES_HEADER = ["calls", "measured", "lost", "share", "median of ours / stock"]


def lost_rows(records: list[dict]) -> list[list[str]]:
    """The lost calls, worst first."""
    lost = sorted((record for record in records if record["lost"]), key=lambda record: -record["ratio"])
    return [
        [
            f"{record['op']} {'x'.join(map(str, record['shape']))} {record['dtype']} {record['layout']}, "
            f"{record['passes']}, {record['allocator']} allocator",
            str(record["elements"]),
            f"{record['fastseg_us']:.0f}",
            f"{record['stock_us']:.0f}",
            f"{record['ratio']:.2f}",
        ]
        for record in lost
    ]


def share_rows(records: list[dict]) -> list[list[str]]:
    """Rows for all calls, then for each op, layout and so on."""
    groups = [("all", records)]
    for key in GROUPS:
        for value in sorted({record[key] for record in records}):
            groups.append((value, [record for record in records if record[key] == value]))
    rows = []
    for name, members in groups:
        lost = sum(record["lost"] for record in members)
        median = statistics.median(record["ratio"] for record in members)
        rows.append([name, str(len(members)), str(lost), f"{lost / len(members):.0%}", f"{median:.2f}"])
    return rows


def verdict(records: list[dict], targets: bool) -> str:
    share = sum(record["lost"] for record in records) / len(records)
    words = f"Lost: {share:.1%} of the calls"
    if targets:
        words += f"; target, at most {MAX_LOST_SHARE:.0%}: {'reached' if share <= MAX_LOST_SHARE else 'missed'}"
    return words


def tables(records: list[dict], targets: bool) -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows of each table, with or without targets."""
    return [(SHARES_HEADER, share_rows(records)), (LOST_HEADER, lost_rows(records))]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run sweep", description=__doc__)
    parser.add_argument("--calls", type=int, default=400, help="how many are drawn (default: 400)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="default: as PyTorch chooses; 1 for a busy machine")
    results.add_options(parser)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    draw = random.Random(options.seed)
    calls = [drawn(draw, WORKLOADS[number % len(WORKLOADS)]) for number in range(options.calls)]
    meta = results.meta("cpu", options.threads) | {"seed": options.seed}
    print(table.heading(meta), flush=True)
    records = list(records_of(calls))
    print(table.report(tables(records, options.targets), verdict(records, options.targets)))
    results.keep(options, "sweep", meta, records)
    return 0
