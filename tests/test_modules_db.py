"""PyTorch's own module database: its samples for convolutions and batch normalization, given to our layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conv_cases import BLOCKS, make_block
from torch import nn
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

from deepops.nn import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d

pytestmark = pytest.mark.usefixtures("one_thread")

INFOS = {info.module_cls: info for info in module_db}
CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
NORMS: dict[Any, Any] = {nn.BatchNorm1d: BatchNormAct1d, nn.BatchNorm2d: BatchNormAct2d, nn.BatchNorm3d: BatchNormAct3d}
DTYPES = [torch.float32, torch.float64]


def samples(kind: Any, dtype: torch.dtype, train: bool) -> Iterator[Any]:
    info = INFOS[kind]
    return iter(info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=train))


def outcome(module: nn.Module, act: nn.Module, x: torch.Tensor) -> list[Any]:
    x = x.detach().clone().requires_grad_()
    y = act(module(x))
    y.sum().backward()
    return [y, x.grad, *(parameter.grad for parameter in module.parameters()), *module.buffers()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", NORMS)
def test_batch_normalization(kind: Any, train: bool, dtype: torch.dtype) -> None:
    count = 0
    for sample in samples(kind, dtype, train):
        arguments, (x,) = sample.constructor_input, sample.forward_input.args
        try:
            stock = kind(*arguments.args, **arguments.kwargs, dtype=dtype).train(train)
        except TypeError:  # an argument that this torch does not have
            continue
        layer = NORMS[kind](*arguments.args, **arguments.kwargs, dtype=dtype, activation="silu").train(train)
        layer.load_state_dict(stock.state_dict())
        torch.testing.assert_close(outcome(layer, nn.Identity(), x), outcome(stock, nn.SiLU(), x))
        count += 1
    assert count >= 6


@pytest.mark.parametrize("kind", NORMS)
def test_errors_of_batch_normalization(kind: Any) -> None:
    """In torch's own words."""
    function = INFOS[kind].module_error_inputs_func
    if function is None:
        pytest.skip("this torch's database has none")
    for sample in function(INFOS[kind], device="cpu", dtype=torch.float32, requires_grad=False, training=True):
        arguments = sample.module_error_input.constructor_input
        assert sample.error_on is ModuleErrorEnum.FORWARD_ERROR
        layer = NORMS[kind](*arguments.args, **arguments.kwargs)
        with pytest.raises(sample.error_type, match=sample.error_regex):
            layer(*sample.module_error_input.forward_input.args)
        assert int(layer.num_batches_tracked) == 0


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolution(kind: Any, train: bool) -> None:
    """With the batch normalization that fits; without a batch dimension both raise the same kind of error.

    In fp64, where the default tolerance leaves room for another order of summation; the rest of the tests has the rule.
    """
    dims, seen, dtype = CONVOLUTIONS[kind], set(), torch.float64
    for sample in samples(kind, dtype, train):
        arguments, (x,) = sample.constructor_input, sample.forward_input.args
        block = make_block(*arguments.args, dims=dims, dtype=dtype, bias=True, activation="silu", **arguments.kwargs)
        block.train(train)
        conv, bn, act = copy.deepcopy(block).to_modules()
        batched = x.dim() == dims + 2
        seen.add(batched)
        if batched:
            ours, theirs = outcome(block, nn.Identity(), x), outcome(nn.Sequential(conv, bn), act, x)
            if train:  # the bias: 0, and in stock what rounding left of it
                assert torch.equal(ours.pop(3), torch.zeros(5, dtype=dtype))
                theirs.pop(3)
            torch.testing.assert_close(ours, theirs)
        else:
            with pytest.raises(ValueError, match="expected rank"):
                block(x)
            if dims > 1:  # nn.BatchNorm1d takes [K, L] for a batch of vectors
                with pytest.raises(ValueError, match=r"expected .D input"):
                    bn(conv(x))
    assert seen == {True, False}
    assert set(BLOCKS) == set(CONVOLUTIONS.values())
