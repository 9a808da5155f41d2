"""``activation(batch_norm(conv2d(x)))`` of a depthwise convolution, in training: oracle and documentation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from deepops.reference.batch_norm_act import batch_norm_act


def depthwise_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    eps: float = 1e-5,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    momentum: float | None = 0.1,
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """Return ``act((z - mean(z)) / sqrt(var(z) + eps) * weight + bias)``; ``z`` is each channel convolved on its own.

    Differentiable any number of times.

    Args:
        x: ``[N, C, H, W]``.
        conv_weight: ``[C, 1, R, S]``, one filter per channel.
        weight, bias, running_mean, running_var: ``[C]`` or None; the last two are updated in place.
        stride, dilation: y, x.
        padding: zeros at the top, bottom, left and right.
        eps: added to the variance.
        num_batches_tracked, momentum: as in ``batch_norm_act``.
        activation: one of ``ACTIVATIONS`` or ``"gelu_tanh"``.
        negative_slope: of ``leaky_relu``.

    >>> import torch
    >>> x, filters = torch.randn(2, 3, 8, 8), torch.randn(3, 1, 3, 3)
    >>> depthwise_bn_act(x, filters, None, None, [2, 2], [1, 1, 1, 1], [1, 1]).shape
    torch.Size([2, 3, 4, 4])
    """
    top, bottom, left, right = padding
    z = F.conv2d(F.pad(x, [left, right, top, bottom]), conv_weight, None, stride, 0, dilation, x.size(1))
    return batch_norm_act(
        z,
        running_mean,
        running_var,
        weight,
        bias,
        True,
        momentum,
        eps,
        activation=activation.removesuffix("_tanh"),
        negative_slope=negative_slope,
        approximate="tanh" if activation == "gelu_tanh" else "none",
        num_batches_tracked=num_batches_tracked,
    )
