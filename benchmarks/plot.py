"""Draws the ratios of ``benchmarks/results/*.csv``: ``python -m benchmarks.plot [--out FILE]`` (needs matplotlib)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import FLOOR, RESULTS
from benchmarks.table import Group, load


def draw(groups: Sequence[Group], out: Path) -> None:
    """One row of dots for each group (a dot is a case, the bar their geometric mean), logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.4 * len(groups)), layout="constrained")
    for place, group in enumerate(groups):
        ratios = [float(row["ratio"]) for row in group.rows]
        axes.barh(place, group.ratio, color="#9ecae1")
        axes.plot(ratios, [place] * len(ratios), "o", color="#08519c", markersize=4)
        if goal := group.rows[0]["goal"]:
            axes.plot([float(goal)] * 2, [place - 0.4, place + 0.4], color="#d94801")
    axes.axvline(1, color="black", linewidth=1)
    axes.axvline(FLOOR, color="black", linewidth=0.5, linestyle=":")
    axes.set_xscale("log")
    axes.set_yticks(range(len(groups)), [f"{group.bench}: {group.name}" for group in groups])
    axes.invert_yaxis()
    axes.set_xlabel("times faster (or smaller) than stock PyTorch; orange: the goal")
    figure.savefig(out, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw every group that has a baseline."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "ratios.png", help="the picture (default: %(default)s)")
    options = parser.parse_args(arguments)
    groups = [group for group in load() if group.baselines]
    if not groups:
        parser.error(f"no results in {RESULTS}; run `make bench` first")
    draw(groups, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
