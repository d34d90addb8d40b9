"""Peak extra memory of a call: the peak during the call minus the memory in use before it.

On the CPU the operating system measures it, not the framework: free heap is returned (`malloc_trim`), the
kernel's high-water mark of resident memory is reset (`/proc/self/clear_refs`), the call runs once, and the
mark is read. This counts every page touched: tensors, scratch buffers of oneDNN and OpenMP, and ours. The
call has been warmed up before, so code pages, thread stacks and caches are already resident. Pages count
when they are touched, so memory that is reserved and never written does not count. The kernel batches its
counters per thread, so the figure is exact to about half a megabyte.
"""

import ctypes
import gc
from collections.abc import Callable

import torch

RESET_PEAK = "5"  # see proc(5): sets VmHWM to the current resident size


def status_bytes(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process in bytes."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def give_back_free_memory() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def peak_extra_cpu(call: Callable) -> int | None:
    """Peak extra bytes of one call, or None if the system cannot measure them."""
    try:
        give_back_free_memory()
        with open("/proc/self/clear_refs", "w") as file:
            file.write(RESET_PEAK)
        before = status_bytes("VmRSS")
        result = call()
        peak = status_bytes("VmHWM")
    except (OSError, AttributeError):  # not Linux, not glibc, or not permitted
        return None
    del result
    return max(0, peak - before)


def peak_extra_cuda(call: Callable) -> int:
    """Peak extra bytes of one call in PyTorch's caching allocator."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return peak - before


def peak_extra(call: Callable, device: str) -> int | None:
    return peak_extra_cpu(call) if device == "cpu" else peak_extra_cuda(call)
