"""`make gpu-check [OPS="op ..."] [ARGS="..."]`: all checks on a GPU machine, in one command of at most eight minutes.

Builds with CUDA from the packages as found (no network), runs the test suite and every benchmark on CUDA and
a small subset under compute-sanitizer. A step that fails or runs out of time does not stop the others. All
results are flat files in `$OUT` (default `build/gpu-check`), at most eight; the last output is a table of what
failed. Without a CUDA device the steps that need one are reported as not run, which is not a failure.
`--rehearse` runs the same steps on the CPU, benchmarks at small sizes. `--steps build tests` and then
`--steps benchmarks` give each of two commands all of its time.
"""

import argparse
import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import harness, results

TIME_LIMIT = 460.0  # default seconds for all steps, without start-up, reporting and a last GRACE
TESTS_LIMIT = 150.0  # seconds for the tests, if benchmarks follow
STEPS = ("build", "environment", "tests", "sanitizer", "benchmarks")
GRACE = 8.0  # seconds for a step to end after it was interrupted
LARGEST_LOG = 2_000_000  # bytes: only the end of a longer log is kept
MAX_FILES = 8


@dataclass(frozen=True)
class Step:
    """One command: `command(limit)`, called when the step starts, where limit is its number of seconds.

    `alternative` is tried if the command fails. `not_run`: the reason why the step cannot run here, or None.
    """

    name: str
    command: Callable[[float], list[str]]
    limit: float
    alternative: Callable[[float], list[str]] | None = None
    environment: tuple[tuple[str, str], ...] = ()
    not_run: str | None = None


@dataclass(frozen=True)
class Outcome:
    """The outcome of a step: `result` is "passed", "failed" or "not run"."""

    name: str
    result: str
    seconds: float
    detail: str


def no_cuda() -> str | None:
    """The reason why nothing can run on CUDA here, or None."""
    return None if torch.cuda.is_available() else "no CUDA device"


def architectures() -> str:
    """CMake's name for the architecture of the device."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}-real"


def python(*arguments: str) -> Callable[[float], list[str]]:
    return lambda limit: [sys.executable, *arguments]


def build_step(device: str, reason: str | None) -> Step:
    install = ("-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps", "--editable", ".")
    environment = [
        ("FASTSEG_LEVELS", "native"),
        ("PIP_DISABLE_PIP_VERSION_CHECK", "1"),
        ("PIP_BREAK_SYSTEM_PACKAGES", "1"),
    ]
    if device == "cuda" and reason is None:
        environment += [("FASTSEG_CUDA", "ON"), ("FASTSEG_CUDA_ARCHS", architectures())]
    else:
        environment += [("FASTSEG_CUDA", "OFF")]
    in_place = python("setup.py", "build_ext", "--inplace")
    return Step("build", python(*install), 200, in_place, tuple(environment), reason)


def test_step(ops: list[str], device: str, limit: float, reason: str | None) -> Step:
    """The whole suite, tests on the device first; or the tests of the given ops."""
    selected = ["tests/test_contract.py", "tests/ops", "tests"]
    if ops:
        files = [f"tests/ops/test_{op}.py" for op in ops]
        selected = ["tests/test_contract.py", *(name for name in files if (results.ROOT / name).exists())]
        selected += ["-k", " or ".join(ops)]
    workers = max(1, min(8, (os.cpu_count() or 1) // 2))
    parallel = ["-n", str(workers), "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    options = ["-q", "-ra", "--tb=short", "--device", device, *parallel]
    command = python("-m", "pytest", *selected, *options)
    return Step("tests", command, limit, None, (("OMP_NUM_THREADS", "2"),), reason)


def sanitizer_step(ops: list[str], reason: str | None) -> Step:
    """Every op once under memcheck, with a separate allocation for each tensor, so that overruns are found."""
    tool = shutil.which("compute-sanitizer")
    if reason is None and tool is None:
        reason = "no compute-sanitizer on the PATH"
    exercise = [sys.executable, "-m", "benchmarks.exercise", "--device", "cuda", *ops]
    return Step(
        "sanitizer",
        lambda limit: [str(tool), "--tool", "memcheck", "--error-exitcode", "9", *exercise],
        60,
        None,
        (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
        reason,
    )


def benchmark_step(ops: list[str], device: str, quick: bool, out: Path, reason: str | None) -> Step:
    """As many benchmarks as the remaining time allows; the JSON is written after every case."""

    def command(limit: float) -> list[str]:
        options = ["--device", device, "--json", str(out / "benchmarks.json")]
        options += ["--time-limit", f"{limit - 25:.0f}", *(["--quick"] if quick else [])]
        return [sys.executable, "-m", "benchmarks.run", *ops, *options]

    return Step("benchmarks", command, math.inf, None, (), reason)


def steps(ops: list[str], device: str, rehearse: bool, out: Path, wanted: Sequence[str] = STEPS) -> list[Step]:
    """The wanted steps in order. The limits of the steps before the benchmarks are far above their usual time."""
    reason = no_cuda() if device == "cuda" else None
    plan = [
        build_step(device, reason),
        Step("environment", python("-m", "fastseg.info"), 40),
        test_step(ops, device, TESTS_LIMIT if "benchmarks" in wanted else math.inf, reason),
        sanitizer_step(ops, no_cuda()),
        benchmark_step(ops, device, rehearse, out, reason),
    ]
    return [step for step in plan if step.name in wanted]


def run_command(command: list[str], log: Path, limit: float, environment: dict[str, str]) -> str | None:
    """Run to the end or the limit, with output to the log; returns None or what went wrong."""
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        try:
            process = subprocess.Popen(
                command,
                cwd=results.ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                start_new_session=True,
            )
        except OSError as error:
            return f"could not start: {error}"
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            stop(process)
            return f"stopped after its {limit:.0f} s"
    return None if status == 0 else f"exit status {status}"


def stop(process: subprocess.Popen) -> None:
    """End a process and its children: with an interrupt first, so that pytest still prints what has failed."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)  # the rest of the process group, with all children
    except ProcessLookupError:
        pass
    process.wait()


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:100] if lines else ""


def run_step(step: Step, out: Path, remaining: float) -> Outcome:
    if step.not_run:
        return Outcome(step.name, "not run", 0.0, step.not_run)
    limit = min(step.limit, remaining)
    if limit < 5:
        return Outcome(step.name, "failed", 0.0, "no time was left for it")
    log = out / f"{step.name}.log"
    start = time.monotonic()
    problem = run_command(step.command(limit), log, limit, dict(step.environment))
    if problem and step.alternative:
        left = max(5.0, limit - (time.monotonic() - start))
        problem = run_command(step.alternative(left), log, left, dict(step.environment))
    seconds = time.monotonic() - start
    detail = last_line(log) if problem is None else f"{problem}: {last_line(log)}"
    if log.stat().st_size > LARGEST_LOG:
        log.write_bytes(b"(beginning left out)\n" + log.read_bytes()[-LARGEST_LOG:])
    return Outcome(step.name, "failed" if problem else "passed", seconds, detail)


def summary(outcomes: list[Outcome], seconds: float) -> str:
    """The table of every step, and one line that says what failed."""
    lines = [f"{'step':12} {'result':8} {'seconds':>8}  detail"]
    for outcome in outcomes:
        lines.append(f"{outcome.name:12} {outcome.result:8} {outcome.seconds:8.1f}  {outcome.detail}")
    failed = [outcome.name for outcome in outcomes if outcome.result == "failed"]
    not_run = [outcome.name for outcome in outcomes if outcome.result == "not run"]
    lines.append("")
    if not_run:
        lines.append(f"NOT RUN: {', '.join(not_run)}; this says nothing about them")
    if failed:
        lines.append(f"FAILED: {', '.join(failed)}; see the log of that name")
    else:
        lines.append("Nothing that ran has failed." if not_run else "Everything passed.")
    lines.append(f"{seconds:.0f} s in total")
    return "\n".join(lines) + "\n"


def run_steps(plan: list[Step], out: Path, time_limit: float = TIME_LIMIT) -> int:
    """Run every step, also after failures; 1 if one failed, else 0."""
    out.mkdir(parents=True, exist_ok=True)
    names = [*(f"{step.name}.log" for step in plan), "benchmarks.json", "summary.txt"]
    if len(names) > MAX_FILES:
        raise ValueError(f"more than {MAX_FILES} result files: {names}")
    for name in names:
        (out / name).unlink(missing_ok=True)
    start = time.monotonic()
    outcomes = []
    for step in plan:
        print(f"{step.name} ...", flush=True)
        outcomes.append(run_step(step, out, time_limit - (time.monotonic() - start)))
        print(f"{step.name}: {outcomes[-1].result} {outcomes[-1].detail}", flush=True)
    text = summary(outcomes, time.monotonic() - start)
    (out / "summary.txt").write_text(text)
    written = [name for name in names if (out / name).exists()]
    print(f"\n{text}results in {out}: {', '.join(written)}", flush=True)
    return 1 if any(outcome.result == "failed" for outcome in outcomes) else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    names = harness.op_names()
    parser.add_argument("ops", nargs="*", metavar="op", help=f"only these: {', '.join(names)} (default: all)")
    parser.add_argument("--rehearse", action="store_true", help="run the same steps on the CPU")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="only these (default: all)")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT, metavar="S", help="seconds in all")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.ops) - set(names))
    if unknown:
        parser.error(f"no such op: {', '.join(unknown)}; there are: {', '.join(names)}")
    device = "cpu" if options.rehearse else "cuda"
    if device == "cuda" and no_cuda():
        print("no CUDA device", flush=True)
    out = Path(os.environ.get("OUT") or results.ROOT / "build" / "gpu-check").resolve()
    plan = steps(options.ops, device, options.rehearse, out, options.steps)
    return run_steps(plan, out, options.time_limit)


if __name__ == "__main__":
    sys.exit(main())
