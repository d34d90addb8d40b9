"""Building and installing: tools of any environment, a second build after their removal, no compiler."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def setup():
    """setup.py as a module; importing it runs no setup."""
    spec = importlib.util.spec_from_file_location("fastseg_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["cmake", "ninja"])
def test_tools_are_found_as_packages_without_a_path(setup, name, monkeypatch):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the package {name} is not installed: a system's {name} builds fastseg here")
    monkeypatch.setenv("PATH", "")
    assert subprocess.run([setup.tool(name), "--version"], capture_output=True).returncode == 0


@pytest.mark.parametrize("name", ["cmake", "ninja"])
def test_tools_are_found_on_the_path_without_a_package(setup, name, monkeypatch, tmp_path):
    monkeypatch.setattr(setup.metadata, "files", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(setup.ExecError, match=f"fastseg: {name} was found neither .* `pip install {name}`"):
        setup.tool(name)
    (tmp_path / name).touch(mode=0o755)
    assert setup.tool(name) == str(tmp_path / name)


def test_every_environment_has_a_build_folder_of_its_own(setup, monkeypatch):
    monkeypatch.delenv("FASTSEG_BUILD_DIR", raising=False)
    one = setup.build_folder()
    assert one == setup.build_folder() and one.parent == ROOT / "build"
    monkeypatch.setattr(sys, "prefix", "/elsewhere")
    assert setup.build_folder() != one


@pytest.mark.parametrize("again", [False, True])
def test_a_build_folder_outlives_the_tools_that_made_it(setup, monkeypatch, tmp_path, again):
    """As with `pip install .` twice in one checkout: the isolated environment of the first no longer exists."""
    monkeypatch.setenv("FASTSEG_LEVELS", "")  # nothing to compile
    monkeypatch.setenv("FASTSEG_CUDA", "OFF")
    build, real = tmp_path / "build", setup.tool
    deleted = shutil.copy(real("ninja"), tmp_path / "ninja")
    monkeypatch.setattr(setup, "tool", lambda name: str(deleted) if name == "ninja" else real(name))
    setup.configure(build)
    mark = build / "CMakeFiles" / "mark"
    mark.touch()
    if again:
        setup.configure(build)
        assert mark.exists()  # existing results are kept
        return
    deleted.unlink()
    monkeypatch.setattr(setup, "tool", real)
    setup.configure(build)
    subprocess.run([real("cmake"), "--build", build], check=True, capture_output=True)
    assert not mark.exists()


def build_without_a_compiler(folder: Path, levels: str) -> subprocess.CompletedProcess:
    options = dict(CXX="/no/such/compiler", FASTSEG_LEVELS=levels, FASTSEG_BUILD_DIR=str(folder / "build"))
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder / "library")]
    environment = {**os.environ, **options}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_without_a_compiler_the_error_says_what_to_do(tmp_path):
    failed = build_without_a_compiler(tmp_path, "base")
    assert failed.returncode != 0 and "set FASTSEG_LEVELS=none" in failed.stderr + failed.stdout


def test_without_a_compiler_the_package_builds_without_libraries(tmp_path):
    """Also without the libraries of an earlier build."""
    library = tmp_path / "library" / "fastseg" / "libfastseg_base.so"
    library.parent.mkdir(parents=True)
    library.touch()
    built = build_without_a_compiler(tmp_path, "none")
    assert built.returncode == 0, built.stderr
    assert not list(tmp_path.rglob("*.so"))
