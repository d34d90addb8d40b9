"""Runs each file of tests/triton_interpreter in a separate process: Triton reads TRITON_INTERPRET at import."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path.name for path in (ROOT / "tests" / "triton_interpreter").glob("test_*.py"))


def run_interpreted(path: Path, report: Path) -> None:
    """Raises AssertionError unless pytest runs at least one test of the file, and none fails or is skipped."""
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            f"--junitxml={report}",
            str(path),
        ],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-2_000:]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    ran = int(suite.get("tests")) - int(suite.get("skipped"))
    assert ran > 0, f"{path.name} ran no test"
    assert int(suite.get("skipped")) == 0, f"{path.name} skipped tests:\n{result.stdout[-5_000:]}"


@pytest.mark.parametrize("name", FILES)
def test_kernels_in_the_interpreter(name, tmp_path):
    run_interpreted(ROOT / "tests" / "triton_interpreter" / name, tmp_path / "report.xml")


def test_a_file_without_tests_fails(tmp_path):
    path = tmp_path / "test_nothing.py"
    path.write_text("")
    with pytest.raises(AssertionError):
        run_interpreted(path, tmp_path / "report.xml")


def test_skipped_tests_fail(tmp_path):
    path = tmp_path / "test_skipped.py"
    path.write_text("import pytest\n\n\n@pytest.mark.skip\ndef test_nothing():\n    pass\n")
    with pytest.raises(AssertionError, match="ran no test"):
        run_interpreted(path, tmp_path / "report.xml")
