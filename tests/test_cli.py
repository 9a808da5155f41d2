"""``deepops train | info | check`` as a user calls them."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_data import write_idx
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import deepops
from deepops import _library, testing
from deepops._build_info import build_info
from deepops.cli import check_ops, errors, main
from deepops.cli.data import load_data
from deepops.cli.side import count_saved_bytes
from deepops.cli.train import prepare, stop_on_interrupt, train

ROOT = Path(__file__).parent.parent


class PlainCNN(nn.Module):
    """The course module's network, written out as there."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, kernel_size=3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=2, stride=2),
            nn.Conv2d(32, 64, kernel_size=3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=2, stride=2),
        )
        self.classifier = nn.Sequential(nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """These tests are about results, not speed, and small tensors on several threads crawl on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(out: Path, *options: str) -> dict[str, Any]:
    """``deepops train`` into ``out``; the report."""
    assert main(["train", *options, "--out", str(out)]) == 0
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One comparison on random images."""
    out = tmp_path_factory.mktemp("synthetic")
    return run(out, "--data", "synthetic", "--epochs", "2", "--seed", "5"), out


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """A folder with IDX files of a few images."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    write_idx(folder, gz=True)
    return str(folder)


# ---- train -----------------------------------------------------------------------------------------------------------


def test_report_says_what_was_run_and_what_came_out(synthetic: tuple[dict[str, Any], Path]) -> None:
    report, out = synthetic
    assert report["format"] == 1
    assert report["interrupted"] is False
    assert report["config"] == {
        "model": "cnn",
        "data": "synthetic",
        "epochs": 2,
        "batch_size": 32,
        "optimizer": "adam",
        "precision": "fp32",
        "device": "cpu" if not torch.cuda.is_available() else "cuda",
        "seed": 5,
        "compare": True,
    }
    assert report["environment"]["torch"] == torch.__version__
    assert report["environment"]["threads"] == torch.get_num_threads()
    assert report["data"]["train_images"] == 500
    assert "meaningless" in report["data"]["note"]
    for side in ("stock", "deepops"):
        assert len(report["epochs"][side]) == 2
        assert len(report["steps"][side]["loss"]) == len(report["steps"][side]["ms"]) == 2 * 16
        last, summary = report["epochs"][side][-1], report["summary"][side]
        assert summary["final_loss"] == last["loss"]
        assert summary["final_accuracy"] == last["test_accuracy"]
        assert summary["step_ms"] == pytest.approx(sorted_median(report["steps"][side]["ms"][3:]), abs=1e-3)
        assert summary["images_per_second"] == pytest.approx(32_000 / summary["step_ms"])
        assert summary["saved_bytes"] > 0
    stock, ours = report["summary"]["stock"], report["summary"]["deepops"]
    assert report["summary"]["ratio"] == {
        "step_ms": pytest.approx(stock["step_ms"] / ours["step_ms"]),
        "images_per_second": pytest.approx(ours["images_per_second"] / stock["images_per_second"]),
        "saved_bytes": stock["saved_bytes"] / ours["saved_bytes"],
    }
    assert report["summary"]["difference"]["final_loss"] == ours["final_loss"] - stock["final_loss"]
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")


def sorted_median(values: list[float]) -> float:
    values = sorted(values)
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2


def test_stock_side_is_the_modules_loop(synthetic: tuple[dict[str, Any], Path]) -> None:
    """The very losses that the module's script gives from the same weights, batches and dropout."""
    report, _ = synthetic
    data = load_data("synthetic", seed=5)
    torch.manual_seed(5)
    model = PlainCNN()
    order = torch.Generator().manual_seed(5)
    loader = DataLoader(
        TensorDataset(data.train_images, data.train_labels), batch_size=32, shuffle=True, generator=order
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001, weight_decay=1e-4)
    criterion = nn.CrossEntropyLoss()
    torch.manual_seed(5)
    steps, epochs = [], []
    for _ in range(2):
        total = 0.0
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = criterion(model(inputs), targets)
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
            total += loss.item() * inputs.size(0)
        epochs.append(total / 500)
    assert report["steps"]["stock"]["loss"] == steps
    assert [epoch["loss"] for epoch in report["epochs"]["stock"]] == pytest.approx(epochs, rel=1e-12)


def test_both_sides_start_alike(synthetic: tuple[dict[str, Any], Path]) -> None:
    """Same weights, batch and dropout: the first losses differ by rounding only."""
    steps = synthetic[0]["steps"]
    assert steps["deepops"]["loss"][0] == pytest.approx(steps["stock"]["loss"][0], rel=1e-5)


def test_alone_is_as_beside_stock(synthetic: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """Taking turns with the stock side changes no number."""
    alone = run(tmp_path, "--data", "synthetic", "--epochs", "2", "--seed", "5", "--no-compare")
    assert alone["steps"]["deepops"]["loss"] == synthetic[0]["steps"]["deepops"]["loss"]
    assert alone["summary"]["deepops"]["final_accuracy"] == synthetic[0]["summary"]["deepops"]["final_accuracy"]
    assert list(alone["epochs"]) == ["deepops"]
    assert list(alone["summary"]) == ["deepops"]
    assert (tmp_path / "plot.png").exists()


def test_model_file_loads_into_plain_modules(synthetic: tuple[dict[str, Any], Path]) -> None:
    report, out = synthetic
    state = torch.load(out / "model.pt", weights_only=True)
    plain = PlainCNN()
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state)
    assert int(state["features.1.num_batches_tracked"]) == 2 * 16
    data = load_data("synthetic", seed=5)
    with torch.no_grad():
        right = plain.eval()(data.test_images).argmax(1) == data.test_labels
    assert right.double().mean().item() == report["summary"]["deepops"]["final_accuracy"]


def test_model_file_computes_what_was_trained(tiny: str, tmp_path: Path) -> None:
    from deepops.cli.models import build_pair, stock_state_dict

    trained = build_pair("cnn", seed=1)["deepops"]
    images = load_data(tiny, seed=0).train_images
    for _ in range(3):
        trained(images + torch.randn_like(images))  # moves the running statistics
    plain, exact = PlainCNN(), PlainCNN().double()
    state = stock_state_dict("cnn", trained)
    plain.load_state_dict(state)
    exact.load_state_dict(state)
    with torch.no_grad():
        actual, stock, oracle = trained.eval()(images), plain.eval()(images), exact.eval()(images.double())
    testing.assert_close_to_oracle(actual, stock, oracle)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(tiny: str, tmp_path: Path, precision: str, monkeypatch: Any) -> None:
    scales = []
    scale = torch.amp.GradScaler.scale
    monkeypatch.setattr(
        torch.amp.GradScaler, "scale", lambda self, x: scales.append(self.get_scale()) or scale(self, x)
    )
    report = run(tmp_path, "--data", tiny, "--epochs", "4", "--precision", precision, "--batch-size", "6")
    assert len(scales) == 2 * 4 * 2  # sides, epochs, steps
    assert all((value > 1) == (precision == "fp16") for value in scales), "the loss is scaled for fp16 alone"
    half, full = report["steps"], run(tmp_path, "--data", tiny, "--epochs", "1", "--batch-size", "6")["steps"]
    for side in ("stock", "deepops"):
        assert half[side]["loss"][0] != full[side]["loss"][0], "computed in fp32"
        assert half[side]["loss"][0] == pytest.approx(full[side]["loss"][0], rel=0.02)
        assert half[side]["loss"][-1] < half[side]["loss"][0]
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}


def test_a_batch_larger_than_the_data(tiny: str, tmp_path: Path) -> None:
    report = run(tmp_path, "--data", tiny, "--epochs", "1", "--batch-size", "100")
    assert len(report["steps"]["deepops"]["loss"]) == 1
    step_ms = report["summary"]["deepops"]["step_ms"]
    assert report["summary"]["deepops"]["images_per_second"] == pytest.approx(12_000 / step_ms)


def test_a_loss_that_is_not_finite_leaves_valid_json(tiny: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(nn.CrossEntropyLoss, "forward", lambda self, outputs, targets: outputs.sum() * float("nan"))
    report = run(tmp_path, "--data", tiny, "--epochs", "1")
    assert report["summary"]["deepops"]["final_loss"] is None
    assert "NaN" not in (tmp_path / "report.json").read_text()


def test_default_folder_and_table(tiny: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["train", "--data", tiny, "--epochs", "1"]) == 0
    assert (tmp_path / "runs" / "cnn-tiny" / "model.pt").exists()
    text = capsys.readouterr().out
    for label in ("time per step", "images per second", "saved for backward", "final loss", "final test accuracy"):
        assert label in text
    assert "ratio" in text
    assert "epoch 1/1" in text


def test_digits_are_learnt_as_well_as_by_stock(tmp_path: Path) -> None:
    """Over three seeds: mean test accuracy at least 96 % and within 1.5 points of stock's."""
    summaries = [run(tmp_path, "--seed", str(seed))["summary"] for seed in range(3)]
    ours = sum(summary["deepops"]["final_accuracy"] for summary in summaries) / 3
    stock = sum(summary["stock"]["final_accuracy"] for summary in summaries) / 3
    assert ours >= 0.96
    assert abs(ours - stock) <= 0.015


def test_saved_bytes_counts_each_storage_once() -> None:
    x = torch.randn(10, 10, requires_grad=True)
    known = torch.randn(10, 10)
    with count_saved_bytes([known, x]) as counter:
        y = torch.relu(x * known)  # relu keeps its output; the product keeps only what is known
        z = y.view(100)[:50] * y.view(100)[50:]  # two views of it: nothing new
        total = z.exp().sum()  # exp keeps its output: 50 elements
    assert counter.bytes == (100 + 50) * 4
    total.backward()


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "deepops", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_interrupt_keeps_what_was_reached(tmp_path: Path) -> None:
    process = start("train", "--data", "synthetic", "--epochs", "100000", "--out", str(tmp_path))
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "interrupted" in out
    assert "Traceback" not in err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["interrupted"] is True
    assert 1 <= len(report["epochs"]["deepops"]) == len(report["epochs"]["stock"]) < 100000
    assert len(report["steps"]["deepops"]["loss"]) == len(report["steps"]["stock"]["loss"]) >= 16
    PlainCNN().load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert (tmp_path / "plot.png").exists()


def test_interrupt_ends_within_a_step(tiny: str, tmp_path: Path) -> None:
    stop = threading.Event()

    class StopAfterThreeSteps:
        steps = 0

        def start_epoch(self, epoch: int, steps: int) -> None:
            assert steps == 2

        def advance(self) -> None:
            self.steps += 1
            if self.steps == 3:
                stop.set()

        def end_epoch(self, epoch: int) -> None:
            pass

    namespace = argparse.Namespace(
        model="cnn", optimizer="adam", precision="fp32", seed=0, compare=True, epochs=9, batch_size=6
    )
    session = prepare(namespace, torch.device("cpu"), load_data(tiny, seed=0))
    assert train(session, StopAfterThreeSteps(), stop) is False
    for side in session.sides.values():
        assert len(side.losses) == 3
        assert len(side.epochs) == 2
        assert side.epochs[1].loss == side.losses[2]


def test_second_interrupt_ends_at_once() -> None:
    with stop_on_interrupt() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupt_before_training_is_one_line(monkeypatch: Any, capsys: Any) -> None:
    def interrupted(source: str, seed: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deepops.cli.train.load_data", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "deepops train: interrupted\n"


# ---- wrong requests --------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[str], str]] = {
    "no command": ([], "train|info|check"),
    "unknown command": (["dance"], "'dance'"),
    "unknown option": (["train", "--fast"], "--fast"),
    "unknown model": (["train", "--model", "vgg"], "'vgg' (choose from"),
    "unknown optimizer": (["train", "--optimizer", "lion"], "'lion' (choose from"),
    "unknown precision": (["train", "--precision", "fp8"], "'fp8' (choose from"),
    "no epochs": (["train", "--epochs", "0"], "--epochs: '0' is not an integer from 1"),
    "half a batch": (["train", "--batch-size", "1.5"], "--batch-size: '1.5' is not an integer from 1"),
    "negative seed": (["train", "--seed", "-1"], "--seed: '-1' is not an integer from 0"),
    "no such device": (["train", "--device", "abacus"], "--device abacus: not available here"),
    "device without data": (["train", "--device", "meta"], "--device meta: not available here"),
    "no such folder": (["train", "--data", "/no/such/folder"], "--data /no/such/folder: no such folder"),
    "folder without data": (["train", "--data", str(ROOT / "csrc")], "train-images-idx3-ubyte.gz is there"),
    "folder is a file": (["train", "--data", "synthetic", "--out", __file__], f"--out {__file__}: cannot be written"),
    "info of something": (["info", "torch"], "torch"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_request_gets_one_line_and_code_2(case: str, capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = REFUSED[case]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("deepops")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not list(tmp_path.iterdir()), "left something behind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line(capsys: Any) -> None:
    assert main(["train", "--device", "cuda"]) == 2
    assert "--device cuda: not available here" in capsys.readouterr().err


def test_a_truncated_file_is_one_line(tiny: str, capsys: Any) -> None:
    path = Path(tiny, "t10k-images-idx3-ubyte.gz")
    path.write_bytes(path.read_bytes()[:-20])
    assert main(["train", "--data", tiny]) == 2
    assert capsys.readouterr().err == f"deepops train: {path}: truncated gzip file\n"


@pytest.mark.parametrize("package", ["rich", "matplotlib", "sklearn"])
def test_a_missing_package_is_one_line(package: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    assert main(["train"]) == 2
    text = capsys.readouterr().err
    assert errors._EXTRA[package] in text
    assert 'pip install ".[cli]"' in text
    assert "pip install deepops" not in text
    assert text.count("\n") == 1


def test_info_and_check_need_torch_alone(monkeypatch: Any, capsys: Any) -> None:
    for package in ("rich", "matplotlib", "sklearn", "numpy"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("deepops.cli.check.CHECKS", ())
    assert main(["info"]) == 0
    assert main(["check"]) == 0


def test_the_command_as_a_process() -> None:
    process = start("--version")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out.strip()) == (0, f"deepops {deepops.__version__}"), err
    process = start("train", "--data", "/no/such/folder")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "Traceback" not in err
    assert "no such folder" in err.splitlines()[-1]


# ---- info ------------------------------------------------------------------------------------------------------------


def test_info_tells_what_is_there(capsys: Any) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == build_info()
    assert facts["version"] == deepops.__version__
    assert facts["torch_running"] == torch.__version__
    assert set(facts["binaries"]) == {"_ops", "_C", "_cuda"}
    for name, path in facts["binaries"].items():
        assert (path is None) == (name in facts["missing"])
        assert path is None or Path(path).exists()
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"missing: {facts['missing']['_cuda']}" in text
    if _library._C is not None:
        assert facts["cpu_isas"]["in_use"] in facts["cpu_isas"]["available"]
        assert set(facts["cpu_isas"]["available"]) <= set(facts["cpu_isas"]["compiled"])
        assert ", ".join(facts["cpu_isas"]["available"]) in text


def test_info_without_binaries_says_why(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(_library, "_C", None)
    monkeypatch.setattr(_library, "_MISSING", {"_ops": "was not built", "_C": "was not built", "_cuda": "not yet"})
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert text.count("missing: was not built") == 2
    assert build_info()["cpu_isas"] == {"compiled": [], "available": [], "in_use": None}
    json.dumps(build_info())


# ---- check -----------------------------------------------------------------------------------------------------------


def test_check_passes_here_and_covers_every_instruction_set(capsys: Any) -> None:
    assert main(["check", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] is True
    rows = result["rows"]
    assert {row["op"] for row in rows} == {check.op for check in check_ops.CHECKS}
    assert all(row["cases"] > 0 and row["ratio"] <= result["limit"] for row in rows)
    for check in check_ops.CHECKS:
        mine = [row for row in rows if row["op"] == check.op and row["device"] == "cpu"]
        expected = set(testing.isas()) if _library.has_kernel(check.kernel, "cpu") else {"reference"}
        assert {row["isa"] for row in mine} == expected
        assert len(mine) == len(expected) * len(check.dtypes) * len(check.layouts)


def bn_only(monkeypatch: Any) -> None:
    monkeypatch.setattr("deepops.cli.check.CHECKS", check_ops.CHECKS[:1])


def test_check_finds_a_wrong_result(monkeypatch: Any, capsys: Any) -> None:
    right = deepops.functional.batch_norm_act

    def wrong(x: Tensor, *args: Any, **options: Any) -> Tensor:
        y = right(x, *args, **options)
        return y * 1.001 if x.dtype == torch.float32 and options["activation"] == "silu" else y

    bn_only(monkeypatch)
    monkeypatch.setattr(deepops.functional, "batch_norm_act", wrong)
    assert main(["check"]) == 1
    text = capsys.readouterr().out
    assert "FAIL" in text
    assert "of silu" in text
    failed = [line for line in text.splitlines() if line.endswith("FAIL")]
    assert all(" float32 " in line for line in failed)
    assert len(failed) < sum(line.endswith("pass") for line in text.splitlines())


def test_check_reports_an_op_that_raises(monkeypatch: Any, capsys: Any) -> None:
    def broken(*args: Any, **options: Any) -> Tensor:
        raise RuntimeError("no such kernel\nand more")

    bn_only(monkeypatch)
    monkeypatch.setattr(deepops.functional, "batch_norm_act", broken)
    assert main(["check", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(row["reason"] == "RuntimeError: no such kernel" and row["ratio"] is None for row in rows)
