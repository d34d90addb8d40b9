"""Shared by every `kernels/<op>/triton.py`. This module does not import triton: `import fastseg` does not need it.

Each `kernels/<op>/triton.py` exports
    CONFIGS      a table of block sizes and warps, chosen in Python per shape class (never @autotune);
    aot_cases()  the `AotCase`s that tests/test_triton_aot.py compiles for sm_80 and sm_90 without a GPU;
The names of its kernels, the functions launched from the host, end with `_kernel`.

Environment: FASTSEG_DEBUG=1 turns on the device-side assertions (a bad label then stops the kernel).
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DEBUG = os.environ.get("FASTSEG_DEBUG") == "1"
MAX_SHARED = 99 * 1024  # bytes a block may use on every GPU from sm_80 on, consumer GPUs included


@dataclass(frozen=True)
class AotCase:
    """One specialisation of a kernel, and limits that its machine code must meet.

    signature: Triton types of the run-time arguments, e.g. {"logits": "*bf16", "pixels": "i32", "scale": "fp32"}.
    constexprs: values of all the other arguments.
    divisible: names of run-time arguments that are multiples of 16 (pointers from torch are; sizes often are).
    max_registers: per thread; 255 is the hardware's limit, a lower one keeps more warps resident.
    load_bits, store_bits: most global loads (stores) move at least this many bits per thread at once.
    copy_bits: the same for asynchronous copies to shared memory.
    tensor_cores: the kernel multiplies on tensor cores, by warp groups (wgmma) from sm_90 on.
    debug: compiled as with FASTSEG_DEBUG=1; the device-side assertion must then be in the code.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    divisible: Sequence[str] = ()
    max_registers: int = 255
    max_shared: int = MAX_SHARED
    load_bits: int = 0
    store_bits: int = 0
    copy_bits: int = 0
    tensor_cores: bool = False
    debug: bool = False


def lazy(module: str, function: str) -> Callable[..., Any]:
    """`fastseg.kernels.<module>.<function>`; the first call imports the module and triton."""

    def run(*args):
        return getattr(importlib.import_module(f"fastseg.kernels.{module}"), function)(*args)

    run.__name__ = function
    return run


def on_device_of(tensor: Tensor):
    """A context in which kernels are launched on the device of `tensor`."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
