"""`tune_allocator()`: keep large freed buffers instead of giving them back to the system."""

import ctypes
import platform
import sys
import warnings

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1  # mallopt takes an int


def tune_allocator() -> bool:
    """Let this process keep freed memory for reuse; returns True if it took effect.

    glibc maps every block above 32 MB (at first 128 KB) anew and unmaps it on free, so a memory-bound op of a
    training step on the CPU spends most of its time in page faults: forward and backward of stock cross-entropy
    on (2, 19, 512, 1024) logits run about 2-3x slower than the memory allows (docs/benchmarks.md shows every
    CPU benchmark with and without). This raises malloc's mmap and trim thresholds to 2 GB.

    The trade-off: the process keeps its peak of ordinary allocations until it ends, and long-lived small
    blocks can fragment the heap. Opt-in, process-wide, not reversible; call it once, before the first large
    tensor is made. Without glibc it does nothing but warn.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        warnings.warn("fastseg.tune_allocator: nothing to do, the C library is not glibc", stacklevel=2)
        return False
    mallopt = ctypes.CDLL(None).mallopt
    taken = [mallopt(option, _LARGEST) for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)]
    return all(taken)
