"""``_cuda.so`` as a binary: what it needs, that it loads, what it registers. No GPU and no driver is needed for that.

`make cuda` builds it and runs this file; where it was not built these tests are skipped, unless DEEPOPS_CUDA=1.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cpu_only import is_cpu_only
from torch._subclasses import FakeTensorMode

import deepops
from deepops import _batch_norm_act, _fallback, _library

ROOT = Path(__file__).parent.parent
CUDA = _library._PATHS["_cuda"]


@pytest.fixture
def binary() -> Path:
    """The built library."""
    if not CUDA.exists():
        if os.environ.get("DEEPOPS_CUDA") == "1":
            pytest.fail(f"DEEPOPS_CUDA=1, but {CUDA} was not built")
        pytest.skip("_cuda.so was not built: make cuda")
    return CUDA


def python(program: str, **environment: str) -> str:
    """Run a program in a new process, warnings being errors; returns the last line it printed."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", program]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return (done.stdout.splitlines() or [""])[-1]


def test_needs_only_the_stable_abi(binary: Path) -> None:
    """As _ops.so does, and no libcudart: it is inside."""
    undefined = subprocess.run(["nm", "-D", "--undefined-only", binary], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in undefined.stdout.splitlines()]
    assert "aoti_torch_get_current_cuda_stream" in names
    assert not [name for name in names if re.match(r"_?Py[A-Z_]|_ZNK?(2at|3c10|5torch)|cuda[A-Z]|cu[A-Z]", name)]
    readelf = subprocess.run(["readelf", "-d", binary], capture_output=True, text=True, check=True).stdout
    needed = {name.split(".so")[0] for name in re.findall(r"\(NEEDED\).*\[(.+)\]", readelf)}
    assert {name for name in needed if "torch" in name or "cu" in name} == {"libtorch_cpu", "libtorch_cuda"}
    assert "runpath" in readelf.lower()


LOAD = """
import ctypes, json, os, sys, torch
stub = os.environ.get("STUB")
if stub:
    ctypes.CDLL(stub, mode=ctypes.RTLD_GLOBAL)
import deepops, deepops.optim
from deepops import _library
if stub:
    torch.ops.load_library(sys.argv[1] if len(sys.argv) > 1 else str(_library._PATHS["_cuda"]))
names = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("deepops::")]
has = lambda name: torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
print(json.dumps({
    "lacking": [name for name in names if not has(name)],
    "missing": _library._MISSING,
    "initialised": torch.cuda.is_initialized(),
}))
"""


def test_loads_and_implements_every_op(binary: Path, tmp_path: Path) -> None:
    """On a torch with CUDA as import deepops does it, else with an empty library in the place of libtorch_cuda.so."""
    environment = {}
    if torch.version.cuda is None:
        stub = tmp_path / "libtorch_cuda.so"
        source = ROOT / "cmake" / "torch_cuda_stub.cpp"
        if not source.exists() or not shutil.which("c++"):
            pytest.skip("needs the source tree and a C++ compiler")
        command = ["c++", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-o", stub, source]
        subprocess.run(command, check=True)
        environment["STUB"] = str(stub)
    facts = json.loads(python(LOAD, **environment))
    assert [op for op in facts["lacking"] if not is_cpu_only(op.removeprefix("deepops::"))] == []
    assert facts["initialised"] is False  # importing must not take a context on every GPU
    assert set(facts["missing"]) == ({"_cuda"} if environment else set())


def test_is_not_loaded_by_a_torch_without_cuda(binary: Path) -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    assert _library.binaries()["_cuda"] == f"needs a torch with CUDA, which {torch.__version__} is not"
    with open("/proc/self/maps") as maps:
        assert "_cuda.so" not in maps.read()
    assert not _library.has_kernel("adam", "cuda")


def test_build_info_names_the_architectures(binary: Path) -> None:
    if _library._C is None:
        pytest.skip("there is no _C")
    assert deepops.build_info()["cuda_archs"] == sorted(deepops.build_info()["cuda_archs"], key=int) != []


NO_PROGRAMS = ("-DCMAKE_FIND_ROOT_PATH=/nowhere", "-DCMAKE_FIND_ROOT_PATH_MODE_PROGRAM=ONLY")


@pytest.mark.parametrize(
    ("options", "fails", "line"),
    [
        (["-DDEEPOPS_CUDA=yes"], True, "deepops: DEEPOPS_CUDA=yes: expected auto, 1 or 0"),
        (["-DDEEPOPS_CUDA=1"], True, "deepops: DEEPOPS_CUDA=1, but no nvcc: set CUDA_HOME or extend the PATH"),
        (
            ["-DTORCH_CUDA_VERSION=13.0"],
            False,
            "-- deepops: torch has CUDA, but there is no nvcc: _cuda.so is not built",
        ),
        (["-DTORCH_CUDA_VERSION=0"], False, ""),
        (["-DTORCH_CUDA_VERSION=13.0", "-DDEEPOPS_CUDA=0"], False, ""),
    ],
    ids=["wrong", "demanded", "auto", "torch without", "never"],
)
def test_the_build_tells_why_there_will_be_no_kernels(
    options: list[str], fails: bool, line: str, tmp_path: Path
) -> None:
    """On a machine without any program; cmake/Cuda.cmake ends here before it needs a compiler."""
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if cmake is None or not (ROOT / "cmake").exists():
        pytest.skip("needs the source tree and cmake")
    command = [cmake, "-DTORCH_ROOT=/nowhere", *NO_PROGRAMS, *options, "-P", ROOT / "cmake" / "Cuda.cmake"]
    done = subprocess.run(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (done.returncode != 0) == fails, done.stdout
    lines = [text.strip() for text in done.stdout.splitlines() if "deepops" in text]
    assert lines == ([line] if line else [])


def why(monkeypatch: pytest.MonkeyPatch, **world: object) -> str:
    """What ``_load_cuda`` says in another world."""
    monkeypatch.setattr(_library, "_MISSING", world.get("missing", {}))
    monkeypatch.setattr(torch.version, "cuda", world.get("cuda", "13.0"))
    monkeypatch.setattr(_library, "_PATHS", {**_library._PATHS, "_cuda": Path(str(world["path"]))})
    return _library._load_cuda()


def test_each_reason_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "_cuda.so"
    broken.write_text("no library")
    nowhere = tmp_path / "nowhere.so"
    assert why(monkeypatch, path=nowhere).startswith("was not built (DEEPOPS_CUDA=1")
    assert why(monkeypatch, path=broken, cuda=None).startswith("needs a torch with CUDA, which")
    assert why(monkeypatch, path=broken).startswith(f"cannot be loaded by torch {torch.__version__}: ")
    assert why(monkeypatch, path=broken, missing={"_ops": "was not built"}).startswith("needs _ops")


@pytest.mark.skipif(_library.has_kernel("batch_norm_act_train", "cuda"), reason="there are CUDA kernels")
@pytest.mark.skipif(_library.binaries()["_ops"] != str(_library._PATHS["_ops"]), reason="_ops.so is missing")
def test_a_cuda_tensor_without_a_kernel_takes_the_reference_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fake tensors, whose CUDA device need not be there. One warning, with the cause."""
    monkeypatch.setattr(_fallback, "_warned", set())
    called = []
    plain = _batch_norm_act.run_plain
    monkeypatch.setattr(_batch_norm_act, "run_plain", lambda *a, **k: called.append(1) or plain(*a, **k))
    with FakeTensorMode(), torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = torch.empty(2, 3, 4, 4, device="cuda")
        mean, var = torch.empty(3, device="cuda"), torch.empty(3, device="cuda")
        for _ in range(2):
            y = deepops.functional.batch_norm_act(x, mean, var, activation="relu")
    assert (y.device.type, y.shape, len(called)) == ("cuda", x.shape, 2)
    (warning,) = [str(entry.message) for entry in caught if entry.category is RuntimeWarning]
    assert warning.startswith("deepops has no kernels for 'cuda' tensors and runs them on plain PyTorch: _cuda ")
    assert _library.binaries()["_cuda"] in warning


def test_a_gpu_older_than_the_build_is_not_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no code for such a GPU: every launch would fail. The answer goes into the warning and into explain()."""
    monkeypatch.setattr(_library, "_C", SimpleNamespace(build_info=lambda: {"cuda_archs": "80 90 100"}))
    of_device = {0: (7, 5), 1: (8, 0), 2: (8, 9), 3: (12, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", of_device.__getitem__)
    _library.gpu_not_covered.cache_clear()
    try:
        reasons = [_library.gpu_not_covered(index) for index in of_device]
    finally:
        _library.gpu_not_covered.cache_clear()
    assert reasons == ["the CUDA kernels were built for compute capability 80 and up, and this GPU has 75", "", "", ""]


def test_a_cuda_tensor_on_such_a_gpu_takes_the_reference_path(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = deepops.functional
    monkeypatch.setattr(_batch_norm_act, "_KERNEL_ON", {"cpu": True, "cuda": True})
    monkeypatch.setattr(_fallback, "_warned", set())
    monkeypatch.setattr(_batch_norm_act, "gpu_not_covered", lambda index: "too old")
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(4, 3, 5, 5, device="cuda")
        statistics = torch.empty(3, device="cuda"), torch.empty(3, device="cuda")
        with pytest.warns(RuntimeWarning, match="runs them on plain PyTorch: too old"):
            assert functional.batch_norm_act(x, *statistics).device.type == "cuda"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            functional.batch_norm_act(x, *statistics)
