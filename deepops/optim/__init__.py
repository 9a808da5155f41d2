"""Optimizers: drop-in subclasses of ``torch.optim`` whose step is one kernel over all tensors."""

from __future__ import annotations

from deepops.optim.adam import Adam

__all__ = ["Adam"]
