"""A convolution and what follows it as the GPU's kernels compute it: oracle and documentation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from deepops.reference.batch_norm_act import activation as activate


def convolve(
    x: Tensor, conv_weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:  # [N, K, P, Q]
    """Return ``conv2d`` of ``x`` (``[N, C, H, W]``) with zeros at the top, bottom, left and right of it."""
    top, bottom, left, right = padding
    return F.conv2d(F.pad(x, [left, right, top, bottom]), conv_weight, None, stride, 0, dilation)


def conv_bn_act_eval(
    x: Tensor,
    conv_weight: Tensor,
    residual: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """Return ``act(conv2d(x) * scale + shift + residual)``: a block in evaluation, its statistics folded.

    Args:
        x: ``[N, C, H, W]``.
        conv_weight: ``[K, C, R, S]``.
        residual: of the shape of the result, or None.
        scale, shift: ``[K]``; of a batch norm ``weight / sqrt(var + eps)`` and ``bias - mean * scale``.
        stride, dilation: y, x.
        padding: zeros at the top, bottom, left and right.
        activation: one of ``ACTIVATIONS`` or ``"gelu_tanh"``.
        negative_slope: of ``leaky_relu``.

    >>> import torch
    >>> x, filters, one = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.ones(4)
    >>> conv_bn_act_eval(x, filters, None, one, one, [2, 2], [1, 1, 1, 1], [1, 1]).shape
    torch.Size([2, 4, 4, 4])
    """
    z = convolve(x, conv_weight, stride, padding, dilation) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    return activate(z if residual is None else z + residual, activation, negative_slope)


def conv_bn_act_statistics(
    x: Tensor,
    conv_weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``z = conv2d(x)``, its means and ``1 / sqrt(var + eps)``; update the running statistics as torch does.

    Args as in ``conv_bn_act_eval``, and:
        running_mean, running_var: ``[K]`` or None; updated in place, the latter by the unbiased variance.
        num_batches_tracked: raised by one; with ``momentum=None`` the running statistics are averages of all batches.
        momentum: of the running statistics.
        eps: added to the variance.

    >>> import torch
    >>> x, filters, mean, var = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.zeros(4), torch.ones(4)
    >>> z, _, _ = conv_bn_act_statistics(x, filters, mean, var, None, [1, 1], [0, 0, 0, 0], [1, 1], momentum=1.0)
    >>> torch.allclose(var, z.var([0, 2, 3]))
    True
    """
    z = convolve(x, conv_weight, stride, padding, dilation)
    mean, var = z.mean([0, 2, 3]), z.var([0, 2, 3], correction=0)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        momentum = 1 / float(num_batches_tracked) if momentum is None else momentum
    if momentum is not None:
        count = z.numel() / z.size(1)
        for running, value in ((running_mean, mean), (running_var, var * count / (count - 1))):
            if running is not None:
                running.lerp_(value.to(running.dtype), momentum)
    return z, mean, (var + eps).rsqrt()
