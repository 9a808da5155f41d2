"""What the tests of the fused convolution share: what it covers, ops of torch's that stand in for it, a step."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import simt
import torch
import torch.nn.functional as F
from conv_cases import CONVOLUTIONS, make_input
from torch import Tensor, nn

from deepops import reference
from deepops._convolution import convolution

# Torch pads by wrapping around into NCHW.
COVERED = {
    name: options
    for name, options in CONVOLUTIONS.items()
    if options.get("groups", 1) == 1 and options.get("padding_mode") != "circular"
}
ACTIVATIONS = ("relu", "leaky_relu", "relu6", "silu", "gelu", "hardswish", "identity")
CHANNELS_LAST = torch.channels_last


class Exact:
    """The two ops in torch's operations; ``calls`` has their names."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.conv_bn_act_eval = SimpleNamespace(default=self._evaluate)
        self.conv_bn_act_statistics = SimpleNamespace(default=self._statistics)

    def _evaluate(self, *arguments: Any) -> Tensor:
        self.calls.append("eval")
        assert all(t.is_contiguous(memory_format=CHANNELS_LAST) for t in arguments[:3] if t is not None)
        *tensors, activation, negative_slope = arguments
        return reference.conv_bn_act_eval(*tensors, activation=activation, negative_slope=negative_slope)

    def _statistics(self, x: Tensor, conv_weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append("statistics")
        assert x.is_contiguous(memory_format=CHANNELS_LAST)
        assert conv_weight.is_contiguous(memory_format=CHANNELS_LAST)
        mean, var, counter, stride, (top, bottom, left, right), dilation, momentum, eps = rest
        symmetric = top == bottom and left == right
        padded, padding = (x, (top, left)) if symmetric else (F.pad(x, [left, right, top, bottom]), (0, 0))
        z = convolution(padded, conv_weight, None, tuple(stride), padding, tuple(dilation), 1)
        options = (mean, var, counter, momentum, eps, "identity", 0.0)
        _, mean, invstd = torch.ops.deepops.batch_norm_act_train.default(z, None, None, None, *options)
        return z, mean, invstd


def data(batch: int = 4, channels: int = 4) -> Tensor:
    return make_input(2, batch, channels, channels_last=True)


def launches(counts: simt.Counts) -> list[str]:
    return [launch.name for launch in counts.kernels if launch.name.startswith("conv_bn_act")]


def step(block: nn.Module, x: Tensor, residual: Tensor | None, **autocast: Any) -> dict[str, Tensor | None]:
    """Output, gradients and buffers after a step."""
    block = copy.deepcopy(block)
    x, residual = (None if t is None else t.detach().requires_grad_() for t in (x, residual))
    with torch.autocast("cpu", **autocast) if autocast else torch.enable_grad():
        y = block(x, residual)
    y.backward(torch.linspace(-0.5, 1, y.numel()).view(y.shape).to(y.dtype))
    grads = {name: parameter.grad for name, parameter in block.named_parameters()}
    given = {"y": y.detach(), "x": x.grad, "residual": None if residual is None else residual.grad}
    return {**given, **grads, **dict(block.named_buffers())}


def assert_same_bits(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None], case: str) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        other = theirs[name]
        assert (value is None) == (other is None), f"{name}, {case}"
        if value is not None:
            assert value.dtype is other.dtype, f"{name}, {case}"
            assert torch.equal(value, other), f"{name}, {case}"
