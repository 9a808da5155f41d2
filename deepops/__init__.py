"""deepops: fused CNN and LSTM training layers and multi-tensor optimizers for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from deepops._library import binaries, version

if TYPE_CHECKING:
    from deepops import functional as functional
    from deepops import nn as nn
    from deepops._explain import explain as explain

__version__ = version()
__all__ = ["__version__", "binaries", "explain", "functional", "nn"]

# Imported at first use: `import deepops` stays cheap.
_SUBMODULES = ("functional", "nn", "optim", "testing", "reference")


def __getattr__(name: str) -> Any:
    if name == "explain":
        return importlib.import_module("deepops._explain").explain
    if name in _SUBMODULES:
        return importlib.import_module(f"deepops.{name}")
    raise AttributeError(f"module 'deepops' has no attribute {name!r}")
