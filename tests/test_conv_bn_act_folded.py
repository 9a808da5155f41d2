"""Evaluation of the blocks without gradients: one convolution with folded weights, kept until something changes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from conv_cases import ACTIVATION_MODULES, Stock, check_layout, convolutions, make_block, make_input
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from deepops.nn import ConvBNAct2d
from deepops.testing import ErrorPool, make_layouts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_folded_evaluation(dtype: torch.dtype, dims: int) -> None:
    options = convolutions(dims)
    cases = [(each, nn.ReLU()) for each in options.values()]
    cases += [(options["bias"], activation) for activation in ACTIVATION_MODULES]
    pool = ErrorPool()
    for seed, (each, activation) in enumerate(cases):
        for channels_last in (False, True) if dims > 1 else (False,):
            block = make_block(4, 8, dims=dims, **each, activation=activation, seed=seed).eval()
            block.conv.to(dtype)
            block.bn.to(torch.float64 if dtype is torch.float64 else torch.float32)
            stock = Stock(block)
            x = make_input(dims, 2, channels_last=channels_last).to(dtype)
            with torch.no_grad():
                ours, theirs, oracle = block(x), stock(x), stock.double()(x.double())
            assert block._folded.folds == (0 if block.bn.running_mean is None else 1)
            assert ours.dtype is dtype
            check_layout(ours, theirs, x)
            if dtype is torch.float64:
                torch.testing.assert_close(ours, theirs)  # nothing finer to compare with
            else:
                pool.add(ours, theirs, oracle, name=f"{activation} {each}")
    if dtype is not torch.float64:
        pool.check()


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("activation", ["relu", "identity", "silu"])
def test_folded_evaluation_with_a_residual(activation: str, dims: int) -> None:
    pool = ErrorPool()
    for seed, (name, options) in enumerate(convolutions(dims).items()):
        block = make_block(4, 8, dims=dims, **options, activation=activation, seed=seed).eval()
        stock = Stock(block)
        wide = copy.deepcopy(stock).double()
        x = make_input(dims, 2)
        with torch.no_grad():
            for residual in make_layouts(torch.randn_like(block(x))).values():
                before = residual.clone()
                ours, theirs, oracle = block(x, residual), stock(x, residual), wide(x.double(), residual.double())
                assert torch.equal(residual, before)
                assert ours.stride() == theirs.stride()
                pool.add(ours, theirs, oracle, name=name)
            for bad in (torch.randn(1, 8, *[1] * dims), ours[:, :4], ours[..., 1:]):
                with pytest.raises(ValueError, match="residual: expected shape"):
                    block(x, bad)
            with pytest.raises(TypeError, match=r"residual: expected torch.float32"):
                block(x, ours.double())
            with pytest.raises(TypeError, match=r"residual: expected a torch.Tensor, got int"):
                block(x, 1)
            with torch.enable_grad(), pytest.raises(TypeError, match=r"residual: expected a torch.Tensor, got int"):
                block(x, 1)
    pool.check()


def test_input_smaller_than_the_kernel() -> None:
    """An error like torch's, folded or not."""
    block = make_block(4, 8, 5, bias=True)
    for train in (True, False):
        with torch.no_grad(), pytest.raises(RuntimeError, match="Kernel size can't be greater"):
            block.train(train)(torch.randn(2, 4, 3, 3))


def edit_parameter(block: ConvBNAct2d) -> None:
    block.conv.weight.mul_(1.5)


def edit_statistic(block: ConvBNAct2d) -> None:
    block.bn.running_mean.add_(1)


def replace_parameter(block: ConvBNAct2d) -> None:
    block.conv.weight = nn.Parameter(torch.randn_like(block.conv.weight))


def replace_data(block: ConvBNAct2d) -> None:
    block.bn.bias.data = torch.randn_like(block.bn.bias)


def load(block: ConvBNAct2d) -> None:
    block.load_state_dict(make_block(4, 8, 3, bias=True, eps=0.1).state_dict())
    block.bn.weight.fill_(3)


def change_eps(block: ConvBNAct2d) -> None:
    block.bn.eps = 0.5


def optimizer_step(block: ConvBNAct2d) -> None:
    for parameter in block.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam(block.parameters(), lr=0.1).step()


def train_statistics(block: ConvBNAct2d) -> None:
    """A training forward of the layer itself; the mode of ``bn`` alone, so that nothing drops the cache."""
    block.bn.train()
    block(torch.randn(4, 4, 9, 8))
    block.bn.eval()


def data_edit_and_eval(block: ConvBNAct2d) -> None:
    block.conv.weight.data.mul_(2)
    block.eval()


def cast(block: ConvBNAct2d) -> None:
    block.double().float()


EDITS = [
    edit_parameter,
    edit_statistic,
    replace_parameter,
    replace_data,
    load,
    change_eps,
    optimizer_step,
    train_statistics,
    data_edit_and_eval,
    cast,
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_refolds_exactly_when_something_changed(edit: Callable[[ConvBNAct2d], None]) -> None:
    block = make_block(4, 8, 3, bias=True).eval()
    x = torch.randn(2, 4, 9, 8)
    with torch.no_grad():
        block(x)
        block(x)
        assert block._folded.folds == 1
        edit(block)
        y = block(x)
        block(x)
        assert block._folded.folds == 2
        assert torch.equal(y, copy.deepcopy(block)(x))  # a copy has an empty cache


def test_tensors_without_memory() -> None:
    """Fake tensors have no address to compare: they must not reach the cache."""
    with FakeTensorMode(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        block = ConvBNAct2d(4, 8, 3).eval()
        assert block(torch.randn(2, 4, 9, 8)).shape == (2, 8, 7, 6)
        assert block._folded.folds == 0


def test_deepops_optimizer_is_noticed() -> None:
    optim = pytest.importorskip("deepops.optim")
    block = make_block(4, 8, 3, bias=True).eval()
    optimizer = optim.Adam(block.parameters(), lr=0.1)
    x = torch.randn(2, 4, 9, 8)
    with torch.no_grad():
        block(x)
    for _ in range(2):
        block(x).sum().backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.equal(block(x), copy.deepcopy(block)(x))


def test_no_folding_where_gradients_are_wanted() -> None:
    block = make_block(4, 8, 3).eval()
    x = torch.randn(2, 4, 9, 8)
    assert block(x).requires_grad
    block.requires_grad_(False)
    assert block(x.clone().requires_grad_()).requires_grad
    assert block._folded.folds == 0
    assert not block(x).requires_grad
    assert block._folded.folds == 1


def test_inference_mode() -> None:
    block = make_block(4, 8, 3).eval()
    x = torch.randn(2, 4, 9, 8)
    with torch.inference_mode():
        y = block(x)
        made_inside = make_block(4, 8, 3).eval()  # inference tensors do not count writes: nothing may be cached
        assert torch.equal(made_inside(x), y)
        made_inside.conv.weight.mul_(0)
        assert not torch.equal(made_inside(x), y)
    with torch.no_grad():
        assert torch.equal(block(x), y)
    block.train()
    block(x).sum().backward()
