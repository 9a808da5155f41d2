"""Fixtures of every test: fixed seed, restored global state, devices and backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import backends
import optim_cases
import pytest
import simt
import torch
from cli_tools import write_idx
from fused_conv_cases import Exact

import deepops.backends
from deepops import _conv_choice, _conv_problem, _library, testing
from deepops.optim._base import FusedStep


def _require(backend: str) -> None:
    """Skip where the backend is missing; under DEEPOPS_REQUIRE_CUDA=1 a missing CUDA fails."""
    reason = backends.missing(backend)
    if reason and backend == "cuda" and backends.REQUIRE_CUDA:
        pytest.fail(f"DEEPOPS_REQUIRE_CUDA is set, but {reason}")
    if reason:
        pytest.skip(reason)


# Files that take long, the longest first: where several processes share the files, none is to be left alone with one of
# these in the end.
LONGEST = (
    "test_sanitized.py",
    "test_packaging.py",
    "test_lstm_op.py",
    "test_batch_norm_act_values.py",
    "test_train.py",
    "test_lstm.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first, in every process alike."""
    places = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(params=backends.BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test per backend, on the same cases; see backends.py."""
    _require(request.param)
    if request.param == "simt":
        simt.load()
    monkeypatch.setattr(backends, "current", request.param)
    return str(request.param)


@pytest.fixture
def on_simt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test's ops on the SIMT executor."""
    _require("simt")
    simt.load()
    monkeypatch.setattr(backends, "current", "simt")


@pytest.fixture
def step_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """``backend``, for optimizers: their steps on the SIMT executor take CPU tensors too."""
    if backend == "simt":
        optim_cases.attach_simt()
        monkeypatch.setattr(FusedStep, "_backend", optim_cases.SimtAdam._backend)
    return backend


@pytest.fixture
def on_conv_executor(on_simt: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks on CPU tensors behave as on a GPU, and their own convolution is the one that they use."""
    monkeypatch.setattr(_conv_problem, "executor", torch.ops.deepops_simt)
    monkeypatch.setattr(deepops.backends, "conv", "fused")


@pytest.fixture
def exact_conv(monkeypatch: pytest.MonkeyPatch) -> Exact:
    """The same with torch's operations in place of the kernels."""
    ops = Exact()
    monkeypatch.setattr(_conv_problem, "executor", ops)
    monkeypatch.setattr(deepops.backends, "conv", "fused")
    return ops


@pytest.fixture
def timed_conv(exact_conv: Exact, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Under "auto", with a clock by which the two ways take what it says."""
    times = {"fused": 1.0, "aten": 2.0}

    def timer(call: Callable[[], object], device: torch.device) -> float:
        before = len(exact_conv.calls)
        call()
        return times["fused" if len(exact_conv.calls) > before else "aten"]

    monkeypatch.setattr(deepops.backends, "conv", "auto")
    monkeypatch.setattr(_conv_choice, "timer", timer)
    monkeypatch.setattr(_conv_choice, "_measured", {})
    monkeypatch.setattr(_conv_choice, "_left_to_torch", set())
    return times


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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests of results, not speed: small tensors on several threads crawl on a busy machine."""
    with testing.use_threads(1):
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with IDX files of 12 images to train and 5 to test."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    folder.mkdir()
    write_idx(folder, gz=True)
    return str(folder)
