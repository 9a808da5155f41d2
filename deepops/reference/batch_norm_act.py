"""``activation(batch_norm(x) + residual)`` in plain PyTorch: oracle, documentation, and the path of other devices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("relu", "leaky_relu", "relu6", "silu", "gelu", "hardswish", "identity")


def activation(
    z: Tensor, name: str, negative_slope: float = 0.01, approximate: str = "none", *, inplace: bool = False
) -> Tensor:
    """Apply one of ``ACTIVATIONS``; ``"gelu_tanh"``, as the compiled ops say, is gelu with ``approximate="tanh"``.

    ``inplace`` as in ``torch.nn.functional.relu``; gelu does without.

    >>> activation(torch.tensor([-1.0, 2.0]), "leaky_relu", negative_slope=0.5)
    tensor([-0.5000,  2.0000])
    """
    if name == "identity":
        return z
    if name == "leaky_relu":
        return F.leaky_relu(z, negative_slope, inplace)
    if name in ("gelu", "gelu_tanh"):
        return F.gelu(z, approximate="tanh" if name == "gelu_tanh" else approximate)
    plain = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}
    if name not in plain:
        raise ValueError(f"activation: {name!r} is not one of {', '.join(ACTIVATIONS)}")
    return plain[name](z, inplace)


_activation = activation  # batch_norm_act has an argument of that name


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
    approximate: str = "none",
    residual: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """Return ``act((x - mean) / sqrt(var + eps) * weight + bias + residual)``, per channel (dimension 1).

    Batch normalization is Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift", 2015, arXiv:1502.03167, algorithms 1 and 2. With ``training`` the mean and the biased
    variance are those of the batch, taken over all dimensions but 1; else they are the running ones. Training also does
    ``running = (1 - momentum) * running + momentum * batch``, in place, with the unbiased variance
    ``var * n / (n - 1)``; ``momentum=None`` means ``1 / num_batches_tracked``, the cumulative average.

    16-bit data are read as they are stored, all arithmetic is fp32, and the result is rounded once, at the end.
    Differentiable any number of times.

    Args:
        x: ``[N, C, ...]``, rank 2 or more, any floating dtype, any device, any strides.
        running_mean: ``[C]`` or None (training only); updated in place in training.
        running_var: ``[C]`` or None, as ``running_mean``.
        weight: ``[C]`` or None (ones); fp32 where ``x`` is 16-bit.
        bias: ``[C]`` or None (zeros).
        training: use the batch's statistics and update the running ones.
        momentum: weight of the new batch in the running statistics; None is the cumulative average.
        eps: added to the variance.
        activation: one of ``ACTIVATIONS``.
        negative_slope: of ``leaky_relu``.
        approximate: of ``gelu``: ``"none"`` or ``"tanh"``.
        residual: same shape as ``x``, added before the activation.
        num_batches_tracked: int64 scalar, one more after each training call.

    Raises:
        ValueError: one value per channel in training; no running statistics in evaluation; an unknown activation.

    >>> x = torch.tensor([[-1.0], [3.0]])
    >>> batch_norm_act(x, None, None, training=True)
    tensor([[0.0000],
            [1.0000]])
    """
    dims = [0, *range(2, x.dim())]
    per_channel = [1, -1] + [1] * (x.dim() - 2)  # [C] -> [1, C, 1, ...]
    count = x.numel() // x.size(1) if x.size(1) else 0
    compute = torch.promote_types(x.dtype, torch.float32)
    data = x.to(compute)
    if training:
        if count == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
        mean = data.mean(dims)
        var = (data - mean.view(per_channel)).square().mean(dims)
        with torch.no_grad():
            _update(running_mean, running_var, num_batches_tracked, mean, var, momentum, count)
    else:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean, running_var: None, but evaluation (training=False) needs both")
        mean, var = running_mean.to(compute), running_var.to(compute)
    z = (data - mean.view(per_channel)) * torch.rsqrt(var + eps).view(per_channel)
    if weight is not None:
        z = z * weight.to(compute).view(per_channel)
    if bias is not None:
        z = z + bias.to(compute).view(per_channel)
    if residual is not None:
        z = z + residual.to(compute)
    return _activation(z, activation, negative_slope, approximate).to(x.dtype)


def _update(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float | None,
    count: int,
) -> None:
    """Update the running statistics and the counter in place, without reading anything back to the host."""
    factor: float | Tensor = 0.0 if momentum is None else momentum  # torch.nn.BatchNorm2d: None and no counter is 0
    if num_batches_tracked is not None and momentum is None:
        factor = (num_batches_tracked + 1).to(mean.dtype).reciprocal()
    if count:  # as torch: an empty batch is counted and changes no statistics
        if running_mean is not None:
            running_mean.copy_((1 - factor) * running_mean + factor * mean)
        if running_var is not None:
            running_var.copy_((1 - factor) * running_var + factor * (var * (count / (count - 1))))
    if num_batches_tracked is not None:  # last: torch.func may refuse to write
        num_batches_tracked.add_(1)
