"""What nvcc makes of the kernels, per architecture: registers, spills, occupancy, memory accesses, PTX instructions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"


# What a kernel on tensor cores is made of: products, matrices from shared memory, asynchronous copies to it.
TENSOR_CORE = ("HMMA", "LDSM", "LDGSTS")


class GateError(Exception):
    """The gate could not look: no compiler, a source that does not compile."""


@dataclass(frozen=True, order=True)
class Key:
    """One kernel, compiled for one architecture."""

    file: str  # below csrc
    kernel: str
    arch: int


@dataclass(frozen=True)
class Kernel:
    """What the compiler made of one kernel."""

    threads: int  # a block; 0 without launch bounds
    registers: int
    stack: int  # bytes, as the next two
    spills: int
    shared: int
    loads_16: int
    loads_narrow: int
    stores_16: int
    stores_narrow: int
    inexact: tuple[str, ...]  # PTX instructions that an exact kernel may not have
    tensor_core: tuple[str, ...] = ()  # which of TENSOR_CORE it has
    blocks_per_sm: int = 0


# ---- tools ----------------------------------------------------------------------------------------------------------


def find_tool(name: str) -> str | None:
    """Path of a program of the CUDA toolkit: CUDACXX (nvcc), CUDA_HOME, the PATH, /usr/local/cuda, PyPI's packages."""
    if name == "nvcc" and (chosen := shutil.which(os.environ.get("CUDACXX", ""))):
        return chosen
    home = os.environ.get("CUDA_HOME")
    pip = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu[0-9]*/bin"))
    places = [Path(home, "bin")] if home else []
    places += [*map(Path, os.get_exec_path()), Path("/usr/local/cuda/bin"), *pip]
    return shutil.which(name, path=os.pathsep.join(map(str, places)))


@cache
def tool(name: str) -> str:
    """The same, where the program must be there."""
    found = find_tool(name)
    if found is None:
        raise GateError(f"there is no {name}; `make cuda` gets it from PyPI (packages nvidia-cuda-nvcc, -nvdisasm)")
    return found


def run(*command: object, text: str | None = None) -> str:
    """Run a program; returns what it printed, standard error included."""
    done = subprocess.run(
        list(map(str, command)), input=text, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        raise GateError(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


@cache
def compiler_flags() -> tuple[str, ...]:
    """The flags of the build: those in cmake/Cuda.cmake, and torch's headers as in cmake/TorchStable.cmake."""
    import torch

    found = re.search(r"set\(DEEPOPS_NVCC_FLAGS ([^)]*)\)", (ROOT / "cmake/Cuda.cmake").read_text())
    target = re.search(r"TORCH_TARGET_VERSION=\w+", (ROOT / "cmake/TorchStable.cmake").read_text())
    assert found, "cmake/Cuda.cmake no longer sets DEEPOPS_NVCC_FLAGS"
    assert target, "cmake/TorchStable.cmake no longer sets TORCH_TARGET_VERSION"
    include = Path(torch.__file__).parent / "include"
    defines = ("-DUSE_CUDA", "-DTORCH_STABLE_ONLY", f"-D{target[0]}")
    return (*found[1].split(), *defines, f"-I{CSRC}", "-isystem", str(include))


# ---- what the compiler made -----------------------------------------------------------------------------------------


def short_name(demangled: str) -> str:
    """``adam<Half, 4>`` of ``void deepops::isa_gpu::(anonymous namespace)::adam<deepops::core::Half, 4>(int)``."""
    name = re.sub(r"(\(anonymous namespace\)|\b[A-Za-z_]\w*)::", "", demangled)
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:i]
            break
    return name.removeprefix("void ")


def resources(ptxas: str) -> dict[str, dict[str, int]]:
    """Registers, stack, spills and shared memory by mangled name, from what ``ptxas -v`` prints."""
    found: dict[str, dict[str, int]] = {}
    name = ""
    for line in ptxas.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'|Function properties for (\S+)", line):
            name = match[1] or match[2]
            if match[1]:
                found[name] = {"stack": 0, "spills": 0, "registers": 0, "shared": 0}
        elif name not in found:
            continue
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            found[name].update(stack=int(match[1]), spills=int(match[2]) + int(match[3]))
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found[name].update(registers=int(match[1]), shared=int(shared[1]) if shared else 0)
    return found


def accesses(sass: str) -> dict[str, Counter[str]]:
    """Accesses of global memory by mangled name, counted as loads_16, loads_narrow, stores_16, stores_narrow.

    And instructions of ``TENSOR_CORE``, by their names.
    """
    found: dict[str, Counter[str]] = {}
    name = ""
    for line in sass.splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line):
            name = match[1]
            found[name] = Counter()
        # LD, ST: where the compiler could not tell the memory. LDGSTS: asynchronous copies. @!PT: never executed.
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P[0-6]\s+)?(LDGSTS|LDG?|STG?)((?:\.\w+)*)\s", line):
            kind = "loads" if match[1].startswith("LD") else "stores"
            wide = {"128", "256"} & set(match[2].split("."))
            found[name][f"{kind}_{'16' if wide else 'narrow'}"] += 1
        if name and (match := re.search(rf"\*/\s+(?:@!?U?P[0-6]\s+)?({'|'.join(TENSOR_CORE)})\b", line)):
            found[name][match[1]] += 1
    return found


def dynamic_shared(kernel: str) -> int:
    """Bytes of shared memory that a kernel is launched with, where its short name tells.

    >>> dynamic_shared("implicit_gemm<Half, Tile<128, 64, 64, 32, 4, 3>, (ConvResult)0, true>")
    49152
    """
    if kernel.startswith("direct_convolution<"):
        return 4 * (8 * 16 * 40 + 160 * 33)  # the most, as DirectTiles::words() in csrc/conv_bn_act/direct.cuh
    tile = re.search(r"\bTile<(\d+), (\d+), \d+, \d+, (\d+), \d+>", kernel)
    if not tile:
        return 0
    rows, columns, stages = map(int, tile.groups())
    return 2 * stages * (rows + columns) * 32  # as Tile::kBytes in csrc/conv_bn_act/gemm_tiles.h


def ptx_facts(ptx: str) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Threads a block and the instructions an exact kernel may not have, by mangled name, from PTX.

    What a function that is not inlined has counts for all kernels of the file.
    """
    threads: dict[str, int] = {}
    inexact: dict[str, set[str]] = {}
    shared: set[str] = set()
    where = shared
    for line in ptx.splitlines():
        if match := re.match(r"\s*(?:\.(?:visible|weak)\s+)?\.entry\s+(\w+)", line):
            name = match[1]
            threads[name], where = 0, inexact.setdefault(name, set())
        elif re.match(r"\s*(?:\.(?:visible|weak)\s+)?\.func\b", line):
            where = shared
        elif match := re.match(r"\s*\.maxntid\s+(\d+)", line):
            threads[name] = int(match[1])
        elif (match := re.match(r"\s*(?:@!?%\w+\s+)?([a-z]\w*(?:\.\w+)+)\s", line)) and re.search(
            # without .rn a driver that compiles PTX for a newer GPU may still contract
            r"^(fma|mad\.(\w+\.)*f\d)|\.(approx|full|ftz)\b|^(add|sub|mul)\.f\d",
            match[1],
        ):
            where.add(match[1])
    return {name: (count, tuple(sorted(inexact[name] | shared))) for name, count in threads.items()}


def compile_one(source: Path, name: str, arch: int) -> dict[Key, Kernel]:
    """The kernels of one file on one architecture; ``name``: what the budget calls the file."""
    with tempfile.TemporaryDirectory() as place:
        cubin = Path(place, "out.cubin")
        command = (*compiler_flags(), "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v", "--keep", f"--keep-dir={place}")
        used = resources(run(tool("nvcc"), *command, source, "-o", cubin))
        code = accesses(run(tool("nvdisasm"), "-c", cubin))
        facts = ptx_facts(Path(place, f"{source.stem}.ptx").read_text())
    if not used:
        return {}
    readable = run("c++filt", *used).splitlines()
    found: dict[Key, Kernel] = {}
    for mangled, demangled in zip(used, readable, strict=True):
        key = Key(name, short_name(demangled), arch)
        if key in found:
            raise GateError(f"{name}: two kernels have the short name {key.kernel}")
        threads, inexact = facts[mangled]
        counts = {kind: code[mangled][kind] for kind in ("loads_16", "loads_narrow", "stores_16", "stores_narrow")}
        used[mangled]["shared"] += dynamic_shared(key.kernel)
        tensor_core = tuple(name for name in TENSOR_CORE if code[mangled][name])
        found[key] = Kernel(threads, inexact=inexact, tensor_core=tensor_core, **used[mangled], **counts)
    return found


def with_occupancy(kernels: dict[Key, Kernel]) -> dict[Key, Kernel]:
    """The same kernels with ``blocks_per_sm``."""
    with tempfile.TemporaryDirectory() as place:
        program = Path(place, "occupancy")
        # It calls nothing of the CUDA runtime, which PyPI's nvcc does not find beside itself.
        run(tool("nvcc"), HERE / "occupancy.cpp", "-O1", "-cudart=none", "-o", program)
        questions = "".join(f"{key.arch} {k.threads or 1024} {k.registers} {k.shared}\n" for key, k in kernels.items())
        answers = run(program, text=questions).split()
    if "-1" in answers:
        raise GateError("occupancy.cpp does not know one of the architectures")
    pairs = zip(kernels.items(), answers, strict=True)
    return {key: Kernel(**{**asdict(kernel), "blocks_per_sm": int(answer)}) for (key, kernel), answer in pairs}


def measure(sources: Iterable[Path], archs: Iterable[int], root: Path = CSRC) -> dict[Key, Kernel]:
    """Compile everything, as many files at once as there are processors."""
    jobs = [(path, path.relative_to(root).as_posix(), arch) for path in sources for arch in archs]
    kernels: dict[Key, Kernel] = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for found in pool.map(lambda job: compile_one(*job), jobs):
            kernels.update(found)
    return with_occupancy(dict(sorted(kernels.items())))
