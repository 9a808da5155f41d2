"""Values of the ``batch_norm_act`` ops, forward and backward, against the fp64 oracle."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import product

import backends
import pytest
import torch
from bn_cases import (
    ACTIVATIONS,
    DTYPES,
    FORMATS,
    KINKS,
    Case,
    Pools,
    gradient_scales,
    make_case,
    op_results,
    oracle_results,
    stock_results,
)
from bn_exact import exact_results

from deepops import testing
from deepops.testing import ErrorPool

pytestmark = pytest.mark.usefixtures("backend")

SHAPES = {2: (130, 25), 3: (9, 25, 21), 4: (6, 25, 5, 7), 5: (5, 25, 2, 4, 5)}
CHANNELS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100]
SPATIAL = [1, 2, 3, 4, 7, 9, 15, 16, 17, 31, 33, 49, 64, 65, 127, 130]
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@both_modes
def test_every_option(training, dtype, activation):
    """All of dtype x activation x layout x residual x affine; rounding of fp64 is the next test's.

    The executor is slow, and its kernels are one template for all dtypes: there each activation in each layout comes in
    one of the dtypes, all of which see every activation and every layout.
    """
    pools = Pools()
    for (i, layout), residual, affine in product(enumerate(FORMATS), (False, True), (False, True)):
        if backends.current == "simt" and (i + DTYPES.index(dtype) + ACTIVATIONS.index(activation)) % len(DTYPES):
            continue
        rank, memory_format = FORMATS[layout]
        case = make_case(
            SHAPES[rank], dtype, memory_format, activation=activation, residual=residual, affine=affine,
            training=training,
        )  # fmt: skip
        if dtype == torch.float64:
            assert_nearly_exact(case, training)
        else:
            pools.add(case, training, f"{layout} residual={residual} affine={affine}")
    if dtype != torch.float64:
        pools.check()


def assert_nearly_exact(case: Case, training: bool) -> None:
    """fp64 results judged by the rule of fp32: catches what is wrong, leaves rounding to ``test_fp64_rounding``."""
    actual = {name: t.float() if t.is_floating_point() else t for name, t in op_results(case, training).items()}
    narrow = {n: t.float() for n, t in vars(case).items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    with testing.use_threads(1):
        stock, oracle = stock_results(replace(case.clone(), **narrow), training), stock_results(case, training)
    for name, expected in oracle.items():
        if expected.is_floating_point():
            testing.assert_close_to_oracle(actual[name], stock[name], expected, name=name)
        else:
            assert actual[name].item() == expected.item()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@both_modes
def test_fp64_rounding(training, activation):
    """fp64 against 200-bit arithmetic. A sum of doubles has nothing finer to be added up in, so every order of the
    elements is as right as any other: stock's error is its largest over several orders, torch.cumsum's included.
    """
    pools: dict[str, ErrorPool] = {}
    for residual, affine, layout in [(False, True, "NCHW"), (True, True, "NHWC"), (True, False, "NCL")]:
        rank, memory_format = FORMATS[layout]
        case = make_case(
            {4: (3, 11, 2, 5), 3: (3, 11, 11)}[rank], torch.float64, memory_format, activation=activation,
            residual=residual, affine=affine, training=training,
        )  # fmt: skip
        exact, actual, scales = (
            exact_results(case, training),
            op_results(case, training),
            gradient_scales(case, training),
        )
        for _ in range(8):
            order = torch.randperm(case.x.shape[0] * case.x[0, 0].numel())
            with testing.use_threads(1):
                stock = stock_in_order(case, training, order)
            for name, expected in exact.items():
                pool = pools.setdefault(name, ErrorPool())
                for variant in stock[name]:
                    pool.add(actual[name], variant, expected, name=f"{layout} {name}", scale=scales.get(name))
    for pool in pools.values():
        pool.check()


def stock_in_order(case: Case, training: bool, order: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Stock's results with each channel's values in another order; the gradients of weight and bias by cumsum, too."""

    def rows(t: torch.Tensor) -> torch.Tensor:
        return t.transpose(0, 1).reshape(t.shape[1], -1)

    def move(t: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        return rows(t)[:, by].view(t.transpose(0, 1).shape).transpose(0, 1).contiguous() if t.dim() > 1 else t

    if case.residual is None:
        case = replace(case, residual=torch.zeros_like(case.x))  # its gradient is act' * grad_y
    shuffled = replace(
        case, **{n: move(t, order) for n, t in vars(case).items() if isinstance(t, torch.Tensor) and t.dim()}
    )
    results = stock_results(shuffled, training)
    xhat = replace(shuffled, weight=None, bias=None, residual=None, activation="identity")
    terms = rows(results["grad_residual"]), rows(results["grad_residual"] * stock_results(xhat, training)["y"])
    out = {name: [move(t, order.argsort())] for name, t in results.items()}
    for name, term in zip(("grad_bias", "grad_weight"), terms, strict=True):
        out.setdefault(name, []).append(term.cumsum(1)[:, -1])
    return out


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@both_modes
def test_sizes_around_vector_borders(training, dtype, layout):
    """Every channel count with every spatial size, batch sizes 1 to 33.

    On the executor a dtype takes every channel count and every spatial size, but a quarter of their pairs.
    """
    choose, pools, (_, memory_format) = random.Random(0), Pools(), FORMATS[layout]
    for i, channels in enumerate(CHANNELS):
        for j, spatial in enumerate(SPATIAL):
            if backends.current == "simt" and (i + j + DTYPES.index(dtype)) % len(DTYPES):
                continue
            batch = choose.randint(2 if spatial == 1 else 1, max(2, min(33, 20_000 // (channels * spatial))))
            height = choose.choice([d for d in range(1, spatial + 1) if spatial % d == 0])
            shape = (batch, channels, height, spatial // height)
            case = make_case(
                shape, dtype, memory_format, activation=choose.choice(["relu", "silu"]), training=training,
                residual=choose.random() < 0.3, affine=choose.random() < 0.8,
            )  # fmt: skip
            if dtype == torch.float64:
                assert_nearly_exact(case, training)
                continue
            pools.add(case, training, f"{list(shape)} {case.activation}")
    if dtype != torch.float64:
        pools.check()


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_work_that_is_cut_into_pieces(dtype, layout):
    """Large enough for several threads, and for several work items to a channel."""
    pools = Pools()
    for shape in [(5, 2, 190, 191), (16, 64, 20, 20), (70, 3, 33, 41), (3, 130, 24, 25)]:
        for training in (True, False):
            case = make_case(shape, dtype, FORMATS[layout][1], residual=True, training=training)
            pools.add(case, training, f"{list(shape)} training={training}")
    pools.check()


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_instruction_set_runs(dtype, layout):
    assert testing.isas()[0] == "baseline"
    for isa in testing.isas() if backends.current == "cpu" else ["baseline"]:
        pools = Pools()
        with testing.use_isa(isa):
            for activation in ACTIVATIONS:
                for shape in [(4, 33, 5, 7), (2, 3, 17, 3), (8, 64, 6, 6)]:
                    case = make_case(shape, dtype, FORMATS[layout][1], activation=activation, residual=True)
                    pools.add(case, True, f"{isa} {list(shape)} {activation}")
        pools.check()


@pytest.mark.parametrize("residual", [False, True])
def test_slopes_of_leaky_relu(residual):
    pools = Pools()
    for slope, layout, shape in product((0.0, 0.2, 1.5, -0.5), ("NCHW", "NHWC"), [(5, 33, 3, 5), (8, 24, 9, 9)]):
        case = make_case(
            shape, torch.float32, FORMATS[layout][1], activation="leaky_relu", negative_slope=slope, residual=residual
        )
        pools.add(case, True, f"{layout} {slope}")
    pools.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_their_whole_range(activation, dtype):
    """Value and derivative at pre-activations from 1e-30 to 5e37, where exp and squares overflow on the way.

    Beyond 1e12 stock's derivative of the tanh form is inf - inf, and so may be ours.
    """
    steps = torch.linspace(-30, 37.7, 5000, dtype=torch.float64)
    near = torch.linspace(-30, 30, 20_001, dtype=torch.float64)
    z = torch.cat([near, 10**steps, -(10**steps)]).to(dtype).view(-1, 1)
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    case = Case(
        x=z, running_mean=torch.zeros(1, dtype=stats), running_var=torch.ones(1, dtype=stats), eps=1e-300,
        activation=activation, grad_y=torch.ones_like(z),
    )  # fmt: skip
    actual, oracle, stock = op_results(case, False), oracle_results(case, False), stock_results(case, False)
    if dtype == torch.float64:  # the oracle rounds as well: find what is wrong, not what is inexact
        assert torch.allclose(actual["y"], oracle["y"], rtol=1e-12, atol=1e-12)
        assert torch.allclose(actual["grad_x"], oracle["grad_x"], rtol=1e-12, atol=1e-12)
        return
    kinks = sum(
        ((z.double() - kink).abs() < 0.1 * (dtype != torch.float32) for kink in KINKS.get(activation, ())), z < z
    )
    usable = ~kinks & (z.abs() < (1e12 if activation == "gelu_tanh" else math.inf))
    moderate = z.abs() < 40  # the error of large values must not excuse that of small ones
    for name, where in [("y", moderate), ("y", z.abs() < 1e37), ("grad_x", usable & moderate), ("grad_x", usable)]:
        testing.assert_close_to_oracle(actual[name][where], stock[name][where], oracle[name][where], name=name)


def test_only_weight_or_only_bias():
    """torch.nn.functional.batch_norm takes either alone."""
    for absent, training in product(("weight", "bias"), (True, False)):
        pools = Pools()
        for shape in [(5, 9, 3, 7), (3, 31, 4, 4), (2, 64, 5, 5), (9, 33, 2, 3), (6, 100, 3, 3), (4, 17, 6, 6)]:
            case = make_case(shape, activation="silu", residual=True, training=training)
            pools.add(replace(case, **{absent: None}), training, f"no {absent}")
        pools.check()
