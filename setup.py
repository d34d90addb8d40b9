"""Builds the shared libraries of fastseg by one CMake + Ninja run; CMakeLists.txt says which, and when.

Environment: FASTSEG_CUDA=AUTO|ON|OFF, FASTSEG_CUDA_ARCHS, FASTSEG_LEVELS (";"-separated; "native": the best level of
this machine, in a third of the build time; "none": no library, no compiler needed), FASTSEG_BUILD_DIR, MAX_JOBS.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
LIBRARIES = ("libfastseg_v4", "libfastseg_v3", "libfastseg_base", "libfastseg_cuda")
CMAKE_OPTIONS = ("FASTSEG_CUDA", "FASTSEG_CUDA_ARCHS")
HOW_TO_DO_WITHOUT = (
    "fastseg: building the libraries failed, for the reason printed above. It takes a C++17 compiler (gcc or clang). "
    "Without one set FASTSEG_LEVELS=none: the package is then installed without libraries, and its ops run through "
    "their slow plain-PyTorch reference."
)


def tool(name: str) -> str:
    """The path of `cmake` or `ninja`: from the Python package of that name if it is installed, else from PATH."""
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError:
        files = []
    programs = [Path(file.locate()).resolve() for file in files if file.name == name and file.parent.name == "bin"]
    programs.sort(
        key=lambda path: "data" not in path.parts
    )  # first the binary in "data": another may be a script that calls it
    found = next((str(path) for path in programs if os.access(path, os.X_OK)), None) or shutil.which(name)
    if found is None:
        raise ExecError(f"fastseg: {name} was found neither as a Python package nor on PATH: `pip install {name}`")
    return found


def build_folder() -> Path:
    """A build folder for each Python environment, since each may have another torch."""
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    default = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{environment}"
    return Path(os.environ.get("FASTSEG_BUILD_DIR", default))


def configure(build: Path) -> None:
    """Configures `build`. Starts afresh if it was configured with other tools: CMake would keep their paths, but those
    of an isolated `pip install` are deleted afterwards.
    """
    cmake, ninja = tool("cmake"), tool("ninja")
    torch = importlib.util.find_spec("torch")
    tools = "\n".join([cmake, ninja, sys.executable, str(torch and torch.origin), os.environ.get("CXX", "")])
    command = [
        cmake,
        "-S",
        str(ROOT),
        "-B",
        str(build),
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython3_EXECUTABLE={sys.executable}",
        "-DCMAKE_BUILD_TYPE=Release",
    ]
    command += [f"-D{name}={os.environ[name]}" for name in CMAKE_OPTIONS if name in os.environ]
    record = build / "tools.txt"
    fresh = [] if record.exists() and record.read_text() == tools else ["--fresh"]
    subprocess.check_call([*command, *levels_option(), *fresh])
    record.write_text(tools)


def levels_option() -> list[str]:
    """-DFASTSEG_LEVELS; without the variable CMake builds every level of the platform."""
    levels = os.environ.get("FASTSEG_LEVELS")
    if levels == "native":
        import torch  # not at the top: an isolated build of the sdist reads this file without torch

        levels = {"AVX512": "v4", "AVX2": "v3"}.get(torch.backends.cpu.get_cpu_capability(), "base")
    # An earlier configuration of the same build folder must not stay in force: hence the -U.
    return ["-UFASTSEG_LEVELS"] if levels is None else [f"-DFASTSEG_LEVELS={levels}"]


class CMakeBuild(build_ext):
    """One CMake build for all libraries; those that the machine cannot build are absent."""

    def get_ext_filename(self, fullname):
        # fastseg.libfastseg_v4 -> fastseg/libfastseg_v4.so: no CPython ABI suffix, none is used
        return os.path.join(*fullname.split(".")) + ".so"

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self):
        pass  # run() has already installed them where they belong

    def run(self):
        target = ROOT / "fastseg" if self.inplace else Path(self.build_lib).resolve() / "fastseg"
        target.mkdir(parents=True, exist_ok=True)
        if not self.inplace:  # else libraries of an earlier build would go into the wheel
            for name in LIBRARIES:
                (target / f"{name}.so").unlink(missing_ok=True)
        if os.environ.get("FASTSEG_LEVELS") == "none":
            return
        build, cmake = build_folder(), tool("cmake")
        build.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        try:
            configure(build)
            subprocess.check_call([cmake, "--build", str(build), "-j", jobs])
            subprocess.check_call([cmake, "--install", str(build), "--prefix", str(target)])
        except subprocess.CalledProcessError as error:
            raise ExecError(HOW_TO_DO_WITHOUT) from error


class AbiFreeWheel(bdist_wheel):
    """The libraries use only torch's stable C ABI, so one wheel serves every CPython: py3-none-<platform>."""

    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform


if __name__ == "__main__":
    setup(
        packages=[
            *find_namespace_packages(".", include=["fastseg", "fastseg.*"]),
            "fastseg.kernels",
            *(f"fastseg.kernels.{name}" for name in find_namespace_packages("kernels")),
        ],
        # `kernels` must never be installed as a top-level package: another library owns that name.
        package_dir={"fastseg": "fastseg", "fastseg.kernels": "kernels"},
        package_data={"fastseg": ["py.typed"]},
        ext_modules=[Extension(f"fastseg.{name}", [], optional=True) for name in LIBRARIES],
        cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AbiFreeWheel},
    )
