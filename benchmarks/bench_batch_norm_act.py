"""Batch normalization with ReLU, training, fp32: the forward and the backward in both layouts.

The baseline is stock PyTorch in the same layout, ``F.relu(F.batch_norm(...))``; its in-place ReLU is shown as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case
from deepops.functional import batch_norm_act

SHAPES = [  # (N, C, H, W): the stages of a residual network, and two off its diagonal
    *((n, c, size, size) for n in (8, 16) for c, size in ((64, 56), (128, 28), (256, 14), (512, 7))),
    (8, 64, 7, 7),
    (8, 512, 28, 28),
]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
GOALS = {
    "NCHW forward": 3.5,
    "NCHW backward": 1.8,
    "channels_last forward": 1.8,
    "channels_last backward": 1.8,
}
MARGIN = 1e-3  # of a pre-activation from zero, below which the benchmark sends no gradient

Forward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def stock(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.batch_norm(x, mean, var, weight, bias, True))


def stock_inplace(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.batch_norm(x, mean, var, weight, bias, True), inplace=True)


def deepops(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return batch_norm_act(x, mean, var, weight, bias, True, activation="relu")


PROVIDERS: dict[str, Forward] = {"torch": stock, "torch in-place": stock_inplace, "deepops": deepops}


@dataclass(frozen=True)
class Inputs:
    """What every provider gets."""

    x: Tensor  # [N, C, H, W]
    weight: Tensor  # [C]
    bias: Tensor  # [C]
    grad: Tensor  # [N, C, H, W], the gradient of the output

    def forward(self, function: Forward) -> Callable[[], Tensor]:
        """The training forward, recorded for autograd as in a training loop."""
        mean, var = torch.zeros_like(self.bias), torch.ones_like(self.bias)
        return lambda: function(self.x, mean, var, self.weight, self.bias)

    def backward(self, function: Forward) -> Callable[[], tuple[Tensor, ...]]:
        """The gradients of x, weight and bias; the forward ran beforehand."""
        output = self.forward(function)()
        return lambda: torch.autograd.grad(output, (self.x, self.weight, self.bias), self.grad, retain_graph=True)

    def double(self) -> Inputs:
        """The same in fp64."""
        leaves = (tensor.detach().double().requires_grad_() for tensor in (self.x, self.weight, self.bias))
        return Inputs(*leaves, grad=self.grad.double())


def draw(shape: tuple[int, int, int, int], layout: torch.memory_format) -> Inputs:
    """Random inputs from a fixed seed, the same in every layout."""
    torch.manual_seed(0)
    channels = shape[1]
    x = torch.randn(shape) + torch.randn(1, channels, 1, 1)
    weight, bias = torch.randn(channels) * 0.1 + 1, torch.randn(channels)
    exact = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), True)
    # A pre-activation that rounding may push over zero makes correct gradients differ: it gets no gradient.
    grad = torch.randn(shape) * (exact.abs() > MARGIN)
    x, grad = (tensor.contiguous(memory_format=layout) for tensor in (x, grad))
    return Inputs(x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), grad)


def cases() -> Iterator[Case]:
    """Every shape in both layouts, forward and backward."""
    for layout, memory_format in LAYOUTS.items():
        for direction in ("forward", "backward"):
            group = f"{layout} {direction}"
            for shape in SHAPES:
                inputs = draw(shape, memory_format)
                prepare = getattr(Inputs, direction)
                yield Case(
                    "x".join(map(str, shape)),
                    group,
                    {name: prepare(inputs, function) for name, function in PROVIDERS.items()},
                    goal=GOALS[group],
                    oracle=lambda inputs=inputs, prepare=prepare: prepare(inputs.double(), stock)(),
                )
