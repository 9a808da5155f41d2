"""``activation(batch_norm(conv2d(x)))`` of a 1x1 convolution, in training: oracle and documentation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from deepops.reference.batch_norm_act import batch_norm_act


def pointwise_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    momentum: float | None = 0.1,
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """Return ``act((z - mean(z)) / sqrt(var(z) + eps) * weight + bias)``; ``z`` mixes the channels of each pixel.

    Differentiable any number of times.

    Args:
        x: ``[N, C, H, W]``.
        conv_weight: ``[K, C, 1, 1]``.
        weight, bias, running_mean, running_var: ``[K]`` or None; the last two are updated in place.
        eps: added to the variance.
        num_batches_tracked, momentum: as in ``batch_norm_act``.
        activation: one of ``ACTIVATIONS`` or ``"gelu_tanh"``.
        negative_slope: of ``leaky_relu``.

    >>> import torch
    >>> pointwise_bn_act(torch.randn(2, 3, 8, 8), torch.randn(12, 3, 1, 1), None, None).shape
    torch.Size([2, 12, 8, 8])
    """
    return batch_norm_act(
        F.conv2d(x, conv_weight),
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
