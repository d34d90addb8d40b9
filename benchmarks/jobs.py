"""The worker processes of a benchmark run: their cases, and how to start them."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import harness

WORKER_LIMIT = 600  # seconds


@dataclass(frozen=True)
class Job:
    """Cases of one op, for one worker process."""

    op: str
    titles: tuple[str, ...]
    allocator: str


def essential(cases: list[harness.Case], device: str) -> set[str]:
    """Titles of the cases that have a target on the device, and of the first case of every op."""
    first = {case.op: case.title for case in reversed(cases)}
    wanted = {case.title for case in cases for target in case.targets if target.device == device}
    return wanted | set(first.values())


def plan(ops: list[str], device: str, match: str) -> list[list[Job]]:
    """The jobs in two passes, the essential cases first: a time limit then cuts the others.

    CPU: one job per case and allocator. CUDA: one per op (starting CUDA costs more than most cases).
    """
    passes: list[list[Job]] = [[], []]
    for op in ops:
        cases = [case for case in harness.cases_of(op) if device in case.devices]
        first = essential(cases, device)
        cases = [case for case in cases if match in case.title]
        for jobs, among_first in zip(passes, (True, False)):
            chosen = [case for case in cases if (case.title in first) == among_first]
            if device == "cpu":
                jobs += [Job(op, (case.title,), allocator) for case in chosen for allocator in case.allocators]
            elif chosen:
                jobs.append(Job(op, tuple(case.title for case in chosen), "default"))
    return passes


def run_worker(
    job: Job,
    options: argparse.Namespace,
    *arguments: str,
    limit: float = WORKER_LIMIT,
    path: list[str] | None = None,
) -> tuple[list[dict], str | None]:
    """The records that a worker wrote, and None or the reason why some are missing.

    `path`: directories to import `fastseg` and `benchmarks` from, instead of the current directory.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "records"
        command = [sys.executable, *(["-P"] if path else []), "-m", "benchmarks.worker", job.op, *job.titles]
        command += ["--device", options.device, "--allocator", job.allocator, "--output", str(output)]
        command += ["--threads", str(options.threads), *(["--quick"] if options.quick else []), *arguments]
        environment = os.environ | ({"PYTHONPATH": os.pathsep.join(path)} if path else {})
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=limit,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            failure = f"ran longer than {limit:.0f} s"
        else:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            failure = None if done.returncode == 0 else f"exit status {done.returncode}: {last}"
        lines = output.read_text().splitlines() if output.exists() else []
    return [json.loads(line) for line in lines], failure
