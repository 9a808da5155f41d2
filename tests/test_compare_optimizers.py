"""``deepops train --compare-optimizers``: what is trained, the table, the files, and wrong requests."""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import report_of

from deepops.cli import compare_optimizers, main
from deepops.cli.compare_optimizers import RULES, Comparison, Run
from deepops.cli.data import load_data, with_label_noise
from deepops.cli.optimizer_report import steps_to, summarize
from deepops.cli.side import Epoch

RATES = {"sgd": [0.001, 0.01], "rmsprop": [0.001], "adam": [0.001, 0.1]}
SHORT = (
    *("--learning-rates", *(f"{name}={','.join(map(str, rates))}" for name, rates in RATES.items())),
    *("--epochs", "2", "--batch-size", "6"),
)
TIMES = ("update_ms", "step_ms")


pytestmark = pytest.mark.usefixtures("one_thread")


def run(out: Path, *options: str) -> dict[str, Any]:
    """``deepops train --compare-optimizers`` into ``out``; the report."""
    return report_of(out, "optimizers.json", "--compare-optimizers", *options)


@pytest.fixture(scope="module")
def compared(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One short comparison at two parts of wrong labels."""
    out = tmp_path_factory.mktemp("compared")
    return run(out, "--data", tiny, *SHORT, "--label-noise", "0.5", "0", "--target-loss", "2"), out


def test_report_has_every_training(compared: tuple[dict[str, Any], Path], tiny: str) -> None:
    report, out = compared
    assert report["format"] == 1
    assert report["interrupted"] is False
    assert report["config"] == {
        "model": "cnn",
        "data": tiny,
        "epochs": 2,
        "batch_size": 6,
        "precision": "fp32",
        "seed": 0,
        "seeds": 1,
        "label_noise": [0.0, 0.5],
        "target_loss": 2.0,
        "learning_rates": RATES,
        "device": "cpu" if not torch.cuda.is_available() else "cuda",
    }
    trained = [(r["label_noise"], r["optimizer"], r["learning_rate"]) for r in report["runs"]]
    assert trained == [(noise, name, rate) for noise in (0.0, 0.5) for name in RATES for rate in RATES[name]]
    for entry in report["runs"]:
        assert len(entry["losses"]) == 4
        assert len(entry["epochs"]) == 2
        assert 0 < entry["update_ms"] < entry["step_ms"]
    for name, words in {"sgd": 1, "rmsprop": 1, "adam": 2}.items():
        assert report["summary"][name]["state_bytes"] == pytest.approx(4 * words, rel=1e-3)
    assert report["summary"]["adam"]["hyper_parameters"] == {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 1e-4}
    assert report["summary"]["sgd"]["hyper_parameters"] == {"momentum": 0.9, "weight_decay": 1e-4}
    assert (out / "optimizers.png").read_bytes().startswith(b"\x89PNG")


def test_csv_has_the_same_trainings(compared: tuple[dict[str, Any], Path]) -> None:
    report, out = compared
    with (out / "optimizers.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, entry in zip(rows, report["runs"], strict=True):
        assert row["optimizer"] == entry["optimizer"]
        assert float(row["learning_rate"]) == entry["learning_rate"]
        assert float(row["label_noise"]) == entry["label_noise"]
        assert float(row["test_accuracy"]) == entry["epochs"][-1]["test_accuracy"]
        assert float(row["final_loss"]) == entry["epochs"][-1]["loss"]
        steps = steps_to(entry["losses"], 2.0)
        assert row["steps_to_target"] == ("" if steps is None else str(steps))


def test_same_seeds_give_the_same_but_for_times(
    compared: tuple[dict[str, Any], Path], tiny: str, tmp_path: Path
) -> None:
    again = run(tmp_path, "--data", tiny, *SHORT, "--label-noise", "0.5", "0", "--target-loss", "2")
    first = copy.deepcopy(compared[0])
    for report in (first, again):
        for entry in (*report["runs"], *report["summary"].values()):
            for name in TIMES:
                del entry[name]
        for entry in report["runs"]:
            for epoch in entry["epochs"]:
                del epoch["train_seconds"]
    assert again == first


def test_every_training_is_that_of_deepops_train(
    compared: tuple[dict[str, Any], Path], tiny: str, tmp_path: Path
) -> None:
    """Same weights, batches and dropout masks, and taking turns changes no number."""
    for name in ("adam", "rmsprop"):
        options = ["--data", tiny, "--epochs", "2", "--batch-size", "6", "--optimizer", name, "--no-compare"]
        assert main(["train", *options, "--out", str(tmp_path)]) == 0
        alone = json.loads((tmp_path / "report.json").read_text())
        runs = [r for r in compared[0]["runs"] if (r["optimizer"], r["label_noise"]) == (name, 0.0)]
        assert runs[0]["learning_rate"] == 0.001
        assert runs[0]["losses"] == alone["steps"]["deepops"]["loss"]


def test_table(tiny: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    options = ["--data", tiny, *SHORT, "--label-noise", "0.25", "--seeds", "2"]
    assert main(["train", "--compare-optimizers", *options]) == 0
    text = capsys.readouterr().out
    for title in (rule.title for rule in RULES.values()):
        assert title in text
    for label in (
        "momentum 0.9",
        "alpha 0.99",
        "betas 0.9 0.999",
        "2: 0.001 to 0.01",
        "fewest steps to loss 0.3",
        "not reached",
        "accuracy, 25% wrong labels",
        "rates that work",
        "one update, median",
        "4.0 bytes",
        "8.0 bytes",
    ):
        assert label in text
    for seed in (0, 1):
        assert f"25% wrong labels, seed {seed}: best test accuracy sgd" in text
    folder = tmp_path / "runs" / "cnn-tiny"
    assert sorted(path.name for path in folder.iterdir()) == ["optimizers.csv", "optimizers.json", "optimizers.png"]
    report = json.loads((folder / "optimizers.json").read_text())
    assert {entry["seed"] for entry in report["runs"]} == {0, 1}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(precision: str, compared: tuple[dict[str, Any], Path], tiny: str, tmp_path: Path) -> None:
    report = run(tmp_path, "--data", tiny, *SHORT, "--label-noise", "0", "--precision", precision)
    for half, full in zip(report["runs"], compared[0]["runs"], strict=False):
        assert half["losses"][0] != full["losses"][0]
        assert half["losses"][0] == pytest.approx(full["losses"][0], rel=0.02)


# ---- Label noise -----------------------------------------------------------------------------------------------------


def test_label_noise_makes_so_many_labels_wrong() -> None:
    data = load_data("synthetic", seed=0)
    assert torch.equal(with_label_noise(data, 0.0, 0).train_targets, data.train_targets)
    little, much = (with_label_noise(data, fraction, 0).train_targets for fraction in (0.2, 0.5))
    wrong, more = little != data.train_targets, much != data.train_targets
    assert (wrong.sum(), more.sum()) == (100, 250)
    assert torch.equal(little[wrong], much[wrong]), "what is wrong at 20 % is wrong in the same way at 50 %"
    assert set(much.tolist()) == set(range(10))
    noisy = with_label_noise(data, 0.2, 0)
    assert torch.equal(noisy.train_targets, little)
    assert torch.equal(noisy.test_targets, data.test_targets)
    assert torch.equal(noisy.train_inputs, data.train_inputs)
    assert not torch.equal(with_label_noise(data, 0.2, 1).train_targets, little)
    assert bool((with_label_noise(data, 1.0, 0).train_targets != data.train_targets).all())


# ---- What the table says ---------------------------------------------------------------------------------------------


def test_steps_to_a_loss() -> None:
    losses = [1.0] * 10 + [0.0] * 10
    assert steps_to(losses, 1.0) == 10
    assert steps_to(losses, 0.5) == 15
    assert steps_to(losses, 0.0) == 20
    assert steps_to(losses[:19], 0.0) is None
    assert steps_to([0.5, 0.1], 0.3) == 2, "fewer steps than the window: all of them"
    assert steps_to([math.nan] * 30, 0.3) is None


def made_up(accuracies: dict[str, list[float]], *, losses: dict[str, list[float]] | None = None) -> dict[str, Any]:
    """The summary of trainings with these results at the learning rates 1, 10, 100, ..."""
    runs = [
        Run(name, 10.0**i, 0.0, 0, [1.0], [Epoch((losses or {}).get(name, [0.0] * 9)[i], value, 1.0)], 2.0, 1.0, 4.0)
        for name, values in accuracies.items()
        for i, value in enumerate(values)
    ]
    arguments = argparse.Namespace(target_loss=0.3)
    return summarize(Comparison(arguments, torch.device("cpu"), load_data("synthetic", 0), 1, runs))


def test_range_of_learning_rates_that_work() -> None:
    summary = made_up(
        {
            "sgd": [0.5, 0.96, 0.97, 0.96, 0.5],
            "rmsprop": [0.96, 0.5, 0.97, 0.98, 0.97],
            "adam": [0.92, 0.92, 0.92, 0.92, 0.92],
        }
    )
    found = {name: entry["noise"]["0"] for name, entry in summary.items()}
    assert found["sgd"]["best_learning_rate"] == 100
    assert found["sgd"]["works"] == {"from": 10, "to": 1000, "decades": 2.0, "reaches_end": False}
    assert found["rmsprop"]["works"] == {"from": 100, "to": 10000, "decades": 2.0, "reaches_end": True}
    assert found["adam"]["works"] is None, "5 points below the best of all optimizers at no rate"


def test_convergence_is_that_of_the_fastest_rate_which_all_seeds_reach_it_with() -> None:
    def trained(rate: float, seed: int, steps: int) -> list[Run]:
        losses = [1.0] * (steps - 10) + [0.0] * 10
        return [Run(name, rate, 0.0, seed, losses, [Epoch(0.0, 0.9, 1.0)], 2.0, 1.0, 4.0) for name in RULES]

    runs = trained(1.0, 0, 40) + trained(1.0, 1, 60) + trained(10.0, 0, 20) + trained(10.0, 1, 200)
    runs += [replace(run, learning_rate=100.0, losses=[1.0] * 9 if run.seed else [0.0] * 9) for run in runs[:6]]
    arguments = argparse.Namespace(target_loss=0.0)
    summary = summarize(Comparison(arguments, torch.device("cpu"), load_data("synthetic", 0), 2, runs))
    assert summary["sgd"]["convergence"] == {"steps": 50, "learning_rate": 1.0}


def test_equal_accuracies_are_told_apart_by_the_loss() -> None:
    same = {"sgd": [0.9, 0.9, 0.9], "rmsprop": [0.9], "adam": [0.9]}
    summary = made_up(same, losses={"sgd": [math.nan, 0.1, 0.2]})
    assert summary["sgd"]["noise"]["0"]["best_learning_rate"] == 10


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("complete", [0, 1])
def test_interrupt_keeps_complete_rounds(
    complete: int, tiny: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    done = []
    real = compare_optimizers.train

    def train(session: Any, listener: Any, stop: Any) -> bool:
        if len(done) == complete:
            stop.set()
        done.append(session)
        return real(session, listener, stop)

    monkeypatch.setattr(compare_optimizers, "train", train)
    assert main(["train", "--compare-optimizers", "--data", tiny, *SHORT, "--out", str(tmp_path)]) == 130
    captured = capsys.readouterr()
    assert len(done) == complete + 1
    if complete:
        assert "interrupted: 1 of 3 rounds are complete" in captured.out
        report = json.loads((tmp_path / "optimizers.json").read_text())
        assert report["interrupted"] is True
        assert {entry["label_noise"] for entry in report["runs"]} == {0.0}
    else:
        assert captured.err == "deepops train: interrupted\n"
        assert not list(tmp_path.iterdir())


# ---- Wrong requests --------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[str], str]] = {
    "with gradient flow": (
        ["--compare-optimizers", "--gradient-flow"],
        "not allowed with argument --compare-optimizers",
    ),
    "with stock": (["--compare-optimizers", "--compare"], "not allowed with argument --compare-optimizers"),
    "one optimizer": (
        ["--compare-optimizers", "--optimizer", "adam"],
        "--optimizer does not go with --compare-optimizers",
    ),
    "contrast": (["--compare-optimizers", "--contrast"], "--contrast does not go with --compare-optimizers"),
    "rates alone": (["--learning-rates", "sgd=1"], "--learning-rates needs --compare-optimizers"),
    "noise alone": (["--label-noise", "0.5"], "--label-noise needs --compare-optimizers"),
    "seeds elsewhere": (["--gradient-flow", "--seeds", "2"], "--seeds does not go with --gradient-flow"),
    "too much noise": (["--compare-optimizers", "--label-noise", "1.5"], "'1.5' is not a number from 0 to 1"),
    "noise in words": (["--compare-optimizers", "--label-noise", "some"], "'some' is not a number from 0 to 1"),
    "no target": (["--compare-optimizers", "--target-loss", "0"], "--target-loss: '0' is not a positive number"),
    "no seeds": (["--compare-optimizers", "--seeds", "0"], "--seeds: '0' is not an integer from 1"),
    "seeds too high": (["--compare-optimizers", "--seed", "4294967295", "--seeds", "2"], "--seeds 2: the last seed"),
    "unknown rule": (["--compare-optimizers", "--learning-rates", "lion=1"], "with NAME one of sgd, rmsprop, adam"),
    "rate without rule": (["--compare-optimizers", "--learning-rates", "0.1"], "'0.1' is not NAME=RATE[,RATE...]"),
    "rate in words": (
        ["--compare-optimizers", "--learning-rates", "sgd=1,low"],
        "'low' is not a positive learning rate",
    ),
    "negative rate": (["--compare-optimizers", "--learning-rates", "sgd=-1"], "'-1' is not a positive learning rate"),
    "rates twice": (
        ["--compare-optimizers", "--learning-rates", "sgd=1", "sgd=2"],
        "--learning-rates: sgd is there twice",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_request_gets_one_line_and_code_2(case: str, capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    options, message = REFUSED[case]
    assert main(["train", *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("deepops train: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not list(tmp_path.iterdir()), "left something behind"


def test_help_names_options_and_defaults(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "--compare-optimizers",
        "with --compare-optimizers:",
        "--learning-rates NAME=RATE[,RATE...]",
        "(default: 0 0.2 0.4)",
        "(default: 5; with --compare-optimizers 4)",
        "(default: runs/MODEL-DATA)",
    ):
        assert part in text
    assert "(default: None)" not in text
    assert "(default: False)" not in text
