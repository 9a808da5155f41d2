"""The backends that op tests run on with the same cases: the CPU kernels, the GPU kernels on the SIMT executor, CUDA.

A test module that wants all of them says ``pytestmark = pytest.mark.usefixtures("backend")`` (tests/conftest.py), makes
its tensors on ``device()`` and calls the ops of ``ops()``.
"""

from __future__ import annotations

import os
from typing import Any

import simt
import torch

from deepops import _library

BACKENDS = ("cpu", "simt", "cuda")
REQUIRE_CUDA = os.environ.get("DEEPOPS_REQUIRE_CUDA", "") not in ("", "0")

current = "cpu"


def ops() -> Any:
    """Namespace of the compiled ops."""
    return torch.ops.deepops_simt if current == "simt" else torch.ops.deepops


def device() -> str:
    """Device of the tensors they take."""
    return "cuda" if current == "cuda" else "cpu"


def missing(backend: str) -> str:
    """Why the backend cannot run here; empty when it can."""
    if backend == "simt":
        return simt.missing()
    if backend == "cuda":
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        path = _library.binaries()["_cuda"]
        return "" if path.endswith(".so") else path
    return ""
