"""What ``deepops train --gradient-flow`` leaves: the table, and gradient_flow.json, .csv and .png."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepops.cli.errors import UserError, first_line
from deepops.cli.figures import figure_file
from deepops.cli.gradient_flow import MeasuredSide
from deepops.cli.report import describe, environment, finite, write_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from deepops.cli.train import Session

FORMAT = 1  # of gradient_flow.json; rises when a field changes its meaning


def summarize(side: MeasuredSide) -> dict[str, Any]:
    """What the table says of one network: its first and last layer, medians over the steps with finite gradients."""
    first, last = side.layers[0], side.layers[-1]
    norms = {name: _median([facts.grad_norm(name) for facts in side.facts]) for name in (first, last)}
    return {
        "first_layer": first,
        "last_layer": last,
        "first_grad_norm": norms[first],
        "last_grad_norm": norms[last],
        "ratio": norms[first] / norms[last] if norms[last] else math.nan,
        "first_update_ratio": update_ratio(side, first),
        "last_update_ratio": update_ratio(side, last),
        "first_non_finite": first_non_finite(side),
        "steps_non_finite": sum(facts.non_finite for facts in side.facts),
    }


def update_ratio(side: MeasuredSide, name: str) -> float:
    """Median of the update's norm over the parameter's, of steps that were taken."""
    taken = [facts.parameters[name] for facts in side.facts if not facts.skipped]
    return _median([facts.update_norm / facts.param_norm for facts in taken if facts.param_norm])


def first_non_finite(side: MeasuredSide) -> dict[str, Any] | None:
    """Step (from 1) and name of the first parameter with a gradient that is not finite; None: all are."""
    for step, facts in enumerate(side.facts, start=1):
        for name, measured in facts.parameters.items():
            if measured.non_finite:
                return {"step": step, "parameter": name}
    return None


def _median(values: list[float]) -> float:
    usable = [value for value in values if math.isfinite(value)]
    return statistics.median(usable) if usable else math.nan


def print_table(session: Session, sides: dict[str, MeasuredSide]) -> None:
    """Print one line per network."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="interrupted: what was reached" if session.interrupted else None, title_justify="left")
    table.add_column("network")
    for heading in (
        "gradient norm,\nfirst layer",
        "gradient norm,\nlast layer",
        "first /\nlast",
        "update / weight,\nfirst, last",
        "first tensor\nnot finite",
    ):
        table.add_column(heading, justify="right", overflow="fold")
    for title, side in sides.items():
        entry = summarize(side)
        table.add_row(
            title,
            f"{entry['first_grad_norm']:.2g}",
            f"{entry['last_grad_norm']:.2g}",
            f"{entry['ratio']:.2g}",
            f"{entry['first_update_ratio']:.1g}, {entry['last_update_ratio']:.1g}",
            _where(entry, len(side.facts)),
        )
    console = Console(highlight=False)
    console.print(table)
    console.print("Norms of the gradients of the layers' weights: medians over all steps.", markup=False)


def _where(entry: dict[str, Any], steps: int) -> str:
    found = entry["first_non_finite"]
    if found is None:
        return "none"
    return f"{found['parameter']}\nat step {found['step']}; {entry['steps_non_finite']} of {steps} steps"


def write_results(session: Session, sides: dict[str, MeasuredSide], out: Path) -> None:
    """Write gradient_flow.json, gradient_flow.csv and gradient_flow.png into the folder ``out``.

    Raises:
        UserError: a file cannot be written.
    """
    from rich.console import Console

    try:
        report = json.dumps(finite(build_report(session, sides)), indent=1, allow_nan=False)
        (out / "gradient_flow.json").write_text(report + "\n")
        write_csv(out / "gradient_flow.csv", list(csv_rows(sides)))
        draw_plot(session, sides, out / "gradient_flow.png")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {first_line(error)}") from error
    Console(highlight=False).print(
        f"gradient_flow.json, gradient_flow.csv and gradient_flow.png are in {out}", markup=False, soft_wrap=True
    )


def build_report(session: Session, sides: dict[str, MeasuredSide]) -> dict[str, Any]:
    """Everything gradient_flow.json holds; numbers that are not finite become null there."""
    names = ("model", "data", "epochs", "batch_size", "optimizer", "precision", "seed", "contrast")
    return {
        "format": FORMAT,
        "config": {**{name: getattr(session.arguments, name) for name in names}, "device": str(session.device)},
        "environment": environment(),
        "data": describe(session.data),
        "interrupted": session.interrupted,
        "layers": {title: side.layers for title, side in sides.items()},
        "losses": {title: side.losses for title, side in sides.items()},
        "epochs": {title: [asdict(epoch) for epoch in side.epochs] for title, side in sides.items()},
        "summary": {title: summarize(side) for title, side in sides.items()},
    }


def csv_rows(sides: dict[str, MeasuredSide]) -> Iterator[dict[str, Any]]:
    """One row per network, step (from 1) and parameter."""
    for title, side in sides.items():
        for step, facts in enumerate(side.facts, start=1):
            for name, measured in facts.parameters.items():
                yield {
                    "network": title,
                    "step": step,
                    "parameter": name,
                    "grad_norm": facts.grad_norm(name),
                    "param_norm": "" if facts.skipped else measured.param_norm,
                    "update_norm": measured.update_norm,
                    "non_finite": measured.non_finite,
                }


def draw_plot(session: Session, sides: dict[str, MeasuredSide], path: Path) -> None:
    """The gradient norm of every layer over the steps, one panel per network, as a PNG file."""
    columns = min(len(sides), 2)
    rows = math.ceil(len(sides) / columns)
    arguments = session.arguments
    facts = (session.data.name, arguments.optimizer, arguments.precision, str(session.device))
    with figure_file(path, 7 * columns, 4 * rows, "Gradient flow: " + ", ".join(facts)) as figure:
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
        for axes, (title, side) in zip(panels, sides.items(), strict=False):
            _draw_network(axes, title, side)
        for axes in panels[len(sides) :]:
            axes.set_visible(False)


def _draw_network(axes: Axes, title: str, side: MeasuredSide) -> None:
    from matplotlib import colormaps

    steps = range(1, len(side.facts) + 1)
    for index, name in enumerate(side.layers):
        norms = [facts.grad_norm(name) for facts in side.facts]
        # A gradient of zero has no place on a logarithmic scale; a gap says so, as it does for one that is not finite.
        shown = [norm if 0 < norm < math.inf else math.nan for norm in norms]
        color = colormaps["viridis"](0.9 * index / max(1, len(side.layers) - 1))
        axes.plot(steps, shown, color=color, linewidth=1, label=name.removesuffix(".weight"))
    axes.set(xlabel="training step", ylabel="norm of the gradient", yscale="log", title=title)
    axes.legend(title="first to last layer", fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
