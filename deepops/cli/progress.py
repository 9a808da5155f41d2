"""Live progress of ``deepops train`` on the terminal, and the lines that stay."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from deepops.cli.train import Session

_REFRESH_SECONDS = 0.2


class StepBar:
    """A bar of training steps; a context manager.

    The bar is redrawn between steps by the thread that trains: a drawing thread of its own would steal time from the
    steps that are being timed.
    """

    def __init__(self, console: Console | None = None) -> None:
        """Print on ``console`` (default: standard output)."""
        self._console = console or Console(highlight=False)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, note="")
        self._drawn = 0.0

    def __enter__(self) -> StepBar:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, markup=False, soft_wrap=True)

    def reset(self, label: str, steps: int) -> None:
        """Begin again, for so many steps."""
        self._bar.reset(self._task, total=steps, description=label, note="")

    def advance(self, note: Callable[[], str] = str) -> None:
        """One more step; ``note`` tells what stands behind the bar."""
        self._bar.update(self._task, advance=1)
        if perf_counter() - self._drawn > _REFRESH_SECONDS:
            self._bar.update(self._task, note=note())
            self._bar.refresh()
            self._drawn = perf_counter()


class Progress:
    """The steps of the running epoch with the current losses; a context manager."""

    def __init__(self, session: Session, console: Console | None = None) -> None:
        """Print on ``console`` (default: standard output)."""
        self._session = session
        self._bar = StepBar(console)

    def __enter__(self) -> Progress:
        """Say what is going to be trained and show the bar."""
        arguments, data = self._session.arguments, self._session.data
        what = " and ".join(self._session.sides)
        self._bar.say(
            f"{arguments.model} on {data.name}: {len(data.train_images)} images to train, {len(data.test_images)} to "
            f"test; {arguments.precision} on {self._session.device}; {what}"
        )
        if data.note:
            self._bar.say(f"note: {data.note}")
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        self._bar.__exit__(kind, error, trace)

    def start_epoch(self, epoch: int, steps: int) -> None:
        """Epoch ``epoch`` (from 1) of ``steps`` steps begins."""
        self._bar.reset(f"epoch {epoch}/{self._session.arguments.epochs}", steps)

    def advance(self) -> None:
        """All sides made one more step."""
        self._bar.advance(self._losses)

    def _losses(self) -> str:
        return "  ".join(f"{name} loss {side.losses[-1]:.3f}" for name, side in self._session.sides.items())

    def end_epoch(self, epoch: int) -> None:
        """Print what epoch ``epoch`` gave for each side."""
        parts = [f"epoch {epoch}/{self._session.arguments.epochs}"]
        for name, side in self._session.sides.items():
            last = side.epochs[-1]
            parts.append(f"{name}: loss {last.loss:.4f}, test accuracy {last.test_accuracy:.2%}")
        self._bar.say("   ".join(parts))


class Rounds:
    """All rounds of ``deepops train --compare-optimizers`` in one bar; a context manager."""

    def __init__(self, rounds: int, epochs: int, console: Console | None = None) -> None:
        """There will be so many ``rounds`` of so many ``epochs``."""
        self._epochs = rounds * epochs
        self._bar = StepBar(console)
        self._started = False

    def __enter__(self) -> Rounds:
        """Show the bar."""
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        self._bar.__exit__(kind, error, trace)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._bar.say(text)

    def start_epoch(self, epoch: int, steps: int) -> None:
        """Every epoch has the same number of ``steps``."""
        if not self._started:
            self._bar.reset("batches", self._epochs * steps)
            self._started = True

    def advance(self) -> None:
        """All sides made one more step."""
        self._bar.advance()

    def end_epoch(self, epoch: int) -> None:
        """Nothing is said before the round is over."""
