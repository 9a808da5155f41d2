"""The table of results in README.md, made from ``benchmarks/results/*.csv``: ``python -m benchmarks.table``.

One row for each group of cases: the geometric mean of its ratios, the lowest one, and the goal. Every case that lost
against stock PyTorch is named below the table.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

from benchmarks.harness import FLOOR, OURS, RESULTS

README = Path(__file__).parent.parent / "README.md"
BEGIN = "<!-- benchmarks: begin (written by `make bench`) -->"
END = "<!-- benchmarks: end -->"
Row = dict[str, str]


@dataclass(frozen=True)
class Group:
    """The judged rows of one group of cases."""

    bench: str
    name: str
    rows: Sequence[Row]
    baselines: Sequence[Row]  # the baseline's row of each case, empty where only a limit applies

    @property
    def ratio(self) -> float | None:
        """Geometric mean of baseline / deepops."""
        return geometric_mean(float(row["ratio"]) for row in self.rows) if self.baselines else None

    @property
    def lowest(self) -> Row | None:
        """The case that gained least."""
        return min(self.rows, key=lambda row: float(row["ratio"])) if self.baselines else None

    @property
    def worst(self) -> float:
        """The largest value of deepops."""
        return max(float(row["median"]) for row in self.rows)

    def goal(self) -> tuple[str, bool | None]:
        """The goal in words and whether it is reached (two decimals count; None: there is no goal)."""
        goal, limit, unit = (self.rows[0][column] for column in ("goal", "limit", "unit"))
        if goal and self.ratio is not None:
            return f">= {float(goal):g}x", round(self.ratio, 2) >= float(goal)
        if limit:
            return f"<= {float(limit):g} {unit}", self.worst <= float(limit)
        return "", None


def load(folder: Path = RESULTS) -> list[Group]:
    """The groups of all results, in the order of the files."""
    groups = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for name in dict.fromkeys(row["group"] for row in rows):
            members = [row for row in rows if row["group"] == name]
            judged = [row for row in members if row["provider"] == OURS]
            baselines = [row for row in members if row["provider"] == row["baseline"]]
            groups.append(Group(path.stem, name, judged, baselines))
    return groups


def cells(group: Group) -> list[str]:
    """The text of a group's row."""
    goal, reached = group.goal()
    if group.ratio is None or group.lowest is None:
        gain, lowest = f"{group.worst:.3g} {group.rows[0]['unit']}", ""
    else:
        gain, lowest = f"{group.ratio:.2f}x", f"{float(group.lowest['ratio']):.2f}x ({group.lowest['case']})"
    verdict = {True: "reached", False: "missed", None: ""}[reached]
    return [group.bench, group.name, str(len(group.rows)), gain, lowest, goal, verdict]


HEAD = ["Benchmark", "Group", "Cases", "Against stock PyTorch", "Lowest case", "Goal", ""]


def losers(groups: Sequence[Group]) -> list[str]:
    """Every case below the floor, in words."""
    return [
        f"{group.bench}, {group.name}, {row['case']}: {float(row['ratio']):.2f}x"
        for group in groups
        for row in group.rows
        if row["ratio"] and float(row["ratio"]) < FLOOR
    ]


def where(groups: Sequence[Group]) -> str:
    """The sentence that says on what the results were measured; several if the files differ."""
    columns = ("cpu", "isa", "threads", "torch", "python", "deepops", "date")
    seen = dict.fromkeys(tuple(row[column] for column in columns) for group in groups for row in group.rows)
    template = "{} ({}), {} threads, torch {}, Python {}, deepops {}, {}"
    return "; ".join(template.format(*facts) for facts in seen)


def markdown(groups: Sequence[Group]) -> str:
    """The table and the lines below it."""
    if not groups:
        return "Not measured yet."
    lines = [HEAD, ["---"] * len(HEAD), *map(cells, groups)]
    lost = losers(groups)
    parts = [
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
        f"A ratio of 2x means half the time (or half the bytes); groups show the geometric mean. "
        f"Cases below {FLOOR}x: {'; '.join(lost) if lost else 'none'}.",
        f"Made by `make bench` on {where(groups)}. Every case is in `benchmarks/results/`.",
    ]
    return "\n\n".join(parts)


def plain(groups: Sequence[Group]) -> str:
    """The same table for a terminal."""
    lines = [HEAD, *map(cells, groups)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, *(f"below {FLOOR}x: {case}" for case in losers(groups))]) + "\n"


def update(readme: Path = README, folder: Path = RESULTS) -> None:
    """Put the table between its markers in README.md.

    Raises:
        ValueError: the file has no markers.
    """
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{readme} lacks the markers {BEGIN} and {END}")
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    readme.write_text(f"{head}{BEGIN}\n\n{markdown(load(folder))}\n\n{END}{tail}")


if __name__ == "__main__":
    update()
