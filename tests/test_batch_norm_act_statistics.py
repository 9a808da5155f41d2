"""Statistics of the ``batch_norm_act`` ops: the batch's, the running ones, the counter."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from bn_cases import DTYPES, FORMATS, Pools, backward, evaluate, make_case
from bn_cases import train as op_train

from deepops import testing
from deepops.testing import ErrorPool

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NC"])
@pytest.mark.parametrize("mean", [100.0, -1000.0])
def test_mean_far_above_sigma(mean, layout):
    """Stock's measure is its NCHW kernel: channels_last has to be as accurate."""
    rank, memory_format = FORMATS[layout]
    shape = {4: (8, 16, 14, 14), 2: (512, 16)}[rank]
    for activation in ("identity", "relu"):
        pools = Pools()
        for _ in range(3):
            case = make_case(shape, torch.float32, memory_format, activation=activation, mean=mean)
            pools.add(replace(case, x=case.x * 0.5 + mean / 2), True)  # sigma 1
        pools.check()


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_statistics_of_the_batch(layout):
    """mean and invstd, which the backward uses, are fp64 for fp64 and fp32 else."""
    for dtype in DTYPES:
        pools = ErrorPool(), ErrorPool()
        for shape in [(4, 9, 5, 7), (16, 33, 8, 8), (2, 3, 40, 40)]:
            case = make_case(shape, dtype, FORMATS[layout][1], mean=3.0)
            _, *actual = op_train(case.clone())
            x = case.x.double()
            oracle = x.mean([0, 2, 3]), (x.var([0, 2, 3], correction=0) + case.eps).rsqrt()
            finest = case.x.to(actual[0].dtype)
            _, *stock = torch.native_batch_norm(finest.contiguous(), None, None, None, None, True, 0.1, case.eps)
            for pool, a, s, o in zip(pools, actual, stock, oracle, strict=True):
                assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                if dtype == torch.float64:  # the oracle rounds as well
                    a, s = a.float(), s.float()
                pool.add(a, s, o, name=f"{dtype} {shape}")
        for pool in pools:
            pool.check()


def test_constant_channels():
    """Variance 0: the result is act(bias), the gradient is finite."""
    pools = Pools()
    for eps, layout, shape in product((1e-3, 1e-5), ("NCHW", "NHWC"), [(4, 32, 3, 3), (5, 24, 8, 8)]):
        case = make_case(shape, torch.float32, FORMATS[layout][1], eps=eps, activation="identity")
        x = case.x.clone()
        x[:, ::2] = 0.3
        case = replace(case, x=x)
        pools.add(case, True, layout)
        y = op_train(case.clone())[0]
        assert torch.equal(y[:, ::2], case.bias[::2].view(1, -1, 1, 1).expand_as(y[:, ::2]))
    pools.check()


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, 0.37, None])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_running_statistics_over_three_steps(layout, momentum):
    """In place, unbiased variance, counter; momentum=None is the cumulative average."""
    norm = torch.nn.BatchNorm2d(6, momentum=momentum)
    exact = torch.nn.BatchNorm2d(6, momentum=momentum).double()
    running = [torch.zeros(6), torch.ones(6), torch.tensor(0)]
    addresses = [t.data_ptr() for t in running]
    for step in range(3):
        case = make_case((3, 6, 4, 5), memory_format=FORMATS[layout][1], momentum=momentum, mean=2.0 * step)
        case = replace(case, running_mean=running[0], running_var=running[1], num_batches_tracked=running[2])
        op_train(case)
        norm(case.x.contiguous())
        exact(case.x.double())
        assert running[2].item() == step + 1
        assert norm.num_batches_tracked.item() == step + 1
        for ours, name in zip(running, ("running_mean", "running_var"), strict=False):
            testing.assert_close_to_oracle(ours, getattr(norm, name), getattr(exact, name), name=f"{name} {step}")
    assert addresses == [t.data_ptr() for t in running]


def test_few_values_per_channel():
    """With two, the unbiased variance is twice the biased one."""
    pool = ErrorPool()
    for layout, shape in product(("NCHW", "NHWC"), [(2, 65, 1, 1), (1, 65, 1, 2), (3, 65, 1, 1), (2, 65, 2, 1)]):
        case = make_case(shape, memory_format=FORMATS[layout][1], momentum=1.0, activation="identity")
        var = case.x.double().var([0, 2, 3])
        stock, updated = case.clone(), case.clone()
        torch.nn.functional.batch_norm(
            case.x.contiguous(), stock.running_mean, stock.running_var, None, None, True, 1.0
        )
        op_train(updated)
        pool.add(updated.running_var, stock.running_var, var, name=f"{layout} {shape}")
    pool.check()


@pytest.mark.parametrize("absent", ["statistics", "counter", "everything"])
def test_absent_buffers(absent):
    pools = Pools()
    for shape in [(4, 25, 3, 3), (8, 40, 5, 5)]:
        case = make_case(shape)
        if absent != "counter":
            case = replace(case, running_mean=None, running_var=None)
        if absent != "statistics":
            case = replace(case, num_batches_tracked=None)
        pools.add(case, True)
    pools.check()


def test_cumulative_average_without_a_counter_learns_nothing():
    """As torch.nn.BatchNorm2d(momentum=None) whose counter was taken away."""
    case = replace(make_case((4, 25, 3, 3), momentum=None), num_batches_tracked=None)
    updated = case.clone()
    op_train(updated)
    assert torch.equal(updated.running_mean, case.running_mean)
    assert torch.equal(updated.running_var, case.running_var)


def test_evaluation_changes_no_statistic():
    case = make_case((4, 5, 3, 3))
    mean, invstd = case.statistics()
    before = mean.clone(), invstd.clone()
    y = evaluate(case)
    backward(case, y, mean, invstd, training=False)
    assert torch.equal(mean, before[0])
    assert torch.equal(invstd, before[1])
    assert case.num_batches_tracked.item() == 3
