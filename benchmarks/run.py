"""`python -m benchmarks.run [op ...]`: check every case, time it against its peers, print and save.

A case whose check fails is refused and not timed. On the CPU each case runs twice, with the default allocator and with
`fastseg.tune_allocator()`, for ours and the peers. The records go to `build/benchmarks`, with `--save` to
`benchmarks/results`, where they are committed. Exit status: 0 if every case was measured, 1 if one was refused, crashed
or ran out of time.

`python -m benchmarks.run host` and `sweep` measure small calls and calls of any size; each has a `--help` of its own.
"""

import argparse
import concurrent.futures
import importlib
import math
import sys
import time

import torch

from benchmarks import against, harness, results, table
from benchmarks.jobs import WORKER_LIMIT, Job, plan, run_worker


class Session:
    """One run of the command: remembers which cases are correct, and prints and saves the records after every job."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.meta = results.meta(options.device, options.threads)
        self.records: dict[str, list[dict]] = {}
        self.checked: dict[str, bool] = {}  # title -> True if its check passed
        self.failures: list[str] = []
        self.left_out: list[str] = []  # for lack of time
        self.deadline = time.monotonic() + options.time_limit

    def remaining(self) -> float:
        return min(WORKER_LIMIT, self.deadline - time.monotonic())

    def fail(self, title: str, reason: str) -> None:
        self.failures.append(f"{title}: {reason}")
        self.checked[title] = False
        print(f"\n{title}: NOT MEASURED: {reason}", flush=True)

    def out_of_time(self, job: Job) -> bool:
        """True if there is no time for the job; its cases are then listed as left out."""
        if self.remaining() > 1:
            return False
        self.left_out += job.titles
        return True

    def prepare(self, jobs: list[Job]) -> None:
        """Check and compile every case, several in parallel: the timings afterwards use the compiler's cache."""
        single = [Job(job.op, (title,), job.allocator) for job in jobs for title in job.titles]

        def check(job: Job) -> tuple[list[dict], str | None] | None:
            if self.remaining() <= 1:
                return None
            return run_worker(job, self.options, "--prepare", limit=self.remaining())

        with concurrent.futures.ThreadPoolExecutor(self.options.jobs) as pool:
            for job, outcome in zip(single, pool.map(check, single)):
                if outcome is not None:
                    self.note(job, *outcome)

    def note(self, job: Job, records: list[dict], failure: str | None) -> list[dict]:
        """Remember the correct cases and report the others; returns the records of the correct cases.

        A worker that failed before its time limit counts as a failure of the first case without a record.
        """
        for title, record in zip(job.titles, records):
            self.checked[title] = True
            if record["refused"]:
                self.fail(title, f"check failed: {record['refused']}")
        if failure:
            culprit = job.titles[min(len(records), len(job.titles) - 1)]
            if not self.out_of_time(Job(job.op, (culprit,), job.allocator)):
                self.fail(culprit, failure)
        return [record for record in records if record["refused"] is None]

    def run(self, job: Job) -> None:
        titles = tuple(title for title in job.titles if self.checked.get(title, True))
        job = Job(job.op, titles, job.allocator)
        if not titles or self.out_of_time(job):
            return
        known = all(title in self.checked for title in titles)
        arguments = ["--no-verify"] if known else []
        records, failure = run_worker(job, self.options, *arguments, limit=self.remaining())
        for record in self.note(job, records, failure):
            print("\n" + table.text(record, self.options.targets), flush=True)
            self.records.setdefault(job.op, []).append(record)
        self.save()
        if failure:
            self.run(Job(job.op, titles[len(records) + 1 :], job.allocator))

    def all_records(self) -> list[dict]:
        return [record for records in self.records.values() for record in records]

    def save(self) -> None:
        """Called after every job, so that a stopped run keeps its results."""
        if self.options.json:
            lost = {"failures": self.failures, "left_out": self.left_out}
            results.save(self.options.json, self.meta | lost, self.all_records())
        elif not self.options.quick:
            for op, records in self.records.items():
                results.keep(self.options, op, self.meta, records)


def measure(options: argparse.Namespace) -> int:
    session = Session(options)
    print(table.heading(session.meta), flush=True)
    for jobs in plan(options.ops, options.device, options.match):
        if options.jobs > 1:
            session.prepare(jobs)
        for job in jobs:
            session.run(job)
    if options.targets:
        print("\n" + table.targets(session.all_records()))
    elif session.records and not options.quick:
        print(f"\nRecords: {results.place(options, session.meta)}")
    if session.left_out:
        print("\nLeft out for lack of time:\n  " + "\n  ".join(session.left_out))
    if session.failures:
        print("\nNot measured:\n  " + "\n  ".join(session.failures))
    return 1 if session.failures else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    names = harness.op_names()
    parser.add_argument("ops", nargs="*", metavar="op", help=f"files of benchmarks/ops: {', '.join(names)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--against", metavar="REV", help="compare with another git revision, not with peers")
    results.add_options(parser)
    parser.add_argument("--quick", action="store_true", help="small sizes, short timings, no records")
    parser.add_argument("--match", default="", metavar="TEXT", help="only cases so titled")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: as PyTorch chooses)")
    parser.add_argument("--jobs", type=int, default=0, help="processes to check and compile in (CUDA: 12)")
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="S", help="seconds in all")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.ops) - set(names))
    if unknown:
        parser.error(f"no such op: {', '.join(unknown)}; there are: {', '.join(names)}")
    if options.save and (options.quick or options.match):
        parser.error("--save: allowed for whole files only, without --quick and --match")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device")
    options.ops = options.ops or names
    options.jobs = options.jobs or (12 if options.device == "cuda" else 1)
    return options


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in results.COMMANDS:
        return importlib.import_module(f"benchmarks.{arguments[0]}").main(arguments[1:])
    options = parse(arguments)
    if options.against:
        return against.compare(options)
    return measure(options)


if __name__ == "__main__":
    sys.exit(main())
