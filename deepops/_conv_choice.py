"""Which convolution a block on a GPU uses: deepops' own, fused with what follows it, or torch's. Measured, not guessed.

Kernels that were never tuned on the very device lose to cuDNN on some shapes and win on others. So both ways of a call
are timed once, on the device, with the tensors of the first call of its kind, and the winner is kept in memory for as
long as the process lives. Nothing is written to disk.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from statistics import median
from threading import Lock
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

WARM_UP, ROUNDS, REPEATS = 2, 5, 3  # calls of each way before any is timed; medians of so many times of so many calls
MOST_KEYS = 1024  # images of ever new sizes are not measured for ever


class Key(NamedTuple):
    """A kind of call."""

    device: torch.device
    dtype: torch.dtype
    x: torch.Size  # [N, C, H, W]
    conv_weight: torch.Size  # [K, C, R, S]
    geometry: tuple[int, ...]  # stride (y, x), padding (top, bottom, left, right), dilation (y, x)
    mode: str  # "training", "evaluation", or "folded": evaluation where torch's way needs no pass of batch norm
    residual: bool
    smooth: bool  # whether the activation computes an exponential or the like; else it compares


@dataclass(frozen=True)
class Times:
    """Milliseconds per call, infinite where there was not memory enough to find out."""

    fused: float
    aten: float

    @property
    def winner(self) -> str:
        """``"fused"`` or ``"aten"``."""
        return "fused" if self.fused < self.aten else "aten"


_measured: dict[Key, Times] = {}
# Calls, as their arguments come, that are known to go torch's way: found at once.
_left_to_torch: set[Hashable] = set()
_one_at_a_time = Lock()


def device_milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """What ``call`` takes on the GPU ``device``, between two events of its stream."""
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(REPEATS):
            call()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / REPEATS


timer: Callable[[Callable[[], object], torch.device], float] = device_milliseconds  # tests have another


def choose(key: Key, fused: Callable[[], object], aten: Callable[[], object]) -> str:
    """The way of calls of the kind ``key``: ``"fused"`` or ``"aten"``; measures them where that has not been done.

    Args:
        key: the kind.
        fused, aten: one call each way. They may be called several times: they must change nothing.
    """
    if torch.are_deterministic_algorithms_enabled():  # time must not decide about bits
        return "aten"
    times = _measured.get(key)
    if times is not None:
        return times.winner
    if len(_measured) >= MOST_KEYS or not _may_measure():
        return "aten"
    if not _one_at_a_time.acquire(blocking=False):  # two that measure at once would measure each other
        return "aten"
    try:
        times = _measured.get(key)
        if times is None:
            times = _measured[key] = _measure(key.device, fused, aten)
    finally:
        _one_at_a_time.release()
    return times.winner


def is_left_to_torch(call: Hashable) -> bool:
    """Whether ``leave_to_torch`` was told of such a call."""
    return call in _left_to_torch


def leave_to_torch(call: Hashable, key: Key | None = None) -> None:
    """Remember of a call that is not covered, or of one of kind ``key`` if that was measured, that it is torch's."""
    if (key is None or (key in _measured and _measured[key].winner == "aten")) and len(_left_to_torch) < MOST_KEYS:
        _left_to_torch.add(call)


def measured() -> dict[Key, Times]:
    """All that has been measured so far, in that order."""
    return dict(_measured)


def forget() -> None:
    """Measure everything anew."""
    _measured.clear()
    _left_to_torch.clear()


def _may_measure() -> bool:
    """Not where calls are recorded or counted: they would be taken for the user's."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
        return False
    return not (is_in_torch_dispatch_mode() or torch._C._is_tracing())


def _measure(device: torch.device, fused: Callable[[], object], aten: Callable[[], object]) -> Times:
    """Both by turns: what slows the device down for a while slows down both."""
    ways: tuple[Callable[[], object], ...] = (aten, fused)
    samples: tuple[list[float], ...] = ([], [])
    try:
        with torch.no_grad():
            for _ in range(WARM_UP):
                for way in ways:
                    way()
            for _ in range(ROUNDS):
                for way, times in zip(ways, samples, strict=True):
                    times.append(timer(way, device))
    except torch.OutOfMemoryError:
        return Times(float("inf"), float("inf"))
    return Times(fused=median(samples[1]), aten=median(samples[0]))


def describe(matches: Callable[[Key], bool]) -> list[str]:
    """A line for each kind of call that ``matches``: its way and both times."""
    return [_line(key, times) for key, times in measured().items() if matches(key)]


def _line(key: Key, times: Times) -> str:
    what = f"{str(key.dtype).removeprefix('torch.')} {list(key.x)} in {key.mode.replace('folded', 'evaluation')}"
    what += " with a residual" if key.residual else ""
    way = "deepops' convolution" if times.winner == "fused" else "torch's convolution"
    if times.fused == float("inf"):
        return f"{what}: {way}, too little memory to time both"
    return f"{what}: {way}; timed {times.fused:.4f} ms (deepops), {times.aten:.4f} ms (torch)"
