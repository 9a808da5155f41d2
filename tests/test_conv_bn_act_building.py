"""The layers of ``deepops.nn`` as objects: built, shared, copied, saved, loaded; bad arguments and bad input."""

from __future__ import annotations

import copy
import doctest
import io
import pickle
from typing import Any

import pytest
import torch
from conv_cases import BLOCKS, MODES, Stock, make_block, make_input, set_mode
from torch import nn

import deepops.nn
import deepops.testing
from deepops.nn import BatchNormAct2d, ConvBNAct2d, ConvBNReLU2d, batch_norm_act, conv_bn_act, conv_bn_relu, convert

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


@pytest.mark.parametrize("dims", BLOCKS)
def test_relu_blocks_and_modules_of_other_dimensions(dims: int) -> None:
    relu, act = getattr(deepops.nn, f"ConvBNReLU{dims}d"), BLOCKS[dims]
    torch.manual_seed(4)
    block = relu(4, 8, 3, 1, 1, bias=True, padding_mode="circular", eps=0.1)
    assert isinstance(block, act)
    assert block.activation == "relu"
    other = act(4, 8, 3, 1, 1, bias=True, padding_mode="circular", eps=0.1)
    other.load_state_dict(block.state_dict())
    x = make_input(dims)
    assert torch.equal(block(x), other(x))
    shared = act.from_modules(block.conv, block.bn, "silu")
    assert type(shared) is act
    assert shared.conv is block.conv
    with pytest.raises(ValueError, match=f"activation: expected relu, got 'silu'; use ConvBNAct{dims}d for others"):
        relu.from_modules(block.conv, block.bn, "silu")
    wrong = BLOCKS[1 + dims % 3](4, 8, 3)
    with pytest.raises(TypeError, match=f"conv: expected torch.nn.Conv{dims}d, got Conv"):
        act.from_modules(wrong.conv, block.bn)
    with pytest.raises(TypeError, match=f"bn: expected torch.nn.BatchNorm{dims}d, got BatchNorm"):
        act.from_modules(block.conv, wrong.bn)


@pytest.mark.parametrize("dims", BLOCKS)
@pytest.mark.parametrize("mode", [*MODES, "no_grad"])
def test_bad_input_changes_nothing(mode: str, dims: int) -> None:
    block, x = make_block(4, 8, 3, dims=dims, bias=True), make_input(dims)
    set_mode(block, "eval" if mode == "no_grad" else mode)
    y = copy.deepcopy(block)(x).detach()
    spatial = {1: "L", 2: "H, W", 3: "D, H, W"}[dims]
    cases: list[tuple[Any, type[Exception], str]] = [
        ([1.0], TypeError, "x: expected a torch.Tensor, got list"),
        (x[0], ValueError, rf"x: expected rank {dims + 2}, \[N, C, {spatial}\], got shape"),  # no batch dimension
        (x[None], ValueError, f"x: expected rank {dims + 2}"),
        (x.to_sparse(), TypeError, "x: expected a dense"),
        (x.to("meta"), ValueError, "expected device"),
        (x.long(), TypeError, "x: expected float32"),
        (x[:, :3], ValueError, "x: expected 4 channels"),
        (x.double(), TypeError, r"conv_weight: expected torch.float64"),
    ]
    before = copy.deepcopy(block.state_dict())
    with torch.set_grad_enabled(mode != "no_grad"):
        for bad, error, message in cases:
            with pytest.raises(error, match=message):
                block(bad)
        with pytest.raises(ValueError, match="residual: expected shape"):
            block(x, x)
        with pytest.raises(TypeError, match=r"residual: expected torch.float32"):
            block(x, y.double())
        bn, block.bn = block.bn, type(block.bn)(5)
        set_mode(block, "eval" if mode == "no_grad" else mode)
        others = copy.deepcopy(block.bn.state_dict())
        with pytest.raises(ValueError, match=r"running_mean: expected shape \[8\], one per channel, got \[5\]"):
            block(x)
    assert all(torch.equal(others[name], value) for name, value in block.bn.state_dict().items())
    block.bn = bn
    assert all(torch.equal(before[name], value) for name, value in block.state_dict().items())


@pytest.mark.parametrize("dims", BLOCKS)
def test_a_state_dict_of_another_shape(dims: int) -> None:
    block, other = make_block(4, 8, 3, dims=dims), make_block(4, 6, 3, dims=dims)
    before, x = copy.deepcopy(block.state_dict()), make_input(dims)
    with pytest.raises(RuntimeError, match=r"size mismatch for bn.running_mean"):
        block.load_state_dict(other.state_dict())
    for name in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"):
        assert torch.equal(before[name], block.state_dict()[name])
    block(x)
    flat = make_block(4, 8, 3, dims=1 + dims % 3)
    with pytest.raises(RuntimeError, match=r"size mismatch for conv.weight"):
        block.load_state_dict(flat.state_dict())


def test_examples_of_the_docstrings() -> None:
    modules = [
        batch_norm_act,
        conv_bn_act,
        conv_bn_relu,
        convert,
        deepops.functional,
        deepops._explain,
        deepops.testing,
    ]
    results = [doctest.testmod(module) for module in modules]
    assert all(result.attempted for result in results)
    assert not any(result.failed for result in results)


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
