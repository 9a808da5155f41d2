"""What ``deepops train`` leaves behind: the table on the terminal, report.json, plot.png and model.pt."""

from __future__ import annotations

import csv
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deepops import __version__
from deepops._library import _C
from deepops.cli.errors import UserError, first_line
from deepops.cli.figures import figure_file
from deepops.cli.models import MODELS, stock_state_dict
from deepops.cli.side import WARM_UP, Side
from deepops.cli.training_data import TrainingData

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from deepops.cli.train import Session

FORMAT = 2  # of report.json; rises when a field changes its meaning
COLORS = {"stock": "#c2703d", "deepops": "#2f6fb0"}


def summarize(session: Session) -> dict[str, dict[str, float]]:
    """Per side: step_ms, samples_per_second, saved_bytes, final_loss, final_accuracy; when comparing, also:

    "ratio": how many times better deepops is in the first three (2.0: half the time, twice the images, half the bytes).
    "difference": deepops minus stock, of final_loss and final_accuracy.
    """
    summary = {name: _summarize_side(side) for name, side in session.sides.items()}
    if len(summary) == 2:
        stock, ours = summary["stock"], summary["deepops"]
        summary["ratio"] = {
            "step_ms": _divide(stock["step_ms"], ours["step_ms"]),
            "samples_per_second": _divide(ours["samples_per_second"], stock["samples_per_second"]),
            "saved_bytes": _divide(stock["saved_bytes"], ours["saved_bytes"]),
        }
        summary["difference"] = {key: ours[key] - stock[key] for key in ("final_loss", "final_accuracy")}
    return summary


def _summarize_side(side: Side) -> dict[str, float]:
    last = side.epochs[-1]
    return {
        "step_ms": 1000 * side.median_step(),
        "samples_per_second": side.samples_per_second(),
        "saved_bytes": side.saved_bytes,
        "final_loss": last.loss,
        "final_accuracy": last.test_accuracy,
    }


def _divide(a: float, b: float) -> float:
    return a / b if b else math.nan


def print_summary(session: Session) -> None:
    """Print the table of what was gained."""
    from rich.console import Console
    from rich.table import Table

    summary = summarize(session)
    comparing = "ratio" in summary
    table = Table(title="interrupted: what was reached" if session.interrupted else None, title_justify="left")
    table.add_column("")
    for name in session.sides:
        table.add_column(name, justify="right")
    if comparing:
        table.add_column("ratio", justify="right")
    rows = {
        "step_ms": ("time per step, median", "{:.2f} ms"),
        "samples_per_second": ("samples per second", "{:,.0f}"),
        "saved_bytes": ("saved for backward", "{:,.0f} bytes"),
        "final_loss": ("final loss", "{:.4f}"),
        "final_accuracy": ("final test accuracy", "{:.2%}"),
    }
    for key, (label, form) in rows.items():
        cells = [form.format(summary[name][key]) for name in session.sides]
        if comparing and key in summary["ratio"]:
            cells.append(f"{summary['ratio'][key]:.2f}x")
        elif key == "final_accuracy" and comparing:
            cells.append(f"{100 * summary['difference'][key]:+.2f} points")
        elif comparing:
            cells.append(f"{summary['difference'][key]:+.4f}")
        table.add_row(label, *cells)
    console = Console(highlight=False)
    console.print(table)
    if comparing and MODELS[session.arguments.model].note:
        console.print(f"saved for backward: {MODELS[session.arguments.model].note}", markup=False)


def write_results(session: Session, out: Path) -> None:
    """Write report.json, plot.png and model.pt into the folder ``out``.

    Raises:
        UserError: a file cannot be written.
    """
    from rich.console import Console

    try:
        (out / "report.json").write_text(json.dumps(finite(build_report(session)), indent=1, allow_nan=False) + "\n")
        draw_plot(session, out / "plot.png")
        model = session.sides["deepops"].model
        torch.save(stock_state_dict(session.arguments.model, model), out / "model.pt")
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise UserError(f"--out {out}: cannot be written: {first_line(error)}") from error
    Console(highlight=False).print(f"report.json, plot.png and model.pt are in {out}", markup=False, soft_wrap=True)


def build_report(session: Session) -> dict[str, Any]:
    """Everything report.json holds; numbers that are not finite become null there."""
    return {
        "format": FORMAT,
        "config": {**_config(session), "device": str(session.device)},
        "environment": environment(),
        "data": describe(session.data),
        "interrupted": session.interrupted,
        "epochs": {name: [asdict(epoch) for epoch in side.epochs] for name, side in session.sides.items()},
        "steps": {
            name: {"loss": side.losses, "ms": [round(1000 * s, 4) for s in side.seconds]}
            for name, side in session.sides.items()
        },
        "summary": summarize(session),
        "test_loss_by_position": {
            name: side.loss_by_position.tolist()
            for name, side in session.sides.items()
            if side.loss_by_position is not None
        },
    }


def _config(session: Session) -> dict[str, Any]:
    names = ("model", "data", "epochs", "batch_size", "optimizer", "precision", "seed", "compare")
    return {name: getattr(session.arguments, name) for name in names}


def describe(data: TrainingData) -> dict[str, Any]:
    """What was trained on."""
    return {
        "name": data.name,
        "samples": data.samples,
        "train_samples": len(data.train_inputs),
        "test_samples": len(data.test_inputs),
        "note": data.note,
    }


def environment() -> dict[str, Any]:
    """Versions and machine, as far as they explain a measured time."""
    return {
        "deepops": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "instruction_set": _C.cpu_isa() if _C is not None else None,
    }


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows that have the same keys; there is at least one."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def finite(value: Any) -> Any:
    """``value`` with None for every number that JSON cannot hold (NaN and the infinities)."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw_plot(session: Session, path: Path) -> None:
    """Loss and time of every step and, for a text, what its prediction owes to the bytes before: a PNG file."""
    arguments = session.arguments
    facts = (arguments.model, session.data.name, arguments.optimizer, arguments.precision, str(session.device))
    of_text = any(side.loss_by_position is not None for side in session.sides.values())
    with figure_file(path, 15 if of_text else 10, 4, ", ".join(facts)) as figure:
        losses, times, *positions = figure.subplots(1, 3 if of_text else 2)
        for name, side in session.sides.items():
            _draw_side(losses, times, name, side)
            if of_text:
                _draw_positions(positions[0], name, side)
        losses.set(xlabel="training step", ylabel="loss", title="Training loss", yscale="log")
        times.set(xlabel="training step", ylabel="milliseconds", title="Time per step (line: median)", ylim=(0, None))
        losses.legend()
        times.legend()


def _draw_positions(axes: Axes, name: str, side: Side) -> None:
    """How well a byte is predicted by its position in its piece, averaged over 1, 2, 3-4, 5-8, ..."""
    assert side.loss_by_position is not None
    bits = side.loss_by_position / math.log(2)
    last = [2**i for i in range(len(bits).bit_length()) if 2**i < len(bits)] + [len(bits)]
    ranges = [bits[first:end].mean().item() for first, end in pairwise([0, *last])]
    width = 2.0 if name == "stock" else 0.8
    axes.plot(last, ranges, color=COLORS[name], label=name, linewidth=width, marker=".")
    axes.set(xlabel="up to byte number", ylabel="bits per byte", title="Test loss by how much came before")
    axes.set_xscale("log", base=2)
    axes.legend()


def _draw_side(losses: Axes, times: Axes, name: str, side: Side) -> None:
    color = COLORS[name]
    style: dict[str, Any] = (
        {"linewidth": 2.0, "alpha": 0.5} if name == "stock" else {"linewidth": 0.8}
    )  # both show where they agree
    losses.plot(range(1, len(side.losses) + 1), side.losses, color=color, label=name, **style)
    milliseconds = [1000 * seconds for seconds in side.seconds]
    steps = range(1, len(milliseconds) + 1)
    times.scatter(steps[WARM_UP:], milliseconds[WARM_UP:], color=color, s=4, alpha=0.5)
    median = 1000 * side.median_step()
    times.axhline(median, color=color, label=f"{name}: {median:.2f} ms")
