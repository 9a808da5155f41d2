"""Adam of one tensor in plain PyTorch: oracle and documentation."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    step: int,
    *,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> None:
    """One step in place. All tensors have one shape and dtype; ``step`` counts from 1; AMSGrad where the last is given.

    Kingma and Ba, *Adam: A Method for Stochastic Optimization* (2015), algorithm 1; Reddi et al. (2018) for AMSGrad;
    Loshchilov and Hutter (2019) for the decoupled decay.
    """
    if maximize:
        grad = -grad
    if decoupled_weight_decay:
        param.mul_(1 - lr * weight_decay)
    else:
        grad = grad + weight_decay * param
    exp_avg.mul_(beta1).add_((1 - beta1) * grad)
    exp_avg_sq.mul_(beta2).add_((1 - beta2) * grad * grad)
    second = exp_avg_sq
    if max_exp_avg_sq is not None:
        second = max_exp_avg_sq.copy_(torch.maximum(max_exp_avg_sq, exp_avg_sq))
    m_hat = exp_avg / (1 - beta1**step)
    v_hat = second / (1 - beta2**step)
    param.sub_(lr * m_hat / (v_hat.sqrt() + eps))
