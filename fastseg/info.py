"""Shows what is built, what runs where, and why anything is missing: `python -m fastseg.info`.

`python -m fastseg.info --write README.md` updates the op x backend table of the README.
"""

import importlib.util
import platform
import sys
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastseg.ops
from fastseg import _library, _op
from fastseg._backend import ALWAYS, Stock
from fastseg._op import BACKEND_NAMES, REGISTRY, Op


def explain(function: str, *args, **options) -> str:
    """Says what would run `fastseg.ops.<function>(*args, **options)` here, and why the other backends would not.

    Nothing is computed, except if plain PyTorch runs the whole function (`cross_entropy` with class weights that
    require grad, `sigmoid_focal_loss` with such targets). `function` may also be an op, `torch.ops.fastseg.<function>`.
    """
    public = {name: getattr(fastseg.ops, name) for name in _functions()}
    if function not in public and function not in REGISTRY:
        raise ValueError(f"fastseg.info.explain: function={function!r}; allowed: {', '.join(sorted(public))}")
    thread = threading.get_ident()
    _op.explaining.add(thread)
    try:
        (public[function] if function in public else REGISTRY[function])(*args, **options)
    except _op.Explanation as explanation:
        return str(explanation)
    finally:
        _op.explaining.remove(thread)
    return f"fastseg.ops.{function}: plain PyTorch runs"


def _functions() -> list[str]:
    """The public functions of fastseg.ops."""
    return [name for name in fastseg.ops.__all__ if not isinstance(getattr(fastseg.ops, name), type)]


def versions() -> dict[str, str]:
    """Versions of everything a bug report needs."""
    found = {"fastseg": fastseg.__version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "triton", "torchvision", "numpy"):
        try:
            found[package] = version(package) if importlib.util.find_spec(package) else "not installed"
        except PackageNotFoundError:
            found[package] = "not installed"
    found["torch CUDA"] = torch.version.cuda or (f"HIP {torch.version.hip}" if torch.version.hip else "none")
    found["CUDA device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    found["CPU"] = torch.backends.cpu.get_cpu_capability()
    return found


GPUS = {  # targets that the tests compile for, without a GPU; README.md says what was measured where
    "CUDA C++": "sm_80 and sm_90, each kernel without spills",
    "Triton": "sm_80 and sm_90, each configuration without spills; some for sm_100, sm_120 and gfx942 (AMD)",
}


def missing() -> dict[str, str | None]:
    """For each backend None if it can run on this machine, else the reason."""
    return {name: _library.missing(name) for name in BACKEND_NAMES[1:]}


def table(built_only: bool = True) -> list[dict[str, str]]:
    """One row per module of `fastseg.ops`: its public functions, the dtypes of each backend ("-" if the op lacks it),
    and the CPU calls that "auto" leaves to stock PyTorch.
    """
    functions: dict[str, list[str]] = {}
    for name in _functions():
        functions.setdefault(getattr(fastseg.ops, name).__module__, []).append(name)
    rows = []
    for module, names in functions.items():
        ops = [op for op in _ops_of(module) if not op.name.endswith("_backward")]
        main = next(op for op in ops if op.backends[0].dtypes is not None)  # the op that takes the caller's tensors
        row = {"op": ", ".join(names)}
        row |= {name: _dtypes(main, name, built_only) for name in BACKEND_NAMES[1:]}
        limits = {kind: limit for op in ops if isinstance(op.stock, Stock) for kind, limit in op.stock.below.items()}
        left = [f"{kind}: {'all' if limit >= ALWAYS else f'{limit:,}'}" for kind, limit in limits.items()]
        rows.append(row | {"left to stock by auto below": "; ".join(left) or "-"})
    return rows


def _ops_of(module: str) -> list[Op]:
    """The ops of a module or package."""
    found = []
    for name, loaded in list(sys.modules.items()):
        if name == module or name.startswith(f"{module}."):
            for value in vars(loaded).values():  # an op, or a tuple of ops (fastseg.ops.convolution.maps)
                found += [op for op in (value if isinstance(value, tuple) else (value,)) if isinstance(op, Op)]
    return [op for op in REGISTRY.values() if op in found]


def markdown_table() -> str:
    """The README's table."""
    rows = table(built_only=False)
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        row = row | {"op": ", ".join(f"`{name}`" for name in row["op"].split(", "))}
        lines.append("| " + " | ".join(row.values()) + " |")
    return "\n".join(lines)


_SHORT = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.uint8: "uint8",
    torch.bool: "bool",
}


def _dtypes(op: Op, name: str, built_only: bool) -> str:
    backend = next((backend for backend in op.backends if backend.name == name), None)
    if backend is None:
        return "-"
    if built_only and _library.missing(name) is None and backend.missing() is not None:
        return "not in the loaded library"
    return "any" if backend.dtypes is None else " ".join(_SHORT[dtype] for dtype in backend.dtypes)


README_MARKERS = "<!-- ops -->\n", "<!-- /ops -->"


def with_table(text: str) -> str:
    """`text` with a new op x backend table between the markers."""
    start, end = README_MARKERS
    before, _, after = text.partition(start)
    return before + start + markdown_table() + "\n" + end + after.partition(end)[2]


def main() -> None:
    if sys.argv[1:2] == ["--write"]:
        path = Path(sys.argv[2])
        path.write_text(with_table(path.read_text()))
        return
    for name, value in versions().items():
        print(f"{name:>12}  {value}")
    print(f"{'CPU library':>12}  {_library.CPU_LEVEL or 'none'}")
    print()
    for name, reason in missing().items():
        print(f"{name:>12}  {'available' if reason is None else f'missing: {reason}'}")
    print()
    for kind, gpus in GPUS.items():
        print(f"{kind:>12}  compiles for {gpus}")
    print()
    rows = table()
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in rows[0]} if rows else {}
    for row in [{column: column for column in widths}, *rows]:
        print("  ".join(row[column].ljust(width) for column, width in widths.items()).rstrip())


if __name__ == "__main__":
    main()
