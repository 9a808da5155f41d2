"""``deepops train --gradient-flow``: what it measures, the table, the files, and wrong requests."""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import report_of

from deepops.cli import flow_report, gradient_flow, main
from deepops.cli.data import load_data

NETWORKS = ["cnn", "cnn without batch norm", "deep sigmoid net", "deep tanh net with large weights"]
SHORT = ("--epochs", "2", "--batch-size", "6")


pytestmark = pytest.mark.usefixtures("one_thread")


def run(out: Path, *options: str) -> dict[str, Any]:
    """``deepops train --gradient-flow`` into ``out``; the report."""
    return report_of(out, "gradient_flow.json", "--gradient-flow", *options)


def read_csv(out: Path) -> list[dict[str, str]]:
    with (out / "gradient_flow.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def flow(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One short training of all networks."""
    out = tmp_path_factory.mktemp("flow")
    return run(out, "--data", tiny, *SHORT), out


def sides_of(precision: str = "fp32", optimizer: str = "adam") -> dict[str, gradient_flow.MeasuredSide]:
    arguments = argparse.Namespace(model="cnn", optimizer=optimizer, precision=precision, seed=0, contrast=True)
    return gradient_flow.prepare(arguments, torch.device("cpu"))


def test_report(flow: tuple[dict[str, Any], Path], tiny: str) -> None:
    report, out = flow
    assert report["format"] == 1
    assert report["interrupted"] is False
    assert report["config"] == {
        "model": "cnn",
        "data": tiny,
        "epochs": 2,
        "batch_size": 6,
        "optimizer": "adam",
        "precision": "fp32",
        "seed": 0,
        "contrast": True,
        "device": "cpu" if not torch.cuda.is_available() else "cuda",
    }
    assert list(report["summary"]) == NETWORKS
    assert report["layers"]["cnn"] == [
        f"{name}.weight" for name in ("features.0.conv", "features.2.conv", "classifier.0", "classifier.3")
    ]
    assert report["layers"]["deep sigmoid net"] == [f"linear{number}.weight" for number in range(1, 11)]
    assert (out / "gradient_flow.png").read_bytes().startswith(b"\x89PNG")


def test_csv_has_every_parameter_at_every_step(flow: tuple[dict[str, Any], Path]) -> None:
    rows = read_csv(flow[1])
    sides = sides_of()
    expected = [
        (title, str(step), name)
        for title, side in sides.items()
        for step in range(1, 5)
        for name, _ in side.model.named_parameters()
    ]
    assert [(row["network"], row["step"], row["parameter"]) for row in rows] == expected
    assert all(row["non_finite"] == "0" for row in rows)
    assert all(float(row["update_norm"]) > 0 for row in rows if row["parameter"].endswith("weight"))
    entry = flow[0]["summary"]["cnn"]
    norms = [float(r["grad_norm"]) for r in rows if (r["network"], r["parameter"]) == ("cnn", entry["first_layer"])]
    assert entry["first_grad_norm"] == pytest.approx((sorted(norms)[1] + sorted(norms)[2]) / 2)


def test_gradients_vanish_and_explode(flow: tuple[dict[str, Any], Path]) -> None:
    summary = flow[0]["summary"]
    assert summary["deep sigmoid net"]["ratio"] < 1e-4
    assert summary["deep tanh net with large weights"]["ratio"] > 10
    assert 1e-2 < summary["cnn"]["ratio"] < 10


def test_measuring_changes_nothing(flow: tuple[dict[str, Any], Path], tiny: str, tmp_path: Path) -> None:
    """The network trains as with ``deepops train``, and the same numbers come out again."""
    assert main(["train", "--data", tiny, *SHORT, "--no-compare", "--out", str(tmp_path)]) == 0
    alone = json.loads((tmp_path / "report.json").read_text())
    assert flow[0]["losses"]["cnn"] == alone["steps"]["deepops"]["loss"]
    run(tmp_path, "--data", tiny, *SHORT)
    assert (tmp_path / "gradient_flow.csv").read_text() == (flow[1] / "gradient_flow.csv").read_text()


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_norms_are_those_of_the_gradients(precision: str, optimizer: str, tiny: str) -> None:
    """Unscaled in fp16, too."""
    data = load_data(tiny, 0)
    for side in sides_of(precision, optimizer).values():
        while not side.facts or side.facts[-1].skipped:  # fp16 begins with a scale that is too large
            before = {name: param.detach().double() for name, param in side.model.named_parameters()}
            side.step(data.train_inputs, data.train_targets)
        facts = side.facts[-1]
        assert (facts.scale > 1) == (precision == "fp16")
        for name, param in side.model.named_parameters():
            assert param.grad is not None
            assert facts.grad_norm(name) == pytest.approx(param.grad.double().norm().item(), rel=1e-5)
            assert facts.parameters[name].param_norm == pytest.approx(param.double().norm().item(), rel=1e-5)
            moved = (param.detach().double() - before[name]).norm().item()
            assert facts.parameters[name].update_norm == pytest.approx(moved, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gradient_that_is_not_finite_is_named(precision: str, tiny: str, tmp_path: Path, monkeypatch: Any) -> None:
    prepare = gradient_flow.prepare

    def poisoned(*arguments: Any) -> dict[str, gradient_flow.MeasuredSide]:
        sides = prepare(*arguments)
        side = sides["cnn"]
        side.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=precision == "fp16")
        side.model.features[2].conv.weight.register_hook(lambda grad: grad * (math.inf if len(side.facts) == 2 else 1))
        return sides

    monkeypatch.setattr(gradient_flow, "prepare", poisoned)
    report = run(tmp_path, "--data", tiny, *SHORT, "--no-contrast", "--precision", precision)
    assert list(report["summary"]) == ["cnn"]
    found = report["summary"]["cnn"]
    assert found["first_non_finite"] == {"step": 3, "parameter": "features.2.conv.weight"}
    assert found["first_grad_norm"] > 0
    if precision == "fp16":  # which leaves out that step, while fp32 loses the weights
        assert found["steps_non_finite"] == 1
        third = [row for row in read_csv(tmp_path) if row["step"] == "3"]
        assert all((row["param_norm"], float(row["update_norm"])) == ("", 0) for row in third)
    else:
        assert found["steps_non_finite"] == 2
    assert "NaN" not in (tmp_path / "gradient_flow.json").read_text()


def test_table(tiny: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["train", "--gradient-flow", "--data", tiny, *SHORT, "--optimizer", "sgd"]) == 0
    text = capsys.readouterr().out
    for title in NETWORKS:
        assert title in text
    for label in ("first layer", "last layer", "update / weight", "not finite", "medians over all steps"):
        assert label in text
    names = ["gradient_flow.csv", "gradient_flow.json", "gradient_flow.png"]
    assert sorted(path.name for path in (tmp_path / "runs" / "cnn-tiny").iterdir()) == names


def test_interrupt_keeps_what_was_reached(tiny: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    real = gradient_flow.train

    def stopped(session: Any, listener: Any, stop: Any) -> bool:
        stop.set()
        return real(session, listener, stop)

    monkeypatch.setattr(gradient_flow, "train", stopped)
    assert main(["train", "--gradient-flow", "--data", tiny, *SHORT, "--out", str(tmp_path)]) == 130
    assert "interrupted: what was reached" in capsys.readouterr().out
    assert {row["step"] for row in read_csv(tmp_path)} == {"1"}


def test_a_step_without_finite_gradients_has_no_median() -> None:
    assert math.isnan(flow_report._median([math.nan, math.inf]))
    assert flow_report._median([1.0, math.inf, 3.0]) == 2.0


# ---- Wrong requests --------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[str], str]] = {
    "with stock": (
        ["--gradient-flow", "--compare"],
        "--compare/--no-compare: not allowed with argument --gradient-flow",
    ),
    "rates": (["--gradient-flow", "--learning-rates", "sgd=1"], "--learning-rates does not go with --gradient-flow"),
    "noise": (["--gradient-flow", "--label-noise", "0"], "--label-noise does not go with --gradient-flow"),
    "contrast alone": (["--no-contrast"], "--contrast needs --gradient-flow"),
    "no such device": (["--gradient-flow", "--device", "abacus"], "--device abacus: not available here"),
    "folder is a file": (["--gradient-flow", "--data", "synthetic", "--out", __file__], "cannot be written"),
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
    assert not list(tmp_path.iterdir()), "left something behind"


def test_without_the_kernel_nothing_can_be_measured(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr("deepops.optim._coverage._C", None)
    assert main(["train", "--gradient-flow", "--data", "synthetic", "--out", str(tmp_path)]) == 2
    message = "deepops train: --gradient-flow: needs the kernel of adam: there is no kernel for cpu\n"
    assert capsys.readouterr().err == message


def test_help(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("--gradient-flow", "with --gradient-flow:", "--contrast, --no-contrast"):
        assert part in text
