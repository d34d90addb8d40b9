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


@pytest.mark.slow
def test_resources_of_every_kernel(library):
    usage = cuobjdump("-res-usage", library)
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert kernels, usage
    for name, registers, stack, shared, local in kernels:
        assert int(registers) <= MOST_REGISTERS, f"{name}: {registers} registers"
        assert int(shared) <= MOST_STATIC_SHARED, f"{name}: {shared} bytes of static shared memory"
        assert (stack, local) == ("0", "0"), (
            f"{name}: {stack} bytes of stack, {local} local: registers were spilled"
        )


@pytest.mark.slow
def test_both_architectures_are_in_the_library(library):
    architectures = set(re.findall(r"arch = (sm_\d+)", cuobjdump("-res-usage", library)))
    assert architectures == {"sm_80", "sm_90"}


@pytest.mark.slow
def test_loads_beside_a_torch_without_cuda(library):
    """The weak symbol of libtorch_cuda.so must not keep the library from loading."""
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA, and fastseg has loaded its own CUDA library")
    program = f"import torch, fastseg; torch.ops.load_library({str(library)!r}); print('loaded')"
    building.run(sys.executable, "-c", program)
