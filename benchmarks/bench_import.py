"""What ``import deepops`` adds to ``import torch``: in a new process each time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from benchmarks.harness import Case

PROGRAM = """
import time
import torch
start = time.perf_counter()
import deepops
print((time.perf_counter() - start) * 1e3)
"""


def milliseconds() -> float:
    """Time of ``import deepops`` after ``import torch``."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    return float(done.stdout)


def cases() -> Iterator[Case]:
    """One case: the time has a limit and no baseline."""
    yield Case(
        "import deepops",
        "after import torch",
        {"deepops": milliseconds},
        baseline=None,
        limit=60,
        measured=True,
        seconds=30,
    )
