"""What is in the sdist and the wheel, and that deepops can be imported from every kind of install.

Each install goes into a throwaway environment that sees the running environment's packages (torch above all) but not
its deepops. The isolated install needs a package registry; deselect it with ``-m 'not isolated'``.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

import pytest

from deepops._library import binaries

ROOT = Path(__file__).parent.parent
if not (ROOT / "setup.py").exists():
    pytest.skip("needs the source tree", allow_module_level=True)

JUNK = shutil.ignore_patterns(  # .hypothesis: other tests write there meanwhile
    ".git", ".venv", ".hypothesis", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache", "runs"
)
EXTENSION = sysconfig.get_config_var("EXT_SUFFIX")
# Run outside the source tree: where deepops came from and whether its binaries work there.
PROBE = """
import importlib.metadata, json, pathlib
import torch, deepops
from deepops._library import binaries
print(json.dumps({
    "file": deepops.__file__,
    "version": deepops.__version__,
    "metadata": importlib.metadata.version("deepops-torch"),
    "missing": [name for name in ("_ops", "_C") if not pathlib.Path(binaries()[name]).is_file()],
    "schema": str(torch.ops.deepops.batch_norm_act_train.default._schema),
}))
"""


def run(*command: object, cwd: Path, fails: bool = False) -> str:
    """Run a command as a user would whose shell has the build tools on its PATH; returns all it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    environment["DEEPOPS_CUDA"] = "0"  # or it would depend on the machine; tests/test_cuda_build.py builds the kernels
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


@dataclass
class Environment:
    """A throwaway virtual environment."""

    python: Path

    def pip(self, *arguments: object, cwd: Path, fails: bool = False) -> str:
        """Run the outer pip on this environment."""
        quiet = ("--disable-pip-version-check", "--no-input")
        return run(sys.executable, "-m", "pip", *quiet, "--python", self.python, *arguments, cwd=cwd, fails=fails)

    def probe(self, cwd: Path) -> dict[str, str]:
        """Import deepops; a warning about a missing binary is an error."""
        return json.loads(run(self.python, "-W", "error::RuntimeWarning", "-c", PROBE, cwd=cwd).splitlines()[-1])


@pytest.fixture
def environment(tmp_path: Path) -> Callable[..., Environment]:
    """Makes an environment that sees everything installed here except deepops and what the caller hides."""

    def make(*hidden: str) -> Environment:
        venv.create(tmp_path / "venv", with_pip=False)
        python = tmp_path / "venv" / "bin" / "python"
        shared = tmp_path / "shared"
        shared.mkdir()
        for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
            for entry in Path(place).iterdir():
                words = re.split(r"[-.]", entry.name)
                if "deepops" not in entry.name and words[0] not in hidden and entry.suffix != ".pth":
                    (shared / entry.name).symlink_to(entry)
        paths = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
        Path(paths.strip(), "shared.pth").write_text(f"{shared}\n")
        return Environment(python)

    return make


def copy_of_tree(place: Path) -> Path:
    """The sources as in a clean clone."""
    return Path(shutil.copytree(ROOT, place / "source", ignore=JUNK))


@pytest.fixture(scope="module")
def version() -> str:
    """The version in pyproject.toml, the one place that states it."""
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found
    return found[1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of a clean copy of the tree."""
    place = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", place, copy_of_tree(place), cwd=place)
    (archive,) = place.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in the sdist. Installs build there, so it has all a build needs.

    Each of them compiles everything, as each sees torch in another place: not optimized, which is no matter here and
    takes a quarter of the time.
    """
    place = tmp_path_factory.mktemp("unpacked")
    shutil.unpack_archive(sdist, place)
    folder = place / sdist.name.removesuffix(".tar.gz")
    for name in ("CMakeLists.txt", "cmake/CpuIsa.cmake"):
        text = (folder / name).read_text()
        assert text.count("-O3 -Wall") == 1
        (folder / name).write_text(text.replace("-O3 -Wall", "-O0 -Wall"))
    return folder


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that ``pip install --no-build-isolation`` makes."""
    place = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", place, unpacked, cwd=place)
    (archive,) = place.glob("*.whl")
    return archive


def sources(folder: str, pattern: str = "*") -> set[str]:
    """Files of the tree below a folder, without what a build or a tool left there."""
    files = (path.relative_to(ROOT) for path in (ROOT / folder).rglob(pattern) if path.is_file())
    return {str(path) for path in files if "__pycache__" not in path.parts and path.suffix not in (".so", ".png")}


def test_sdist_has_everything_to_build_and_test(sdist: Path, version: str) -> None:
    with tarfile.open(sdist) as archive:
        members = [member.name for member in archive.getmembers() if member.isfile()]
    top = f"deepops_torch-{version}/"
    assert all(name.startswith(top) for name in members)
    names = {name.removeprefix(top) for name in members}
    wanted = {"pyproject.toml", "setup.py", "CMakeLists.txt", "Makefile", "README.md", "LICENSE", "CHANGELOG.md"}
    for folder in ("csrc", "cmake", "tests", "benchmarks", "deepops"):
        assert sources(folder)
        wanted |= sources(folder)
    assert wanted <= names
    assert not [name for name in names if re.search(r"\.(so|pyc)$|__pycache__|^(build|dist|\.venv)/", name)]


def test_wheel_has_the_package_and_nothing_else(wheel: Path, version: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"deepops_torch-{version}.dist-info"
    assert {name.split("/")[0] for name in names} == {"deepops", info}  # no csrc, tests or benchmarks
    inside = {name for name in names if name.startswith("deepops/")}
    assert inside == sources("deepops") | {"deepops/_ops.so", f"deepops/_C{EXTENSION}"}
    assert {"deepops/py.typed", "deepops/_C.pyi", f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= names


def test_wheel_metadata(wheel: Path, version: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = HeaderParser().parsestr(archive.read(f"deepops_torch-{version}.dist-info/METADATA").decode())
    assert (metadata["Name"], metadata["Version"]) == ("deepops-torch", version)
    always = [requirement for requirement in metadata.get_all("Requires-Dist", []) if "extra ==" not in requirement]
    assert always == ["torch>=2.11"]


def test_ops_binary_needs_only_the_stable_abi(wheel: Path, tmp_path: Path) -> None:
    """No Python and no unstable C++ symbol of torch: that is what lets one binary run on every torch from 2.11."""
    with zipfile.ZipFile(wheel) as archive:
        binary = archive.extract("deepops/_ops.so", tmp_path)
    undefined = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", binary, cwd=tmp_path).splitlines()]
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in undefined)
    assert not [name for name in undefined if re.match(r"_?Py[A-Z_]|_ZNK?(2at|3c10|5torch)", name)]


@pytest.mark.parametrize("kind", ["wheel", "editable", pytest.param("isolated", marks=pytest.mark.isolated)])
def test_import_from_install(
    kind: str,
    environment: Callable[..., Environment],
    tmp_path: Path,
    version: str,
    unpacked: Path,
    wheel: Path,
) -> None:
    place = environment()
    if kind == "wheel":
        place.pip("install", "--no-deps", wheel, cwd=tmp_path)
    elif kind == "editable":
        place.pip("install", "--no-build-isolation", "--no-deps", "-e", unpacked, cwd=tmp_path)
    else:
        place.pip("install", unpacked, cwd=tmp_path)
    facts = place.probe(tmp_path)
    assert (facts["version"], facts["metadata"], facts["missing"]) == (version, version, [])
    assert facts["schema"].startswith("deepops::batch_norm_act_train(")
    home = unpacked if kind == "editable" else tmp_path / "venv"
    assert Path(facts["file"]).is_relative_to(home)
    assert (place.python.parent / "deepops").exists()


def test_missing_requirement_stops_pip_with_one_clear_line(
    environment: Callable[..., Environment], tmp_path: Path, unpacked: Path
) -> None:
    arguments = ("install", "--no-build-isolation", "--no-deps", unpacked)
    output = environment("pybind11").pip(*arguments, cwd=tmp_path, fails=True)
    lines = [line.strip() for line in output.splitlines() if "deepops: cannot build" in line]
    assert lines == ["deepops: cannot build, missing: the Python package pybind11; see 'Install' in README.md"], output


@pytest.fixture
def requirements(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """``check_requirements`` of setup.py, loaded without building anything."""
    monkeypatch.setenv("PATH", os.environ["PATH"])  # setup.py extends it
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    return runpy.run_path(str(ROOT / "setup.py"))["check_requirements"]


def test_binaries_are_loaded_here() -> None:
    """Else every test of a kernel would quietly test the reference path, or be skipped."""
    assert {name for name, place in binaries().items() if Path(place).is_file()} >= {"_ops", "_C"}


def test_requirements_are_met_here(requirements: Callable[[], None]) -> None:
    requirements()


@pytest.mark.parametrize(
    ("hidden", "named"),
    [
        ("torch", "the Python package torch"),
        ("pybind11", "the Python package pybind11"),
        ("cmake", "the program cmake"),
        ("ninja", "the program ninja"),
        ("Python.h", "Python's headers"),
        ("c++", "a C++20 compiler"),
    ],
)
def test_requirement_is_named(
    hidden: str, named: str, requirements: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec, which, exists = requirements.__globals__["importlib"].util.find_spec, shutil.which, Path.exists
    gone = {hidden, "g++", "clang++"} if hidden == "c++" else {hidden}
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in gone else find_spec(name))
    monkeypatch.setattr("shutil.which", lambda name: None if name in gone else which(name))
    monkeypatch.setattr(Path, "exists", lambda path: path.name not in gone and exists(path))
    with pytest.raises(SystemExit) as stop:
        requirements()
    message = str(stop.value)
    assert re.fullmatch(
        rf"deepops: cannot build, missing: {re.escape(named)}[^,\n]*; see 'Install' in README.md", message
    )


def test_a_chosen_compiler_must_exist(requirements: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(SystemExit, match="missing: a C"):
        requirements()


def test_version_is_stated_once(version: str) -> None:
    files = [ROOT / "setup.py", ROOT / "CMakeLists.txt"]
    files += [ROOT / name for folder in ("deepops", "csrc", "cmake") for name in sources(folder)]
    assert not [str(path) for path in files if re.search(rf"\b{re.escape(version)}\b", path.read_text())]


def test_import_brings_in_nothing_but_deepops() -> None:
    """`import deepops` on top of `import torch`: no optional package and none of torch's slow parts."""
    program = (
        "import json, sys, torch\nbefore = set(sys.modules)\nimport deepops\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    output = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
    )
    new = json.loads(output.stdout)
    assert "deepops._library" in new
    foreign = {name.split(".")[0] for name in new} - {"deepops"} - sys.stdlib_module_names
    assert not foreign - {"torch"}
    slow = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.onnx", "torch.distributed", "torch.fx.exp")
    assert not [name for name in new if name.startswith(slow)]


@pytest.mark.parametrize(
    ("fails_at", "named"),
    [
        (None, "no-such-python; on Debian: apt install python3 python3-venv python3-dev"),
        ("*version_info*", "Python 3.10 or newer; choose one with PYTHON=..."),
        ("*ensurepip*", "the venv module of {python}; on Debian: apt install python3-venv"),
        ("*get_path*", "the headers of {python}; on Debian: apt install python3-dev"),
        ("c++", "a C++20 compiler; on Debian: apt install g++"),
    ],
)
def test_make_names_what_the_machine_lacks(fails_at: str | None, named: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in {fails_at}) exit 1;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    venv_place, chosen = tmp_path / "venv", python if fails_at else "no-such-python"
    compiler = "no-such-compiler" if fails_at == "c++" else "true"
    output = run(
        "make",
        "-C",
        ROOT,
        "train",
        f"VENV={venv_place}",
        f"PYTHON={chosen}",
        f"CXX={compiler}",
        cwd=tmp_path,
        fails=True,
    )
    lines = [line for line in output.splitlines() if not re.match(r"make(\[\d\])?: (Entering|Leaving|\*\*\*)", line)]
    assert lines == [f"make: missing: {named.format(python=python)}"]
    assert not venv_place.exists()
