"""Optimizers: drop-in subclasses of ``torch.optim`` whose step is one kernel over all tensors."""

from __future__ import annotations

from deepops.optim._clip import clip_grad_norm_
from deepops.optim._options import StepOptions
from deepops.optim._scaling import TensorFacts
from deepops.optim.adam import Adam, AdamW
from deepops.optim.rmsprop import RMSprop
from deepops.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "RMSprop", "StepOptions", "TensorFacts", "clip_grad_norm_"]
