"""The CUDA emulator itself: correct kernels run, planted bugs are seen, by the emulator or by a sanitizer."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / "tests/cpp/emulator_cases.cu"
RUNTIME = sorted((ROOT / "csrc/emulator").glob("*.cpp"))

# The runtime is never instrumented (see csrc/emulator/fiber.h), only told which sanitizer watches.
VARIANTS = {
    "plain": ([], []),
    "address": (["-fsanitize=address,undefined", "-fno-sanitize-recover=all"], ["-DFASTSEG_EMULATOR_ASAN"]),
    "thread": (["-fsanitize=thread"], ["-DFASTSEG_EMULATOR_TSAN"]),
}
CORRECT = [
    "row_sum",
    "reverse_tiles",
    "exchange_in_warp",
    "partial_masks",
    "histogram",
    "unset_shared_is_nan",
    "launch_limits",
]
# planted bug: (variant that sees it, what its report says)
PLANTED = {
    "static_shared_overrun": ("address", "use-after-poison"),
    "dynamic_shared_overrun": ("address", "use-after-poison"),
    "global_overrun": ("address", "heap-buffer-overflow"),
    "local_overrun": ("address", "stack-buffer-overflow|index 4 out of bounds|insufficient space"),
    "misaligned_vector": ("address", "misaligned address"),
    "missing_barrier": ("thread", "data race"),
    "write_after_read": ("thread", "data race"),
    "missing_syncwarp": ("thread", "data race"),
    "too_much_shared": ("plain", "more static and dynamic shared memory"),
    "barrier_in_one_branch": ("plain", "deadlock"),
    "different_barriers": ("plain", "different __syncthreads"),
    "mask_names_returned_lane": ("plain", "has returned or never existed"),
    "mask_omits_caller": ("plain", "mask that leaves it out"),
    "different_operations": ("plain", "different warp operations"),
}


def compile_and_link(folder, variant):
    sanitize, define = VARIANTS[variant]
    common = ["g++", *"-std=c++17 -g -O1 -Wall -Wextra -Wno-unknown-pragmas -DFASTSEG_EMULATOR".split()]
    common += ["-I", ROOT / "csrc"]
    objects = []
    for source in [CASES, *RUNTIME]:
        flags = sanitize if source == CASES else define
        objects.append(folder / f"{source.stem}.o")
        subprocess.run([*common, *flags, "-x", "c++", "-c", source, "-o", objects[-1]], check=True)
    program = folder / "emulator_cases"
    subprocess.run(["g++", *sanitize, *objects, "-o", program], check=True)
    return program


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    built = {}

    def program(variant):
        if variant not in built:
            built[variant] = compile_and_link(tmp_path_factory.mktemp(f"emulator-{variant}"), variant)
        return built[variant]

    return program


def run(program, case, order="forward"):
    environment = dict(os.environ, FASTSEG_EMULATOR_ORDER=order, ASAN_OPTIONS="detect_leaks=0")
    return subprocess.run([program, case], capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize("order", ["forward", "reverse", "7"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CORRECT)
def test_correct_kernels_pass(programs, case, variant, order):
    result = run(programs(variant), case, order)
    assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")


@pytest.mark.parametrize("case", PLANTED)
def test_planted_bug_is_reported(programs, case):
    variant, report = PLANTED[case]
    result = run(programs(variant), case)
    assert result.returncode != 0
    assert any(words in result.stderr for words in report.split("|")), result.stderr


def test_sanitizer_reports_name_the_kernel_line(programs):
    lines = CASES.read_text().splitlines()
    line = next(i for i, text in enumerate(lines, start=1) if "element[1] = 1;" in text)
    result = run(programs("address"), "static_shared_overrun")
    assert f"emulator_cases.cu:{line}" in result.stderr


def test_thread_order_exposes_a_missing_barrier_without_a_sanitizer(programs):
    outcomes = {order: run(programs("plain"), "missing_barrier", order).stdout for order in ["forward", "reverse"]}
    # in reverse order the first warp, which adds up, happens to run last
    assert outcomes == {"forward": "wrong\n", "reverse": "ok\n"}


def test_nvcc_accepts_the_same_source(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    include, output = ["-I", ROOT / "csrc"], ["-o", tmp_path / "cases.o"]
    command = [nvcc, "-std=c++17", "-arch=sm_90", *include, "-c", CASES, *output]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
