"""What the tests of ``deepops.nn`` share: blocks beside their stock modules, and all that a step leaves behind."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepops._library import has_kernel
from deepops.nn import ConvBNAct1d, ConvBNAct2d, ConvBNAct3d
from deepops.nn.conv_bn_act import _ConvBNAct
from deepops.testing import ErrorPool, away_from_kinks

needs_kernel = pytest.mark.skipif(not has_kernel("batch_norm_act_train", "cpu"), reason="no compiled kernels")

BLOCKS: dict[int, type[_ConvBNAct]] = {1: ConvBNAct1d, 2: ConvBNAct2d, 3: ConvBNAct3d}  # by spatial dimensions
SIZES = {1: (61,), 2: (11, 10), 3: (6, 5, 6)}  # of an input, likewise
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}

ACTIVATION_MODULES = [
    nn.ReLU(),
    nn.LeakyReLU(0.2),
    nn.ReLU6(inplace=True),
    nn.SiLU(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.Hardswish(),
    nn.Identity(),
]


class Stock(nn.Module):
    """What a block stands for, in torch's modules."""

    def __init__(self, block: _ConvBNAct) -> None:
        super().__init__()
        self.conv, self.bn, self.act = copy.deepcopy(block).to_modules()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.bn(self.conv(x))
        return self.act(y if residual is None else y + residual)


def make_block(*args: Any, dims: int = 2, seed: int = 0, **options: Any) -> Any:
    """A block with parameters and statistics that are not the initial ones."""
    torch.manual_seed(seed)
    block = BLOCKS[dims](*args, **options)
    with torch.no_grad():
        for name, tensor in [*block.bn.named_parameters(), *block.bn.named_buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if name in ("weight", "running_var") else tensor.uniform_(-0.5, 0.5)
    return block


def make_input(dims: int, batch: int = 4, channels: int = 4, channels_last: bool = False) -> Tensor:
    x = torch.randn(batch, channels, *SIZES[dims])
    return x.to(memory_format=CHANNELS_LAST[dims]) if channels_last else x


MODES = ("train", "eval", "frozen", "frozen affine")


def set_mode(module: Any, mode: str) -> None:
    """Frozen is the usual idiom: the model is in training, its batch normalization in evaluation."""
    module.train(mode != "eval")
    if mode.startswith("frozen"):
        module.bn.eval()
    if mode == "frozen affine":
        module.bn.requires_grad_(False)


def run(
    module: nn.Module,
    x: Tensor,
    residual: Tensor | None,
    mode: str,
    autocast: torch.dtype | None = None,
    before: tuple[Tensor, str] | None = None,
) -> dict[str, Tensor]:
    """Output, gradients and state after a step.

    ``before``: the exact input of the activation, and its name; no gradient is sent to where its derivative jumps.
    """
    set_mode(module, mode)
    x = x.detach().requires_grad_()  # in the very layout that it came in
    residual = None if residual is None else residual.detach().requires_grad_()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = module(x, residual)
    # A ramp of numbers that every dtype has; not around 0, where its sums would cancel.
    grad_y = torch.linspace(-0.5, 1, y.numel()).mul(64).round().div(64).view(y.shape)
    y.backward((grad_y if before is None else away_from_kinks(grad_y, *before)).to(y.dtype))
    results = {"y": y.detach(), "x.grad": x.grad}
    if residual is not None:
        results["residual.grad"] = residual.grad
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
        if parameter.grad is not None:
            results[f"{name}.grad"] = parameter.grad
    return {**results, **dict(module.named_buffers())}


def before_activation(wide: Stock, x: Tensor, residual: Tensor | None, mode: str) -> Tensor:
    """What the activation is applied to; nothing of ``wide`` is changed."""
    linear = copy.deepcopy(wide)
    linear.act = nn.Identity()
    set_mode(linear, mode)
    with torch.no_grad():
        return linear(x, residual)


Pools = defaultdict[str, ErrorPool]


def compare(
    pools: Pools,
    block: _ConvBNAct,
    x: Tensor,
    residual: Tensor | None,
    mode: str,
    case: str,
    autocast: torch.dtype | None = None,
    pool: str = "",
) -> None:
    """Take everything that a step leaves behind into the pool of its name; the tolerance rule is ``check``'s.

    ``pool``: kept apart from other pools of that name.
    """
    stock = Stock(block)
    wide = copy.deepcopy(stock).double()
    exact = (x.double(), None if residual is None else residual.double())
    before = before_activation(wide, *exact, mode), block.activation
    oracle = run(wide, *exact, mode, before=before)
    theirs = run(stock, x, residual, mode, autocast, before)
    ours = run(block, x, residual, mode, autocast, before)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype is theirs[name].dtype, name
        if not value.is_floating_point():
            assert torch.equal(value, theirs[name]), name
        elif name == "conv.bias.grad" and (mode == "train" or block.bn.running_mean is None):
            assert torch.equal(value, torch.zeros_like(value))  # batch statistics remove the bias
        else:
            # Both gradients of a convolution come from torch's own backward; those of biases alone are too few numbers.
            kind = "conv.grad" if name.startswith("conv.") else name
            pools[kind + pool].add(value, theirs[name], oracle[name], name=f"{name}, {case}")
    check_layout(ours["y"], theirs["y"], x)


def check_layout(y: Tensor, stock: Tensor, x: Tensor) -> None:
    """Stock's, or channels_last as ``x`` is: some of torch's convolutions give that up (fp16 in three dimensions)."""
    channels_last = CHANNELS_LAST.get(x.dim() - 2)
    kept = channels_last and all(tensor.is_contiguous(memory_format=channels_last) for tensor in (x, y))
    assert kept or y.stride() == stock.stride()


def check(pools: Pools) -> None:
    for pool in pools.values():
        pool.check()


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "bias": {"kernel_size": 3, "bias": True, "padding": 1},
    "stride": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "groups": {"kernel_size": 3, "groups": 2, "bias": True},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1},
    "1x1": {"kernel_size": 1},
    "same": {"kernel_size": (2, 4), "padding": "same", "bias": True},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"},
    "momentum None": {"kernel_size": 3, "momentum": None, "bias": True},
    "momentum 0.3, eps": {"kernel_size": 3, "momentum": 0.3, "eps": 1e-2},
    "affine False": {"kernel_size": 3, "affine": False, "bias": True},
    "no statistics": {"kernel_size": 3, "track_running_stats": False},
}


def convolutions(dims: int) -> dict[str, dict[str, Any]]:
    """The same for another number of dimensions: pairs are cut or repeated."""
    return {
        name: {key: (value * 2)[:dims] if isinstance(value, tuple) else value for key, value in options.items()}
        for name, options in CONVOLUTIONS.items()
    }
