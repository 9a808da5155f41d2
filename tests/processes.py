"""Tests whose body runs in several processes at once, joined by torch.distributed (gloo, on the CPU).

    @on_ranks(2)
    @pytest.mark.parametrize("name", ["a", "b"])
    def test_something(name):
        assert torch.distributed.get_world_size() == 2

The processes are started once per module (fixture ``process_pools``) and run one test after the other. One that fails
or hangs in any of them fails with the tracebacks of all; the processes are then ended, and the next test gets new ones.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import inspect
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch
import torch.distributed as dist

START_LIMIT = 120  # seconds until all processes have joined
TEST_LIMIT = 20  # seconds for one test; most take less than one, but the machine may be building meanwhile
GRACE = 3  # seconds for the others, after one has failed
MOST_HANGS = 3  # tests of a module that run out of time, then the rest is not tried


def missing() -> str:
    """Why there are no processes here; empty when there are."""
    if not dist.is_available():
        return "this torch has no torch.distributed"
    return "" if dist.is_gloo_available() else "this torch has no gloo"


def on_ranks(world_size: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run the test's body in ``world_size`` processes. Its arguments must be picklable; fixtures are not for it."""

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        def test(process_pools: Pools, **arguments: Any) -> None:
            process_pools.run(world_size, body, arguments)

        test.__dict__.update(body.__dict__, body=body)  # the marks, too
        test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
        pools = inspect.Parameter("process_pools", inspect.Parameter.KEYWORD_ONLY)
        arguments = inspect.signature(body).parameters.values()
        test.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [*(a.replace(kind=inspect.Parameter.KEYWORD_ONLY) for a in arguments), pools]
        )
        return test

    return decorate


class Pools:
    """Groups of waiting processes, one per number of processes."""

    def __init__(self) -> None:
        """None is started yet."""
        self._pools: dict[int, _Pool] = {}
        self._hangs = 0

    def run(self, world_size: int, body: Callable[..., None], arguments: dict[str, Any]) -> None:
        """Run a test's body; raises AssertionError with what went wrong in each process."""
        if self._hangs >= MOST_HANGS:
            pytest.fail(f"not tried: {MOST_HANGS} tests before this one have run out of time", pytrace=False)
        if world_size not in self._pools:
            self._pools[world_size] = _Pool(world_size)
        started = time.monotonic()
        failures = self._pools[world_size].run((body.__module__, body.__name__, arguments), TEST_LIMIT)
        self._hangs += time.monotonic() - started >= TEST_LIMIT
        if failures:
            self._pools.pop(world_size).end()
            pytest.fail("\n".join(failures), pytrace=False)

    def end(self) -> None:
        """End all processes."""
        for pool in self._pools.values():
            pool.end()


@pytest.fixture(scope="module")
def process_pools() -> Iterator[Pools]:
    """For :func:`on_ranks`; import it into the test module."""
    if missing():
        pytest.skip(missing())
    pools = Pools()
    yield pools
    pools.end()


class _Pool:
    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.fsdp", "torch._dynamo"])  # which take seconds
        self._folder = tempfile.TemporaryDirectory()
        self._processes, self._connections = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            store = os.path.join(self._folder.name, "store")
            process = context.Process(target=_serve, args=(theirs, rank, world_size, store), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        if failures := self._answers(START_LIMIT):
            self.end()
            pytest.fail("the processes did not start\n" + "\n".join(failures), pytrace=False)

    def run(self, task: tuple[str, str, dict[str, Any]], limit: float) -> list[str]:
        """What went wrong, by process."""
        for connection in self._connections:
            connection.send(task)
        return self._answers(limit)

    def _answers(self, limit: float) -> list[str]:
        failures: dict[int, str] = {}
        pending: dict[Connection, int] = {connection: rank for rank, connection in enumerate(self._connections)}
        deadline = time.monotonic() + limit
        while pending and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(pending), left):
                assert isinstance(connection, Connection)
                rank = pending.pop(connection)
                try:
                    failure = connection.recv()
                except EOFError:
                    self._processes[rank].join(GRACE)
                    failure = f"ended with exit code {self._processes[rank].exitcode}"
                if failure:
                    failures[rank] = failure
                    deadline = min(deadline, time.monotonic() + GRACE)
        failures |= dict.fromkeys(pending.values(), "no answer in time")
        return [f"process {rank}: {failures[rank]}" for rank in sorted(failures)]

    def end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._folder.cleanup()


def _serve(connection: Connection, rank: int, world_size: int, store: str) -> None:
    """Run one test after the other, until the connection ends."""
    torch.set_num_threads(1)
    if "lo" in [name for _, name in socket.if_nameindex()]:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the host's name may not lead anywhere
    with contextlib.suppress(EOFError, BrokenPipeError):
        connection.send(_outcome(_join, (rank, world_size, store)))
        while True:
            module, name, arguments = connection.recv()
            faulthandler.dump_traceback_later(TEST_LIMIT - GRACE)
            connection.send(_outcome(_run, (module, name, arguments)))
            faulthandler.cancel_dump_traceback_later()


def _join(rank: int, world_size: int, store: str) -> None:
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TEST_LIMIT),
    )


def _run(module: str, name: str, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    getattr(importlib.import_module(module), name).body(**arguments)


def _outcome(function: Callable[..., None], arguments: tuple[Any, ...]) -> str:
    """What went wrong; empty: nothing."""
    try:
        function(*arguments)
    except Exception:
        return traceback.format_exc()
    return ""
