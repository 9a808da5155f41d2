"""SGD of one tensor in plain PyTorch: oracle and documentation."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def sgd_step(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    step: int,
    *,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> None:
    """One step in place. All tensors have one shape and dtype; ``step`` counts from 1; momentum if there is a buffer.

    Sutskever et al., *On the importance of initialization and momentum in deep learning* (2013), in the form of
    ``torch.optim.SGD``: the learning rate is no part of the buffer, and the first gradient is not dampened.
    """
    grad = (-grad if maximize else grad) + weight_decay * param
    if momentum_buffer is not None:
        if step == 1:
            momentum_buffer.copy_(grad)
        else:
            momentum_buffer.mul_(momentum).add_((1 - dampening) * grad)
        grad = grad + momentum * momentum_buffer if nesterov else momentum_buffer
    param.sub_(lr * grad)
