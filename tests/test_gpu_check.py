"""`make gpu-check` without a GPU: reports, continues after failures, keeps its limits, says what it skips."""

import subprocess
import sys
import time

import pytest

from benchmarks import gpu_check, results


def python(code: str):
    return lambda limit: [sys.executable, "-c", code]


def step(name: str, code: str, **options) -> gpu_check.Step:
    return gpu_check.Step(name, python(code), options.pop("limit", 60.0), **options)


def test_without_a_device_it_says_so_and_succeeds(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "no_cuda", lambda: "no CUDA device")
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_check.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("no CUDA device\n")
    for name in ("build", "tests", "sanitizer", "benchmarks"):
        expected = f"{name} not run 0.0 no CUDA device"
        assert any(" ".join(line.split()) == expected for line in printed.splitlines())
    assert "NOT RUN: build, tests, sanitizer, benchmarks" in printed
    assert "Everything passed" not in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["environment.log", "summary.txt"]
    assert "python" in (tmp_path / "environment.log").read_text()


def test_a_failure_does_not_stop_the_rest(tmp_path, capsys):
    plan = [
        step("first", "print('broken'); raise SystemExit(3)"),
        step("second", "print('fine')"),
        step("third", "", not_run="no such tool"),
    ]
    assert gpu_check.run_steps(plan, tmp_path) == 1
    summary = (tmp_path / "summary.txt").read_text()
    assert "exit status 3: broken" in summary
    assert "FAILED: first;" in summary
    assert "NOT RUN: third" in summary
    second = next(line for line in summary.splitlines() if line.startswith("second"))
    assert "passed" in second and "fine" in second
    assert summary in capsys.readouterr().out


def test_a_step_is_stopped_at_its_limit_with_its_children(tmp_path):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.monotonic()
    outcome = gpu_check.run_step(step("slow", code, limit=5.0), tmp_path, 100.0)
    assert time.monotonic() - start < 20
    assert outcome.result == "failed"
    assert "stopped after its 5 s" in outcome.detail


def test_a_stopped_step_may_still_report(tmp_path):
    code = (
        "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('3 failed, 4 passed until then')"
    )
    outcome = gpu_check.run_step(step("slow", code, limit=5.0), tmp_path, 100.0)
    assert outcome.result == "failed"
    assert "3 failed, 4 passed until then" in outcome.detail


def test_no_step_starts_when_the_time_is_spent(tmp_path):
    assert gpu_check.run_steps([step("late", "print(1)")], tmp_path, time_limit=1.0) == 1
    assert "no time was left" in (tmp_path / "summary.txt").read_text()


def test_the_alternative_is_tried_after_a_failure(tmp_path):
    plan = [step("build", "raise SystemExit(1)", alternative=python("print('second way')"))]
    assert gpu_check.run_steps(plan, tmp_path) == 0
    assert "second way" in (tmp_path / "summary.txt").read_text()


def test_what_the_alternative_builds_can_be_imported():
    """It installs nothing: fastseg.kernels must be found next to the package."""
    code = (
        "import sys\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in str(finder)]\n"
        "import fastseg\n"
        "from fastseg.kernels.cross_entropy import reference\n"
        "print(fastseg.kernels.__spec__.origin, reference.__file__)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=results.ROOT, capture_output=True, text=True, check=True)
    folder = results.ROOT / "kernels"
    assert run.stdout.split() == [str(folder / "__init__.py"), str(folder / "cross_entropy" / "reference.py")]


def test_long_logs_keep_their_end(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LARGEST_LOG", 1000)
    gpu_check.run_step(step("talk", "print('x' * 5000); print('the end')"), tmp_path, 100.0)
    log = (tmp_path / "talk.log").read_text()
    assert len(log) < 1100
    assert log.endswith("the end\n")


def test_every_step_fits_into_the_file_limit(tmp_path):
    plan = gpu_check.steps([], "cpu", rehearse=True, out=tmp_path)
    assert len(plan) + 2 <= gpu_check.MAX_FILES


def test_ops_narrow_tests_and_benchmarks(tmp_path):
    steps = gpu_check.steps(["cross_entropy"], "cpu", rehearse=True, out=tmp_path)
    plan = {step.name: step for step in steps}
    tests = plan["tests"].command(100.0)
    assert tests[tests.index("-k") + 1] == "cross_entropy"
    assert "tests" not in tests
    assert "cross_entropy" in plan["benchmarks"].command(100.0)


def test_tests_alone_get_all_the_time(monkeypatch, tmp_path):
    plans = []
    monkeypatch.setattr(gpu_check, "run_steps", lambda plan, out, limit: plans.append((plan, limit)) or 0)
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_check.main([]) == 0
    assert gpu_check.main(["--rehearse", "--time-limit", "500", "--steps", "build", "tests"]) == 0
    limits = [({step.name: step.limit for step in plan}, limit) for plan, limit in plans]
    assert limits[0][0]["tests"] == gpu_check.TESTS_LIMIT and limits[0][1] == gpu_check.TIME_LIMIT
    assert list(limits[1][0]) == ["build", "tests"] and limits[1][0]["tests"] > 500 and limits[1][1] == 500


def test_an_unknown_op_is_refused():
    with pytest.raises(SystemExit) as exit:
        gpu_check.main(["no_such_op"])
    assert exit.value.code == 2
