"""Times the providers of a case against each other, fairly: one process, interleaved rounds, medians.

A benchmark is a module ``benchmarks/bench_<name>.py`` with one function, ``cases() -> Iterator[Case]``. A case names
the callables to compare ("providers"); everything else (warm-up, rounds, statistics, ratios, CSV) is done here.

Two modules look after what comes out: ``benchmarks.table`` (README.md) and ``benchmarks.plot``.
"""

from __future__ import annotations

import csv
import datetime
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import deepops
from deepops.testing import assert_close_to_oracle

THREADS = 2
RESULTS = Path(__file__).parent / "results"
FLOOR = 0.95  # a case below this ratio loses against the baseline
SAMPLE_SECONDS = 2e-3  # a sample repeats its callable until it lasts about this long: the clock costs nothing then
OURS = "deepops"  # the provider that is judged
FASTEST = "fastest"  # as a baseline: the fastest of the others
COLUMNS = [
    *("bench", "group", "case", "provider", "baseline", "unit", "median", "p20", "p80", "rounds", "ratio", "goal"),
    *("limit", "deepops", "torch", "python", "cpu", "isa", "threads", "date"),
]


@dataclass(frozen=True)
class Case:
    """One thing measured with several implementations.

    Args:
        name: what is measured, e.g. ``"8x64x56x56"``; unique within its group.
        group: cases whose ratios are averaged (geometrically), e.g. ``"NCHW forward"``.
        providers: implementation -> callable without arguments. One of them is ``"deepops"``.
        baseline: the provider that the others are compared with, ``FASTEST`` for the fastest one beside deepops, or
            ``None`` when only ``limit`` applies.
        goal: the ratio baseline / deepops that the group's geometric mean must reach.
        limit: the largest value allowed for deepops, in ``unit``.
        unit: ``"ms"`` or, for measured values, any other name. Smaller is better in every unit.
        measured: the callables return their value in ``unit`` themselves instead of being timed.
        seconds: time to spend on the case; it gets at least three rounds anyway.
        oracle: computes in fp64 what the providers return; ``--refcheck`` compares them with it.
    """

    name: str
    group: str
    providers: Mapping[str, Callable[[], object]]
    baseline: str | None = "torch"
    goal: float | None = None
    limit: float | None = None
    unit: str = "ms"
    measured: bool = False
    seconds: float = 2.0
    oracle: Callable[[], object] | None = None

    def __post_init__(self) -> None:
        """Reject a case that could not be judged."""
        for name in (OURS, self.baseline):
            if name not in (None, FASTEST) and name not in self.providers:
                raise ValueError(f"providers: {sorted(self.providers)} lack {name!r}")


@dataclass(frozen=True)
class Sample:
    """What one provider took: the median and the 20th and 80th percentile of its rounds."""

    median: float
    p20: float
    p80: float
    rounds: int


@dataclass(frozen=True)
class Result:
    """A case with a sample for each of its providers."""

    bench: str
    case: Case
    samples: Mapping[str, Sample]
    device: str = "cpu"

    @property
    def baseline(self) -> str | None:
        """The provider that the others are compared with."""
        if self.case.baseline != FASTEST:
            return self.case.baseline
        return min((name for name in self.samples if name != OURS), key=lambda name: self.samples[name].median)

    def ratio(self, provider: str) -> float | None:
        """How many times faster (or smaller) than the baseline: the ratio of the medians."""
        if self.baseline is None:
            return None
        return self.samples[self.baseline].median / self.samples[provider].median


def summarise(values: Iterable[float]) -> Sample:
    """Median, p20 and p80 of the rounds; percentiles are interpolated between neighbours."""
    ordered = sorted(values)

    def percentile(share: float) -> float:
        position = share * (len(ordered) - 1)
        below = math.floor(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (position - below) * (ordered[above] - ordered[below])

    return Sample(statistics.median(ordered), percentile(0.2), percentile(0.8), len(ordered))


def seconds_per_call(call: Callable[[], object], repeats: int) -> float:
    """Mean time of ``repeats`` calls in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def milliseconds_per_call(call: Callable[[], object], repeats: int) -> float:
    """The same in milliseconds."""
    return seconds_per_call(call, repeats) * 1e3


def device_milliseconds_per_call(call: Callable[[], object], repeats: int) -> float:
    """The same between two events of the GPU's stream: what the GPU took, waiting for the host included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


TIMERS = {"cpu": milliseconds_per_call, "cuda": device_milliseconds_per_call}


def value_of(call: Callable[[], object]) -> float:
    """What a callable measured itself."""
    return float(call())  # type: ignore[arg-type]


def measure(case: Case, *, quick: bool = False, device: str = "cpu") -> dict[str, Sample]:
    """Run all providers of a case in interleaved rounds, so that a noisy moment hits all of them."""
    seconds = case.seconds / 10 if quick else case.seconds
    sample: dict[str, Callable[[], float]] = {}
    cost = 0.0  # of one round, in seconds
    for name, call in case.providers.items():
        if case.measured:
            sample[name] = partial(value_of, call)
            cost += seconds_per_call(call, 1)
        else:
            warm = min(TIMERS[device](call, 1) for _ in range(3)) / 1e3
            repeats = max(1, round(SAMPLE_SECONDS / max(warm, 1e-9)))
            sample[name] = partial(TIMERS[device], call, repeats)
            cost += warm * repeats
    rounds = max(3, min(100, int(seconds / max(cost, 1e-9))))
    values: dict[str, list[float]] = {name: [] for name in sample}
    for turn in range(rounds):
        names = list(sample) if turn % 2 == 0 else list(reversed(sample))  # nobody always comes first
        for name in names:
            values[name].append(sample[name]())
    return {name: summarise(taken) for name, taken in values.items()}


def tensors(output: object) -> list[Tensor]:
    """The tensors of a provider's return value, in order."""
    if isinstance(output, Tensor):
        return [output.detach()]
    if isinstance(output, (tuple, list)):
        return [tensor for part in output for tensor in tensors(part)]
    return []


def check_outputs(case: Case) -> None:
    """Compare every provider with the oracle under the project's tolerance rule (``deepops.testing``).

    Raises:
        AssertionError: a provider is further from the fp64 oracle than stock PyTorch allows.
    """
    if case.oracle is None or case.baseline is None:
        return
    oracle = tensors(case.oracle())
    stock = tensors(case.providers[case.baseline]())
    for name, call in case.providers.items():
        actual = tensors(call())
        assert len(actual) == len(stock) == len(oracle) > 0, f"{case.name}: {name} returns {len(actual)} tensors"
        for ours, theirs, exact in zip(actual, stock, oracle, strict=True):
            assert_close_to_oracle(ours, theirs, exact, name=f"{case.group} {case.name} {name}")


def made_on(device: str, cases: Iterable[Case]) -> Iterator[Case]:
    """The cases, whose tensors and modules are on ``device``; while they are timed it is not torch's default device.

    (A default device costs each of torch's functions some microseconds.)
    """
    remaining = iter(cases)
    while True:
        with torch.device(device):
            case = next(remaining, None)
        if case is None:
            return
        yield case


def run(
    bench: str, cases: Iterable[Case], *, quick: bool = False, refcheck: bool = False, device: str = "cpu"
) -> Iterator[Result]:
    """Measure the cases one after another, with ``THREADS`` threads."""
    torch.set_num_threads(THREADS)
    for case in made_on(device, cases):
        if refcheck:
            check_outputs(case)
        yield Result(bench, case, measure(case, quick=quick, device=device), device)


def cpu_model() -> str:
    """The processor's name as Linux tells it."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment(device: str = "cpu") -> dict[str, object]:
    """The columns that say where and when a measurement was taken; ``cpu``: the processor, also where it is a GPU."""
    compiled = deepops._library._C
    return {
        "deepops": deepops.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_model() if device == "cpu" else torch.cuda.get_device_name(),
        "isa": compiled.cpu_isa() if compiled else "none",
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
    }


def rows(result: Result) -> Iterator[dict[str, object]]:
    """One CSV row for each provider of a case."""
    case = result.case
    for provider, sample in result.samples.items():
        ratio = result.ratio(provider)
        judged = provider == OURS and result.device == "cpu"  # the goals are for the CPU
        yield {
            "bench": result.bench,
            "group": case.group,
            "case": case.name,
            "provider": provider,
            "baseline": result.baseline or "",
            "unit": case.unit,
            "median": f"{sample.median:.6g}",
            "p20": f"{sample.p20:.6g}",
            "p80": f"{sample.p80:.6g}",
            "rounds": sample.rounds,
            "ratio": "" if ratio is None else f"{ratio:.3f}",
            "goal": case.goal if judged and case.goal is not None else "",
            "limit": case.limit if judged and case.limit is not None else "",
            **environment(result.device),
        }


def write_csv(bench: str, results: Iterable[Result], folder: Path = RESULTS) -> Path:
    """Write ``<folder>/<bench>.csv``, replacing what an earlier run left there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{bench}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for result in results:
            writer.writerows(rows(result))
    return path
