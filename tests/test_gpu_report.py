"""`make gpu` as far as no GPU is needed: its error lines, its report, the timer with faked events, the comparison."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import simt
import torch
from fake_events import FakeEvent

ROOT = Path(__file__).parent.parent
if not (ROOT / "csrc").exists() or not (ROOT / "benchmarks").exists():
    pytest.skip("needs the source tree", allow_module_level=True)
import deepops  # noqa: E402
from benchmarks import compare, conv_ways, gpu, harness, run  # noqa: E402
from benchmarks.conv_ways import Block, Peaks  # noqa: E402
from benchmarks.gpu import Step  # noqa: E402
from benchmarks.harness import Case, Sample  # noqa: E402
from deepops import _conv_problem  # noqa: E402


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Toaster")


def test_no_gpu_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    expected = f"make gpu: no NVIDIA GPU: torch {torch.__version__} finds no CUDA device\n"
    assert capsys.readouterr() == ("", expected)


def test_a_missing_package_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "missing", lambda names: [name for name in names if name == "pybind11"])
    assert gpu.main([]) == 2
    expected = f"make gpu: {sys.executable} lacks pybind11; choose another Python with PYTHON=...\n"
    assert capsys.readouterr() == ("", expected)


def test_missing_finds_packages_and_programs() -> None:
    assert gpu.missing(["torch", "sh", "no_such_thing"]) == ["no_such_thing"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, list[str]]:
    """A machine with a GPU on which every command succeeds at once; what was run, by the name of its log."""
    seen: dict[str, list[str]] = {}

    def fake(title: str, *command: object, name: str, keep: int = 3, **environment: str) -> Step:
        seen[name] = [*map(str, command), *(f"{key}={value}" for key, value in environment.items())]
        return Step(title, True, f"end of {name}")

    monkeypatch.setattr(gpu, "OUT", tmp_path)
    monkeypatch.setattr(gpu, "run", fake)
    monkeypatch.setattr(gpu, "gpu", lambda: {"GPU": "NVIDIA Toaster", "compute capability": "9.0"})
    return seen


def test_all_steps_are_run_and_reported(machine: dict[str, list[str]], tmp_path: Path) -> None:
    assert gpu.main([]) == 0
    assert list(machine) == ["configure", "build", "tests", "compare", "conv_ways", "timings"]
    assert {"-DDEEPOPS_CUDA=1", "-DDEEPOPS_CUDA_ARCHS=90"} <= set(machine["configure"])
    assert "DEEPOPS_REQUIRE_CUDA=1" in machine["tests"]
    assert machine["compare"][-3:] == ["cpu", "simt", "cuda"]
    assert machine["conv_ways"][-1] == "benchmarks.conv_ways"
    assert machine["timings"][-2:] == ["--device", "cuda"]
    text = (tmp_path / "report.md").read_text()
    assert "- GPU: NVIDIA Toaster\n" in text
    for title, name in (
        ("Build", "build"),
        ("Tests", "tests"),
        ("Comparison", "compare"),
        ("Convolutions, both ways", "conv_ways"),
        ("Timings", "timings"),
    ):
        assert f"## {title}: passed\n\nend of {name}\n" in text


def test_steps_can_be_left_out(machine: dict[str, list[str]]) -> None:
    assert gpu.main(["--skip", "tests", "timings"]) == 0
    assert list(machine) == ["configure", "build", "compare", "conv_ways"]


def test_a_failed_step_fails_and_a_failed_build_ends_it(
    machine: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "missing", lambda names: list(names) if "pytest" in names else [])
    assert gpu.main([]) == 1
    text = (tmp_path / "report.md").read_text()
    assert "## Tests: FAILED\n\nNot run: this Python lacks pytest, hypothesis, expecttest.\n" in text
    assert "## Timings: passed" in text
    monkeypatch.setattr(gpu, "build", lambda capability: Step("Build", False, "no nvcc"))
    machine.clear()
    assert gpu.main([]) == 1
    assert not machine
    assert "Tests" not in (tmp_path / "report.md").read_text()


def test_a_command_leaves_its_log_and_its_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "OUT", tmp_path)
    program = "import os, sys; print('one\\ntwo\\nthree', os.environ['EXTRA']); sys.exit(int(sys.argv[1]))"
    step = gpu.run("Title", sys.executable, "-c", program, "0", name="log", keep=2, EXTRA="x")
    assert step == Step("Title", True, "```\ntwo\nthree x\n```")
    assert (tmp_path / "log.log").read_text() == "one\ntwo\nthree x\n"
    step = gpu.run("Title", sys.executable, "-c", program, "3", name="log", keep=2, EXTRA="x")
    assert step == Step("Title", False, "```\none\ntwo\nthree x\n```")


def test_device_events_are_what_is_timed(events: None, tmp_path: Path) -> None:
    calls: list[str] = []
    providers = {name: lambda name=name: calls.append(name) for name in ("torch", "deepops")}
    (result,) = harness.run("b", [Case("c", "g", providers, seconds=0, goal=2.0)], device="cpu")
    assert result.samples["deepops"].median < 6
    case = Case("c", "g", providers, seconds=0, goal=2.0)
    samples = harness.measure(case, device="cuda")
    assert {sample.median for sample in samples.values()} == {6.0}  # 6 ms: one call each
    path = harness.write_csv("b", [harness.Result("b", case, samples, "cuda")], tmp_path)
    head, *rows = path.read_text().splitlines()
    assert all("NVIDIA Toaster" in row for row in rows)
    assert {row.split(",")[head.split(",").index("goal")] for row in rows} == {""}  # goals are for the CPU


def test_cases_are_made_on_the_device_and_timed_without_a_default() -> None:
    def cases():
        yield torch.empty(2)
        yield torch.nn.Linear(1, 1).weight

    for made in harness.made_on("meta", cases()):
        assert made.device.type == "meta"
        assert torch.empty(1).device.type == "cpu"


def test_timing_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run.main(["--device", "cuda"])
    assert capsys.readouterr().err.endswith("--device cuda: torch finds no CUDA device\n")


def test_least_time_of_a_block() -> None:
    """Counted by hand: 2 images of 8 x 8 and 4 channels, 3 x 3 filters for 6 channels, every second pixel."""
    block = Block(4, 6, 8, 3, 2, residual=True, batch=2)
    assert block.name == "3x3/2 4->6, 8 + residual"
    assert block.pixels == 2 * 4 * 4
    assert block.operations == 2 * 32 * 6 * 36
    x, weights, y = 2 * 4 * 64, 6 * 4 * 9, 32 * 6
    slow_memory, slow_products = Peaks(1e12, 1e3), Peaks(1e3, 1e12)
    assert conv_ways.least_milliseconds(block, 2, False, slow_memory) == pytest.approx(2 * (x + weights + 2 * y))
    assert conv_ways.least_milliseconds(block, 2, True, slow_memory) == pytest.approx(2 * (x + weights + 4 * y))
    for training in (False, True):
        assert conv_ways.least_milliseconds(block, 2, training, slow_products) == pytest.approx(block.operations)
    names = [block.name for blocks in conv_ways.NETWORKS.values() for block in blocks]
    assert len(names) == len(set(names))


def test_both_ways_of_a_block_are_timed(on_simt: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the executor, whose times mean nothing."""
    monkeypatch.setattr(_conv_problem, "executor", torch.ops.deepops_simt)
    blocks = [Block(1, 4, 6, 3, batch=2), Block(4, 4, 5, 1, residual=True, batch=2)]
    with simt.counting() as counts:
        rows = list(conv_ways.rows({"tiny": blocks}, "cpu", quick=True, side=64))
    assert {launch.name for launch in counts.kernels} == {"conv_bn_act_direct"}
    kinds = [(row.block, row.dtype, row.training) for row in rows]
    assert kinds == [(b, d, t) for b in blocks for d in (torch.float16, torch.float32) for t in (True, False)]
    assert deepops.backends.conv == "auto"
    assert all(len(conv_ways.line(row)) == len(conv_ways.HEAD) for row in rows)
    row = rows[0]._replace(samples={"torch": Sample(3.0, 3, 3, 1), "deepops": Sample(2.0, 2, 2, 1)}, least=0.5)
    expected = (
        "tiny        3x3 1->4, 6                       float16  training        3.0000      2.0000   1.50      25%"
    )
    assert conv_ways.line(row) == expected
    for block in blocks:
        ways = conv_ways.providers(block, torch.float32, True, "cpu")
        torch.testing.assert_close(ways["deepops"](), ways["torch"]())


def test_both_ways_need_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert conv_ways.main([]) == 2
    assert capsys.readouterr() == ("", "torch finds no CUDA device\n")


def test_comparison_tells_equal_bits_from_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(["cpu", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(compare.CASES) * len(compare.DTYPES)
    assert all("off by" not in line for line in lines)

    def drifting(backend: str, dtype: torch.dtype) -> compare.Outputs:
        return {"y": torch.tensor([1.0, 2.0 if backend == "cpu" else 2.5])}

    monkeypatch.setattr(compare, "CASES", {"loose": (drifting, False)})
    assert compare.main(["cpu", "cuda"]) == 0
    assert "loose float32, cuda against cpu: y 50.0% equal, off by 5.0e-01" in capsys.readouterr().out
    monkeypatch.setattr(compare, "CASES", {"exact": (drifting, True)})
    assert compare.main(["cpu", "cuda"]) == 1
