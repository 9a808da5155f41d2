"""Live progress of ``deepops train`` on the terminal, and one line per epoch that stays."""

from __future__ import annotations

from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from deepops.cli.train import Session

_REFRESH_SECONDS = 0.2


class Progress:
    """A bar of the steps of the running epoch with the current losses; a context manager.

    The bar is redrawn between steps by the thread that trains: a drawing thread of its own would steal time from the
    steps that are being timed.
    """

    def __init__(self, session: Session, console: Console | None = None) -> None:
        """Print on ``console`` (default: standard output)."""
        self._session = session
        self._console = console or Console(highlight=False)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=self._console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, losses="")
        self._drawn = 0.0

    def __enter__(self) -> Progress:
        """Say what is going to be trained and show the bar."""
        arguments, data = self._session.arguments, self._session.data
        what = " and ".join(self._session.sides)
        self._console.print(
            f"{arguments.model} on {data.name}: {len(data.train_images)} images to train, {len(data.test_images)} to "
            f"test; {arguments.precision} on {self._session.device}; {what}",
            markup=False,
        )
        if data.note:
            self._console.print(f"note: {data.note}", markup=False)
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        self._bar.stop()

    def start_epoch(self, epoch: int, steps: int) -> None:
        """Epoch ``epoch`` (from 1) of ``steps`` steps begins."""
        label = f"epoch {epoch}/{self._session.arguments.epochs}"
        self._bar.reset(self._task, total=steps, description=label, losses="")

    def advance(self) -> None:
        """All sides made one more step."""
        self._bar.update(self._task, advance=1)
        if perf_counter() - self._drawn > _REFRESH_SECONDS:
            losses = "  ".join(f"{name} loss {side.losses[-1]:.3f}" for name, side in self._session.sides.items())
            self._bar.update(self._task, losses=losses)
            self._bar.refresh()
            self._drawn = perf_counter()

    def end_epoch(self, epoch: int) -> None:
        """Print what epoch ``epoch`` gave for each side."""
        parts = [f"epoch {epoch}/{self._session.arguments.epochs}"]
        for name, side in self._session.sides.items():
            last = side.epochs[-1]
            parts.append(f"{name}: loss {last.loss:.4f}, test accuracy {last.test_accuracy:.2%}")
        self._console.print("   ".join(parts), markup=False, soft_wrap=True)
