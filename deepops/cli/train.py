"""``deepops train``: the course module's training, with stock PyTorch and with deepops side by side.

Both sides start from the same weights, see the same batches in the same order and draw the same dropout masks. They
take turns step by step in one process (and swap who goes first), so that a busy machine slows both alike.
"""

from __future__ import annotations

import argparse
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch
from torch.utils.data import DataLoader, TensorDataset

from deepops.cli.data import load_data
from deepops.cli.errors import UserError, first_line, require
from deepops.cli.models import MODELS, OPTIMIZERS, build_pair
from deepops.cli.side import Side
from deepops.cli.training_data import TrainingData

INTERRUPTED = 130


@dataclass
class Session:
    """One run of ``deepops train``."""

    arguments: argparse.Namespace
    device: torch.device
    data: TrainingData
    sides: dict[str, Side]  # "stock" (when comparing) and "deepops"
    interrupted: bool = False


class Listener(Protocol):
    """Who is told how the training goes."""

    def start_epoch(self, epoch: int, steps: int) -> None:
        """Epoch ``epoch`` (from 1) of ``steps`` steps begins."""

    def advance(self) -> None:
        """All sides made one more step."""

    def end_epoch(self, epoch: int) -> None:
        """Epoch ``epoch`` is over, or was cut short."""


def run_train(arguments: argparse.Namespace) -> int:
    """Train, print and write the results; 0, or 130 when Ctrl-C ended the training early.

    Raises:
        UserError: the device, the data, a package or the output folder is not available.
    """
    require("rich", "matplotlib")
    from deepops.cli.progress import Progress
    from deepops.cli.report import print_summary, write_results

    device = find_device(arguments.device)
    data = load_data(arguments.data, arguments.seed, MODELS[arguments.model].data)
    out = output_folder(arguments, data)
    session = prepare(arguments, device, data)
    with stop_on_interrupt() as stop, Progress(session) as progress:
        session.interrupted = not train(session, progress, stop)
    print_summary(session)
    write_results(session, out)
    return INTERRUPTED if session.interrupted else 0


def find_device(name: str) -> torch.device:
    """The device called ``name``, after a trial that it computes; "auto": a CUDA GPU if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type != "meta" and torch.ones(2, device=device).sum().item() == 2:
            return device
        reason = "it holds no data"
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        reason = first_line(error)
    raise UserError(f"--device {name}: not available here: {reason}")


def output_folder(arguments: argparse.Namespace, data: TrainingData) -> Path:
    """The folder for the results, made and found to be writable."""
    out = Path(arguments.out or f"runs/{arguments.model}-{data.name}").expanduser()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass  # found out now rather than after the training
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from error
    return out


def prepare(arguments: argparse.Namespace, device: torch.device, data: TrainingData) -> Session:
    """Models, optimizers and random numbers of both sides, ready for the first step."""
    models = build_pair(arguments.model, arguments.seed)
    if not arguments.compare:
        del models["stock"]
    sides = {}
    for name, model in models.items():
        torch.manual_seed(arguments.seed)  # on every device: where this side's dropout starts
        model.to(device)
        optimizer = OPTIMIZERS[arguments.optimizer].build(name, model.parameters())
        sides[name] = Side(model, optimizer, device, arguments.precision)
    return Session(arguments, device, data, sides)


def train(session: Session, listener: Listener, stop: threading.Event) -> bool:
    """All epochs of all sides; False when ``stop`` was set before the end.

    A step is never cut in two, and an epoch cut short is still evaluated: the results belong to the model as saved.
    """
    data, arguments = session.data, session.arguments
    batches = DataLoader(
        TensorDataset(data.train_inputs, data.train_targets),
        batch_size=arguments.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(arguments.seed),
    )
    for epoch in range(1, arguments.epochs + 1):
        listener.start_epoch(epoch, len(batches))
        for index, (images, targets) in enumerate(batches):
            order = list(session.sides) if index % 2 == 0 else list(reversed(session.sides))
            for name in order:
                session.sides[name].step(images, targets)
            listener.advance()
            if stop.is_set():
                break
        for side in session.sides.values():
            side.end_epoch(data.test_inputs, data.test_targets)
        listener.end_epoch(epoch)
        if stop.is_set():
            return False
    return True


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Inside the block the first Ctrl-C only sets the event; a second one raises KeyboardInterrupt as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python delivers signals to the main thread only
        return

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
