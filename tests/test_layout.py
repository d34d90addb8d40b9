"""Every op has a reference, README, tests, benchmark and info row; files and lines are not too long."""

import importlib
from pathlib import Path

import pytest

import fastseg.info
import fastseg.ops
from fastseg import _op
from fastseg.info import table

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = [getattr(fastseg.ops, name) for name in fastseg.ops.__all__]
OP_FILES = sorted({function.__module__.rpartition(".")[2] for function in PUBLIC if not isinstance(function, type)})
FOLDERS = sorted(path.name for path in (ROOT / "kernels").iterdir() if path.is_dir() and not path.name.startswith("_"))
METRIC_FOLDERS = ("detection_matching", "fill_polygons")  # steps of fastseg.metrics, on the CPU only
SHARED_FOLDERS = ("pooling",)  # used by two ops
MAX_LINES = 400
MAX_COLUMNS = 120


@pytest.mark.parametrize("op", OP_FILES)
def test_op_has_its_files(op):
    for path in (
        f"kernels/{op}/reference.py",
        f"kernels/{op}/README.md",
        f"tests/ops/test_{op}.py",
        f"benchmarks/ops/{op}.py",
    ):
        assert (ROOT / path).exists(), f"op {op}: {path} is missing"
    assert list((ROOT / "kernels" / op).glob("cpu*.cpp")), f"op {op}: kernels/{op}/cpu*.cpp is missing"
    gpu = [name for name in ("triton.py", "cuda.cu") if (ROOT / "kernels" / op / name).exists()]
    assert gpu, f"op {op}: neither kernels/{op}/triton.py nor kernels/{op}/cuda.cu"


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_kernel_folder_without_an_op(folder):
    assert folder in (*OP_FILES, *METRIC_FOLDERS, *SHARED_FOLDERS)


@pytest.mark.parametrize("op", OP_FILES)
def test_op_declares_contracts_and_benchmarks(op):
    assert importlib.import_module(f"tests.ops.test_{op}").CONTRACTS
    assert importlib.import_module(f"benchmarks.ops.{op}").CASES


def test_every_function_has_an_info_row():
    """Every public function has a row, and every op belongs to a row or to the metrics."""
    functions = [name for row in table() for name in row["op"].split(", ")]
    assert sorted(functions) == sorted(function.__name__ for function in PUBLIC if not isinstance(function, type))
    modules = {getattr(fastseg.ops, name).__module__ for name in functions} | {"fastseg.metrics"}
    assert {op.name for module in modules for op in fastseg.info._ops_of(module)} == set(_op.REGISTRY)


def test_every_public_op_is_documented():
    for name in fastseg.ops.__all__:
        text = getattr(fastseg.ops, name).__doc__ or ""
        assert len(text) > 200, f"fastseg.ops.{name}: the docstring must give shapes, dtypes, errors and the source"


def test_every_op_of_the_registry_has_a_reference():
    for op in _op.REGISTRY.values():
        assert op.backends[-1].name == "reference", f"{op.name}: the last backend of the table must be the reference"


def test_the_readme_shows_the_table_of_ops(monkeypatch):
    monkeypatch.undo()  # removes conftest.py's patch, which leaves no calls to stock
    text = (ROOT / "README.md").read_text()
    assert fastseg.info.with_table(text) == text, "run `python -m fastseg.info --write README.md`"


def _sources():
    endings = {".py", ".cpp", ".cu", ".h", ".cuh", ".sh"}
    folders = ("fastseg", "kernels", "csrc", "benchmarks", "tests", "examples")
    paths = [*ROOT.glob("*"), *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    return {str(path.relative_to(ROOT)): path.read_text().splitlines() for path in paths if path.suffix in endings}


def test_files_stay_short():
    long = {path: len(lines) for path, lines in _sources().items() if len(lines) > MAX_LINES * 1.1}
    assert not long, f"files over ~{MAX_LINES} lines: {long}"


def test_lines_stay_short():
    numbered = ((path, number, line) for path, lines in _sources().items() for number, line in enumerate(lines, 1))
    long = [f"{path}:{number}: {len(line)}" for path, number, line in numbered if len(line) > MAX_COLUMNS]
    assert not long, f"lines over {MAX_COLUMNS} characters:\n" + "\n".join(long)
