"""fastseg: custom CUDA, Triton and C++ kernels for dense prediction in PyTorch."""

from fastseg import ops

__version__ = "0.1.0"
__all__ = ["ops"]
