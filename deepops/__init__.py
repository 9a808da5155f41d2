"""deepops: fused CNN and LSTM training layers and multi-tensor optimizers for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from deepops._library import binaries, version

if TYPE_CHECKING:
    from deepops import amp as amp
    from deepops import backends as backends
    from deepops import functional as functional
    from deepops import memory as memory
    from deepops import nn as nn
    from deepops import optim as optim
    from deepops._build_info import build_info as build_info
    from deepops._explain import explain as explain

__version__ = version()
__all__ = ["__version__", "amp", "backends", "binaries", "build_info", "explain", "functional", "memory", "nn", "optim"]

# Imported at first use: `import deepops` stays cheap.
_SUBMODULES = ("amp", "backends", "functional", "memory", "nn", "optim", "testing", "reference")
_FUNCTIONS = ("build_info", "explain")  # each lives in a module of its own name, with a leading underscore


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"deepops._{name}"), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"deepops.{name}")
    raise AttributeError(f"module 'deepops' has no attribute {name!r}")
