"""PyTorch's own tools on the layers of ``deepops.nn``: hooks, replaced submodules, checkpointing, averaging, DDP."""

from __future__ import annotations

import copy
from collections.abc import Callable

import processes
import pytest
import torch
from conv_cases import BLOCKS, MODES, SIZES, Stock, make_block, make_input, set_mode
from processes import on_ranks, process_pools  # noqa: F401
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

import deepops
from deepops.nn import BatchNormAct2d, ConvBNAct2d, ConvBNReLU2d
from deepops.nn.convert import swap_layers

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- what the submodules are replaced by, and hooks on them ----------------------------------------------------------


def forward_hook(block: ConvBNAct2d, calls: list[str]) -> None:
    block.conv.register_forward_hook(lambda *_: calls.append("hook"))


def forward_pre_hook(block: ConvBNAct2d, calls: list[str]) -> None:
    block.bn.register_forward_pre_hook(lambda *_: calls.append("hook"))


def backward_hook(block: ConvBNAct2d, calls: list[str]) -> None:
    block.bn.register_full_backward_hook(lambda *_: calls.append("hook"))


def backward_pre_hook(block: ConvBNAct2d, calls: list[str]) -> None:
    block.conv.register_full_backward_pre_hook(lambda *_: calls.append("hook"))


def own_forward(block: ConvBNAct2d, calls: list[str]) -> None:
    def forward(x: Tensor) -> Tensor:
        calls.append("hook")
        return nn.Conv2d.forward(block.conv, x)

    block.conv.forward = forward


def other_class(block: ConvBNAct2d, calls: list[str]) -> None:
    class Counting(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            calls.append("hook")
            return super().forward(x)

    bn = Counting(block.bn.num_features)
    bn.load_state_dict(block.bn.state_dict())
    block.bn = bn


def parametrized(block: ConvBNAct2d, calls: list[str]) -> None:
    class Counting(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            calls.append("hook")
            return weight

    torch.nn.utils.parametrize.register_parametrization(block.conv, "weight", Counting())
    calls.clear()


def weight_norm(block: ConvBNAct2d, calls: list[str]) -> None:
    parametrizations.weight_norm(block.conv)
    calls.append("hook")


def spectral_norm(block: ConvBNAct2d, calls: list[str]) -> None:
    parametrizations.spectral_norm(block.conv)
    calls.append("hook")


def pruned(block: ConvBNAct2d, calls: list[str]) -> None:
    prune.l1_unstructured(block.conv, "weight", 0.5)
    calls.append("hook")


CHANGES = [
    forward_hook,
    forward_pre_hook,
    backward_hook,
    backward_pre_hook,
    own_forward,
    other_class,
    parametrized,
    weight_norm,
    spectral_norm,
    pruned,
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_submodules_are_called_one_by_one(change: Callable[[ConvBNAct2d, list[str]], None], mode: str) -> None:
    block = make_block(4, 8, 3, activation="silu")
    stock = Stock(block)
    calls: list[str] = []
    assert "not fused" not in deepops.explain(block)
    for module, seen in ((block, calls), (stock, [])):
        torch.manual_seed(1)
        change(module, seen)
        set_mode(module, mode)
    assert "not fused" in deepops.explain(block)
    x = torch.randn(2, 4, 9, 8)
    y, expected = block(x), stock(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    calls += ["hook"] * (change is backward_hook and mode == "frozen affine")  # nothing of bn is differentiated
    y.sum().backward()
    expected.sum().backward()
    assert "hook" in calls
    for ours, theirs in zip(block.parameters(), stock.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            assert torch.equal(ours.grad, theirs.grad)


def test_pruning_made_permanent_is_fused_again() -> None:
    block = make_block(4, 8, 3)
    prune.l1_unstructured(block.conv, "weight", 0.5)
    x = torch.randn(2, 4, 9, 8)
    expected = block.eval()(x)
    prune.remove(block.conv, "weight")
    assert deepops.explain(block).startswith("ConvBNAct2d: fused")
    torch.testing.assert_close(block(x), expected)


def test_global_hook_takes_the_plain_path() -> None:
    block = make_block(4, 8, 3)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        block(torch.randn(2, 4, 9, 8))
    finally:
        handle.remove()
    assert seen == [nn.Conv2d, nn.BatchNorm2d, ConvBNAct2d]
    block(torch.randn(2, 4, 9, 8))
    assert len(seen) == 3


@pytest.mark.parametrize("dims", BLOCKS)
def test_sync_batch_norm_conversion_keeps_the_activation(dims: int) -> None:
    block = make_block(4, 8, 3, dims=dims, activation="silu")
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
    assert type(converted.bn) is nn.SyncBatchNorm
    assert "fused" in deepops.explain(converted)
    assert "not fused" not in deepops.explain(converted)
    x = make_input(dims)
    for train in (True, False):
        torch.testing.assert_close(converted.train(train)(x), block.train(train)(x))
    torch.testing.assert_close(converted.bn.running_var, block.bn.running_var)


@pytest.mark.parametrize("dims", BLOCKS)
def test_torchs_own_fusion(dims: int) -> None:
    block = make_block(4, 8, 3, dims=dims, bias=True, activation="identity").eval()
    x = make_input(dims)
    torch.testing.assert_close(fuse_conv_bn_eval(block.conv, block.bn)(x), block(x))


# ---- modes, recomputation, averaging ---------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointing_updates_the_statistics_once(momentum: float | None, use_reentrant: bool) -> None:
    """Stock batch normalization is updated by the recomputation, too (pytorch#96136)."""
    block = make_block(4, 8, 3, bias=True, momentum=momentum)
    model = nn.Sequential(block, BatchNormAct2d(8, momentum=momentum))
    plain = copy.deepcopy(model)
    x = torch.randn(4, 4, 6, 6, requires_grad=True)
    for _ in range(3):
        checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
        actual, x.grad = x.grad, None
        plain(x).square().sum().backward()
        expected, x.grad = x.grad, None
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    for (name, ours), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_train_and_eval_of_a_model() -> None:
    """``train`` of a model thaws batch normalization again, as with stock modules."""
    model = nn.Sequential(make_block(4, 8, 3))
    set_mode(model[0], "frozen")
    assert [model.training, model[0].training, model[0].conv.training, model[0].bn.training] == [
        True,
        True,
        True,
        False,
    ]
    x = torch.randn(2, 4, 6, 6)
    model(x)
    assert int(model[0].bn.num_batches_tracked) == 0
    model.train()(x)
    assert int(model[0].bn.num_batches_tracked) == 1
    model.eval()(x)
    assert int(model[0].bn.num_batches_tracked) == 1


def test_swapping_a_frozen_model() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model[1].eval()
    assert swap_layers(model) == ["0"]
    assert [model[0].training, model[0].conv.training, model[0].bn.training] == [True, True, False]


@pytest.mark.parametrize("dims", BLOCKS)
def test_update_bn(dims: int) -> None:
    block = make_block(4, 8, 3, dims=dims, momentum=0.3)
    model, stock = nn.Sequential(block), nn.Sequential(Stock(block))
    data = [make_input(dims) for _ in range(3)]
    for network in (model, stock):
        torch.optim.swa_utils.update_bn(data, network)
    assert block.bn.momentum == 0.3
    assert int(block.bn.num_batches_tracked) == 3
    torch.testing.assert_close(block.bn.running_mean, stock[0].bn.running_mean)
    torch.testing.assert_close(block.bn.running_var, stock[0].bn.running_var)


def test_explain() -> None:
    model = nn.Sequential(ConvBNReLU2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    assert deepops.explain(model).startswith(
        "0 (ConvBNReLU2d): fused: torch's convolution, then batch norm + relu in one"
    )
    assert "plain PyTorch" in deepops.explain(nn.Linear(2, 2))
    assert "batch norm + silu" in deepops.explain(BatchNormAct2d(4, activation="silu"))
    set_mode(model[0], "frozen")
    assert "with weights folded once; with gradients, under autocast and in fp16 torch's conv" in deepops.explain(model)
    set_mode(model[0], "frozen affine")
    assert "with weights folded once, with gradients in each call" in deepops.explain(model)
    assert "one op from 16 channels on" in deepops.explain(ConvBNReLU2d(16, 16, 3, groups=16))


# ---- several processes -----------------------------------------------------------------------------------------------

needs_processes = pytest.mark.skipif(bool(processes.missing()), reason=processes.missing() or "no gloo")


@needs_processes
@on_ranks(1)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_ddp(dims: int) -> None:
    block = make_block(4, 8, 3, dims=dims, bias=True)
    single = copy.deepcopy(block)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(block))
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (model, single)]
    for _ in range(3):
        x = torch.randn(4, 4, *SIZES[dims])
        for module, optimizer in zip((model, single), optimizers, strict=True):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    for (name, ours), theirs in zip(block.state_dict().items(), single.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
