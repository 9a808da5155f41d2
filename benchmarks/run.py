"""Runs benchmarks: ``python -m benchmarks.run [name...] [--quick] [--refcheck]``; ``make bench`` runs them all.

Each benchmark runs in a process of its own, and all that it compares shares that process. (What an earlier benchmark
leaves of the heap decides how often memory comes fresh from the kernel: the course CNN's step was 1.12 to 1.24 times
faster after the others, 1.31 to 1.43 times alone.)

A full run writes ``benchmarks/results/<name>.csv`` and the table in README.md. ``--quick`` (a tenth of the time, for a
first look) writes nothing. ``--device cuda`` measures on the GPU, with device events, and writes its files to
``build/gpu`` (`make gpu`).
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import harness, table

FOLDERS = {"cpu": harness.RESULTS, "cuda": Path(__file__).parent.parent / "build" / "gpu"}


def names() -> list[str]:
    """The benchmarks there are: every ``benchmarks/bench_<name>.py``."""
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def line(result: harness.Result) -> str:
    """One line for a case: median and spread of every provider, and its ratio to the baseline."""
    parts = []
    for provider, sample in result.samples.items():
        ratio = result.ratio(provider)
        text = f"{provider} {sample.median:.4g} ({sample.p20:.4g}..{sample.p80:.4g}) {result.case.unit}"
        parts.append(text if ratio is None or provider == result.baseline else f"{text} {ratio:.2f}x")
    return f"  {result.case.group:32} {result.case.name:24} {' | '.join(parts)}"


def measure(name: str, quick: bool, refcheck: bool, device: str = "cpu") -> None:
    """Run one benchmark, print its cases as they come, and write its results."""
    print(name, flush=True)
    cases = importlib.import_module(f"benchmarks.bench_{name}").cases()
    results = []
    for result in harness.run(name, cases, quick=quick, refcheck=refcheck, device=device):
        results.append(result)
        print(line(result), flush=True)
    if not quick:
        print(f"  wrote {harness.write_csv(name, results, FOLDERS[device])}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named benchmarks, all of them by default. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description="Times deepops against stock PyTorch."
    )
    parser.add_argument("names", nargs="*", metavar="name", help=f"which ones: {', '.join(names())} (default: all)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the time; writes no files")
    parser.add_argument("--refcheck", action="store_true", help="compare the outputs before timing them")
    parser.add_argument("--device", choices=FOLDERS, default="cpu", help="where to measure (default: cpu)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if unknown := sorted(set(options.names) - set(names())):
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(names())}")

    for name in options.names or names():
        process = multiprocessing.get_context("spawn").Process(
            target=measure, args=(name, options.quick, options.refcheck, options.device)
        )
        process.start()
        process.join()
        if process.exitcode:
            return 1
    if not options.quick and options.device == "cpu":
        table.update()
    print("\n" + table.plain(table.load(FOLDERS[options.device])) if not options.quick else "", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
