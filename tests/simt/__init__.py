"""The SIMT executor from Python: builds it, loads it, chooses schedules, and reads its counts.

    >>> import simt
    >>> simt.load()                                   # torch.ops.deepops_simt.* take CPU tensors from here on
    >>> with simt.schedule("random", seed=3), simt.counting() as counts:
    ...     torch.ops.deepops_simt.batch_norm_act_eval(...)
    >>> [launch.name for launch in counts.kernels]

``DEEPOPS_SIMT_BUILD`` chooses the build: ``none`` (fast, the default), ``address`` or ``thread``. A sanitized library
can only be loaded where the sanitizer came first: :func:`sanitized_environment` says how. ``DEEPOPS_SIMT_SCHEDULE``
(``reverse:0``, ``random:3``) is the schedule where no test asks for one. ``python tests/simt`` sets both.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parent.parent
SANITIZERS = ("none", "address", "thread")
SCHEDULES = ("in_order", "reverse", "random")
PROGRAMS = ("cmake", "ninja", "g++")


def missing() -> str:
    """Why the executor cannot run here; empty when it can."""
    if not (ROOT / "csrc" / "core" / "gpu.cuh").exists():
        return "the SIMT executor needs the source tree"
    lost = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"the SIMT executor needs {', '.join(lost)}" if lost else ""


def _path() -> str:
    """PATH with the programs that pip put beside this interpreter."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


@functools.cache
def build(target: str, sanitizer: str = "none") -> Path:
    """Build ``_simt`` or ``simt_selftest`` (only what changed) and return its path."""
    assert sanitizer in SANITIZERS, f"sanitizer {sanitizer!r}: one of {', '.join(SANITIZERS)}"
    folder = ROOT / "build" / f"simt-{sanitizer}"
    environment = {**os.environ, "PATH": _path()}
    environment.pop("LD_PRELOAD", None)  # a sanitizer's runtime is not for the compiler
    configure = ["cmake", "-G", "Ninja", "-S", HERE, "-B", folder, f"-DSANITIZER={sanitizer}"]
    configure += [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=_path())}",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test process may want the same; it then finds everything built
        for command in (configure, ["cmake", "--build", folder, "--target", target]):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"building {target} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return folder / (f"{target}.so" if target == "_simt" else target)


def sanitized_environment(sanitizer: str) -> dict[str, str]:
    """Environment of a Python process that is to load the sanitized library: its runtime goes before all others."""
    library = {"address": "libasan.so", "thread": "libtsan.so"}[sanitizer]
    found = subprocess.run(["g++", f"-print-file-name={library}"], capture_output=True, text=True, check=True)
    return {
        **os.environ,
        "DEEPOPS_SIMT_BUILD": sanitizer,
        "LD_PRELOAD": found.stdout.strip(),
        # Python itself never frees everything; torch's own threads are not what is tested.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "TSAN_OPTIONS": f"halt_on_error=1:report_mutex_bugs=0:suppressions={HERE / 'tsan_suppressions.txt'}",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }


@functools.cache
def load() -> ctypes.CDLL:
    """Build and load ``_simt.so``, which registers ``torch.ops.deepops_simt``."""
    import torch

    path = build("_simt", os.environ.get("DEEPOPS_SIMT_BUILD", "none"))
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    library.simt_set_schedule.argtypes = [ctypes.c_int, ctypes.c_uint64]
    library.simt_set_device.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.simt_counts.restype = ctypes.c_char_p
    _set_default_schedule(library)
    return library


def _set_default_schedule(library: ctypes.CDLL) -> None:
    name, _, seed = os.environ.get("DEEPOPS_SIMT_SCHEDULE", "in_order:0").partition(":")
    library.simt_set_schedule(SCHEDULES.index(name), int(seed or 0))


@contextmanager
def schedule(name: str, seed: int = 0) -> Iterator[None]:
    """Run blocks and threads in this order inside the block: ``in_order``, ``reverse`` or ``random`` by ``seed``."""
    load().simt_set_schedule(SCHEDULES.index(name), seed)
    try:
        yield
    finally:
        _set_default_schedule(load())


@contextmanager
def device(multiprocessors: int, shared_bytes: int = 228 << 10) -> Iterator[None]:
    """Pretend a device with so many multiprocessors, each with so much shared memory: kernels may stay on chip.

    Outside there are none, so that nothing is launched cooperatively.
    """
    load().simt_set_device(multiprocessors, shared_bytes)
    try:
        yield
    finally:
        load().simt_set_device(0, 0)


@dataclass(frozen=True)
class Launch:
    """Counts of one kernel launch, memset or copy; see counts.h."""

    kind: str
    name: str
    blocks: int
    threads: int
    load_bytes: int
    store_bytes: int
    load_sectors: int
    store_sectors: int
    ideal_sectors: int
    wavefronts: int
    ideal_wavefronts: int
    barriers: int
    shared_bytes: int
    lanes_of_width: dict[str, int]
    conflicts: dict[str, int]  # wavefronts above the ideal, by the file and line of the access

    @property
    def sector_bytes(self) -> int:
        """Bytes that global memory moves, in sectors of 32."""
        return 32 * (self.load_sectors + self.store_sectors)

    @property
    def coalescing(self) -> float:
        """Sectors that would do, over those that were needed; 1 is perfect."""
        actual = self.load_sectors + self.store_sectors
        return self.ideal_sectors / actual if actual else 1.0


@dataclass
class Counted:
    """What :func:`counting` yields; filled when its block ends."""

    launches: list[Launch] = field(default_factory=list)

    @property
    def kernels(self) -> list[Launch]:
        return [launch for launch in self.launches if launch.kind == "kernel"]


@contextmanager
def counting() -> Iterator[Counted]:
    """Record every launch inside the block, and what its memory accesses would cost."""
    library, result = load(), Counted()
    library.simt_set_counting(1)
    try:
        yield result
    finally:
        library.simt_set_counting(0)
        result.launches = [Launch(**launch) for launch in json.loads(library.simt_counts())]
