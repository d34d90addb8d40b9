"""Loads the compiled libraries, and keeps the reason if one is absent.

`libfastseg_{v4,v3,base}.so` hold the CPU kernels, the same sources compiled for AVX-512, AVX2 and plain
x86-64 (or the platform's baseline); exactly one of them is loaded. `libfastseg_cuda.so` holds the CUDA
kernels. Both register implementations of ops whose schemas `fastseg._op.Op` defines.

Environment: FASTSEG_CPU_LEVEL=v4|v3|base|none forces a level (`none`: no compiled library at all);
FASTSEG_LIBRARY_DIR loads them from another folder (the sanitizer builds of the tests).
"""

import functools
import importlib.util
import os
import warnings
from pathlib import Path

import torch

LIBRARY_DIR = Path(os.environ.get("FASTSEG_LIBRARY_DIR", Path(__file__).resolve().parent))
LEVELS = ("v4", "v3", "base")  # best first
_ATEN_LEVEL = {"AVX512": "v4", "AVX2": "v3"}
HOW_TO_BUILD = (
    "build it with `pip install --no-build-isolation .` (or `-e .`) from the source tree; `make build` does so"
)


def _cpu_candidates() -> list[str]:
    """The levels this machine can run, best first, or the level that the environment names."""
    forced = os.environ.get("FASTSEG_CPU_LEVEL")
    if forced == "none":
        return []
    if forced is not None:
        if forced not in LEVELS:
            raise ValueError(f"FASTSEG_CPU_LEVEL={forced!r}; allowed: {', '.join(LEVELS)}, none")
        return [forced]
    best = _ATEN_LEVEL.get(torch.backends.cpu.get_cpu_capability(), "base")
    return list(LEVELS[LEVELS.index(best) :])


def _load_cpu() -> tuple[str | None, str | None]:
    """(the level loaded, None) or (None, the reason why none was)."""
    candidates = _cpu_candidates()
    if not candidates:
        return None, "FASTSEG_CPU_LEVEL=none disables the compiled library"
    failure = None
    for level in candidates:
        path = LIBRARY_DIR / f"libfastseg_{level}.so"
        if not path.exists():
            continue
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            failure = f"{path.name} does not load: {error}"
        else:
            return level, None
    wanted = ", ".join(f"libfastseg_{level}.so" for level in candidates)
    return None, failure or f"the CPU library is not built (no {wanted} in the package folder); {HOW_TO_BUILD}"


def _load_cuda() -> str | None:
    """None if loaded, else the reason."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA"
    path = LIBRARY_DIR / "libfastseg_cuda.so"
    if not path.exists():
        return (
            "the CUDA library is not built (nvcc was not found, or FASTSEG_CUDA=OFF); "
            "install the CUDA toolkit and rebuild"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


CPU_LEVEL, _cpu_missing = _load_cpu()
_cuda_library_missing = _load_cuda()
if _cpu_missing is not None and os.environ.get("FASTSEG_CPU_LEVEL") != "none":
    warnings.warn(
        f"fastseg: {_cpu_missing}. Until then every op runs through its slow plain-PyTorch reference.", stacklevel=2
    )


def interpreting() -> bool:
    """True when Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def missing(backend: str) -> str | None:
    """None if `backend` ("cpu", "cuda", "triton" or "reference") can run on this machine at all, else the reason."""
    if backend == "cpu":
        return _cpu_missing
    if backend == "cuda":
        return _cuda_library_missing or _no_device()
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        return None if interpreting() else _no_device()
    return None


def _no_device() -> str | None:
    """None if there is a GPU, NVIDIA's or AMD's (a ROCm torch calls its devices "cuda", too), else the reason."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this torch ({torch.__version__}) has no CUDA"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"
