"""What is built, what runs where, and why anything is missing: `python -m fastseg.info`.

`python -m fastseg.info --write README.md` renews the op x backend table of the README.
"""

import importlib.util
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastseg.ops  # noqa: F401  fills the registry
from fastseg import _library
from fastseg._first_op import BACKEND_NAMES, REGISTRY, STOCK_BELOW, NativeOp, Op


def explain(op: str, *args, backend: str = "auto") -> str:
    """What would run `torch.ops.fastseg.<op>(*args)` here, and why the other backends would not."""
    if op not in REGISTRY:
        raise ValueError(f"fastseg.info.explain: op={op!r}; allowed: {', '.join(sorted(REGISTRY))}")
    return REGISTRY[op].explain(*args, backend=backend)


def versions() -> dict[str, str]:
    """Versions of everything a bug report needs."""
    found = {"fastseg": fastseg.__version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "triton", "numpy"):
        try:
            found[package] = version(package) if importlib.util.find_spec(package) else "not installed"
        except PackageNotFoundError:
            found[package] = "not installed"
    found["torch CUDA"] = torch.version.cuda or "none"
    found["CUDA device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    found["CPU"] = torch.backends.cpu.get_cpu_capability()
    return found


def missing() -> dict[str, str | None]:
    """Per backend None if it can run on this machine, else the reason."""
    return {name: _library.missing(name) for name in BACKEND_NAMES}


def table() -> list[dict[str, str]]:
    """One row per op: the dtypes of each backend ("-" where the op has none)."""
    return [{"op": op.name} | {name: _dtypes(op, name) for name in BACKEND_NAMES} for op in REGISTRY.values()]


def markdown_table() -> str:
    """The README's table: per module of `fastseg.ops` its public functions, the dtypes each backend takes, and the CPU
    tensors that "auto" leaves to stock PyTorch.
    """
    functions: dict[str, list[str]] = {}
    for name in fastseg.ops.__all__:
        if isinstance(getattr(fastseg.ops, name), type):
            continue  # what ops take or return
        functions.setdefault(getattr(fastseg.ops, name).__module__, []).append(f"`{name}`")
    titles = ["op", *BACKEND_NAMES, "left to stock by `auto` on CPU: fewer elements than"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for module, names in functions.items():
        ops = [
            op for op in vars(sys.modules[module]).values() if isinstance(op, Op) and not op.name.endswith("_backward")
        ]
        cells = [_dtypes(ops[0], name, built_only=False) for name in BACKEND_NAMES]
        left = [(*key.split(": "), fewest) for key, fewest in STOCK_BELOW.items()]
        stock = [f"{what} {fewest:,}" for function, what, fewest in left if f"`{function}`" in names]
        cells.append("; ".join(stock) or "-")
        lines.append(f"| {', '.join(names)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


_SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
          torch.int64: "int64", torch.int32: "int32", torch.uint8: "uint8", torch.bool: "bool"}


def _dtypes(op, name: str, built_only: bool = True) -> str:
    entries = [backend for backend in op.backends if backend.name == name]
    if not entries:
        return "-"
    backend = entries[0]
    if built_only and isinstance(backend.run, NativeOp) and _library.missing(name) is None:
        key = "CUDA" if name == "cuda" else "CPU"
        if backend.run.missing(key):
            return "not in the loaded library"
    return "any" if backend.dtypes is None else " ".join(_SHORT[dtype] for dtype in backend.dtypes)


README_MARKERS = "<!-- ops -->\n", "<!-- /ops -->"


def with_table(text: str) -> str:
    """`text` with the op x backend table between its markers."""
    start, end = README_MARKERS
    before, _, rest = text.partition(start)
    return before + start + markdown_table() + "\n" + end + rest.partition(end)[2]


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
    rows = table()
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in rows[0]} if rows else {}
    for row in [{column: column for column in widths}, *rows]:
        print("  ".join(row[column].ljust(width) for column, width in widths.items()).rstrip())
    print("\nleft to stock PyTorch by backend=\"auto\": CPU tensors of fewer than")
    for what, fewest in STOCK_BELOW.items():
        print(f"{fewest:>12}  elements  {what}")


if __name__ == "__main__":
    main()
