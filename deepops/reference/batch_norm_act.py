"""``activation(batch_norm(x) + residual)`` in plain PyTorch: oracle, documentation, and the path of other devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from deepops.reference._collectives import all_gather

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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
    process_group: ProcessGroup | None = None,
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
        process_group: with ``training`` the batch is what all its processes have, each its own part, which may be
            empty; gradients are those of the sum of their losses, for ``weight`` and ``bias`` by way of this part.

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
        total: int | Tensor = count
        if process_group is not None:
            mean, var, total = _of_all_parts(data, dims, process_group)
        elif count == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
        else:
            mean = data.mean(dims)
            var = (data - mean.view(per_channel)).square().mean(dims)
        with torch.no_grad():
            _update(running_mean, running_var, num_batches_tracked, mean, var, momentum, total)
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


def _of_all_parts(data: Tensor, dims: list[int], group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of values per channel of what all processes have.

    Chan, Golub & LeVeque, "Algorithms for computing the sample variance", 1983: the variance of the whole is the mean
    of those of the parts and of the squares of how far their means are from the common one.
    """
    channels = data.size(1)
    count = data.numel() // channels if channels else 0
    mean = data.sum(dims) / max(count, 1)
    var = (data - mean.view([1, -1] + [1] * (data.dim() - 2))).square().sum(dims)
    part = torch.cat([mean.double(), var.double() / max(count, 1), mean.new_tensor([count], dtype=torch.float64)])
    parts = all_gather(part, group)  # [processes, 2 C + 1]
    means, variances, counts = parts[:, :channels], parts[:, channels:-1], parts[:, -1:]
    refuse_single_value(counts)
    total = counts.sum()
    shares = counts / total.clamp(min=1)
    mean = (shares * means).sum(0)
    var = (shares * (variances + (means - mean).square())).sum(0)
    return mean.to(data.dtype), var.to(data.dtype), total


def refuse_single_value(counts: Tensor) -> None:
    """Raise where all processes together have one value per channel; a GPU is not waited for to find out."""
    if counts.device.type == "cpu" and counts.sum() == 1:
        raise ValueError("Expected more than 1 value per channel when training, got 1 in all processes of the group")


def _update(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float | None,
    count: int | Tensor,
) -> None:
    """Update the running statistics and the counter in place, without reading anything back to the host."""
    factor: float | Tensor = 0.0 if momentum is None else momentum  # torch.nn.BatchNorm2d: None and no counter is 0
    if num_batches_tracked is not None and momentum is None:
        factor = (num_batches_tracked + 1).to(mean.dtype).reciprocal()
    if isinstance(count, Tensor):  # stays where it is
        factor, count = factor * (count > 1).to(count.dtype), count.clamp(min=2)
    if isinstance(count, Tensor) or count:  # as torch: an empty batch is counted and changes no statistics
        if running_mean is not None:
            running_mean.copy_((1 - factor) * running_mean + factor * mean)
        if running_var is not None:
            running_var.copy_((1 - factor) * running_var + factor * (var * (count / (count - 1))))
    if num_batches_tracked is not None:  # last: torch.func may refuse to write
        num_batches_tracked.add_(1)
