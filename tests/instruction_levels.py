"""Tests of one instruction level of the CPU library, in a separate process: the level is chosen at import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastseg import _library


def run_at_level(level: str, *arguments: str) -> None:
    """`python <arguments>` must succeed with `level` loaded; skips if that level is not built or cannot run."""
    if not (_library.LIBRARY_DIR / f"libfastseg_{level}.so").exists():
        pytest.skip(f"libfastseg_{level}.so is not built")
    if _library.LEVELS.index(level) < _library.LEVELS.index(_library.CPU_LEVEL or "base"):
        pytest.skip(f"this machine does not run {level}")
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "FASTSEG_CPU_LEVEL": level},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2_000:]
