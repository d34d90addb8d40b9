"""Builds every shared library of fastseg by one CMake + Ninja run; see CMakeLists.txt for what is built when.

Environment: FASTSEG_CUDA=AUTO|ON|OFF, FASTSEG_CUDA_ARCHS, FASTSEG_LEVELS (";"-separated, or "native": the best one this
machine runs, a third of the build time), FASTSEG_BUILD_DIR, MAX_JOBS.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
LIBRARIES = ("libfastseg_v4", "libfastseg_v3", "libfastseg_base", "libfastseg_cuda")
CMAKE_OPTIONS = ("FASTSEG_CUDA", "FASTSEG_CUDA_ARCHS")


def levels_option() -> list[str]:
    """-DFASTSEG_LEVELS; without the variable CMake builds every level of the platform."""
    levels = os.environ.get("FASTSEG_LEVELS")
    if levels == "native":
        import torch  # not at the top: isolated builds of the sdist need no torch to read this file

        levels = {"AVX512": "v4", "AVX2": "v3"}.get(torch.backends.cpu.get_cpu_capability(), "base")
    # An earlier configuration of the same build folder must not stay in force: hence the -U.
    return ["-UFASTSEG_LEVELS"] if levels is None else [f"-DFASTSEG_LEVELS={levels}"]


class CMakeBuild(build_ext):
    """One CMake build for all the libraries; those the machine cannot build are simply absent."""

    def get_ext_filename(self, fullname):
        # fastseg.libfastseg_v4 -> fastseg/libfastseg_v4.so: no CPython ABI suffix, none is used
        return os.path.join(*fullname.split(".")) + ".so"

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self):
        pass  # run() has already installed them where they belong

    def run(self):
        target = ROOT / "fastseg" if self.inplace else Path(self.build_lib).resolve() / "fastseg"
        default_build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build = Path(os.environ.get("FASTSEG_BUILD_DIR", default_build))
        build.mkdir(parents=True, exist_ok=True)
        target.mkdir(parents=True, exist_ok=True)
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
                     f"-DPython3_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-D{name}={os.environ[name]}" for name in CMAKE_OPTIONS if name in os.environ]
        configure += levels_option()
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.check_call(configure)
        subprocess.check_call(["cmake", "--build", str(build), "-j", jobs])
        subprocess.check_call(["cmake", "--install", str(build), "--prefix", str(target)])


class AbiFreeWheel(bdist_wheel):
    """The libraries use only torch's stable C ABI, so one wheel serves every CPython: py3-none-<platform>."""

    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(
    packages=[
        *find_namespace_packages(".", include=["fastseg", "fastseg.*"]),
        "fastseg.kernels",
        *(f"fastseg.kernels.{name}" for name in find_namespace_packages("kernels")),
    ],
    # `kernels` must never be installed as a top-level package: another library owns that name.
    package_dir={"fastseg": "fastseg", "fastseg.kernels": "kernels"},
    ext_modules=[Extension(f"fastseg.{name}", [], optional=True) for name in LIBRARIES],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AbiFreeWheel},
)
