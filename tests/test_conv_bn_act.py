"""The blocks of ``deepops.nn`` against the stock modules they replace: a step in each mode, in 1 to 3 dimensions."""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from conv_cases import (
    ACTIVATION_MODULES,
    MODES,
    Pools,
    Stock,
    check,
    compare,
    convolutions,
    make_block,
    make_input,
    needs_kernel,
    run,
)

from deepops.testing import ErrorPool, assert_close_to_oracle, make_layouts, saved_storages, use_threads

pytestmark = pytest.mark.usefixtures("one_thread")


# Errors are pooled over many cases: on the eight numbers of one bn.weight.grad stock is often right by luck.
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_convolutions(mode: str, dims: int) -> None:
    pools: Pools = defaultdict(ErrorPool)
    for seed in range(3):
        for name, options in convolutions(dims).items():
            for channels_last in (False, True) if dims > 1 else (False,):
                block = make_block(4, 8, dims=dims, **options, activation="silu", seed=seed)
                compare(pools, block, make_input(dims, channels_last=channels_last), None, mode, name)
    check(pools)


@pytest.mark.parametrize("trainable", ["weight", "bias"])
def test_one_parameter_of_a_frozen_batch_norm_is_trained(trainable: str) -> None:
    pools: Pools = defaultdict(ErrorPool)
    for seed, dims in itertools.product(range(4), (1, 2, 3)):
        block = make_block(4, 8, 3, dims=dims, padding=1, activation="silu", seed=seed)
        block.bn.requires_grad_(False).get_parameter(trainable).requires_grad_()
        compare(pools, block, make_input(dims, batch=16), None, "frozen", f"seed {seed}")
    assert f"bn.{trainable}.grad" in pools
    check(pools)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_activations(with_residual: bool, mode: str) -> None:
    pools: Pools = defaultdict(ErrorPool)
    for seed in range(8):
        for activation in ACTIVATION_MODULES:
            block = make_block(4, 8, 3, padding=1, activation=activation, seed=seed)
            x = torch.randn(4, 4, 10, 10)
            compare(pools, block, x, torch.randn(4, 8, 10, 10) if with_residual else None, mode, str(activation))
    check(pools)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("statistics", ["wide", "narrow"])
@pytest.mark.parametrize("mode", MODES)
def test_16_bit_modules(mode: str, statistics: str, dtype: torch.dtype, dims: int) -> None:
    pools: Pools = defaultdict(ErrorPool)
    for seed in range(3):
        block = make_block(4, 8, 3, dims=dims, padding=1, bias=mode == "eval", activation="silu", seed=seed)
        block.conv.to(dtype)
        if statistics == "narrow":
            block.bn.to(dtype)
        compare(pools, block, make_input(dims).to(dtype), None, mode, f"seed {seed}")
    check(pools)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode: str, dtype: torch.dtype, dims: int) -> None:
    pools: Pools = defaultdict(ErrorPool)
    for seed in range(3):
        block = make_block(4, 8, 3, dims=dims, padding=1, activation="silu", seed=seed)
        compare(pools, block, make_input(dims), None, mode, f"seed {seed}", dtype)
    check(pools)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_bias_before_batch_statistics(dims: int) -> None:
    """However large: it has a gradient of exactly 0 and moves nothing but the running mean."""
    block = make_block(4, 8, 3, dims=dims, bias=True, padding=1, activation="silu")
    x = make_input(dims)
    without = copy.deepcopy(block)
    torch.nn.init.zeros_(without.conv.bias)
    torch.nn.init.constant_(block.conv.bias, 1000.0)
    results, expected = run(block, x, None, "train"), run(without, x, None, "train")
    assert torch.equal(results["conv.bias.grad"], torch.zeros(8))
    shift = block.bn.momentum * block.conv.bias.detach()
    torch.testing.assert_close(results.pop("bn.running_mean"), expected.pop("bn.running_mean") + shift)
    for name, value in results.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_layouts_of_the_input(mode: str, dims: int) -> None:
    pools: Pools = defaultdict(ErrorPool)
    for seed in range(8):
        for name, x in make_layouts(make_input(dims)).items():
            block = make_block(4, 8, 3, dims=dims, padding=1, activation="silu", seed=seed)
            compare(pools, block, x, None, mode, name)
    check(pools)


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_twice_and_with_two_threads(mode: str) -> None:
    for dims in (1, 2, 3):
        block = make_block(4, 16, 3, dims=dims, padding=1, bias=True)
        x = make_input(dims, batch=8)
        runs = []
        for threads in (1, 1, 2):
            with use_threads(threads):
                runs.append(run(copy.deepcopy(block), x, None, mode))
        for name, value in runs[0].items():
            assert torch.equal(value, runs[1][name]), name
            # The sums of the convolution are torch's, and other with another number of threads.
            if name in ("y", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"):
                assert torch.equal(value, runs[2][name]), name


def test_many_steps() -> None:
    """Running statistics and counters after fifty steps, momentum or cumulative average."""
    for dims, momentum in ((1, 0.1), (2, None), (3, 0.3)):
        block = make_block(4, 8, 3, dims=dims, bias=True, momentum=momentum)
        stock = Stock(block)
        wide = copy.deepcopy(stock).double()
        pool = ErrorPool()
        with torch.no_grad():
            for _ in range(50):
                x = make_input(dims, batch=2) + 1
                for module in (block, stock, wide):
                    module(x.to(module.conv.weight.dtype))
        assert torch.equal(block.bn.num_batches_tracked, stock.bn.num_batches_tracked)
        assert int(block.bn.num_batches_tracked) == 50
        for name in ("running_mean", "running_var"):
            pool.add(getattr(block.bn, name), getattr(stock.bn, name), getattr(wide.bn, name), name=name)
        pool.check()


@needs_kernel
def test_a_step_keeps_half_of_what_stock_keeps() -> None:
    block = make_block(4, 16, 3, padding=1, activation="relu")
    stock = Stock(block)
    x = torch.randn(4, 4, 16, 16)
    size = 4 * 16 * 16 * 16 * 4
    outputs = [sum(s.nbytes() == size for s in saved_storages(lambda m=m: m(x))) for m in (block, stock)]
    assert outputs == [1, 2]


def test_relu_gradient_with_our_own_mask() -> None:
    """The ReLU family against torch's formulas on the mask that the layer itself used."""
    block = make_block(4, 8, 3, padding=1, activation="relu")
    x = torch.randn(4, 4, 8, 8, requires_grad=True)
    y = block(x)
    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    stock, plain_x = Stock(block), x.detach().clone().requires_grad_()
    wide, wide_x = copy.deepcopy(stock).double(), x.detach().double().requires_grad_()
    mask = y.detach() > 0
    for module, leaf in ((stock, plain_x), (wide, wide_x)):
        module.zero_grad()
        z = F.batch_norm(module.conv(leaf), None, None, module.bn.weight, module.bn.bias, True)
        z.backward((grad_y * mask).to(z.dtype))
    assert_close_to_oracle(x.grad, plain_x.grad, wide_x.grad, name="x.grad")
    for (name, ours), theirs, best in zip(block.named_parameters(), stock.parameters(), wide.parameters(), strict=True):
        assert_close_to_oracle(ours.grad, theirs.grad, best.grad, name=f"{name}.grad")
