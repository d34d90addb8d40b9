"""The CUDA kernels as CPU code: building libfastseg_emulator.so, and processes that have it loaded.

A sanitizer must be in a process from its start, so the kernels are tested in one of their own: `run_tests`
runs the pytest files of tests/emulated there, which find them in torch.ops.fastseg_emulator.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests import building

LIBRARY = "FASTSEG_EMULATOR_LIBRARY"  # set in the processes that run_tests starts
VARIANT = "FASTSEG_EMULATOR_VARIANT"  # likewise: one of SANITIZERS
SANITIZERS = {"plain": "", "address": "address", "thread": "thread"}


def build(variant: str) -> Path:
    """Builds the emulated CUDA library of a variant under build/ and gives its path."""
    folder = building.cmake(f"emulator-{variant}", FASTSEG_EMULATOR="ON", FASTSEG_EMULATOR_SANITIZE=SANITIZERS[variant])
    return folder / "libfastseg_emulator.so"


def environment(variant: str, library: Path) -> dict[str, str]:
    changes = {LIBRARY: str(library), VARIANT: variant, "OMP_NUM_THREADS": "1"}
    runtimes = {"address": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}.get(variant, [])
    if runtimes:
        preload = [*runtimes, "libstdc++.so"]  # libstdc++ after them, so that they intercept its exceptions
        changes["LD_PRELOAD"] = " ".join(map(_runtime, preload))
        changes["ASAN_OPTIONS"] = "detect_leaks=0"  # Python keeps memory until it exits
        changes["TSAN_OPTIONS"] = "ignore_noninstrumented_modules=1 halt_on_error=1"  # watch our kernels only
    return {**os.environ, **changes}


def _runtime(name: str) -> str:
    return subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()


def run_tests(variant: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs tests/emulated in a process of its own against the library of `variant`."""
    options = ["-q", "-s", "-p", "no:cacheprovider"]  # -s: a sanitizer ends the process with its report
    command = [sys.executable, "-m", "pytest", *options, "tests/emulated", *arguments]
    settings = dict(cwd=building.ROOT, env=environment(variant, build(variant)))
    return subprocess.run(command, **settings, capture_output=True, text=True, timeout=900)


def load() -> None:
    """Loads the library that the environment names: torch.ops.fastseg_emulator has its ops then."""
    import fastseg  # noqa: F401  fills the list of schemas
    from fastseg._op import NATIVE_SCHEMAS

    definitions = torch.library.Library("fastseg_emulator", "DEF")
    for schema in NATIVE_SCHEMAS:
        definitions.define(schema)
    torch.ops.load_library(os.environ[LIBRARY])
    load.definitions = definitions  # a Library that is collected takes its definitions with it
