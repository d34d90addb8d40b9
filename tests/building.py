"""CMake builds of the library in folders of their own, for tests that need it with special options."""

import fcntl
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def cmake(name: str, **options: str) -> Path:
    """Builds into build/<name> with -D<option>=<value>, no CPU library, and gives that folder."""
    folder = ROOT / "build" / name
    folder.mkdir(parents=True, exist_ok=True)
    options = {"Python3_EXECUTABLE": sys.executable, "FASTSEG_LEVELS": "", "FASTSEG_CUDA": "OFF", **options}
    definitions = [f"-D{option}={value}" for option, value in options.items()]
    with open(folder / "lock", "w") as lock:  # pytest-xdist may want the same build in two processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *definitions)
        run("cmake", "--build", folder)
    return folder


def run(*command) -> None:
    """Runs a command in the source tree; its output becomes the message of a failure."""
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
