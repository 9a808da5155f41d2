"""Memory that large results on the CPU take, and that is kept for the next ones.

Kernels of deepops take results of 1 MiB and more from a pool. Fresh memory has to be mapped and cleared page by page,
which takes several times as long as to normalize as much; memory of an earlier result does not. What the pool keeps is
never more than was in use at one time, and a system that runs short of memory takes back blocks of 4 MiB and more.

The storage of such a result cannot be resized in place.

    >>> import torch, deepops
    >>> y = deepops.functional.batch_norm_act(torch.randn(8, 64, 32, 32), None, None, training=True)
    >>> deepops.memory.stats().live >= y.nbytes
    True
"""

from __future__ import annotations

from typing import NamedTuple

from deepops._library import _C

__all__ = ["MemoryStats", "empty_cache", "stats"]


class MemoryStats(NamedTuple):
    """What the pool has now.

    Attributes:
        live: bytes in results that exist.
        kept: bytes kept for results to come.
        mapped: how often the system was asked for memory since the start.
    """

    live: int
    kept: int
    mapped: int


def stats() -> MemoryStats:
    """What the pool has now; zeros where the kernels were not built."""
    return MemoryStats(0, 0, 0) if _C is None else MemoryStats(*_C.memory_stats())


def empty_cache() -> None:
    """Give what is kept for results to come back to the system, for example after training, before other work."""
    if _C is not None:
        _C.empty_cache()
