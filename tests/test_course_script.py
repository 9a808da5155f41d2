"""The course module's training script with only its two swapped lines learns what the stock script learns."""

import difflib
import runpy
from pathlib import Path

import pytest
import torch

from deepops.testing import ErrorPool, use_threads

STOCK = (Path(__file__).parent / "course_script.py").read_text()
SEEDS = range(6)
SWAPS = {
    "nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())": (
        "deepops.nn.ConvBNReLU2d(inputs, outputs, 3, padding=1, bias=True)"
    ),
    "= optim.Adam(": "= deepops.optim.Adam(",
}
DOUBLE = {
    "DigitCNN()\ndata": "DigitCNN().double()\ndata",
    "randn(IMAGES, 1, 28, 28)": "randn(IMAGES, 1, 28, 28).double()",
}


def edit(script: str, replacements: dict[str, str]) -> str:
    """Replace each text where it stands, exactly once."""
    for old, new in replacements.items():
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    return script


SWAPPED = edit(STOCK, {"import torch\n": "import deepops\nimport torch\n", **SWAPS})
ORACLE = edit(STOCK, DOUBLE)


def losses(script: str, seed: int, folder: Path) -> torch.Tensor:
    """The losses of the script's first six steps.

    Later, Adam amplifies the rounding of whatever implementation: after eight steps the largest error of 14 seeds is
    1.2e-5 on both sides, that of a single seed up to 28 times the other side's.
    """
    path = folder / "script.py"
    path.write_text(edit(script, {"manual_seed(0)": f"manual_seed({seed})"}))
    with torch.random.fork_rng(), use_threads(1):  # one: the order of sums is the same on every machine
        values = runpy.run_path(str(path))["losses"]
    return torch.tensor(values[:6], dtype=torch.float64 if script is ORACLE else torch.float32)


@pytest.fixture(scope="module")
def stock_and_oracle(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each seed the losses of the stock script in fp32 and in fp64."""
    folder = tmp_path_factory.mktemp("stock")
    return [(losses(STOCK, seed, folder), losses(ORACLE, seed, folder)) for seed in SEEDS]


def test_only_two_lines_are_swapped() -> None:
    changes = list(difflib.unified_diff(STOCK.splitlines(), SWAPPED.splitlines(), lineterm="", n=0))
    removed = [line for line in changes if line.startswith("-") and not line.startswith("---")]
    added = [line for line in changes if line.startswith("+") and not line.startswith("+++")]
    assert len(removed) == len(SWAPS) == 2
    assert added[0] == "+import deepops"
    assert len(added) == 3


def test_swapped_script_has_the_losses_of_the_stock_script(
    stock_and_oracle: list[tuple[torch.Tensor, torch.Tensor]], tmp_path: Path
) -> None:
    pool = ErrorPool()
    for seed, (stock, exact) in zip(SEEDS, stock_and_oracle, strict=True):
        pool.add(losses(SWAPPED, seed, tmp_path), stock, exact, name=f"seed {seed}")
    pool.check()


@pytest.mark.parametrize(
    "mistake",
    [
        {"bias=True)": "bias=True, eps=1e-4)"},
        {"lr=1e-3": "lr=1.01e-3"},
        {"weight_decay=1e-4": "weight_decay=2e-4"},
    ],
    ids=str,
)
def test_comparison_notices_a_small_mistake(
    mistake: dict[str, str], stock_and_oracle: list[tuple[torch.Tensor, torch.Tensor]], tmp_path: Path
) -> None:
    pool = ErrorPool()
    for stock, exact in stock_and_oracle:
        pool.add(stock, stock, exact)
    pool.add(losses(edit(SWAPPED, mistake), SEEDS[0], tmp_path), *stock_and_oracle[0])
    with pytest.raises(AssertionError, match="times stock's error"):
        pool.check()
