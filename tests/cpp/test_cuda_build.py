"""The CUDA library, compiled by nvcc for sm_80 and sm_90 and not run: no spills, limited resources."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import building

MOST_REGISTERS = 128  # with 256 threads a block, a quarter of the threads an SM can hold
MOST_STATIC_SHARED = 48 * 1024


@pytest.fixture(scope="module")
def library():
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    folder = building.cmake("cuda-check", FASTSEG_CUDA="ON", FASTSEG_CUDA_ARCHS="80-real;90-real")
    return folder / "libfastseg_cuda.so"


def cuobjdump(*arguments):
    triton = pytest.importorskip("triton", reason="cuobjdump comes with triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def kernels(library):
    """{(op, architecture): [(name, registers, stack, shared, local), ...]}"""
    found = {}
    for code in cuobjdump("-res-usage", library).split("Fatbin elf code:")[1:]:
        (architecture,), (op,) = re.findall(r"arch = (\w+)", code), re.findall(r"kernels/(\w+)/cuda\.cu\n", code)
        resources = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", code)
        found[op, architecture] = [(name, *map(int, numbers)) for name, *numbers in resources]
    return found


@pytest.mark.slow
def test_every_op_has_kernels_for_both_architectures(kernels):
    ops = {path.parent.name for path in (building.ROOT / "kernels").glob("*/cuda.cu")}
    assert set(kernels) == {(op, architecture) for op in ops for architecture in ("sm_80", "sm_90")}
    assert all(kernels.values())
    for op in ops:
        assert len(kernels[op, "sm_80"]) == len(kernels[op, "sm_90"])


@pytest.mark.slow
def test_resources_of_every_kernel(kernels):
    for (op, architecture), resources in kernels.items():
        for name, registers, stack, shared, local in resources:
            where = f"{op}, {architecture}, {name}"
            assert registers <= MOST_REGISTERS, f"{where}: {registers} registers"
            assert shared <= MOST_STATIC_SHARED, f"{where}: {shared} bytes of static shared memory"
            assert stack == local == 0, f"{where}: {stack} bytes of stack, {local} local: registers were spilled"


@pytest.mark.slow
def test_loads_beside_a_torch_without_cuda(library):
    """The weak symbol of libtorch_cuda.so must not keep the library from loading."""
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA, and fastseg has loaded its own CUDA library")
    program = f"import torch, fastseg; torch.ops.load_library({str(library)!r}); print('loaded')"
    building.run(sys.executable, "-c", program)
