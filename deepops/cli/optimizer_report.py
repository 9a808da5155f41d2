"""What ``deepops train --compare-optimizers`` leaves: the table, optimizers.json, optimizers.csv and optimizers.png."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deepops.cli.compare_optimizers import RULES, Comparison, Run, learning_rates, percent, rank
from deepops.cli.errors import UserError, first_line
from deepops.cli.models import OPTIMIZERS
from deepops.cli.optimizer_plot import draw_plot
from deepops.cli.report import describe, environment, finite, write_csv

FORMAT = 1  # of optimizers.json; rises when a field changes its meaning
WINDOW = 10  # steps: the training loss of one batch alone jumps
WORKS = 0.05  # a learning rate works if it is no more than this below the best accuracy that any optimizer reaches


def steps_to(losses: list[float], target: float) -> int | None:
    """After how many steps the mean loss of the last ``WINDOW`` is at most ``target``; None: never."""
    for end in range(min(WINDOW, len(losses)), len(losses) + 1):
        if statistics.fmean(losses[max(0, end - WINDOW) : end]) <= target:
            return end
    return None


def summarize(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Per optimizer: what the table says.

    "noise" has an entry for each part of wrong labels: the accuracy of every learning rate (the mean over the seeds),
    the best rate (of equal ones that with the lowest final loss), and the range of neighbours of the best that work.
    "convergence" is that of the fastest learning rate at the least noise; None where none gets there with every seed.
    """
    summary = {name: _summarize(comparison, name) for name in RULES}
    for noise in comparison.noises:
        best = max(entry["noise"][f"{noise:g}"]["accuracy"] for entry in summary.values())
        for entry in summary.values():
            entry["noise"][f"{noise:g}"]["works"] = _works(entry["noise"][f"{noise:g}"], best - WORKS)
    return summary


def _summarize(comparison: Comparison, name: str) -> dict[str, Any]:
    runs = [run for run in comparison.runs if run.optimizer == name]
    noise = {f"{level:g}": _at_noise([run for run in runs if run.label_noise == level]) for level in comparison.noises}
    return {
        "hyper_parameters": hyper_parameters(name),
        "convergence": _fastest(
            [run for run in runs if run.label_noise == comparison.noises[0]], comparison.arguments.target_loss
        ),
        "noise": noise,
        "update_ms": statistics.median(run.update_ms for run in runs),
        "step_ms": statistics.median(run.step_ms for run in runs),
        "state_bytes": max(run.state_bytes for run in runs),
    }


def _by_rate(runs: list[Run]) -> dict[float, list[Run]]:
    """The runs of each learning rate, rising."""
    rates = sorted({run.learning_rate for run in runs})
    return {rate: [run for run in runs if run.learning_rate == rate] for rate in rates}


def _fastest(runs: list[Run], target: float) -> dict[str, float] | None:
    """The learning rate that takes the fewest steps to the loss ``target``, and their mean over the seeds."""
    found = []
    for rate, same in _by_rate(runs).items():
        steps = [count for run in same if (count := steps_to(run.losses, target)) is not None]
        if len(steps) == len(same):
            found.append({"steps": statistics.fmean(steps), "learning_rate": rate})
    return min(found, key=lambda entry: entry["steps"], default=None)


def _at_noise(runs: list[Run]) -> dict[str, Any]:
    by_rate = _by_rate(runs)
    accuracies = {rate: statistics.fmean(run.accuracy for run in same) for rate, same in by_rate.items()}
    losses = {rate: statistics.fmean(run.final_loss for run in same) for rate, same in by_rate.items()}
    best = max(by_rate, key=lambda rate: rank(accuracies[rate], losses[rate]))
    return {
        "best_learning_rate": best,
        "accuracy": accuracies[best],
        "by_learning_rate": [{"learning_rate": rate, "accuracy": accuracies[rate]} for rate in by_rate],
    }


def _works(entry: dict[str, Any], least: float) -> dict[str, Any] | None:
    """The unbroken range of learning rates around the best one with this accuracy; None: not even the best has it."""
    rates = [item["learning_rate"] for item in entry["by_learning_rate"]]
    enough = [item["accuracy"] >= least for item in entry["by_learning_rate"]]
    low = high = rates.index(entry["best_learning_rate"])
    if not enough[low]:
        return None
    while low > 0 and enough[low - 1]:
        low -= 1
    while high + 1 < len(rates) and enough[high + 1]:
        high += 1
    return {
        "from": rates[low],
        "to": rates[high],
        "decades": math.log10(rates[high] / rates[low]),
        "reaches_end": low == 0 or high == len(rates) - 1,  # of the rates tried: the range may go on
    }


def hyper_parameters(name: str) -> dict[str, Any]:
    """The options of the optimizer beside the learning rate."""
    import torch

    defaults = OPTIMIZERS[name].build("deepops", [torch.nn.Parameter(torch.zeros(1))]).defaults
    return {option: defaults[option] for option in RULES[name].hyper_parameters}


def print_table(comparison: Comparison) -> None:
    """Print the course module's table with what was measured."""
    from rich.console import Console
    from rich.table import Table

    summary = summarize(comparison)
    done = len({(run.seed, run.label_noise) for run in comparison.runs})
    title = f"interrupted: {done} of {comparison.rounds} rounds are complete" if comparison.interrupted else None
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for rule in RULES.values():
        table.add_column(rule.title, justify="right")
    for label, cells in table_rows(comparison, summary):
        table.add_row(label, *cells)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"A rate works if its test accuracy is at most {100 * WORKS:g} points below the best of all optimizers at that "
        f"noise. The loss is the mean of {WINDOW} steps.",
        markup=False,
    )


def table_rows(comparison: Comparison, summary: dict[str, dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Label and one cell per optimizer, for every row of the table."""
    arguments, entries = comparison.arguments, list(summary.values())
    rates = learning_rates(arguments)
    rows = [
        ("hyper-parameters", [_options(entry["hyper_parameters"]) for entry in entries]),
        ("learning rates tried", [_span(rates[name][0], rates[name][-1], len(rates[name])) for name in summary]),
        (f"fewest steps to loss {arguments.target_loss:g}", [_steps(entry["convergence"]) for entry in entries]),
    ]
    for level in comparison.noises:
        at = [entry["noise"][f"{level:g}"] for entry in entries]
        rows += [
            (f"accuracy, {percent(level)} wrong labels", [f"{entry['accuracy']:.2%}" for entry in at]),
            ("  best learning rate", [f"{entry['best_learning_rate']:g}" for entry in at]),
            ("  rates that work", [_range(entry["works"]) for entry in at]),
        ]
    rows += [
        ("one update, median", [f"{entry['update_ms']:.2f} ms" for entry in entries]),
        ("training step, median", [f"{entry['step_ms']:.2f} ms" for entry in entries]),
        ("state per parameter", [f"{entry['state_bytes']:.1f} bytes" for entry in entries]),
    ]
    return rows


def _options(options: dict[str, Any]) -> str:
    parts = []
    for name, value in options.items():
        numbers = " ".join(f"{number:g}" for number in (value if isinstance(value, tuple) else (value,)))
        parts.append(f"{name.replace('_', ' ')} {numbers}")
    return "\n".join(["learning rate", *parts])


def _span(low: float, high: float, count: int) -> str:
    return f"{low:g}" if count == 1 else f"{count}: {low:g} to {high:g}"


def _steps(convergence: dict[str, float] | None) -> str:
    if convergence is None:
        return "not reached"
    return f"{convergence['steps']:.0f} at {convergence['learning_rate']:g}"


def _range(works: dict[str, Any] | None) -> str:
    if works is None:
        return "none"
    width = f"{'>= ' if works['reaches_end'] else ''}{works['decades']:.1f} decades"
    return f"{works['from']:g} to {works['to']:g}\n{width}"


def write_results(comparison: Comparison, out: Path) -> None:
    """Write optimizers.json, optimizers.csv and optimizers.png into the folder ``out``.

    Raises:
        UserError: a file cannot be written.
    """
    from rich.console import Console

    try:
        report = json.dumps(finite(build_report(comparison)), indent=1, allow_nan=False)
        (out / "optimizers.json").write_text(report + "\n")
        write_csv(out / "optimizers.csv", [_csv_row(comparison, run) for run in comparison.runs])
        draw_plot(comparison, summarize(comparison), out / "optimizers.png")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {first_line(error)}") from error
    Console(highlight=False).print(
        f"optimizers.json, optimizers.csv and optimizers.png are in {out}", markup=False, soft_wrap=True
    )


def build_report(comparison: Comparison) -> dict[str, Any]:
    """Everything optimizers.json holds; numbers that are not finite become null there."""
    arguments = comparison.arguments
    names = ("model", "data", "epochs", "batch_size", "precision", "seed", "seeds", "label_noise", "target_loss")
    return {
        "format": FORMAT,
        "config": {
            **{name: getattr(arguments, name) for name in names},
            "learning_rates": {name: list(rates) for name, rates in learning_rates(arguments).items()},
            "device": str(comparison.device),
        },
        "environment": environment(),
        "data": describe(comparison.data),
        "interrupted": comparison.interrupted,
        "runs": [asdict(run) for run in comparison.runs],
        "summary": summarize(comparison),
    }


def _csv_row(comparison: Comparison, run: Run) -> dict[str, Any]:
    """One training, in one line."""
    steps = steps_to(run.losses, comparison.arguments.target_loss)
    return {
        "optimizer": run.optimizer,
        "learning_rate": run.learning_rate,
        "label_noise": run.label_noise,
        "seed": run.seed,
        "steps": len(run.losses),
        "final_loss": run.final_loss,
        "test_accuracy": run.accuracy,
        "steps_to_target": "" if steps is None else steps,
        "update_ms": round(run.update_ms, 4),
        "step_ms": round(run.step_ms, 4),
        "state_bytes": round(run.state_bytes, 4),
    }
