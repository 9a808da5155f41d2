"""Layers whose batch is shared by processes: converted by torch or told so, against one process that has all of it."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from conv_cases import make_block
from processes import on_ranks, process_pools  # noqa: F401
from torch import nn

import deepops
from deepops._library import has_kernel
from deepops.nn import BatchNormAct1d, BatchNormAct2d, ConvBNAct1d, ConvBNAct2d, ConvBNReLU2d
from deepops.testing import use_threads

pytestmark = pytest.mark.skipif(not has_kernel("batch_norm_act_train", "cpu"), reason="no compiled kernels")

PARTS = (2, 4)


def converted(block):
    return nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))


def told(block):
    """The same layer, made with a process group."""
    layer = ConvBNAct2d(4, 8, 3, activation="silu", bias=True, dtype=torch.float64, process_group=dist.group.WORLD)
    layer.load_state_dict(block.state_dict())
    return layer


def from_torchs(block):
    return ConvBNAct2d.from_modules(block.conv, nn.SyncBatchNorm.convert_sync_batchnorm(block.bn), "silu")


def two_steps(model, x):
    """Outputs, gradients summed over the processes that share the batch, and state."""
    shared = len(x) != sum(PARTS)
    results = []
    for scale in (1.0, 0.5):
        part = (x * scale).requires_grad_()
        model.zero_grad()
        y = model(part)
        y.backward(torch.linspace(-1, 1, y[0].numel(), dtype=y.dtype).view(y[0].shape).expand_as(y))
        grads = [parameter.grad for parameter in model.parameters()]
        if shared:
            for grad in grads:
                dist.all_reduce(grad)
        results += [y.detach(), part.grad, *grads]
    return [*results, *(b.clone() for b in model.buffers())]


def assert_as_one(shared, alone, x):
    """``shared`` on this process' part of ``x`` gives what ``alone`` gives on all of it."""
    first = sum(PARTS[: dist.get_rank()])
    mine = slice(first, first + PARTS[dist.get_rank()])
    with use_threads(1):
        ours, whole = two_steps(shared, x[mine].clone()), two_steps(alone, x)
    for actual, expected in zip(ours, whole, strict=True):
        expected = expected[mine] if expected.dim() == 4 and len(expected) == len(x) else expected
        torch.testing.assert_close(actual, expected)


@on_ranks(2)
@pytest.mark.parametrize("how", [converted, told, from_torchs], ids=lambda how: how.__name__)
def test_a_block(how):
    block = make_block(4, 8, 3, activation="silu", bias=True).double()
    shared = how(copy.deepcopy(block))
    assert type(shared.bn) is nn.SyncBatchNorm
    assert "not fused" not in deepops.explain(shared)
    x = torch.randn(6, 4, 7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_as_one(shared, block, x)
    shared.eval(), block.eval()
    torch.testing.assert_close(shared(x), block(x))


@on_ranks(2)
def test_batch_norm_act():
    alone = BatchNormAct2d(3, activation="gelu", dtype=torch.float64)
    shared = BatchNormAct2d(3, activation="gelu", dtype=torch.float64, process_group=dist.group.WORLD)
    x = torch.randn(6, 3, 7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_as_one(shared, alone, x)
    bn, act = shared.to_modules()
    assert (type(bn), bn.process_group, type(act)) == (nn.SyncBatchNorm, dist.group.WORLD, nn.GELU)


@on_ranks(2)
def test_a_group_of_this_process_alone():
    groups = [dist.new_group([rank]) for rank in range(2)]
    alone, own = BatchNormAct1d(3), BatchNormAct1d(3, process_group=groups[dist.get_rank()])
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(dist.get_rank()))
    assert torch.equal(own(x), alone(x))
    assert torch.equal(own.running_var, alone.running_var)


def test_without_processes_a_converted_layer_has_all_of_the_batch():
    for block, x in ((ConvBNAct1d(3, 4, 3), torch.randn(2, 3, 9)), (ConvBNReLU2d(3, 4, 3), torch.randn(2, 3, 9, 9))):
        other = converted(block)
        for _, train in itertools.product(range(2), (True, False)):
            assert torch.equal(other.train(train)(x), block.train(train)(x))


def test_a_batch_norm_of_another_number_of_channels():
    with pytest.raises(ValueError, match="expected 4 features, the channels of conv, got 5"):
        ConvBNAct2d.from_modules(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(5))
