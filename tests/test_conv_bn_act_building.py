"""The layers of ``deepops.nn`` as objects: built, shared, copied, saved, loaded; bad arguments and bad input."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from conv_cases import Stock, make_block
from torch import nn

from deepops.nn import (
    BatchNormAct2d,
    ConvBNAct2d,
    ConvBNReLU2d,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_from_modules_shares_everything() -> None:
    conv, bn = nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4)
    block = ConvBNAct2d.from_modules(conv, bn, nn.LeakyReLU(0.3))
    assert block.conv is conv
    assert block.bn is bn
    assert "activation='leaky_relu', negative_slope=0.3" in repr(block)
    parts = block.to_modules()
    assert parts[0] is conv
    assert parts[1] is bn
    assert isinstance(parts[2], nn.LeakyReLU)
    assert parts[2].negative_slope == 0.3
    assert ConvBNAct2d.from_modules(conv, bn).activation == "identity"
    assert ConvBNAct2d.from_modules(conv, bn, "gelu").activation == "gelu"
    assert ConvBNReLU2d.from_modules(conv, bn).activation == "relu"
    layer = BatchNormAct2d.from_modules(bn, nn.SiLU())
    back, act = layer.to_modules()
    for module in (layer, back):
        mine, theirs = module.state_dict(keep_vars=True), bn.state_dict(keep_vars=True)
        assert list(mine) == list(theirs)
        assert all(mine[name] is theirs[name] for name in mine)
    assert isinstance(act, nn.SiLU)


def test_bad_modules() -> None:
    conv, bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    with pytest.raises(TypeError, match=r"conv: expected torch.nn.Conv2d, got Linear"):
        ConvBNAct2d.from_modules(nn.Linear(3, 4), bn)
    with pytest.raises(TypeError, match=r"bn: expected torch.nn.BatchNorm2d, got GroupNorm"):
        ConvBNAct2d.from_modules(conv, nn.GroupNorm(2, 4))
    with pytest.raises(ValueError, match="bn: expected 4 features, the channels of conv, got 5"):
        ConvBNAct2d.from_modules(conv, nn.BatchNorm2d(5))
    with pytest.raises(TypeError, match=r"activation: expected a name or one of nn.ReLU.* got Tanh"):
        ConvBNAct2d.from_modules(conv, bn, nn.Tanh())
    with pytest.raises(ValueError, match=r"activation: expected one of relu, .* got 'tanh'"):
        ConvBNAct2d(3, 4, 3, activation="tanh")
    with pytest.raises(ValueError, match="approximate: expected"):
        BatchNormAct2d(4, activation="gelu", approximate="exact")
    with pytest.raises(ValueError, match="activation: expected relu"):
        ConvBNReLU2d.from_modules(conv, bn, "silu")
    with pytest.raises(TypeError, match=r"bn: expected torch.nn.BatchNorm2d"):
        BatchNormAct2d.from_modules(nn.BatchNorm1d(4))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_bad_input_to_modules(train: bool) -> None:
    block, layer = make_block(4, 8, 3).train(train), BatchNormAct2d(4).train(train)
    before = copy.deepcopy([block.state_dict(), layer.state_dict()])
    cases: list[tuple[Any, type[Exception], str]] = [
        ([1.0], TypeError, "x: expected a torch.Tensor, got list"),
        (torch.randn(4, 9, 9), ValueError, "x: expected "),
        (torch.randn(2, 4, 9, 9).to_sparse(), TypeError, "x: expected a dense"),
        (torch.randn(2, 4, 9, 9, device="meta"), ValueError, "expected device"),
    ]
    with torch.no_grad():
        for x, error, message in cases:
            for module in (block, layer):
                with pytest.raises(error, match=message):
                    module(x)
        with pytest.raises(ValueError, match=r"x: expected 4 channels"):
            block(torch.randn(2, 3, 9, 9))
        with pytest.raises(TypeError, match=r"conv_weight: expected torch.float64"):
            block(torch.randn(2, 4, 9, 9).double())
        with pytest.raises(ValueError, match="residual: expected shape"):
            block(torch.randn(2, 4, 9, 9), torch.randn(2, 8, 9, 9))
        block.bn = nn.BatchNorm2d(1).train(train)
        with pytest.raises(ValueError, match=r"running_mean: expected shape \[8\]"):
            block(torch.randn(2, 4, 9, 9))
    assert str(before[1]) == str(layer.state_dict())


def test_deepcopy_pickle_save() -> None:
    block = make_block(4, 8, 3, activation="leaky_relu", negative_slope=0.2).eval()
    x = torch.randn(2, 4, 9, 8)
    with torch.no_grad():
        y = block(x)
        buffer = io.BytesIO()
        torch.save(block, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), loaded):
            assert other._folded.folds == 0
            assert other._folded is not block._folded
            assert torch.equal(other(x), y)
            other.conv.weight.zero_()
        assert torch.equal(block(x), y)
        assert list(block.state_dict()) == [
            "conv.weight",
            "bn.weight",
            "bn.bias",
            "bn.running_mean",
            "bn.running_var",
            "bn.num_batches_tracked",
        ]


def test_same_initial_parameters_as_stock() -> None:
    torch.manual_seed(2)
    block = ConvBNReLU2d(3, 4, 3, bias=True)
    torch.manual_seed(2)
    conv, bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    stock = [*conv.state_dict().values(), *bn.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(block.state_dict().values(), stock, strict=True))


def test_memory_format_of_the_module() -> None:
    block = make_block(4, 8, 3).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 9, 8)
    for train in (True, False):
        with torch.no_grad():
            y = block.train(train)(x)
            assert y.stride() == Stock(block)(x).stride()
            assert y.is_contiguous(memory_format=torch.channels_last)
