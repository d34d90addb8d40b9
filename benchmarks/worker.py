"""Runs cases of one op in a separate process: check, time, measure memory, write one JSON record per line.

`benchmarks.run` starts this module, on the CPU once per case and allocator, so that no case inherits the heap of
another one and a crash loses only one case. By hand: `python -m benchmarks.worker cross_entropy "<title>" --quick`.
"""

import argparse
import gc
import json
import os
import sys
import unittest.mock
from collections.abc import Callable

import torch

from benchmarks import harness, measure, memory
from fastseg._op import REGISTRY, Op


def tune_allocator() -> None:
    """Keep large buffers instead of mapping them again on every call, for ours and all peers."""
    import fastseg

    fastseg.tune_allocator()


def copies(inputs: harness.Inputs, count: int) -> list[harness.Inputs]:
    """`count` separate copies of the inputs, with the same strides."""
    clone = [
        tuple(value.clone() if isinstance(value, torch.Tensor) else value for value in inputs) for _ in range(count - 1)
    ]
    return [inputs, *clone]


def run_timings(case: harness.Case, running: dict, device: str, quick: bool) -> dict[str, measure.Timing]:
    if device == "cpu":
        calls = {name: contestant.step(case.backward) for name, contestant in running.items()}
        return measure.measure_cpu(calls, budget=0.2 if quick else 1.0)
    rotations = {}
    for name, contestant in running.items():
        count = measure.copies_for_cold_cache(contestant.inputs)
        rotations[name] = [contestant.step(case.backward, each) for each in copies(contestant.inputs, count)]
    return measure.measure_cuda(rotations, budget=0.1 if quick else 0.4)


def warm_up(case: harness.Case, running: dict[str, harness.Contestant]) -> dict[str, str]:
    """Call every contestant once (compiling it); removes peers that fail, and returns them with the reason."""
    failed = {}
    for name, contestant in list(running.items()):
        try:
            contestant.step(case.backward)()
        except Exception as error:  # report a peer that cannot run this case, and still time ours
            if name == harness.OURS:
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            del running[name]
    return failed


def backends_used(call: Callable) -> dict[str, str]:
    """The backend of each op of ours during the call, so that results of the reference are marked."""
    used = {}
    choose = Op.choose
    for op in REGISTRY.values():
        op._choices.clear()  # the next call asks `choose` again

    def recording(op, *arguments, **options):
        backend = choose(op, *arguments, **options)
        used[op.name] = backend.name
        return backend

    with unittest.mock.patch.object(Op, "choose", recording):
        call()
    return used


def contestant_record(timing: measure.Timing, ours: measure.Timing, extra_bytes: int | None) -> dict:
    low, high = timing.quartiles()
    ratio_low, ratio_high = measure.ratio_quartiles(timing, ours)
    return {
        "median_ms": timing.median * 1e3,
        "quartiles_ms": [low * 1e3, high * 1e3],
        "ratio": timing.median / ours.median,
        "ratio_quartiles": [ratio_low, ratio_high],
        "clean_samples": sum(timing.clean),
        "samples": len(timing.clean),
        "reliable": timing.reliable,
        "extra_bytes": extra_bytes,
    }


def describe(case: harness.Case, device: str) -> dict:
    """The part of a record that describes its case."""
    return {
        "op": case.op,
        "case": case.workload,
        "shape": list(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "layout": case.layout,
        "backward": case.backward,
        "minimal_bytes": case.minimal_bytes(case.shape, case.dtype),
        "flops": case.flops(case.shape) if case.flops else None,
        "targets": [vars(target) for target in case.targets if target.device == device],
        "refused": None,
    }


def run_case(case: harness.Case, options: argparse.Namespace) -> dict:
    """The record of one case; if the check fails, `refused` is the reason and there are no figures."""
    device, case = options.device, case.prepared()
    torch.manual_seed(0)
    inputs = case.make(case.shape, torch.device(device), case.dtype, case.layout)
    record = describe(case, device) | {"allocator": options.allocator, "quick": options.quick}
    if options.verify:
        record["refused"] = harness.check(case, inputs)
        gc.collect()
        if record["refused"]:
            return record
    running, skipped = harness.contestants(case, inputs, device)
    if options.only_ours:
        running = {harness.OURS: running[harness.OURS]}
    skipped.update(warm_up(case, running))
    if options.prepare:
        return record
    record["backends"] = backends_used(running[harness.OURS].step(case.backward))
    record["skipped_peers"] = skipped
    record["copy_bytes_per_second"] = measure.copy_bandwidth(device)
    timings = run_timings(case, running, device, options.quick)
    record["contestants"] = {}
    for name, timing in timings.items():
        contestant = running[name]
        extra_bytes = memory.peak_extra(contestant.step(case.backward), device)
        figures = contestant_record(timing, timings[harness.OURS], extra_bytes)
        record["contestants"][name] = figures | {"ours": contestant.ours}
    return record


def find_case(op: str, title: str, quick: bool) -> harness.Case:
    """The case with that full-size title; at its small size if `quick`."""
    for case in harness.cases_of(op):
        if case.title == title:
            return case.quick() if quick else case
    raise SystemExit(f"benchmarks/ops/{op}.py has no case {title!r}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker", description=__doc__)
    parser.add_argument("op", help="name of a file in benchmarks/ops")
    parser.add_argument("titles", nargs="+", help="titles of its cases")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--allocator", choices=("default", "tuned"), default="default")
    parser.add_argument("--threads", type=int, default=0, help="0: as PyTorch chooses")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-verify", dest="verify", action="store_false")
    parser.add_argument("--only-ours", action="store_true", help="no peers")
    parser.add_argument("--prepare", action="store_true", help="check and compile only, no timing")
    parser.add_argument("--output", help="file to append the records to (default: standard output)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no compiler processes during the measurement
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.allocator == "tuned":
        tune_allocator()
    for title in options.titles:
        line = json.dumps(run_case(find_case(options.op, title, options.quick), options))
        if options.output:
            with open(options.output, "a") as file:
                file.write(line + "\n")
        else:
            print(line)
        torch.compiler.reset()
        gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
