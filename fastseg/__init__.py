"""fastseg: custom CUDA, Triton and C++ kernels for dense prediction in PyTorch."""

__version__ = "0.1.0"

from fastseg import (
    _checkout,  # noqa: F401  first: the others import fastseg.kernels
    inference,
    integrations,
    metrics,
    models,
    nn,
    ops,
)
from fastseg._allocator import tune_allocator
from fastseg.accelerate import accelerate, restore

__all__ = ["accelerate", "inference", "integrations", "metrics", "models", "nn", "ops", "restore", "tune_allocator"]
