"""A GPU's events without a GPU."""

from __future__ import annotations


class FakeEvent:
    """An event of a GPU on which every recorded event is 6 ms after the one before."""

    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.clock += 6.0
        self.at = FakeEvent.clock

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at
