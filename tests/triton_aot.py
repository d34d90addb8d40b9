"""Compiles Triton kernels without a GPU, and reads registers, spills and load widths from the machine code."""

import collections
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastseg._triton import AotCase

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"  # both tools are in triton's wheel
CAPABILITIES = (80, 90)
OTHER_TARGETS = {
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# One SASS line: /*0890*/ @!P0 LDG.E.128 R4, ...
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


@dataclass(frozen=True)
class MachineCode:
    """Per-thread registers and stack bytes, shared bytes of a block, counts of SASS opcodes."""

    registers: int
    stack: int
    shared: int
    opcodes: collections.Counter
    ptx: str
    capability: int

    def count(self, *names: str) -> int:
        """The number of instructions with one of these names and any suffixes: count("STL", "LDL")."""
        return sum(number for opcode, number in self.opcodes.items() if opcode.split(".")[0] in names)

    def widths(self, name: str) -> collections.Counter:
        """Bits moved per thread -> number of instructions, for `LDG`, `STG` or `LDGSTS`."""
        found = collections.Counter()
        for opcode, number in self.opcodes.items():
            first, *suffixes = opcode.split(".")
            if first == name:
                found[_width(suffixes)] += number
        return found


def _width(suffixes: list[str]) -> int:
    for suffix in suffixes:
        if suffix in ("64", "128"):
            return int(suffix)
        if suffix in ("U8", "S8", "U16", "S16"):
            return int(suffix[1:])
    return 32


def compiled_for(case: AotCase, target: GPUTarget):
    """`case`, compiled by Triton."""
    names = case.kernel.arg_names
    unknown = [name for name in (*case.signature, *case.constexprs, *case.divisible) if name not in names]
    missing = [name for name in names if name not in case.signature and name not in case.constexprs]
    if unknown or missing:
        raise ValueError(f"{case.name}: arguments unknown to the kernel: {unknown}; not given: {missing}")
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    options = dict(num_warps=case.num_warps, num_stages=case.num_stages, debug=case.debug)
    return triton.compile(source, target=target, options=options)


def compile_case(case: AotCase, capability: int) -> MachineCode:
    """Machine code of `case` for compute capability 80 or 90 (that is sm_80, sm_90)."""
    compiled = compiled_for(case, GPUTarget("cuda", capability, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        sass = _tool("nvdisasm", cubin.name)
    opcodes = collections.Counter(_INSTRUCTION.findall(sass))
    if not opcodes:
        raise RuntimeError(f"{case.name}: nvdisasm printed no instruction")
    return MachineCode(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=compiled.metadata.shared,
        opcodes=opcodes,
        ptx=compiled.asm["ptx"],
        capability=capability,
    )


def _tool(name: str, *arguments: str) -> str:
    result = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def violations(case: AotCase, code: MachineCode) -> list[str]:
    """The limits of `case` that its machine code breaks."""
    found = []
    if code.count("STL", "LDL") or code.stack:
        found.append(f"spills: {code.count('STL')} stores, {code.count('LDL')} loads, {code.stack} bytes of stack")
    if code.registers > case.max_registers:
        found.append(f"{code.registers} registers; allowed {case.max_registers}")
    if code.shared > case.max_shared:
        found.append(f"{code.shared} bytes of shared memory; allowed {case.max_shared}")
    if case.debug != ("__assertfail" in code.ptx):
        found.append("no device-side assertion" if case.debug else "a device-side assertion without debug")
    multiply = "HGMMA" if code.capability >= 90 else "HMMA"
    if case.tensor_cores and not code.count(multiply):
        found.append(f"no {multiply}")
    for name, bits in (("LDG", case.load_bits), ("STG", case.store_bits), ("LDGSTS", case.copy_bits)):
        widths = code.widths(name)
        wide = sum(number for width, number in widths.items() if width >= bits)
        if bits and 2 * wide <= sum(widths.values()):
            found.append(f"{name} widths {dict(widths)}; most must be at least {bits} bits")
    return found
