"""Live progress of ``deepops train`` on the terminal, and the lines that stay."""

from __future__ import annotations

from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from typing_extensions import Self

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

    def __enter__(self) -> Self:
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

    def advance(self) -> None:
        """All sides have made one more step."""
        self._bar.update(self._task, advance=1)
        if perf_counter() - self._drawn > _REFRESH_SECONDS:
            self._bar.update(self._task, note=self._note())
            self._bar.refresh()
            self._drawn = perf_counter()

    def _note(self) -> str:
        """What stands behind the bar."""
        return ""


class Progress(StepBar):
    """The steps of the running epoch with the current losses; a context manager."""

    def __init__(self, session: Session, console: Console | None = None) -> None:
        """Print on ``console`` (default: standard output)."""
        super().__init__(console)
        self._session = session

    def __enter__(self) -> Self:
        """Say what is going to be trained and show the bar."""
        arguments, data = self._session.arguments, self._session.data
        what = " and ".join(self._session.sides)
        self.say(
            f"{arguments.model} on {data.name}: {len(data.train_inputs)} {data.samples} to train, "
            f"{len(data.test_inputs)} to test; {arguments.precision} on {self._session.device}; {what}"
        )
        if data.note:
            self.say(f"note: {data.note}")
        return super().__enter__()

    def start_epoch(self, epoch: int, steps: int) -> None:
        """Epoch ``epoch`` (from 1) of ``steps`` steps begins."""
        self.reset(f"epoch {epoch}/{self._session.arguments.epochs}", steps)

    def _note(self) -> str:
        return "  ".join(f"{name} loss {side.losses[-1]:.3f}" for name, side in self._session.sides.items())

    def end_epoch(self, epoch: int) -> None:
        """Print what epoch ``epoch`` gave for each side."""
        parts = [f"epoch {epoch}/{self._session.arguments.epochs}"]
        for name, side in self._session.sides.items():
            last = side.epochs[-1]
            parts.append(f"{name}: loss {last.loss:.4f}, test accuracy {last.test_accuracy:.2%}")
        self.say("   ".join(parts))


class Rounds(StepBar):
    """All rounds of ``deepops train --compare-optimizers`` in one bar; a context manager."""

    def __init__(self, rounds: int, epochs: int, console: Console | None = None) -> None:
        """There will be so many ``rounds`` of so many ``epochs``."""
        super().__init__(console)
        self._epochs = rounds * epochs
        self._started = False

    def start_epoch(self, epoch: int, steps: int) -> None:
        """Every epoch has the same number of ``steps``."""
        if not self._started:
            self.reset("batches", self._epochs * steps)
            self._started = True

    def end_epoch(self, epoch: int) -> None:
        """Nothing is said before the round is over."""
