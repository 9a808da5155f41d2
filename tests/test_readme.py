"""Every Python example in README.md runs, and what it says of commands and measurements is true."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
if not README.exists():
    pytest.skip("needs README.md", allow_module_level=True)
TEXT = README.read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def in_source_tree(*names: str) -> pytest.MarkDecorator:
    """Skip where the tests run on an installed package, beside README.md alone."""
    missing = [name for name in names if not (ROOT / name).exists()]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3
    for name in ("deepops.nn.ConvBNReLU2d", "deepops.optim.Adam"):
        assert any(name in example for example in EXAMPLES)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[number], f"README.md, example {number}", "exec"), {"__name__": "__main__"})
    assert not list(tmp_path.iterdir())


def installs_of_the_other_deepops(text: str) -> list[str]:
    """Commands that install the distribution ``deepops``: on the package index the name belongs to somebody else."""
    commands = re.findall(r"\bpip3? install\b[^#`|\n]*", text)
    return [command for command in commands if re.search(r"(?<![\w/.-])deepops(?!-torch)\b", command)]


def test_never_installs_the_other_deepops() -> None:
    assert "pip install ." in TEXT
    assert installs_of_the_other_deepops(TEXT) == []
    for wrong in ("pip install deepops", "pip3 install -U 'deepops[cli]'", "pip install torch deepops==1"):
        assert installs_of_the_other_deepops(f"say `{wrong}` now") == [wrong]
    assert installs_of_the_other_deepops("pip install deepops-torch # deepops") == []


@in_source_tree("Makefile", "CONTRIBUTING.md", "csrc/README.md")
def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^(\w+):", makefile, re.MULTILINE))
    texts = [TEXT, *((ROOT / name).read_text() for name in ("CONTRIBUTING.md", "csrc/README.md"))]
    named = {name for text in texts for name in re.findall(r"(?:`|^)make (\w+)", text, re.MULTILINE)}
    assert {"train", "test", "bench"} <= named
    assert named <= targets


@in_source_tree("CONTRIBUTING.md", "CHANGELOG.md", "csrc/README.md")
def test_linked_files_exist() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "csrc/README.md"):
        page = ROOT / name
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{name}: {link}"


@in_source_tree("benchmarks/results")
def test_table_is_what_the_results_say() -> None:
    from benchmarks import table

    shown = TEXT.split(table.BEGIN)[1].split(table.END)[0].strip()
    assert shown == table.markdown(table.load()).strip()
