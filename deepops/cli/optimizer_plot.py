"""The plot of ``deepops train --compare-optimizers``."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepops.cli.compare_optimizers import RULES, Comparison, percent
from deepops.cli.figures import figure_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"sgd": "#2f6fb0", "rmsprop": "#4a9a5b", "adam": "#c2703d"}
_LINES = ("-", "--", ":", "-.")  # one per part of wrong labels, the least first
_SMOOTH = 10  # steps that a point of the loss curve averages


def draw_plot(comparison: Comparison, summary: dict[str, dict[str, Any]], path: Path) -> None:
    """Convergence, accuracy against learning rate and against noise, and cost, as a PNG file."""
    arguments = comparison.arguments
    facts = (arguments.model, comparison.data.name, arguments.precision, str(comparison.device))
    with figure_file(path, 11, 8, ", ".join(facts)) as figure:
        (convergence, rates), (noise, cost) = figure.subplots(2, 2)
        _draw_convergence(convergence, comparison, summary)
        _draw_rates(rates, comparison, summary)
        _draw_noise(noise, comparison, summary)
        _draw_cost(cost, summary)


def _draw_convergence(axes: Axes, comparison: Comparison, summary: dict[str, dict[str, Any]]) -> None:
    least = comparison.noises[0]
    for name, entry in summary.items():
        fastest = entry["convergence"]
        rate = fastest["learning_rate"] if fastest else entry["noise"][f"{least:g}"]["best_learning_rate"]
        chosen = (name, rate, least, comparison.arguments.seed)
        run = next(r for r in comparison.runs if (r.optimizer, r.learning_rate, r.label_noise, r.seed) == chosen)
        smooth = [statistics.fmean(run.losses[max(0, end - _SMOOTH) : end]) for end in range(1, len(run.losses) + 1)]
        axes.plot(range(1, len(smooth) + 1), smooth, color=COLORS[name], label=f"{RULES[name].title}, lr {rate:g}")
    target = comparison.arguments.target_loss
    axes.axhline(target, color="0.6", linewidth=0.8, label=f"target {target:g}")
    axes.set(
        xlabel="training step",
        ylabel=f"loss, mean of {_SMOOTH} steps",
        yscale="log",
        title=f"Convergence at the fastest learning rate, {percent(least)} wrong labels",
    )
    axes.legend()


def _draw_rates(axes: Axes, comparison: Comparison, summary: dict[str, dict[str, Any]]) -> None:
    for name, entry in summary.items():
        for index, level in enumerate(comparison.noises):
            points = entry["noise"][f"{level:g}"]["by_learning_rate"]
            axes.plot(
                [point["learning_rate"] for point in points],
                [100 * point["accuracy"] for point in points],
                _LINES[index % len(_LINES)],
                marker="o",
                markersize=3,
                color=COLORS[name],
                label=f"{name}, {percent(level)} wrong",
            )
    axes.set(xlabel="learning rate", ylabel="test accuracy, %", xscale="log", title="Learning rates that work")
    axes.legend(fontsize="x-small")


def _draw_noise(axes: Axes, comparison: Comparison, summary: dict[str, dict[str, Any]]) -> None:
    for name, entry in summary.items():
        accuracies = [100 * entry["noise"][f"{level:g}"]["accuracy"] for level in comparison.noises]
        levels = [100 * level for level in comparison.noises]
        axes.plot(levels, accuracies, marker="o", color=COLORS[name], label=RULES[name].title)
    axes.set(xlabel="wrong training labels, %", ylabel="test accuracy, %", title="Noise, at the best learning rate")
    axes.legend()


def _draw_cost(axes: Axes, summary: dict[str, dict[str, Any]]) -> None:
    titles = [RULES[name].title for name in summary]
    times = [entry["update_ms"] for entry in summary.values()]
    bars = axes.bar(titles, times, color=[COLORS[name] for name in summary])
    labels = [f"{e['update_ms']:.2f} ms\n{e['state_bytes']:.1f} bytes" for e in summary.values()]
    axes.bar_label(bars, labels)
    axes.set(
        ylabel="milliseconds", title="One update: time, and bytes of state per parameter", ylim=(0, 1.3 * max(times))
    )
