"""The CUDA kernels as CPU code: building libfastseg_emulator.so, and processes that have it loaded.

A sanitizer must be in a process from its start, so the kernels are tested in one of their own: `run_tests` runs the
pytest files of tests/emulated there. In that process `emulated` gives the ops of torch.ops.fastseg_emulator.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "FASTSEG_EMULATOR_LIBRARY"  # set in the processes that run_tests starts
SANITIZERS = {"plain": "", "address": "address", "thread": "thread"}


def build(variant: str) -> Path:
    """Builds the emulated CUDA library of a variant under build/ and gives its path."""
    folder = ROOT / "build" / f"emulator-{variant}"
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DPython3_EXECUTABLE={sys.executable}",
                 "-DFASTSEG_LEVELS=", "-DFASTSEG_CUDA=OFF", "-DFASTSEG_EMULATOR=ON",
                 f"-DFASTSEG_EMULATOR_SANITIZE={SANITIZERS[variant]}"]
    for command in (configure, ["cmake", "--build", folder]):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder / "libfastseg_emulator.so"


def environment(variant: str, library: Path) -> dict[str, str]:
    changes = {LIBRARY: str(library), "OMP_NUM_THREADS": "1"}
    runtimes = {"address": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}.get(variant, [])
    if runtimes:
        preload = [*runtimes, "libstdc++.so"]  # libstdc++ after them, so that they intercept its exceptions
        paths = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in preload]
        changes["LD_PRELOAD"] = " ".join(paths)
        changes["ASAN_OPTIONS"] = "detect_leaks=0"  # Python keeps memory until it exits
        changes["TSAN_OPTIONS"] = "ignore_noninstrumented_modules=1 halt_on_error=1"  # only our kernels are watched
    return {**os.environ, **changes}


def run_tests(variant: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs tests/emulated in a process of its own against the library of `variant`."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/emulated", *arguments]
    settings = environment(variant, build(variant))
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=900)


def load() -> None:
    """Loads the library that the environment names, with every C++ entry point defined in torch.ops.fastseg_emulator."""
    import fastseg  # noqa: F401  fills the list of schemas
    from fastseg._op import NATIVE_SCHEMAS

    definitions = torch.library.Library("fastseg_emulator", "DEF")
    for schema in NATIVE_SCHEMAS:
        definitions.define(schema)
    torch.ops.load_library(os.environ[LIBRARY])
    load.definitions = definitions  # a Library that is collected takes its definitions with it
