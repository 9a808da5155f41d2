"""Which of the two convolutions a call on a GPU takes: the setting, and times that are measured once. Without a GPU."""

from __future__ import annotations

import doctest
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_events import FakeEvent
from torch.utils._python_dispatch import TorchDispatchMode

import deepops
from deepops import _conv_choice
from deepops._conv_choice import Key, Times, choose


def key(batch: int = 2, **changes: Any) -> Key:
    sizes = torch.Size([batch, 8, 5, 5]), torch.Size([16, 8, 3, 3])
    made = Key(torch.device("cpu"), torch.float16, *sizes, (1, 1, 1, 1, 1, 1, 1, 1), "training", False, False)
    return made._replace(**changes)


class Clock:
    """A timer on which calls take what ``times`` says, a value a call; ``seen`` has the ways that were timed."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {"fused": [1.0], "aten": [2.0]}
        self.seen: list[str] = []
        self.calls: list[str] = []

    def way(self, name: str) -> Callable[[], None]:
        return lambda: self.calls.append(name)

    def ways(self) -> tuple[Callable[[], None], Callable[[], None]]:
        return self.way("fused"), self.way("aten")

    def __call__(self, call: Callable[[], object], device: torch.device) -> float:
        call()
        name = self.calls[-1]
        self.seen.append(name)
        values = self.times[name]
        return values[(self.seen.count(name) - 1) % len(values)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(_conv_choice, "timer", clock)
    monkeypatch.setattr(_conv_choice, "_measured", {})
    monkeypatch.setattr(_conv_choice, "_left_to_torch", set())
    return clock


# ---- the setting -----------------------------------------------------------------------------------------------------


def test_the_setting_is_checked_at_once_and_given_back() -> None:
    assert deepops.backends.conv == "auto"
    for value in ("Fused", "", None, 1):
        with pytest.raises(ValueError, match="conv: expected one of 'auto', 'fused', 'aten', got "):
            deepops.backends.conv = value
        with pytest.raises(ValueError, match="conv: expected"), deepops.backends.flags(conv=value):
            raise AssertionError
        assert deepops.backends.conv == "auto"
    with deepops.backends.flags(conv="fused"):
        assert deepops.backends.conv == "fused"
        with pytest.raises(ZeroDivisionError), deepops.backends.flags(conv="aten"):
            raise ZeroDivisionError(deepops.backends.conv)
        assert deepops.backends.conv == "fused"
    assert deepops.backends.conv == "auto"


def test_the_documentation_is_true() -> None:
    result = doctest.testmod(deepops.backends)
    assert result.attempted
    assert not result.failed


# ---- measuring -------------------------------------------------------------------------------------------------------


def test_a_kind_is_measured_once_by_turns_after_a_warm_up(clock: Clock) -> None:
    assert choose(key(), *clock.ways()) == "fused"
    turns, warm = _conv_choice.ROUNDS, _conv_choice.WARM_UP
    assert clock.calls == ["aten", "fused"] * (warm + turns)
    assert clock.seen == ["aten", "fused"] * turns
    for _ in range(3):
        assert choose(key(), *clock.ways()) == "fused"
    assert len(clock.seen) == 2 * turns
    assert _conv_choice.measured() == {key(): Times(fused=1.0, aten=2.0)}
    _conv_choice.forget()
    clock.times["fused"] = [3.0]
    assert choose(key(), *clock.ways()) == "aten"


def test_every_difference_makes_another_kind(clock: Clock) -> None:
    others = [
        key(),
        key(batch=3),
        key(device=torch.device("meta")),
        key(dtype=torch.bfloat16),
        key(conv_weight=torch.Size([8, 8, 3, 3])),
        key(geometry=(2, 1, 1, 1, 1, 1, 1, 1)),
        key(mode="folded"),
        key(residual=True),
        key(smooth=True),
    ]
    for other in others:
        choose(other, *clock.ways())
    assert list(_conv_choice.measured()) == others


def test_medians_decide(clock: Clock) -> None:
    """One call that had to wait says nothing."""
    assert _conv_choice.ROUNDS % 2
    clock.times = {
        "fused": [99.0, *[1.0] * (_conv_choice.ROUNDS - 1)],
        "aten": [0.5, *[2.0] * (_conv_choice.ROUNDS - 1)],
    }
    assert choose(key(), *clock.ways()) == "fused"


def test_a_tie_is_torchs(clock: Clock) -> None:
    clock.times["aten"] = [1.0]
    assert choose(key(), *clock.ways()) == "aten"


def test_nothing_is_recorded_while_measuring(clock: Clock) -> None:
    seen = []

    def aten() -> None:
        seen.append(torch.is_grad_enabled())
        clock.calls.append("aten")

    choose(key(), clock.way("fused"), aten)
    assert seen == [False] * (_conv_choice.WARM_UP + _conv_choice.ROUNDS)
    assert torch.is_grad_enabled()


class Watching(TorchDispatchMode):
    """A mode that sees every operation, as counters and recorders do."""


def test_what_must_not_be_measured_takes_torchs_way(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    with Watching():
        assert choose(key(), *clock.ways()) == "aten"
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(key(), *clock.ways()) == "aten"
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(_conv_choice, "MOST_KEYS", 0)
    assert choose(key(), *clock.ways()) == "aten"
    monkeypatch.setattr(_conv_choice, "MOST_KEYS", 1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(key(), *clock.ways()) == "aten"
    assert not clock.calls
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose(key(), *clock.ways()) == "fused"
    assert choose(key(batch=3), *clock.ways()) == "aten"  # the second kind, where one may be measured
    assert len(_conv_choice.measured()) == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(key(), *clock.ways()) == "fused"  # what is known may be captured
    with Watching():
        assert choose(key(), *clock.ways()) == "fused"


def test_deterministic_algorithms_do_not_depend_on_what_was_measured(clock: Clock) -> None:
    assert choose(key(), *clock.ways()) == "fused"
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(key(), *clock.ways()) == "aten"
    finally:
        torch.use_deterministic_algorithms(False)
    assert choose(key(), *clock.ways()) == "fused"


def test_too_little_memory_is_torchs_and_not_tried_again(clock: Clock) -> None:
    def full() -> None:
        clock.calls.append("full")
        raise torch.OutOfMemoryError

    for _ in range(2):
        assert choose(key(), full, clock.way("aten")) == "aten"
    assert clock.calls.count("full") == 1
    (line,) = _conv_choice.describe(lambda _: True)
    assert line == "float16 [2, 8, 5, 5] in training: torch's convolution, too little memory to time both"


def test_an_error_is_told_and_leaves_no_choice_behind(clock: Clock) -> None:
    def broken() -> None:
        raise RuntimeError("a kernel failed")

    with pytest.raises(RuntimeError, match="a kernel failed"):
        choose(key(), broken, clock.way("aten"))
    assert choose(key(), *clock.ways()) == "fused"


def test_threads_measure_a_kind_once_and_none_waits(clock: Clock) -> None:
    """While one measures, the others take torch's way: two that measure would measure each other."""
    started, go_on = threading.Event(), threading.Event()
    answers: dict[str, str] = {}

    def slow() -> None:
        started.set()
        assert go_on.wait(30)
        clock.calls.append("fused")

    def measure() -> None:
        answers["first"] = choose(key(), slow, clock.way("aten"))

    thread = threading.Thread(target=measure)
    thread.start()
    assert started.wait(30)
    calls = len(clock.calls)
    assert choose(key(), *clock.ways()) == "aten"  # the same kind
    assert choose(key(batch=3), *clock.ways()) == "aten"  # another
    assert len(clock.calls) == calls
    go_on.set()
    thread.join(30)
    assert answers == {"first": "fused"}
    assert choose(key(), *clock.ways()) == "fused"
    assert list(_conv_choice.measured()) == [key()]
    assert choose(key(batch=3), *clock.ways()) == "fused"


def test_many_threads_at_once(clock: Clock) -> None:
    barrier, answers = threading.Barrier(8), []

    def ask() -> None:
        barrier.wait(30)
        answers.append(choose(key(), *clock.ways()))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert "fused" in answers
    assert len(clock.seen) == 2 * _conv_choice.ROUNDS


def test_the_timer_counts_the_calls_between_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    devices: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: devices.append(device) or torch.no_grad())
    calls: list[int] = []
    milliseconds = _conv_choice.device_milliseconds(lambda: calls.append(1), torch.device("cuda", 1))
    assert milliseconds == 6.0 / _conv_choice.REPEATS
    assert len(calls) == _conv_choice.REPEATS
    assert devices == [torch.device("cuda", 1)]


def test_a_line_says_the_way_and_both_times(clock: Clock) -> None:
    clock.times = {"fused": [0.125], "aten": [0.25]}
    choose(key(residual=True), *clock.ways())
    clock.times = {"fused": [0.5], "aten": [0.25]}
    choose(key(mode="folded", dtype=torch.bfloat16), *clock.ways())
    assert _conv_choice.describe(lambda _: True) == [
        "float16 [2, 8, 5, 5] in training with a residual: deepops' convolution; "
        "timed 0.1250 ms (deepops), 0.2500 ms (torch)",
        "bfloat16 [2, 8, 5, 5] in evaluation: torch's convolution; timed 0.5000 ms (deepops), 0.2500 ms (torch)",
    ]
    assert len(_conv_choice.describe(lambda key: key.residual)) == 1
