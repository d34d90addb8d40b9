"""`python -m benchmarks.run host`: the overhead of a call without its kernel, in calls of a few hundred elements.

Ours and stock take turns in one process on one thread. Ours runs with backend="cpu": "auto" would leave such calls to
stock. Calls of Triton kernels are timed on CPU tensors up to the launch: the launcher is replaced by a function that
returns at once, and the checks for a GPU are off.
"""

import argparse
import contextlib
import sys
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import harness, measure, results, table
from benchmarks.harness import OURS
from benchmarks.progress import progress
from benchmarks.workloads import STOCK, Workload, named
from fastseg import _library
from fastseg._op import REGISTRY

SHAPE = (1, 4, 8, 8)

# Kinds of calls.
INFERENCE, FORWARD, BACKWARD = "forward, no gradient wanted", "forward, gradient wanted", "forward and backward"


@dataclass(frozen=True)
class Case:
    """A workload at a small size, and its targets: `at_most` of stock's time, and of Python calls in one forward."""

    workload: Workload
    passes: str
    backend: str = "cpu"
    at_most: float | None = None
    most_calls: int | None = None

    @property
    def title(self) -> str:
        launch = " up to the launch of Triton" if self.backend == "triton" else ""
        return f"{self.workload.name}{launch}, {self.passes}"

    def inputs(self) -> harness.Inputs:
        return self.workload.make(SHAPE, torch.device("cpu"), torch.float32, "contiguous")

    def forwards(self) -> dict[str, Callable]:
        """The forward of each contestant, without arguments."""
        inputs = harness.differentiable(self.inputs(), self.passes != INFERENCE)
        return {name: partial(run, *inputs) for name, run in self.workload.contestants(self.backend).items()}

    def calls(self) -> dict[str, Callable]:
        """The timed call of each contestant."""
        if self.passes == BACKWARD:
            return self.workload.steps(self.inputs(), True, self.backend)
        return self.forwards()


def cases(name: str, at_most: dict[str, float | None], **options) -> list[Case]:
    return [Case(named(name), passes, at_most=value, **options) for passes, value in at_most.items()]


FORWARDS = {INFERENCE: 5, FORWARD: 5}
UNTARGETED = {INFERENCE: None, BACKWARD: None}
CASES = [
    *cases("cross_entropy", FORWARDS | {BACKWARD: 1.7}, most_calls=20),
    *cases("cross_entropy", FORWARDS, backend="triton"),
    *cases("max_pool2d 2x2 indices", {INFERENCE: 5, BACKWARD: None}, most_calls=20),
    *cases("max_unpool2d", UNTARGETED),
    *cases("upsample_cross_entropy", UNTARGETED),
    *cases("cross_entropy_dice", UNTARGETED),
    *cases("sigmoid_focal_loss", UNTARGETED),
]


def python_calls(call: Callable) -> int:
    """The number of Python function calls during a call."""
    entered = []

    def note(frame, event, argument):
        if event == "call":
            entered.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return len(entered)


def stopping_at_the_launch(name: str) -> contextlib.ExitStack:
    """While open, the op's Triton backend takes CPU tensors, and its launcher returns at once."""
    op = REGISTRY[name]
    (triton,) = (backend for backend in op.backends if backend.name == "triton")
    patched = contextlib.ExitStack()
    for where, what, value in (
        (_library, "interpreting", lambda: True),
        (triton, "_available", True),
        (triton, "kernel", lambda *values: None),
        (op, "_choices", {}),  # discards choices made while this is open
    ):
        patched.enter_context(unittest.mock.patch.object(where, what, value))
    return patched


def measured(case: Case, turns: int) -> dict:
    """The record of a case; its ratio is our time / stock's."""
    launch = case.backend == "triton"
    with stopping_at_the_launch(case.workload.name) if launch else contextlib.nullcontext():
        timings = measure.measure_turns(case.calls(), turns)
        entered = python_calls(case.forwards()[OURS])
    ours, stock = timings[OURS], timings[STOCK]
    return {
        "case": case.title,
        "fastseg_us": ours.median * 1e6,
        "stock_us": stock.median * 1e6,
        "ratio": ours.median / stock.median,
        "ratio_quartiles": measure.ratio_quartiles(ours, stock),
        "python_calls": entered,
        "turns": len(ours.seconds),
        "targets": {"ratio": case.at_most, "python_calls": case.most_calls},
    }


def judged(record: dict) -> list[tuple[str, bool]]:
    """Every target of a record as text, and whether it is met."""
    words = {"ratio": "<= {:g}x stock", "python_calls": "<= {} Python calls"}
    return [
        (words[figure].format(most), record[figure] <= most)
        for figure, most in record["targets"].items()
        if most is not None
    ]


HEADER = ["call", "fastseg us", "stock us", "ours / stock (quartiles)", "Python calls"]


def row(record: dict) -> list[str]:
    low, high = record["ratio_quartiles"]
    return [
        record["case"],
        f"{record['fastseg_us']:.1f}",
        f"{record['stock_us']:.1f}",
        f"{record['ratio']:.2f} ({low:.2f} to {high:.2f})",
        str(record["python_calls"]),
    ]


def target_cell(record: dict) -> str:
    return "; ".join(words if met else f"**missed** {words}" for words, met in judged(record))


def tables(records: list[dict], targets: bool) -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows of each table."""
    header = [*HEADER, "targets"] if targets else HEADER
    return [(header, [row(record) + ([target_cell(record)] if targets else []) for record in records])]


def verdict(records: list[dict], targets: bool) -> str:
    faster = sum(record["ratio"] <= 1 for record in records)
    words = f"{faster} of {len(records)} calls take no longer than stock's"
    if targets:
        met = [met for record in records for _, met in judged(record)]
        words += f"; targets: {sum(met)} reached, {len(met) - sum(met)} missed"
    return words


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run host", description=__doc__)
    parser.add_argument("--turns", type=int, default=4000, help="of which a fifth warms up (default: 4000)")
    results.add_options(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    meta = results.meta("cpu", threads=1)
    print(table.heading(meta), flush=True)
    records = [measured(case, options.turns) for case in progress(CASES)]
    print(table.report(tables(records, options.targets), verdict(records, options.targets)))
    results.keep(options, "host", meta, records)
    return 0
