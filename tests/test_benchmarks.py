"""The benchmark harness: statistics, ratios, interleaving, the CSV and the table. Nothing here asserts a time."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
if not (ROOT / "benchmarks").exists():
    pytest.skip("needs benchmarks/", allow_module_level=True)
from benchmarks import harness, run, table  # noqa: E402
from benchmarks.harness import Case, Sample  # noqa: E402


def measured(name: str, ours: float, stock: float, **options: object) -> Case:
    """A case whose providers return fixed values."""
    return Case(name, "group", {"torch": lambda: stock, "deepops": lambda: ours}, measured=True, seconds=0, **options)


def test_summary_is_the_median_and_interpolated_percentiles() -> None:
    assert harness.summarise([5, 1, 2, 3, 4, 11]) == Sample(median=3.5, p20=2.0, p80=5.0, rounds=6)
    assert harness.summarise([7]) == Sample(7, 7, 7, 1)


def test_rounds_are_interleaved_and_turn_about() -> None:
    order: list[str] = []
    providers = {name: lambda name=name: order.append(name) or 1.0 for name in ("torch", "deepops")}
    case = Case("c", "g", providers, measured=True, seconds=0)
    assert harness.measure(case)["deepops"].rounds == 3
    warm_up, *rounds = zip(order[::2], order[1::2], strict=True)
    assert rounds == [warm_up, warm_up[::-1], warm_up]


def test_timed_case_gives_positive_times() -> None:
    case = Case("c", "g", {"torch": lambda: sum(range(100)), "deepops": lambda: None}, seconds=0)
    samples = harness.measure(case, quick=True)
    assert all(0 < sample.p20 <= sample.median <= sample.p80 for sample in samples.values())


def test_ratio_is_baseline_over_ours() -> None:
    (result,) = harness.run("b", [measured("c", ours=2.0, stock=6.0)])
    assert result.ratio("deepops") == 3
    assert result.ratio("torch") == 1


def test_the_fastest_of_the_others_as_baseline() -> None:
    values = {"slow": 9.0, "quick": 4.0, "deepops": 2.0}
    providers = {name: (lambda value=value: value) for name, value in values.items()}
    case = Case("c", "g", providers, baseline=harness.FASTEST, unit="n", measured=True, seconds=0)
    (result,) = harness.run("b", [case])
    assert (result.baseline, result.ratio("deepops"), result.ratio("slow")) == ("quick", 2, 4 / 9)
    assert {row["baseline"] for row in harness.rows(result)} == {"quick"}


@pytest.mark.parametrize("providers", [{"torch": lambda: 0}, {"deepops": lambda: 0}])
def test_case_without_ours_or_baseline_is_refused(providers: dict) -> None:
    with pytest.raises(ValueError, match="lack"):
        Case("c", "g", providers)


def test_refcheck_finds_a_wrong_provider() -> None:
    x = torch.linspace(-3, 3, 64)
    providers = {"torch": lambda: torch.sigmoid(x), "deepops": lambda: torch.sigmoid(x)}
    case = Case("c", "g", providers, oracle=lambda: torch.sigmoid(x.double()))
    harness.check_outputs(case)
    wrong = Case("c", "g", {**providers, "deepops": lambda: torch.sigmoid(x) * 1.001}, oracle=case.oracle)
    with pytest.raises(AssertionError, match="g c deepops"):
        harness.check_outputs(wrong)
    with pytest.raises(AssertionError, match="returns 0 tensors"):
        harness.check_outputs(Case("c", "g", {**providers, "deepops": lambda: None}, oracle=case.oracle))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of two benchmarks: one with a goal and a losing case, one with a limit."""
    cases = [measured("good", 1.0, 4.0, goal=1.8), measured("bad", 2.0, 1.0, goal=1.8)]
    harness.write_csv("first", harness.run("first", cases), tmp_path)
    limit = Case("import", "time", {"deepops": lambda: 50.0}, baseline=None, limit=60, measured=True, seconds=0)
    harness.write_csv("second", harness.run("second", [limit]), tmp_path)
    return tmp_path


def test_table_has_geometric_means_goals_and_losers(folder: Path) -> None:
    first, second = table.load(folder)
    assert first.ratio == pytest.approx(2**0.5)  # of 4 and 1/2
    assert table.cells(first) == ["first", "group", "2", "1.41x", "0.50x (bad)", ">= 1.8x", "missed"]
    assert table.cells(second) == ["second", "time", "1", "50 ms", "", "<= 60 ms", "reached"]
    assert table.losers([first, second]) == ["first, group, bad: 0.50x"]
    text = table.markdown([first, second])
    assert "first, group, bad: 0.50x" in text
    assert torch.__version__ in text
    assert harness.cpu_model() in text
    assert "0.50x (bad)" in table.plain([first])


def test_table_replaces_what_is_between_the_markers(folder: Path) -> None:
    readme = folder / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    for _ in range(2):  # the second time changes nothing
        table.update(readme, folder)
        text = readme.read_text()
        assert text == f"before\n{table.BEGIN}\n\n{table.markdown(table.load(folder))}\n\n{table.END}\nafter\n"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="lacks the markers"):
        table.update(readme, folder)


def test_wrong_name_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(["no_such"])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"no benchmark no_such; there are {', '.join(run.names())}")


@pytest.mark.parametrize("name", run.names())
def test_benchmark_gives_cases(name: str) -> None:
    """The first case of every benchmark can be made, and its providers run."""
    module = __import__(f"benchmarks.bench_{name}", fromlist=["cases"])
    case = next(module.cases())
    for call in case.providers.values():
        call()
    harness.check_outputs(case)
