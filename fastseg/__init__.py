"""fastseg: custom CUDA, Triton and C++ kernels for dense prediction in PyTorch."""

__version__ = "0.1.0"

from fastseg import ops
from fastseg._allocator import tune_allocator

__all__ = ["ops", "tune_allocator"]
