"""``deepops train`` with the recurrent models: digits row by row, and a text byte by byte."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cli_tools import report_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from deepops import testing
from deepops.cli import main
from deepops.cli.data import load_data
from deepops.cli.errors import UserError
from deepops.cli.models import MODELS, build_pair
from deepops.cli.text import STEPS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of 22 pieces, of words that repeat."""
    path = tmp_path_factory.mktemp("data") / "words.txt"
    path.write_text("the quick brown fox jumps over the lazy dog.\n" * (22 * STEPS // 45 + 1))
    return str(path)


@pytest.fixture(scope="module")
def of_text(text: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One comparison on the file."""
    out = tmp_path_factory.mktemp("out")
    options = ("--model", "lstm-text", "--data", text, "--epochs", "2", "--batch-size", "4", "--seed", "3")
    return report_of(out, "report.json", *options), out


def test_lstm_learns_the_digits(tmp_path: Path) -> None:
    report = report_of(tmp_path, "report.json", "--model", "lstm", "--epochs", "3")
    assert report["config"]["data"] == "digits"
    for side in ("stock", "deepops"):
        losses = [epoch["loss"] for epoch in report["epochs"][side]]
        assert losses[2] < losses[0]
        assert report["summary"][side]["final_accuracy"] > 0.7  # chance: 0.1
    assert report["test_loss_by_position"] == {}
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    MODELS["lstm"].stock().load_state_dict(state)


def test_text_comes_in_pieces_with_what_follows(text: str) -> None:
    data = load_data(text, seed=0, kind="text")
    stream = torch.frombuffer(bytearray(Path(text).read_bytes()), dtype=torch.uint8).long()
    assert (data.name, data.samples) == ("words", f"pieces of {STEPS} bytes")
    inputs = torch.cat([data.train_inputs, data.test_inputs]).flatten()
    targets = torch.cat([data.train_targets, data.test_targets]).flatten()
    assert torch.equal(inputs, stream[: len(inputs)])
    assert torch.equal(targets, stream[1 : len(inputs) + 1])
    assert (len(data.test_inputs), len(data.train_inputs)) == (2, 20)


def test_pythons_reference_is_english_with_grammar() -> None:
    data = load_data("python", seed=0, kind="text")
    words = bytes(data.train_inputs.flatten().tolist()).decode(errors="ignore")
    assert len(data.train_inputs) > 1000
    assert "expression" in words
    assert " the " in words


def test_loss_by_position_is_that_of_the_saved_model(text: str, of_text: tuple[dict[str, Any], Path]) -> None:
    report, out = of_text
    data = load_data(text, seed=3, kind="text")
    model = MODELS["lstm-text"].stock()
    model.load_state_dict(torch.load(out / "model.pt", weights_only=True))
    results: dict[torch.dtype, Tensor] = {}
    for dtype in (torch.float32, torch.float64):
        with torch.no_grad():
            scores = model.to(dtype)(data.test_inputs)
            results[dtype] = F.cross_entropy(scores, data.test_targets, reduction="none").mean(0)
            if dtype is torch.float64:
                right = (scores.argmax(1) == data.test_targets).double().mean().item()
    found = report["test_loss_by_position"]["deepops"]
    assert len(found) == STEPS
    testing.assert_close_to_oracle(torch.tensor(found), results[torch.float32], results[torch.float64])
    assert report["summary"]["deepops"]["final_accuracy"] == pytest.approx(right, abs=1 / data.test_targets.numel())


def test_stock_side_is_a_plain_loop(text: str, of_text: tuple[dict[str, Any], Path]) -> None:
    report, _ = of_text
    data = load_data(text, seed=3, kind="text")
    torch.manual_seed(3)
    embedding, lstm, linear = nn.Embedding(256, 64), nn.LSTM(64, 128, batch_first=True), nn.Linear(128, 256)
    parameters = [*embedding.parameters(), *lstm.parameters(), *linear.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, weight_decay=1e-4)
    order = torch.Generator().manual_seed(3)
    batches = DataLoader(
        TensorDataset(data.train_inputs, data.train_targets), batch_size=4, shuffle=True, generator=order
    )
    losses = []
    for _ in range(2):
        for inputs, targets in batches:
            optimizer.zero_grad()
            scores = linear(lstm(embedding(inputs))[0])
            loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert report["steps"]["stock"]["loss"] == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < losses[0] < 1.1 * math.log(256)


@pytest.mark.parametrize("name", ["lstm", "lstm-text"])
def test_both_sides_begin_with_the_same_weights(name: str) -> None:
    pair = build_pair(name, seed=1)
    assert type(pair["deepops"].lstm).__module__.startswith("deepops.")
    assert pair["stock"].state_dict().keys() == pair["deepops"].state_dict().keys()
    for key, value in pair["stock"].state_dict().items():
        assert torch.equal(value, pair["deepops"].state_dict()[key]), key


def test_gradient_flow_of_the_lstm(tmp_path: Path, tiny: str) -> None:
    """There is no batch norm to do without."""
    report = report_of(
        tmp_path, "gradient_flow.json", "--model", "lstm", "--data", tiny, "--epochs", "1", "--gradient-flow"
    )
    assert "lstm" in str(report)
    assert "without batch norm" not in str(report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "lstm-text", "--data", "digits"), "--data digits: the model takes a text"),
        (("--model", "lstm-text", "--data", "/nowhere/at/all"), "--data /nowhere/at/all: cannot be read: No such file"),
        (("--model", "lstm", "--data", "python"), "--data python: the model takes images"),
        (("--model", "lstm-text", "--gradient-flow"), "--gradient-flow is for models of images, not for lstm-text"),
        (("--model", "lstm-text", "--compare-optimizers"), "--compare-optimizers is for models of images"),
    ],
)
def test_data_and_model_must_go_together(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_text_that_is_too_short(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("x" * 10 * STEPS)
    with pytest.raises(UserError, match=rf"{10 * STEPS} bytes are too short a text, {10 * STEPS + 1} needed at least"):
        load_data(str(tmp_path / "short.txt"), 0, "text")
    (tmp_path / "long.txt").write_text("x" * (10 * STEPS + 1))
    assert len(load_data(str(tmp_path / "long.txt"), 0, "text").train_inputs) == 9
