"""Sizes at which the CPU kernels change their way: large results are stored past the caches, long rows taken singly;
many planes a channel, many channels after few.

A large case must equal, bit for bit, its samples taken one at a time: those are small, so they go the ordinary way.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from bn_cases import FORMATS, Pools, backward, evaluate, make_case, train

from deepops._library import _C
from deepops.testing import isas

# 2.2 M values each: short rows, long rows, planes that are no whole number of vectors (those are not streamed).
SHAPES = [(4, 32, 132, 132), (6, 512, 28, 28), (3, 8, 301, 309)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def samples(case):
    for n in range(case.x.size(0)):
        parts = {name: getattr(case, name)[n : n + 1] for name in ("x", "grad_y")}
        residual = None if case.residual is None else case.residual[n : n + 1]
        yield replace(case, residual=residual, **parts)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_evaluation(dtype, layout):
    """Forward and backward with given statistics treat every sample by itself."""
    for shape, residual in product(SHAPES, (True, False)):
        if residual:
            whole = make_case(shape, dtype, FORMATS[layout][1], residual=True, training=False)
        case = whole if residual else replace(whole, residual=None)
        y = evaluate(case)
        gradients = backward(case, y, *case.statistics(), training=False)
        for n, sample in enumerate(samples(case)):
            alone = evaluate(sample)
            assert torch.equal(y[n : n + 1], alone), f"{shape} sample {n}"
            found = backward(sample, alone, *sample.statistics(), training=False)
            assert torch.equal(gradients["grad_x"][n : n + 1], found["grad_x"]), f"{shape} sample {n}"
            if residual:
                assert torch.equal(gradients["grad_residual"][n : n + 1], found["grad_residual"])


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_large_training(layout):
    """The forward is the evaluation with the statistics it returns; the gradients are those of the oracle."""
    pools = Pools()
    for shape in SHAPES[:2]:
        case = make_case(shape, torch.float32, FORMATS[layout][1])
        y, mean, invstd = train(case.clone())
        op_eval = torch.ops.deepops.batch_norm_act_eval
        for n, sample in enumerate(samples(case)):
            alone = op_eval(sample.x, None, case.weight, case.bias, mean, invstd, case.activation, case.negative_slope)
            assert torch.equal(y[n : n + 1], alone), f"{shape} sample {n}"
        pools.add(case, True, f"{shape}")
    pools.check()


@pytest.mark.skipif(_C is None or len(isas()) < 2, reason="one instruction set only: nothing to compare")
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_large_results_are_the_same_on_every_instruction_set(layout):
    case = make_case(SHAPES[1], torch.float32, FORMATS[layout][1])
    found = []
    for isa in isas():
        _C.set_cpu_isa(isa)
        y, mean, invstd = train(case.clone())
        found.append([y, mean, invstd, *backward(case, y, mean, invstd, training=True).values()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_many_small_planes(layout):
    """Sums of single precision run on across the planes of a channel, up to a limit."""
    pools = Pools()
    for shape in [(70, 5, 4, 4), (131, 18, 7, 7), (40, 17, 5, 7)]:
        pools.add(make_case(shape, torch.float32, FORMATS[layout][1], mean=2.0), True, f"{shape}")
    pools.check()


def test_many_channels_between_few():
    """The memory an op works in grows with its largest call; it is not kept beyond a limit."""
    pools = Pools()
    for channels in (3, 50_000, 7, 150_000, 3):
        pools.add(make_case((2, channels, 2, 2)), True, f"{channels} channels")
    pools.check()
