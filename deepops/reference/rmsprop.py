"""RMSprop of one tensor in plain PyTorch: oracle and documentation."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def rmsprop_step(
    param: Tensor,
    grad: Tensor,
    square_avg: Tensor,
    grad_avg: Tensor | None,
    momentum_buffer: Tensor | None,
    *,
    lr: float = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    maximize: bool = False,
) -> None:
    """One step in place. All tensors have one shape and dtype; centered and with momentum where these states are given.

    Tieleman and Hinton, *Lecture 6.5 - RMSProp* (2012); centered: Graves, *Generating Sequences with Recurrent Neural
    Networks* (2013). As in ``torch.optim.RMSprop``, ``eps`` is added to the root.
    """
    grad = (-grad if maximize else grad) + weight_decay * param
    square_avg.mul_(alpha).add_((1 - alpha) * grad * grad)
    variance = square_avg
    if grad_avg is not None:
        grad_avg.mul_(alpha).add_((1 - alpha) * grad)
        variance = square_avg - grad_avg * grad_avg
    update = grad / (variance.sqrt() + eps)
    if momentum_buffer is not None:
        update = momentum_buffer.mul_(momentum).add_(update)
    param.sub_(lr * update)
