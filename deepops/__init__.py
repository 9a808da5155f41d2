"""deepops: fused CNN and LSTM training layers and multi-tensor optimizers for PyTorch."""

from __future__ import annotations

from deepops._library import _C, binaries

__version__ = "0.1.0"
__all__ = ["__version__", "binaries"]
