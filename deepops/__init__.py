"""deepops: fused CNN and LSTM training layers and multi-tensor optimizers for PyTorch."""

from __future__ import annotations

from deepops._library import binaries, version

__version__ = version()
__all__ = ["__version__", "binaries"]
