"""Expanding 1x1 convolution, batch normalization and activation in training, fp32, channels_last: forward and backward.

The blocks of MobileNetV2 and of the first stage of ResNet-50. The baseline is stock PyTorch in the same layout, its
activation in place; ``two ops`` is its convolution followed by ``deepops.functional.batch_norm_act``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case
from deepops.functional import batch_norm_act, conv_bn_act

SHAPES = [  # batch, channels before and after, height and width, activation
    (8, 16, 96, 112, "relu6"),
    (8, 24, 144, 56, "relu6"),
    (8, 32, 192, 28, "relu6"),
    (8, 64, 384, 14, "relu6"),
    (16, 24, 144, 56, "silu"),
    (16, 64, 256, 56, "relu"),
]

Forward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, str], Tensor]


def stock(x: Tensor, conv: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    y = F.batch_norm(F.conv2d(x, conv), mean, var, weight, bias, True)
    act: Callable[..., Tensor] = getattr(F, activation)
    return act(y, inplace=True)


def two_ops(
    x: Tensor, conv: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, activation: str
) -> Tensor:
    return batch_norm_act(F.conv2d(x, conv), mean, var, weight, bias, True, activation=activation)


def deepops(
    x: Tensor, conv: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, activation: str
) -> Tensor:
    return conv_bn_act(x, conv, None, mean, var, weight, bias, True, activation=activation)


PROVIDERS: dict[str, Forward] = {"torch": stock, "two ops": two_ops, "deepops": deepops}


def step(
    function: Forward, batch: int, inputs: int, outputs: int, size: int, activation: str
) -> Callable[[], tuple[Tensor, ...]]:
    """A forward and a backward with respect to everything."""
    torch.manual_seed(0)
    x = torch.randn(batch, inputs, size, size).contiguous(memory_format=torch.channels_last).requires_grad_()
    conv = torch.randn(outputs, inputs, 1, 1).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.randn(outputs, requires_grad=True) for _ in range(2))
    mean, var = torch.zeros(outputs), torch.ones(outputs)
    grad = torch.randn(batch, outputs, size, size).contiguous(memory_format=torch.channels_last)

    def run() -> tuple[Tensor, ...]:
        y = function(x, conv, mean, var, weight, bias, activation)
        return torch.autograd.grad(y, (x, conv, weight, bias), grad)

    return run


def cases() -> Iterator[Case]:
    """Every shape."""
    for shape in SHAPES:
        batch, inputs, outputs, size, activation = shape
        providers = {key: step(function, *shape) for key, function in PROVIDERS.items()}
        yield Case(f"{batch}x{inputs}->{outputs}, {size}x{size}, {activation}", "training step", providers)
