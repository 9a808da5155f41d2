"""What the plots of ``deepops train`` share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def figure_file(path: Path, width: float, height: float, title: str) -> Iterator[Figure]:
    """A figure of so many inches to draw in, which then goes into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # drawn in memory: no display, and no global state of pyplot
    yield figure
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
