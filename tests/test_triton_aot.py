"""Every Triton kernel compiles for sm_80 and sm_90 without spills and within its limits, and some for other GPUs."""

import importlib
import os
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from fastseg._triton import AotCase
from tests.triton_aot import CAPABILITIES, OTHER_TARGETS, compile_case, compiled_for, violations

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
FOLDERS = sorted(path.parent.name for path in KERNELS.glob("*/triton.py"))
MODULES = {folder: importlib.import_module(f"fastseg.kernels.{folder}.triton") for folder in FOLDERS}
CASES = [
    pytest.param(case, capability, id=f"{folder}-{case.name}-sm{capability}")
    for folder, module in MODULES.items()
    for case in module.aot_cases()
    for capability in CAPABILITIES
]


@pytest.mark.parametrize("case, capability", CASES)
def test_kernel_keeps_its_limits(case, capability):
    assert not violations(case, compile_case(case, capability))


ALL = [(folder, case) for folder, module in MODULES.items() for case in module.aot_cases()]
# Every fourth specialisation for each of these GPUs, starting at another one for each.
ELSEWHERE = [
    pytest.param(case, target, id=f"{folder}-{case.name}-{target}")
    for place, target in enumerate(OTHER_TARGETS)
    for folder, case in ALL[place::4]
]


@pytest.mark.parametrize("case, target", ELSEWHERE)
def test_kernel_compiles_for_other_gpus(case, target):
    code = compiled_for(case, OTHER_TARGETS[target]).asm
    machine_code = code["hsaco" if target.startswith("gfx") else "cubin"]
    assert machine_code.startswith(b"\x7fELF")


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_kernel_of_a_folder_has_a_case(folder):
    module = MODULES[folder]
    assert module.CONFIGS
    files = [
        importlib.import_module(f"fastseg.kernels.{folder}.{path.stem}")
        for path in (KERNELS / folder).glob("triton*.py")
    ]
    functions = {name: value for file in files for name, value in vars(file).items() if isinstance(value, JITFunction)}
    kernels = {name for name in functions if name.endswith("_kernel")}
    compiled = {case.kernel.__name__ for case in module.aot_cases()}
    assert kernels, f"kernels/{folder}/triton.py: no function whose name ends with _kernel"
    assert kernels <= compiled, f"without an AotCase: {kernels - compiled}"


@triton.jit
def spilling_kernel(values, size, BLOCK: tl.constexpr):
    """Keeps many more values alive than there are registers."""
    offsets = tl.arange(0, BLOCK)
    kept = tl.load(values + offsets)
    total = tl.sum(kept, 0)
    tl.store(values + offsets, kept * total + size)


@triton.jit
def scalar_kernel(values, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(values + offsets, tl.load(values + offsets, mask=offsets < size), mask=offsets < size)


def _case(kernel, block, **limits):
    return AotCase(
        "probe", kernel, {"values": "*fp32", "size": "i32"}, {"BLOCK": block}, divisible=("values",), **limits
    )


def test_gates_can_fail():
    spilling = _case(spilling_kernel, 65536)
    assert "spills" in " ".join(violations(spilling, compile_case(spilling, 90)))
    scalar = _case(scalar_kernel, 512, load_bits=128, store_bits=128)  # size is not known to be a multiple of 4
    assert len(violations(scalar, compile_case(scalar, 90))) == 2
    greedy = _case(scalar_kernel, 512, max_registers=2)
    assert "registers" in " ".join(violations(greedy, compile_case(greedy, 90)))
    frugal = _case(spilling_kernel, 512, load_bits=128, store_bits=128)
    assert not violations(frugal, compile_case(frugal, 90))
    assert violations(_case(spilling_kernel, 512, max_shared=0), compile_case(frugal, 90))


def test_arguments_of_a_case_are_checked():
    with pytest.raises(ValueError, match="BLOCK_SIZE.*not given.*BLOCK"):
        compile_case(AotCase("probe", scalar_kernel, {"values": "*fp32", "size": "i32"}, {"BLOCK_SIZE": 4}), 90)
