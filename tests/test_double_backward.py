"""Gradients of gradients where a layer is used twice, and where checkpointing computes the forward again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import deepops
from deepops.functional import batch_norm_act, conv_bn_act

Layer = Callable[[Tensor, dict[str, Tensor]], Tensor]


def normalize(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    return batch_norm_act(x, None, None, p["weight"], p["bias"], True, activation="silu")


def normalize_stock(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    return nn.functional.silu(nn.functional.batch_norm(x, None, None, p["weight"], p["bias"], True))


def block(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    groups = x.size(1) // p["conv"].size(1)
    padding = p["conv"].size(2) // 2
    return conv_bn_act(
        x, p["conv"], None, None, None, p["weight"], p["bias"], True, padding=padding, groups=groups, activation="silu"
    )


def block_stock(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    groups = x.size(1) // p["conv"].size(1)
    z = nn.functional.conv2d(x, p["conv"], None, 1, p["conv"].size(2) // 2, 1, groups)
    return normalize_stock(z, p)


def narrow(layer: Layer) -> Layer:
    """An expanding block can follow itself if only the first channels go on."""
    return lambda x, p: layer(x[:, : p["conv"].size(1)].contiguous(memory_format=torch.channels_last), p)


def parameters(channels: int, conv: tuple[int, ...] | None) -> dict[str, Tensor]:
    made = {
        "weight": torch.rand(channels, dtype=torch.float64) + 0.5,
        "bias": torch.randn(channels, dtype=torch.float64),
    }
    if conv is not None:
        made["conv"] = torch.randn(channels, *conv, dtype=torch.float64) / 3
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


CASES: dict[str, tuple[Layer, Layer, int, tuple[int, ...] | None]] = {
    "batch norm": (normalize, normalize_stock, 4, None),
    "depthwise": (block, block_stock, 16, (1, 3, 3)),
    "expanding": (narrow(block), narrow(block_stock), 32, (8, 1, 1)),
}


def penalty(layer: Layer, x: Tensor, p: dict[str, Tensor], *, checkpointed: bool = False) -> list[Tensor]:
    """The gradients of the layer applied twice, and those of a penalty on them."""

    def twice(x: Tensor) -> Tensor:
        return layer(layer(x, p), p)

    y = checkpoint(twice, x, use_reentrant=False) if checkpointed else twice(x)
    inputs = [x, *p.values()]
    grads = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
    return [*grads, *torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_layer_used_twice(name: str, checkpointed: bool) -> None:
    ours, stock, channels, conv = CASES[name]
    p = parameters(channels, conv)
    x = torch.randn(4, channels, 9, 9, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    expected = penalty(stock, x, p)
    for actual, wanted in zip(penalty(ours, x, p, checkpointed=checkpointed), expected, strict=True):
        torch.testing.assert_close(actual, wanted)  # fp64: torch's own measure


def test_the_layers_are_the_compiled_ones() -> None:
    """Else the test above would compare PyTorch with itself."""
    if not deepops._library.has_kernel("batch_norm_act_train", "cpu"):
        pytest.skip("no kernels here")
    nodes = {}
    for name, (ours, _, channels, conv) in CASES.items():
        x = torch.randn(4, channels, 9, 9, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        node = ours(x.requires_grad_(), parameters(channels, conv)).grad_fn
        assert node is not None
        nodes[name] = type(node).__name__
    assert nodes == {
        "batch norm": "BatchNormActBackward",
        "depthwise": "DepthwiseBatchNormActBackward",
        "expanding": "PointwiseBatchNormActBackward",
    }
