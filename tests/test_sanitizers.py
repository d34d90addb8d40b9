"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: the tests marked `sanitized`, in their own
process.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
LEVEL = "v3"  # the sanitizers see the same source at every level; AVX2 runs on nearly every machine


def _runtime(name: str) -> str:
    return subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()


@pytest.mark.slow
def test_cpu_kernels_under_address_and_undefined_sanitizers():
    if shutil.which("g++") is None:
        pytest.skip("no g++: the sanitizer runtimes are found through it")
    configure = [
        "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(BUILD),
        "-G",
        "Ninja",
        f"-DPython3_EXECUTABLE={sys.executable}",
        "-DCMAKE_CXX_COMPILER=g++",
        f"-DFASTSEG_LEVELS={LEVEL}",
        "-DFASTSEG_CUDA=OFF",
        "-DFASTSEG_SANITIZE=address,undefined",
    ]
    for command in (configure, ["cmake", "--build", str(BUILD)]):
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
    environment = dict(
        os.environ,
        LD_PRELOAD=f"{_runtime('libasan.so')} {_runtime('libstdc++.so')}",
        ASAN_OPTIONS="detect_leaks=0:abort_on_error=0",
        UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1",
        FASTSEG_LIBRARY_DIR=str(BUILD),
        FASTSEG_CPU_LEVEL=LEVEL,
        OMP_NUM_THREADS="2",
        OMP_WAIT_POLICY="passive",  # the cores are shared with other tests
    )
    environment.pop("PYTEST_XDIST_WORKER", None)
    options = ["-q", "-s", "-p", "no:cacheprovider"]  # -s: a sanitizer ends the process with its report
    command = [sys.executable, "-m", "pytest", *options, "tests", "-m", "sanitized"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) > 0, "the sanitized process ran no test"
