"""``deepops train --compare-optimizers``: the course module's comparison of optimizers, measured.

A round is one seed at one part of wrong labels. In it every optimizer trains with every learning rate: all from the
same weights, on the same batches in the same order, with the same dropout masks, and in turns step by step, so that a
busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from deepops.cli.data import load_data, with_label_noise
from deepops.cli.errors import require
from deepops.cli.models import OPTIMIZERS, build_pair
from deepops.cli.side import Epoch, Side, median_after_warm_up
from deepops.cli.train import INTERRUPTED, Session, find_device, output_folder, stop_on_interrupt, train
from deepops.cli.training_data import TrainingData


@dataclass(frozen=True)
class Rule:
    """One update rule of the comparison."""

    title: str
    learning_rates: tuple[float, ...]  # tried unless others are asked for
    hyper_parameters: tuple[str, ...]  # names of the options that it has beside the learning rate


RULES = {
    "sgd": Rule("SGD with momentum", (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), ("momentum", "weight_decay")),
    "rmsprop": Rule("RMSprop", (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2), ("alpha", "eps", "weight_decay")),
    "adam": Rule("Adam", (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2), ("betas", "eps", "weight_decay")),
}


@dataclass(frozen=True)
class Run:
    """What one training gave."""

    optimizer: str
    learning_rate: float
    label_noise: float  # part of the training labels that were wrong
    seed: int
    losses: list[float]  # of every step
    epochs: list[Epoch]
    step_ms: float  # median of a whole training step
    update_ms: float  # median of optimizer.step() in it
    state_bytes: float  # of the optimizer, per element of the parameters

    @property
    def accuracy(self) -> float:
        """On the test images, at the end."""
        return self.epochs[-1].test_accuracy

    @property
    def final_loss(self) -> float:
        """The mean loss of the last epoch."""
        return self.epochs[-1].loss


def percent(part: float) -> str:
    """0.125 -> "12.5%"."""
    return f"{100 * part:g}%"


def rank(accuracy: float, final_loss: float) -> tuple[float, float]:
    """The larger the better: by accuracy, and where that is equal by loss, which may be NaN."""
    return accuracy, -final_loss if math.isfinite(final_loss) else -math.inf


class UpdateTimer:
    """Times every ``step()`` of an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        """The parameters of ``optimizer`` are on ``device``."""
        self.seconds: list[float] = []
        self._device = device
        self._start = 0.0
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, *_: Any) -> None:
        self._wait()
        self._start = perf_counter()

    def _after(self, *_: Any) -> None:
        self._wait()
        self.seconds.append(perf_counter() - self._start)

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.get_device_module(self._device).synchronize(self._device)


@dataclass
class Comparison:
    """One run of ``deepops train --compare-optimizers``."""

    arguments: argparse.Namespace
    device: torch.device
    data: TrainingData  # of the first seed, without wrong labels
    rounds: int  # that were asked for
    runs: list[Run]
    interrupted: bool = False

    @property
    def noises(self) -> list[float]:
        """Parts of wrong labels of which there are runs, rising."""
        return sorted({run.label_noise for run in self.runs})


def run_compare_optimizers(arguments: argparse.Namespace) -> int:
    """Train, print and write the results; 0, or 130 when Ctrl-C ended it early.

    Raises:
        UserError: the device, the data, a package or the output folder is not available.
        KeyboardInterrupt: Ctrl-C before the first round was complete.
    """
    require("rich", "matplotlib")
    from deepops.cli.optimizer_report import print_table, write_results

    device = find_device(arguments.device)
    data = load_data(arguments.data, arguments.seed)
    out = output_folder(arguments, data)
    comparison = compare(arguments, device, data)
    if not comparison.runs:
        raise KeyboardInterrupt  # before the first round was complete: there is nothing to show
    print_table(comparison)
    write_results(comparison, out)
    return INTERRUPTED if comparison.interrupted else 0


def compare(arguments: argparse.Namespace, device: torch.device, data: TrainingData) -> Comparison:
    """All rounds; those that an interrupt cuts short are left out. ``data`` is that of the first seed."""
    from deepops.cli.progress import Rounds

    rates = learning_rates(arguments)
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    plan = [(seed, noise) for seed in seeds for noise in arguments.label_noise]
    comparison = Comparison(arguments, device, data, len(plan), [])
    with stop_on_interrupt() as stop, Rounds(len(plan), arguments.epochs) as progress:
        progress.say(_heading(comparison, rates))
        if data.note:
            progress.say(f"note: {data.note}")
        for seed, noise in plan:
            seeded = data if seed == arguments.seed else load_data(arguments.data, seed)
            noisy = with_label_noise(seeded, noise, seed)
            session, timers = _prepare(arguments, device, noisy, seed, rates)
            if not train(session, progress, stop):
                comparison.interrupted = True
                break
            found = [_result(key, noise, seed, side, timers[key]) for key, side in session.sides.items()]
            comparison.runs += found
            progress.say(_one_line(found, noise, seed))
    return comparison


def learning_rates(arguments: argparse.Namespace) -> dict[str, tuple[float, ...]]:
    """Those to try, by optimizer."""
    return {name: rule.learning_rates for name, rule in RULES.items()} | dict(arguments.learning_rates)


def _prepare(
    arguments: argparse.Namespace,
    device: torch.device,
    data: TrainingData,
    seed: int,
    rates: dict[str, tuple[float, ...]],
) -> tuple[Session, dict[str, UpdateTimer]]:
    """Models and optimizers of one round, by a key such as "sgd 0.01", and what times their updates."""
    start = build_pair(arguments.model, seed)["deepops"]
    sides, timers = {}, {}
    for name, values in rates.items():
        for rate in values:
            key = f"{name} {rate!r}"
            torch.manual_seed(seed)  # on every device: where the dropout starts
            model = copy.deepcopy(start).to(device)
            optimizer = OPTIMIZERS[name].build("deepops", model.parameters(), lr=rate)
            sides[key] = Side(model, optimizer, device, arguments.precision)
            timers[key] = UpdateTimer(optimizer, device)
    return Session(argparse.Namespace(**{**vars(arguments), "seed": seed}), device, data, sides), timers


def _result(key: str, noise: float, seed: int, side: Side, timer: UpdateTimer) -> Run:
    name, rate = key.split()
    elements = sum(param.numel() for param in side.model.parameters())
    states = [value for state in side.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return Run(
        name,
        float(rate),
        noise,
        seed,
        side.losses,
        side.epochs,
        step_ms=1000 * side.median_step(),
        update_ms=1000 * median_after_warm_up(timer.seconds),
        state_bytes=sum(value.nbytes for value in states) / elements,
    )


def _heading(comparison: Comparison, rates: dict[str, tuple[float, ...]]) -> str:
    arguments, data = comparison.arguments, comparison.data
    return (
        f"{arguments.model} on {data.name}: {len(data.train_inputs)} images to train, {len(data.test_inputs)} to test; "
        f"{arguments.precision} on {comparison.device}; {comparison.rounds} rounds (label noise, seed) of "
        f"{sum(map(len, rates.values()))} trainings in turns, {arguments.epochs} epochs each"
    )


def _one_line(runs: list[Run], noise: float, seed: int) -> str:
    parts = []
    for name in RULES:
        best = max((run for run in runs if run.optimizer == name), key=lambda run: rank(run.accuracy, run.final_loss))
        parts.append(f"{name} {best.accuracy:.2%} at {best.learning_rate:g}")
    return f"{percent(noise)} wrong labels, seed {seed}: best test accuracy " + ", ".join(parts)
