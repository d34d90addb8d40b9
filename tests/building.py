"""CMake builds of the library with special options, in separate folders, for tests."""

import fcntl
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def cmake(name: str, **options: str) -> Path:
    """Builds into build/<name> with -D<option>=<value> and without a CPU library; returns that folder."""
    folder = ROOT / "build" / name
    folder.mkdir(parents=True, exist_ok=True)
    options = {"Python3_EXECUTABLE": sys.executable, "FASTSEG_LEVELS": "", "FASTSEG_CUDA": "OFF", **options}
    definitions = [f"-D{option}={value}" for option, value in options.items()]
    with open(folder / "lock", "w") as lock:  # two processes of pytest-xdist may need the same build
        fcntl.flock(lock, fcntl.LOCK_EX)
        run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *definitions)
        run("cmake", "--build", folder)
    return folder


def run(*command) -> None:
    """Runs a command in the source tree; raises with its output if it fails."""
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
