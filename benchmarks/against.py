"""`python -m benchmarks.run --against REV`: the same cases here and on another git revision.

The revision is unpacked and built under `build/against/<commit>`. The benchmark files of this checkout run its
`fastseg`, so both sides do the same work. The processes of the two sides alternate, and each pair gives a ratio.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from benchmarks import results
from benchmarks.harness import OURS
from benchmarks.jobs import Job, plan, run_worker

ROUNDS = 3


def install(target: Path, source: Path) -> None:
    """`pip install` of a source tree into a folder of its own."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True)


def build(revision: str) -> Path:
    """The folder to import that revision's `fastseg` from; built once per commit."""
    commit = results.git("rev-parse", "--verify", f"{revision}^{{commit}}")
    if not commit:
        raise SystemExit(f"--against: there is no revision {revision!r}")
    folder = results.ROOT / "build" / "against" / commit[:12]
    installed = folder / "site"
    if not installed.exists():
        source, unfinished = folder / "source", folder / "unfinished"
        shutil.rmtree(folder, ignore_errors=True)
        source.mkdir(parents=True)
        archive = folder / "source.tar"
        subprocess.run(["git", "archive", "--output", str(archive), commit], cwd=results.ROOT, check=True)
        with tarfile.open(archive) as files:
            files.extractall(source, filter="data")
        install(unfinished, source)
        unfinished.rename(installed)
    return installed


def time_once(job: Job, options: argparse.Namespace, path: list[str]) -> float | str:
    """Milliseconds of our op in a new process, or the reason why it was not measured."""
    records, failure = run_worker(job, options, "--only-ours", path=path)
    if failure or records[0]["refused"]:
        return failure or f"check failed: {records[0]['refused']}"
    return records[0]["contestants"][OURS]["median_ms"]


def link_benchmarks(folder: str) -> str:
    """A folder that contains `benchmarks` without `fastseg`, to import from."""
    (Path(folder) / "benchmarks").symlink_to(results.ROOT / "benchmarks")
    return folder


def compare(options: argparse.Namespace) -> int:
    """Print, per case and allocator, this checkout's time, the revision's, and the paired ratio."""
    other = build(options.against)
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        benchmarks_only = link_benchmarks(folder)
        here = [str(results.ROOT)]
        there = [benchmarks_only, str(other)]
        print(f"this checkout against {options.against}; a ratio above 1 means that this checkout is faster")
        jobs = [job for jobs in plan(options.ops, options.device, options.match) for job in jobs]
        for job in (Job(job.op, (title,), job.allocator) for job in jobs for title in job.titles):
            pairs = [(time_once(job, options, here), time_once(job, options, there)) for _ in range(ROUNDS)]
            label = f"{job.titles[0]}, {job.allocator} allocator"
            reasons = [side for pair in pairs for side in pair if isinstance(side, str)]
            if reasons:
                failures += 1
                print(f"{label}: NOT COMPARED: {reasons[0]}", flush=True)
                continue
            ratios = [theirs / ours for ours, theirs in pairs]
            ours, theirs = (statistics.median(side) for side in zip(*pairs))
            print(
                f"{label}: {ours:.3f} ms, {theirs:.3f} ms there, x{statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )
    return 1 if failures else 0
