"""The static gate of the CUDA kernels: what the compiler made of them, for every architecture, without a GPU.

``python tests/cuda_gate/gate.py`` compiles each ``csrc/**/*_cuda.cu`` and compares every kernel with its line in
``budget.csv``. It fails, with one line for each violation, when

- a kernel spills registers, or has a stack frame that its budget does not allow;
- it uses more registers, or fits fewer blocks on a multiprocessor, than its budget says;
- it has fewer 16-byte accesses of global memory, or more narrower ones, than its budget says;
- it belongs to an optimizer (``csrc/optim``) and its PTX has an instruction that rounds in other ways than the CPU
  kernels do: ``fma``, ``.approx``, ``.ftz``;
- it has no line in the budget, or a line has no kernel.

``--update`` writes what was measured into the budget, for a change that is meant to change it; read the diff. It does
not write off a stack frame or the loss of all 16-byte accesses: delete the line first.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, fields
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
BUDGET = HERE / "budget.csv"
ARCHS = (80, 90, 100)
ALL_ARCHS = (75, 80, 86, 89, 90, 100, 120)
EXACT = "optim/"  # files below it promise the bits of the CPU kernels
REGISTER_UNIT = 8  # a thread gets its registers in multiples of this


class GateError(Exception):
    """The gate could not look: no compiler, a source that does not compile."""


@dataclass(frozen=True, order=True)
class Key:
    """One kernel, compiled for one architecture."""

    file: str  # below csrc
    kernel: str
    arch: int


@dataclass(frozen=True)
class Budget:
    """The limits of one kernel; ``*_16``: 16-byte accesses of global memory in the code, ``*_narrow``: all others."""

    registers: int
    blocks_per_sm: int
    stack: int
    loads_16: int
    loads_narrow: int
    stores_16: int
    stores_narrow: int


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
    """Accesses of global memory by mangled name, counted as loads_16, loads_narrow, stores_16, stores_narrow."""
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
    return found


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
            r"^(fma|mad\.(\w+\.)*f\d)|\.(approx|ftz)\b", match[1]
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
        found[key] = Kernel(threads, inexact=inexact, **used[mangled], **counts)
    return found


def with_occupancy(kernels: dict[Key, Kernel]) -> dict[Key, Kernel]:
    """The same kernels with ``blocks_per_sm``."""
    with tempfile.TemporaryDirectory() as place:
        program = Path(place, "occupancy")
        run(tool("nvcc"), HERE / "occupancy.cpp", "-O1", "-o", program)
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


# ---- the budget -----------------------------------------------------------------------------------------------------

COLUMNS = [field.name for kind in (Key, Budget) for field in fields(kind)]


def read_budget(path: Path = BUDGET) -> dict[Key, Budget]:
    """The committed limits."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = [dict(row) for row in csv.DictReader(file)]
    return {
        Key(row.pop("file"), row.pop("kernel"), int(row.pop("arch"))): Budget(**{k: int(v) for k, v in row.items()})
        for row in rows
    }


def write_budget(budget: dict[Key, Budget], path: Path = BUDGET) -> None:
    """Write them, sorted."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((*astuple(key), *astuple(limits)) for key, limits in sorted(budget.items()))


def updated(kernel: Kernel, old: Budget | None) -> Budget:
    """The limits that this kernel just meets; what only a human may allow stays as it was."""
    return Budget(
        registers=-(-kernel.registers // REGISTER_UNIT) * REGISTER_UNIT,
        blocks_per_sm=kernel.blocks_per_sm,
        stack=old.stack if old else 0,
        loads_16=kernel.loads_16 or (old.loads_16 if old else 0),
        loads_narrow=kernel.loads_narrow,
        stores_16=kernel.stores_16 or (old.stores_16 if old else 0),
        stores_narrow=kernel.stores_narrow,
    )


def violations(key: Key, kernel: Kernel, limits: Budget | None) -> list[str]:
    """What is wrong with one kernel."""
    wrong = []
    if kernel.spills:
        wrong.append(f"spills registers: {kernel.spills} bytes")
    if kernel.threads == 0:
        wrong.append("has no launch bounds: declare it with DEEPOPS_KERNEL(threads)")
    if key.file.startswith(EXACT) and kernel.inexact:
        wrong.append(f"must round as the CPU does, but has {', '.join(kernel.inexact)}")
    if limits is None:
        return [*wrong, "has no line in the budget (--update writes it)"]
    most = {"registers": "registers", "stack": "bytes of stack", "loads_narrow": "loads narrower than 16 bytes",
            "stores_narrow": "stores narrower than 16 bytes"}  # fmt: skip
    least = {"blocks_per_sm": "blocks per multiprocessor", "loads_16": "16-byte loads", "stores_16": "16-byte stores"}
    for name, words in (most | least).items():
        is_, limit = getattr(kernel, name), getattr(limits, name)
        if (is_ > limit) if name in most else (is_ < limit):
            wrong.append(f"{is_} {words}, budget {limit}")
    return wrong


def judge(kernels: dict[Key, Kernel], budget: dict[Key, Budget]) -> list[str]:
    """One line for each violation, of the kernels and of budget lines without a kernel."""
    lines = []
    for key in sorted(kernels.keys() | budget.keys()):
        where = f"csrc/{key.file}: {key.kernel} on sm_{key.arch}"
        if key in kernels:
            lines += [f"{where}: {what}" for what in violations(key, kernels[key], budget.get(key))]
        else:
            lines.append(f"{where}: in the budget, but there is no such kernel (--update drops the line)")
    return lines


def table(kernels: dict[Key, Kernel]) -> str:
    """All that was measured, for people."""
    head = (
        "kernel",
        "arch",
        "threads",
        "registers",
        "blocks/SM",
        "shared",
        "stack",
        "loads 16/narrow",
        "stores 16/narrow",
    )
    rows = [head]
    for key, k in kernels.items():
        rows.append(
            (key.kernel, f"sm_{key.arch}", *map(str, (k.threads, k.registers, k.blocks_per_sm, k.shared, k.stack)),
             f"{k.loads_16}/{k.loads_narrow}", f"{k.stores_16}/{k.stores_narrow}")
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the gate. Returns 0 when all is well, 1 on violations, 2 when it could not look."""
    parser = argparse.ArgumentParser(prog="gate.py", description="Static checks of the compiled CUDA kernels.")
    parser.add_argument("--archs", type=int, nargs="+", default=ARCHS, help=f"default: {' '.join(map(str, ARCHS))}")
    parser.add_argument("--all", action="store_true", help=f"all of {' '.join(map(str, ALL_ARCHS))}")
    parser.add_argument("--update", action="store_true", help="write what was measured into budget.csv")
    parser.add_argument("--find", metavar="TOOL", help="print where nvcc or nvdisasm is, and do nothing else")
    options = parser.parse_args(arguments)
    if options.find:
        print(found := find_tool(options.find) or "")
        return 0 if found else 1
    archs = ALL_ARCHS if options.all else tuple(options.archs)
    sources = sorted(CSRC.rglob("*_cuda.cu"))
    try:
        kernels = measure(sources, archs)
    except GateError as error:
        print(f"cuda gate: {error}", file=sys.stderr)
        return 2
    budget = read_budget()
    if options.update:
        kept = {key: limits for key, limits in budget.items() if key.arch not in archs}
        budget = kept | {key: updated(kernel, budget.get(key)) for key, kernel in kernels.items()}
        write_budget(budget)
    print(table(kernels))
    wrong = judge(kernels, {key: limits for key, limits in budget.items() if key.arch in archs})
    print("\n".join(wrong), end="\n" if wrong else "")
    print(
        f"{len(kernels)} kernels of {len(sources)} files, sm_{', sm_'.join(map(str, archs))}: {len(wrong)} violations"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
