"""The static gate of the CUDA kernels: what the compiler made of them, for every architecture, without a GPU.

``make cuda`` (``PYTHONPATH=tests python -m cuda_gate.gate``) compiles each ``csrc/**/*_cuda.cu`` and compares every
kernel with its line in ``budget.csv``. It fails, with one line for each violation, when

- a kernel spills registers, or has a stack frame that its budget does not allow;
- it uses more registers, or fits fewer blocks on a multiprocessor, than its budget says;
- it has fewer 16-byte accesses of global memory, or more narrower ones, than its budget says;
- it is one of ``GEMM`` and lacks tensor-core products, loads of matrices or asynchronous copies;
- it belongs to an optimizer (``csrc/optim``) and its PTX has an instruction that rounds in other ways than the CPU
  kernels do: ``fma``, ``.approx``, ``.ftz``;
- it has no line in the budget, or a line has no kernel.

``--update`` writes what was measured into the budget, for a change that is meant to change it; read the diff. It does
not write off a stack frame or the loss of all 16-byte accesses: delete the line first.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from cuda_gate.compiled import CSRC, TENSOR_CORE, GateError, Kernel, Key, find_tool, measure

BUDGET = Path(__file__).parent / "budget.csv"
ARCHS = (80, 90, 100)
ALL_ARCHS = (75, 80, 86, 89, 90, 100, 120)
EXACT = "optim/"  # files below it promise the bits of the CPU kernels
GEMM = "implicit_gemm<"  # kernels that begin so work on tensor cores
OLDEST_GEMM_ARCH = 80
REGISTER_UNIT = 8  # a thread gets its registers in multiples of this


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
    if key.kernel.startswith(GEMM) and key.arch >= OLDEST_GEMM_ARCH:
        wrong += [f"has no {name}" for name in TENSOR_CORE if name not in kernel.tensor_core]
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
