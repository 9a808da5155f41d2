"""``BatchNormAct1d``, ``2d`` and ``3d`` against torch's batch normalization and activation."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from typing import Any

import pytest
import torch
from conv_cases import ACTIVATION_MODULES, CHANNELS_LAST, Pools, check
from torch import Tensor, nn

import deepops
from deepops.nn import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from deepops.testing import ErrorPool

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(24, 6), (4, 6, 17), (4, 6, 5, 5), (2, 6, 3, 4, 5)]
LAYERS: dict[int, Any] = {2: BatchNormAct1d, 3: BatchNormAct1d, 4: BatchNormAct2d, 5: BatchNormAct3d}  # by rank
OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": None, "eps": 1e-2},
    {"affine": False},
    {"track_running_stats": False},
    {"bias": False},
]


def make_layer(rank: int, **options: Any) -> Any:
    layer = LAYERS[rank](6, **options)
    with torch.no_grad():
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if name in ("weight", "running_var") else tensor.uniform_(-0.5, 0.5)
    return layer


def step(bn: nn.Module, act: nn.Module | None, x: Tensor, residual: Tensor | None) -> dict[str, Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    if act is None:
        y = bn(x, residual)
    else:
        y = bn(x)
        y = act(y if residual is None else y + residual)
    y.backward(torch.linspace(-1, 1, y.numel()).mul(64).round().div(64).to(y.dtype).view(y.shape))
    gradients = {name: parameter.grad for name, parameter in bn.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients, **dict(bn.named_buffers())}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_option_and_activation(shape: tuple[int, ...], train: bool) -> None:
    pools: Pools = defaultdict(ErrorPool)
    for seed in range(4):
        torch.manual_seed(seed)
        for at, activation in enumerate(ACTIVATION_MODULES):
            options = OPTIONS[(at + seed) % len(OPTIONS)]
            layer = make_layer(len(shape), activation=activation, **options).train(train)
            bn, act = copy.deepcopy(layer).to_modules()
            wide = copy.deepcopy(bn).double()
            x = torch.randn(shape)
            if len(shape) > 3 and seed % 2:
                x = x.to(memory_format=CHANNELS_LAST[len(shape) - 2])
            residual = torch.randn_like(x) if at % 2 else None
            ours, theirs = step(layer, None, x, residual), step(bn, act, x, residual)
            best = step(wide, act, x.double(), None if residual is None else residual.double())
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                if value.is_floating_point():
                    pools[name].add(value, theirs[name], best[name], name=f"{name} {activation} {options}")
                else:
                    assert torch.equal(value, theirs[name])
            assert ours["y"].stride() == theirs["y"].stride()
    check(pools)


@pytest.mark.parametrize("rank", LAYERS)
def test_state_dict_copies_and_pickles(rank: int) -> None:
    layer = make_layer(rank, activation="leaky_relu", negative_slope=0.2)
    stock = layer._stock(6)
    stock.load_state_dict(layer.state_dict())
    layer.load_state_dict(stock.state_dict())
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    x = torch.randn(SHAPES[rank - 2])
    layer.eval()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    assert "activation='leaky_relu', negative_slope=0.2" in repr(layer)
    assert "batch norm + leaky_relu" in deepops.explain(layer)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (BatchNormAct1d, (6,), r"x: expected 2D or 3D input, \[N, C\] or \[N, C, L\] \(got 1D input of shape \[6\]\)"),
        (BatchNormAct1d, (2, 6, 3, 3), "got 4D input"),
        (BatchNormAct2d, (6, 5, 5), r"x: expected 4D input, \[N, C, H, W\]"),
        (BatchNormAct3d, (6, 3, 5, 5), r"x: expected 5D input, \[N, C, D, H, W\]"),
        (BatchNormAct2d, (2, 5, 3, 3), r"running_mean: expected shape \[5\], one per channel, got \[6\]"),
        (BatchNormAct1d, (1, 6), "Expected more than 1 value per channel when training"),
    ],
)
def test_wrong_input(layer: Any, shape: tuple[int, ...], message: str) -> None:
    module = layer(6)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=message):
        module(torch.randn(shape))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize("rank", LAYERS)
def test_from_modules_and_back(rank: int) -> None:
    stock = LAYERS[rank]._stock(6, eps=0.1)
    layer = LAYERS[rank].from_modules(stock, nn.SiLU())
    assert layer.eps == 0.1
    assert layer.weight is stock.weight
    bn, act = layer.to_modules()
    assert type(bn) is type(stock)
    assert bn.running_mean is stock.running_mean
    assert isinstance(act, nn.SiLU)
    with pytest.raises(TypeError, match=r"bn: expected torch.nn.BatchNorm.d, got InstanceNorm1d"):
        LAYERS[rank].from_modules(nn.InstanceNorm1d(6))


@pytest.mark.parametrize("rank", LAYERS)
def test_sync_batch_norm_conversion_is_refused(rank: int) -> None:
    """It replaces every batch normalization and would lose the activation without a word."""
    layer = LAYERS[rank](6)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), layer)
    with pytest.raises(TypeError, match=r"would drop the activation of BatchNormAct.d: give it a process_group"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert model[1] is layer
    assert not hasattr(layer, "qconfig")
    with pytest.raises(AttributeError, match="no attribute 'qconfig'"):
        _ = layer.qconfig
    model[1] = nn.Sequential(*layer.to_modules())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert [type(module).__name__ for module in converted[1]] == ["SyncBatchNorm", "ReLU"]
    layer.qconfig = 3  # quantization sets one
    assert layer.qconfig == 3
    assert copy.deepcopy(layer).qconfig == 3
