"""Loads the compiled libraries: the one place that knows their names and says what is missing and why.

Importing deepops never fails for want of a binary. Without one, every op runs its plain-PyTorch reference
(``deepops.reference``) and one warning names the cause.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

_FOLDER = Path(__file__).parent
_PATHS: dict[str, Path] = {"_ops": _FOLDER / "_ops.so", "_cuda": _FOLDER / "_cuda.so"}
_MISSING: dict[str, str] = {}  # binary -> why it is not there

_C: ModuleType | None = None  # the pybind11 module, None when it could not be imported


def _load() -> None:
    global _C
    try:
        _C = importlib.import_module("deepops._C")
        _PATHS["_C"] = Path(str(_C.__file__))
    except ImportError as error:
        _MISSING["_C"] = f"cannot be imported: {error}"
    try:
        torch.ops.load_library(str(_PATHS["_ops"]))  # type: ignore[no-untyped-call]
        if _C is not None:
            _C.attach_ops(str(_PATHS["_ops"]))
    except (OSError, RuntimeError) as error:
        exists = _PATHS["_ops"].exists()
        _MISSING["_ops"] = f"cannot be loaded by torch {torch.__version__}: {error}" if exists else "was not built"
    if reason := _load_cuda():
        _MISSING["_cuda"] = reason
    lost = [f"{name} {_MISSING[name]}" for name in ("_ops", "_C") if name in _MISSING]
    if lost:
        warnings.warn(
            f"deepops runs without its kernels, on plain PyTorch: {'; '.join(lost)}", RuntimeWarning, stacklevel=3
        )


def _load_cuda() -> str:
    """Load the CUDA kernels, which needs no GPU and touches none; returns why that cannot be, or ""."""
    path = _PATHS["_cuda"]
    if "_ops" in _MISSING:
        return "needs _ops, which declares what it implements"
    if torch.version.cuda is None:
        return f"needs a torch with CUDA, which {torch.__version__} is not"
    if not path.exists():
        return "was not built (DEEPOPS_CUDA=1 builds it where there is an nvcc)"
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        if _C is not None and hasattr(_C, "attach"):
            _C.attach(str(path), "cuda")
    except (OSError, RuntimeError) as error:
        return f"cannot be loaded by torch {torch.__version__}: {error}"
    return ""


@cache
def has_kernel(op: str, device_type: str) -> bool:
    """Whether ``torch.ops.deepops.<op>`` has a kernel for tensors on ``device_type`` ("cpu", "cuda", ...)."""
    if "_ops" in _MISSING or (device_type == "cuda" and "_cuda" in _MISSING):
        return False
    if not hasattr(torch.ops.deepops, op):  # the binary is older than this file
        return False
    key = torch._C._dispatch_key_for_device(device_type)
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"deepops::{op}", key))


@cache
def gpu_not_covered(index: int | None) -> str:
    """Why the CUDA kernels cannot run on GPU ``index`` (None: the current one); empty when they can.

    They have code for the architectures of the build, which newer GPUs of the same generation run too, and PTX of the
    last, from which the driver makes code for all newer ones. What is older than the first has none.
    """
    archs = str(_C.build_info()["cuda_archs"]).split() if _C is not None else []
    major, minor = torch.cuda.get_device_capability(index)
    if archs and 10 * major + minor < int(archs[0]):
        return f"the CUDA kernels were built for compute capability {archs[0]} and up, and this GPU has {major}{minor}"
    return ""


def version() -> str:
    """The version of deepops: pyproject.toml states it, and the build writes it into ``_C``."""
    if _C is not None:
        return str(_C.build_info()["version"])
    try:
        return importlib.metadata.version("deepops-torch")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # a source folder that was never built


def binaries() -> dict[str, str]:
    """Path of each binary, or why it is missing."""
    return {name: _MISSING.get(name) or str(_PATHS[name]) for name in ("_ops", "_C", "_cuda")}


_load()
