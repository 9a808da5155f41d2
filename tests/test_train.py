"""``deepops train``: what it computes, what it writes, and how Ctrl-C ends it."""

from __future__ import annotations

import argparse
import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import report_of, start
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from deepops import testing
from deepops.cli import main
from deepops.cli.data import load_data
from deepops.cli.side import count_saved_bytes
from deepops.cli.train import prepare, stop_on_interrupt, train


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


pytestmark = pytest.mark.usefixtures("one_thread")


def run(out: Path, *options: str) -> dict[str, Any]:
    """``deepops train`` into ``out``; the report."""
    return report_of(out, "report.json", *options)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One comparison on random images."""
    out = tmp_path_factory.mktemp("synthetic")
    return run(out, "--data", "synthetic", "--epochs", "2", "--seed", "5"), out


def test_report_says_what_was_run_and_what_came_out(synthetic: tuple[dict[str, Any], Path]) -> None:
    report, out = synthetic
    assert report["format"] == 2
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
    assert report["data"]["train_samples"] == 500
    assert "meaningless" in report["data"]["note"]
    for side in ("stock", "deepops"):
        assert len(report["epochs"][side]) == 2
        assert len(report["steps"][side]["loss"]) == len(report["steps"][side]["ms"]) == 2 * 16
        last, summary = report["epochs"][side][-1], report["summary"][side]
        assert summary["final_loss"] == last["loss"]
        assert summary["final_accuracy"] == last["test_accuracy"]
        assert summary["step_ms"] == pytest.approx(sorted_median(report["steps"][side]["ms"][3:]), abs=1e-3)
        assert summary["samples_per_second"] == pytest.approx(32_000 / summary["step_ms"])
        assert summary["saved_bytes"] > 0
    stock, ours = report["summary"]["stock"], report["summary"]["deepops"]
    assert report["summary"]["ratio"] == {
        "step_ms": pytest.approx(stock["step_ms"] / ours["step_ms"]),
        "samples_per_second": pytest.approx(ours["samples_per_second"] / stock["samples_per_second"]),
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
        TensorDataset(data.train_inputs, data.train_targets), batch_size=32, shuffle=True, generator=order
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
        right = plain.eval()(data.test_inputs).argmax(1) == data.test_targets
    assert right.double().mean().item() == report["summary"]["deepops"]["final_accuracy"]


def test_model_file_computes_what_was_trained(tiny: str, tmp_path: Path) -> None:
    from deepops.cli.models import build_pair, stock_state_dict

    trained = build_pair("cnn", seed=1)["deepops"]
    images = load_data(tiny, seed=0).train_inputs
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
    assert report["summary"]["deepops"]["samples_per_second"] == pytest.approx(12_000 / step_ms)


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
    for label in ("time per step", "samples per second", "saved for backward", "final loss", "final test accuracy"):
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


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN], ids=["usual", "in the background"])
def test_second_interrupt_ends_at_once(before: Any) -> None:
    """What was done with the signal before is done again after."""
    outer = signal.signal(signal.SIGINT, before)
    try:
        with stop_on_interrupt() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.is_set()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, outer)


def test_interrupt_before_training_is_one_line(monkeypatch: Any, capsys: Any) -> None:
    def interrupted(source: str, seed: int, kind: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deepops.cli.train.load_data", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "deepops train: interrupted\n"
