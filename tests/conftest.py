"""Fixtures of every test: fixed seed, restored global state, devices."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from deepops import _library

REQUIRE_CUDA = os.environ.get("DEEPOPS_REQUIRE_CUDA", "") not in ("", "0")


def _missing_cuda() -> str:
    """Why the CUDA cases cannot run here, or ""."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    path = _library.binaries()["_cuda"]
    return "" if path.endswith(".so") else path


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Run the test per device type; a missing CUDA shows as skipped, and fails under DEEPOPS_REQUIRE_CUDA=1."""
    if request.param == "cuda" and (reason := _missing_cuda()):
        if REQUIRE_CUDA:
            pytest.fail(f"DEEPOPS_REQUIRE_CUDA is set, but {reason}")
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture(autouse=True)
def _fixed_state() -> Iterator[None]:
    """Seed each test alike and give back what it may have changed: generators, thread count, instruction set."""
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    isa = _library._C.cpu_isa() if _library._C is not None else None
    torch.manual_seed(0)
    yield
    torch.random.set_rng_state(state)
    torch.set_num_threads(threads)
    if _library._C is not None:
        _library._C.set_cpu_isa(isa)
