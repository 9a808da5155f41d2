"""Builds deepops with CMake; CMakeLists.txt is the only place that knows sources and flags."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# Programs that pip put beside this interpreter are found although nobody activated its environment.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])


def check_requirements() -> None:
    """Stop with one clear line when something the build needs is missing."""
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    missing = [f"the Python package {name}" for name in ("torch", "pybind11") if not importlib.util.find_spec(name)]
    missing += [f"the program {name}" for name in ("cmake", "ninja") if not shutil.which(name)]
    missing += [] if headers.exists() else [f"Python's headers ({headers}; on Debian: apt install python3-dev)"]
    compilers = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    missing += [] if any(map(shutil.which, compilers)) else ["a C++20 compiler (on Debian: apt install g++)"]
    if missing:
        sys.exit(f"deepops: cannot build, missing: {', '.join(missing)}; see 'Install' in README.md")


class CMakeBuild(build_ext):
    """One CMake run makes all libraries. All are declared, so that editable installs copy all; _cuda may be missing."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the file of an extension; those without Python symbols have no interpreter tag in their names."""
        return super().get_ext_filename(fullname) if fullname.endswith("_C") else f"{fullname.replace('.', '/')}.so"

    def copy_extensions_to_source(self) -> None:
        """Editable installs: put the binaries into the source tree, where an old _cuda.so must not outlive them."""
        (ROOT / "deepops" / "_cuda.so").unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def build_extension(self, ext: Extension) -> None:
        """Run CMake for _C, which makes all; all kinds of build share a folder and compile only what changed."""
        if not ext.name.endswith("_C"):
            return
        check_requirements()
        import pybind11

        out = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        (out / "_cuda.so").unlink(missing_ok=True)  # of an earlier build, perhaps with other options
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        options = {
            "CMAKE_BUILD_TYPE": os.environ.get("DEEPOPS_BUILD_TYPE", "Debug" if self.debug else "Release"),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": out,
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),  # the one of an earlier isolated build is gone
            "DEEPOPS_CUDA": os.environ.get("DEEPOPS_CUDA") or "auto",  # see cmake/Cuda.cmake
            "DEEPOPS_CUDA_ARCHS": os.environ.get("DEEPOPS_CUDA_ARCHS") or "80;90;100",
            "DEEPOPS_VERSION": self.distribution.get_version(),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        flags = ["-G", "Ninja", *(f"-D{name}={value}" for name, value in options.items())]
        for command in (["cmake", "-S", ROOT, "-B", build, *flags], ["cmake", "--build", build]):
            if subprocess.call(command):
                sys.exit("deepops: cannot build: see the error above")


EXTENSIONS = [Extension(f"deepops.{name}", [], optional=name == "_cuda") for name in ("_C", "_ops", "_cuda")]
setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": CMakeBuild})
