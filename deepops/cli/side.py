"""One side of a comparison: a model with its optimizer, its own random numbers, and what its training measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP = 3  # first steps left out of the timing: they build caches and optimizer state


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training data gave."""

    loss: float  # mean over the samples, as seen during training
    test_accuracy: float  # fraction of the targets
    train_seconds: float  # sum of the step times


class Side:
    """Trains one model exactly as if nothing else ran in the process.

    Dropout draws from torch's global generators. Each side keeps its own copy of their state and puts it in place for
    its steps, so that two sides can take turns step by step and still see the numbers they would see alone.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, device: torch.device, precision: str) -> None:
        """``model`` is on ``device``, ``optimizer`` updates it; the generators' state now is where this side starts."""
        self.model = model
        self.optimizer = optimizer
        self.device = device
        self.precision = precision
        self.criterion = nn.CrossEntropyLoss()
        # Without fp16 the scaler is switched off: scale(), step() and update() then do what plain code would do.
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.losses: list[float] = []  # of every step
        self.seconds: list[float] = []  # of every step
        self.epochs: list[Epoch] = []
        self.loss_by_position: Tensor | None = None  # [T], of the test pieces of a text at the end of the last epoch
        self.saved_bytes = 0
        self.batch_sizes: list[int] = []  # of every step
        self._epoch_start = 0  # the first step of the epoch that runs
        self._random_state = self._read_random_state()

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """One training step on a batch (on any device), timed; returns its loss."""
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        with self._own_random_numbers():
            if self.losses:
                start = perf_counter()
                loss = self._train_on(inputs, targets)
                seconds = perf_counter() - start
            else:  # the first step is warm-up anyway: count what it saves
                known = [inputs, targets, *self.model.parameters(), *self.model.buffers()]
                start = perf_counter()
                with count_saved_bytes(known) as counter:
                    loss = self._train_on(inputs, targets)
                seconds = perf_counter() - start
                self.saved_bytes = counter.bytes
        self.losses.append(loss)
        self.seconds.append(seconds)
        self.batch_sizes.append(len(inputs))
        return loss

    def _train_on(self, inputs: Tensor, targets: Tensor) -> float:
        """The module's training step."""
        self.optimizer.zero_grad()
        with self._autocast():
            outputs = self.model(inputs)
            loss = self.criterion(outputs, targets)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return float(loss.item())  # waits for the device, so that the time is that of the work

    def end_epoch(self, inputs: Tensor, targets: Tensor) -> Epoch:
        """Close the epoch: its mean loss, and the accuracy on the test ``inputs``."""
        steps = slice(self._epoch_start, None)
        counts = self.batch_sizes[steps]
        loss = sum(value * count for value, count in zip(self.losses[steps], counts, strict=True)) / sum(counts)
        self.epochs.append(Epoch(loss, self.evaluate(inputs, targets), sum(self.seconds[steps])))
        self._epoch_start = len(self.losses)
        self.model.train()
        return self.epochs[-1]

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, targets: Tensor, batch_size: int = 256) -> float:
        """The fraction of ``targets`` that the model (in evaluation mode) tells right.

        For the pieces of a text, with a target per position, also ``loss_by_position``.
        """
        self.model.eval()
        right, losses = 0, []
        with self._autocast():
            for batch, expected in zip(torch.split(inputs, batch_size), torch.split(targets, batch_size), strict=True):
                expected = expected.to(self.device)
                scores = self.model(batch.to(self.device))
                right += int((scores.argmax(1) == expected).sum())
                if expected.dim() == 2:
                    losses.append(F.cross_entropy(scores.float(), expected, reduction="none").sum(0))
        self.loss_by_position = sum(losses[1:], losses[0]).cpu() / len(inputs) if losses else None
        return right / targets.numel()

    def samples_per_second(self) -> float:
        """Training samples per second: those of a full batch in the median step."""
        return max(self.batch_sizes) / self.median_step()

    def median_step(self) -> float:
        """Median seconds per training step, warm-up left out where there were more steps than that."""
        return median_after_warm_up(self.seconds)

    def _autocast(self) -> torch.autocast:
        if self.precision == "fp32":
            return torch.autocast(self.device.type, enabled=False)
        return torch.autocast(self.device.type, DTYPES[self.precision])

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        self._write_random_state(self._random_state)
        try:
            yield
        finally:
            self._random_state = self._read_random_state()

    def _read_random_state(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self.device.type != "cpu":
            states.append(torch.get_device_module(self.device).get_rng_state(self.device))
        return states

    def _write_random_state(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device.type != "cpu":
            torch.get_device_module(self.device).set_rng_state(states[1], self.device)


def median_after_warm_up(seconds: list[float]) -> float:
    """Of the times of all steps, the first ones left out where there are more."""
    return statistics.median(seconds[WARM_UP:] or seconds)


class SavedBytes:
    """Counts the memory that a forward pass keeps for its backward pass, each storage once."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        """``known``: tensors that exist anyway and are not counted."""
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        """Called by autograd with every tensor that it saves."""
        storage = tensor.untyped_storage()
        # While the graph is alive no saved storage is freed, so equal addresses mean the same storage.
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


@contextmanager
def count_saved_bytes(known: Iterable[Tensor]) -> Iterator[SavedBytes]:
    """Count what forward passes inside the block save for backward: the bytes of distinct storages.

    A tensor saved by several operations (the output of ReLU, say, by ReLU and by the pooling after it) or seen through
    views counts once, with its whole storage: that is the memory it holds. ``known`` are tensors whose memory is not
    held by the graph but there anyway: parameters, buffers and the batch itself. The same rule serves both sides.
    """
    counter = SavedBytes(known)
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
        yield counter
