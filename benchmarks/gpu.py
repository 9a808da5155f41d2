"""``make gpu``: builds deepops for this machine's NVIDIA GPU, tests it, compares, times, and writes one report.

``python -m benchmarks.gpu`` needs what is in ``NEEDED``; no network, no pip. The tests need pytest, hypothesis and
expecttest as well; where they are missing the report says so and the exit code is 1. Everything goes to ``build/gpu``:
``report.md``, the logs and the CSV files. Exit code 0: all is well; 1: something failed; 2: nothing could be done.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT / "build" / "gpu"
NEEDED = ("torch", "pybind11", "cmake", "ninja")
TEST_TOOLS = ("pytest", "hypothesis", "expecttest")


class NotHereError(Exception):
    """There is no GPU, or something that the build needs is missing."""


@dataclass(frozen=True)
class Step:
    """One section of the report."""

    title: str
    ok: bool
    text: str


def which(name: str) -> str | None:
    """A program on the PATH or beside this interpreter."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")]))


def missing(names: Sequence[str]) -> list[str]:
    """Those that are neither a package of this Python nor a program."""
    return [name for name in names if importlib.util.find_spec(name) is None and which(name) is None]


def gpu() -> dict[str, str]:
    """Facts about the GPU and what drives it.

    Raises:
        NotHereError: in one line, what is missing.
    """
    if lost := missing(NEEDED):
        raise NotHereError(f"{sys.executable} lacks {', '.join(lost)}; choose another Python with PYTHON=...")
    import torch

    if not torch.cuda.is_available():
        raise NotHereError(f"no NVIDIA GPU: torch {torch.__version__} finds no CUDA device")
    major, minor = torch.cuda.get_device_capability()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip() if which(query[0]) else ""
    return {
        "GPU": torch.cuda.get_device_name(),
        "compute capability": f"{major}.{minor}",
        "driver": driver or "unknown",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "Python": sys.version.split()[0],
    }


def run(title: str, *command: object, name: str, keep: int = 3, **environment: str) -> Step:
    """Run a command in the project's folder, its output in ``build/gpu/<name>.log``; the report shows its end."""
    OUT.mkdir(parents=True, exist_ok=True)
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), **environment}
    print(f"{title}: {OUT / name}.log", flush=True)
    with (OUT / f"{name}.log").open("w+") as log:
        done = subprocess.run(list(map(str, command)), cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT)
        log.seek(0)
        lines = log.read().splitlines()
    shown = lines[-keep:] if done.returncode == 0 else lines[-40:]
    return Step(title, done.returncode == 0, "\n".join(["```", *shown, "```"]))


def build(capability: str) -> Step:
    """Build all binaries into ``deepops/``, the CUDA kernels for this GPU alone."""
    import pybind11

    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version, "pyproject.toml states no version"
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": ROOT / "deepops",
        "CMAKE_MAKE_PROGRAM": which("ninja"),
        "DEEPOPS_CUDA": "1",
        "DEEPOPS_CUDA_ARCHS": capability.replace(".", ""),
        "DEEPOPS_VERSION": version[1],
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    flags = (f"-D{key}={value}" for key, value in options.items())
    step = run("Configure", which("cmake"), "-S", ROOT, "-B", OUT / "cmake", "-G", "Ninja", *flags, name="configure")
    return run("Build", which("cmake"), "--build", OUT / "cmake", name="build") if step.ok else step


def tests() -> Step:
    """All tests; a CUDA case that is skipped fails."""
    if lost := missing(TEST_TOOLS):
        return Step("Tests", False, f"Not run: this Python lacks {', '.join(lost)}.")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not isolated", "-p", "no:cacheprovider"]
    command += ["--ignore=tests/test_packaging.py"] if missing(["build"]) else []
    return run("Tests", *command, name="tests", DEEPOPS_REQUIRE_CUDA="1")


def compare() -> Step:
    """The same inputs on the CPU, in the SIMT executor and on the GPU."""
    return run("Comparison", sys.executable, "-m", "benchmarks.compare", "cpu", "simt", "cuda", name="compare", keep=99)


def convolutions() -> Step:
    """deepops' fused convolution against cuDNN's."""
    return run("Convolutions, both ways", sys.executable, "-m", "benchmarks.conv_ways", name="conv_ways", keep=99)


def timings() -> Step:
    """Every benchmark with device events."""
    return run("Timings", sys.executable, "-m", "benchmarks.run", "--device", "cuda", name="timings", keep=99)


def report(facts: dict[str, str], steps: Sequence[Step]) -> str:
    """The report as Markdown."""
    lines = ["# deepops on a GPU", "", *(f"- {name}: {value}" for name, value in facts.items())]
    for step in steps:
        lines += ["", f"## {step.title}: {'passed' if step.ok else 'FAILED'}", "", step.text]
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Do all of it; a failed build ends it, a failed later step does not."""
    later = {"tests": tests, "compare": compare, "convolutions": convolutions, "timings": timings}
    parser = argparse.ArgumentParser(prog="make gpu", description="Build, test, compare and time on this NVIDIA GPU.")
    parser.add_argument("--skip", nargs="+", choices=later, default=[], help="leave these out")
    options = parser.parse_args(arguments)
    try:
        facts = gpu()
    except NotHereError as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2
    steps = [build(facts["compute capability"])]
    if steps[0].ok:
        steps += [step() for name, step in later.items() if name not in options.skip]
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "report.md").write_text(text := report(facts, steps))
    print(text, f"wrote {OUT / 'report.md'}", sep="\n")
    return 0 if all(step.ok for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
