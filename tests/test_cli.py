"""The ``deepops`` command: wrong requests, ``deepops info`` and ``deepops check``."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import start
from torch import Tensor

import deepops
from deepops import _library, testing
from deepops._build_info import build_info
from deepops.cli import check_ops, errors, main

pytestmark = pytest.mark.usefixtures("one_thread")


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
    "folder without data": (["train", "--data", str(Path(__file__).parent)], "train-images-idx3-ubyte.gz is there"),
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


def test_a_truncated_file_is_one_line(tiny: str, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    assert main(["train", "--data", str(tmp_path)]) == 2
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
    assert all(f"missing: {why}" in text for why in facts["missing"].values())
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
    assert {row["op"] for row in rows} == {
        check.op for check in check_ops.CHECKS if set(check.devices) & set(testing.devices())
    }
    assert all(row["cases"] > 0 and row["ratio"] <= result["limit"] for row in rows)
    for check in check_ops.CHECKS:
        if "cpu" not in check.devices:
            continue
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
