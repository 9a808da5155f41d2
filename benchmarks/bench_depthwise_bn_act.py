"""Depthwise convolution, batch normalization and ReLU6 in training, fp32, both layouts: forward and backward together.

The blocks of MobileNetV2. The baseline is stock PyTorch in the same layout; ``two ops`` is its convolution followed by
``deepops.functional.batch_norm_act``, which is also what deepops does with 7x7 planes of contiguous data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case
from deepops.functional import batch_norm_act, conv_bn_act

SHAPES = [  # channels, height and width, stride
    (96, 112, 2),
    (144, 56, 1),
    (192, 28, 1),
    (384, 14, 1),
    (960, 7, 1),
]
BATCH = 8
LAYOUTS = {"training step": torch.channels_last, "training step, NCHW": torch.contiguous_format}

Forward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]


def stock(x: Tensor, conv: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    z = F.conv2d(x, conv, None, stride, 1, 1, x.size(1))
    return F.relu6(F.batch_norm(z, mean, var, weight, bias, True))


def two_ops(x: Tensor, conv: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    z = F.conv2d(x, conv, None, stride, 1, 1, x.size(1))
    return batch_norm_act(z, mean, var, weight, bias, True, activation="relu6")


def deepops(x: Tensor, conv: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    options = {"stride": stride, "padding": 1, "groups": x.size(1)}
    return conv_bn_act(x, conv, None, mean, var, weight, bias, True, activation="relu6", **options)  # type: ignore[arg-type]


PROVIDERS: dict[str, Forward] = {"torch": stock, "two ops": two_ops, "deepops": deepops}


def step(
    function: Forward, layout: torch.memory_format, channels: int, size: int, stride: int
) -> Callable[[], tuple[Tensor, ...]]:
    """A forward and a backward with respect to everything."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, channels, size, size).contiguous(memory_format=layout).requires_grad_()
    conv = torch.randn(channels, 1, 3, 3, requires_grad=True)
    weight, bias = (torch.randn(channels, requires_grad=True) for _ in range(2))
    mean, var = torch.zeros(channels), torch.ones(channels)
    out = size // stride
    grad = torch.randn(BATCH, channels, out, out).contiguous(memory_format=layout)

    def run() -> tuple[Tensor, ...]:
        y = function(x, conv, mean, var, weight, bias, stride)
        return torch.autograd.grad(y, (x, conv, weight, bias), grad)

    return run


def cases() -> Iterator[Case]:
    """Every shape in both layouts."""
    for (group, layout), (channels, size, stride) in product(LAYOUTS.items(), SHAPES):
        name = f"{BATCH}x{channels}x{size}x{size}" + (f", stride {stride}" if stride > 1 else "")
        providers = {key: step(function, layout, channels, size, stride) for key, function in PROVIDERS.items()}
        yield Case(name, group, providers)
