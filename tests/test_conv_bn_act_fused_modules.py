"""The blocks on deepops' own convolution, run by the SIMT executor, beside stock modules and the fp64 oracle.

Where not the kernels but what is around them is tested, torch's operations stand in for them (fixture ``exact_conv``):
then the two ways must agree in every bit.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import pytest
import simt
import torch
import torch.nn.functional as F
from conv_cases import Stock, compare, make_block, needs_kernel, set_mode
from conv_cases import check as check_pools
from fused_conv_cases import ACTIVATIONS, CHANNELS_LAST, COVERED, Exact, assert_same_bits, data, launches, step
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import deepops
from deepops import _conv_problem, reference
from deepops.cli import check_ops
from deepops.cli.check import check_rows
from deepops.cli.check_types import Setting
from deepops.functional import conv_bn_act
from deepops.testing import ErrorPool, oracle

pytestmark = [pytest.mark.usefixtures("one_thread"), needs_kernel]


# ---- the kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_conv_executor")
@pytest.mark.parametrize("name", COVERED)
def test_a_step(name: str) -> None:
    pools: Any = defaultdict(ErrorPool)
    for seed, activation in enumerate(("relu", "silu")):
        block = make_block(4, 6, **COVERED[name], activation=activation, seed=seed)
        with simt.counting() as counts:
            compare(pools, block, data(), None, "train", f"{activation}, {name}")
        assert len(launches(counts)) == 1
    check_pools(pools)


@pytest.mark.usefixtures("on_conv_executor")
@pytest.mark.parametrize("with_residual", [False, True])
def test_every_activation(with_residual: bool) -> None:
    pools: Any = defaultdict(ErrorPool)
    for seed, activation in enumerate(ACTIVATIONS):
        block = make_block(3, 8, 3, padding=1, bias=True, activation=activation, seed=seed)
        x = data(channels=3)
        residual = torch.randn_like(Stock(block)(x)) if with_residual else None
        compare(pools, block, x, residual, "train", activation)
    check_pools(pools)


@pytest.mark.usefixtures("on_conv_executor")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [4, 8])
def test_sixteen_bits_by_autocast(channels: int, dtype: torch.dtype) -> None:
    pools: Any = defaultdict(ErrorPool)
    for seed, name in enumerate(("bias", "stride", "1x1")):
        block = make_block(channels, 8, **COVERED[name], seed=seed)
        x = data(channels=channels)
        with simt.counting() as counts:
            compare(pools, block, x, None, "train", name, autocast=dtype)
        assert len(launches(counts)) == 1
    check_pools(pools)


@pytest.mark.usefixtures("on_conv_executor")
@pytest.mark.parametrize("channels", [4, 8])
def test_same_bits_in_every_schedule(channels: int) -> None:
    """Of a step and of an evaluation, whatever the order of threads, blocks and copies."""
    autocast = {"dtype": torch.bfloat16} if channels == 8 else {}
    for seed, name in enumerate(("bias", "stride", "1x1")):
        block = make_block(channels, 9, **COVERED[name], activation="silu", seed=seed).to(memory_format=CHANNELS_LAST)
        evaluated, x = copy.deepcopy(block).eval(), data(channels=channels)

        def results(block: Any = block, evaluated: Any = evaluated, x: Tensor = x) -> dict[str, Tensor | None]:
            with torch.no_grad(), torch.autocast("cpu", **autocast) if autocast else nullcontext():
                evaluation = evaluated(x)
            return {**step(block, x, None, **autocast), "evaluation": evaluation}

        expected = results()
        for schedule, number in (("reverse", 0), ("random", 1), ("random", 2)):
            with simt.schedule(schedule, number), simt.counting() as counts:
                actual = results()
            assert len(launches(counts)) == 2
            assert_same_bits(actual, expected, f"{name}, {schedule} {number}")


@pytest.mark.usefixtures("on_conv_executor")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_evaluation_on_tensor_cores(dtype: torch.dtype) -> None:
    pool = ErrorPool()
    for seed, (name, activation) in enumerate((("bias", "relu"), ("same", "gelu"), ("stride", "identity"))):
        block = make_block(16, 11, **COVERED[name], activation=activation, seed=seed).eval()
        x = data(2, 16)
        stock = Stock(block)
        with torch.no_grad():
            residual = torch.randn_like(stock(x)).to(dtype)
        with torch.no_grad(), torch.autocast("cpu", dtype), simt.counting() as counts:
            ours, theirs = block(x, residual), stock(x, residual)
        assert len(launches(counts)) == 1
        with torch.no_grad():
            exact = copy.deepcopy(stock).double()(x.double(), residual.double())
        pool.add(ours, theirs, exact, name=f"{name}, {activation}")
    pool.check()


@pytest.mark.usefixtures("on_conv_executor")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_evaluation_without_gradients(dtype: torch.dtype) -> None:
    pool = ErrorPool()
    for seed, (name, options) in enumerate(COVERED.items()):
        if name == "no statistics":
            continue  # which takes those of the batch, as in training
        activation = ("relu", "gelu", "leaky_relu")[seed % 3]
        block = make_block(4, 9, **options, activation=activation, seed=seed).eval().to(dtype)
        stock, x = Stock(block), data(2).to(dtype)
        wide = copy.deepcopy(stock).double()
        with torch.no_grad():
            for residual in (None, torch.randn_like(stock(x))):
                with simt.counting() as counts:
                    ours = block(x, residual)
                assert launches(counts) == ["conv_bn_act_direct"]
                assert ours.dtype is dtype
                exact = wide(x.double(), None if residual is None else residual.double())
                pool.add(ours, stock(x, residual), exact, name=f"{name}, {activation}")
        assert block._folded.folds == 1
    pool.check()


@pytest.mark.usefixtures("on_conv_executor")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_function_in_evaluation(dtype: torch.dtype) -> None:
    """Which, other than a layer, has nothing computed before; with and without each of its vectors."""
    pool = ErrorPool()
    x, weight, conv_bias = data().to(dtype), torch.randn(6, 4, 3, 3).to(dtype), torch.randn(6).to(dtype)
    statistics = torch.randn(6), torch.rand(6) + 0.5
    for given in ((None, None, None), (conv_bias, None, torch.randn(6)), (conv_bias, torch.randn(6), torch.randn(6))):
        for activation in ("relu", "silu"):
            bias, *affine = given

            def stock(*tensors: Any, activation: str = activation) -> Tensor:
                x, weight, bias, *vectors = tensors
                y = F.batch_norm(F.conv2d(x, weight, bias), *vectors, False, 0.1, 1e-3)
                return reference.activation(y, activation)

            arguments = (x, weight, bias, *statistics, *affine)
            with simt.counting() as counts:
                ours = conv_bn_act(*arguments, eps=1e-3, activation=activation)
            assert launches(counts) == ["conv_bn_act_direct"]
            pool.add(ours, stock(*arguments), oracle(stock, *arguments), name=f"{activation}, {len(affine)}")
    pool.check()


@pytest.mark.usefixtures("on_conv_executor")
def test_deepops_check_looks_at_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA; here the executor stands in."""
    monkeypatch.setattr(deepops.backends, "conv", "auto")
    checks = [check for check in check_ops.CHECKS if check.devices == ("cuda",)]
    assert {check.kernel for check in checks} == {"conv_bn_act_eval"}
    assert not [row for row in check_rows(tuple(checks)) if row.device == "cpu"]
    for check in checks:
        for dtype in check.dtypes:
            pools: Any = defaultdict(ErrorPool)
            with simt.counting() as counts:
                for case in check.compare(Setting("cpu", dtype, *check.layouts)):
                    pools[case.output].add(case.actual, case.stock, case.oracle, name=case.output)
            assert len(launches(counts)) == 6  # three seeds: a step, an evaluation
            check_pools(pools)
    assert deepops.backends.conv == "auto"


# ---- what is around them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COVERED)
def test_gradients_do_not_depend_on_the_way(name: str, exact_conv: Exact) -> None:
    """Nor anything else, where the convolution has the same bits."""
    for seed, activation in enumerate(ACTIVATIONS):
        block = make_block(4, 6, **COVERED[name], activation=activation, seed=seed).to(memory_format=CHANNELS_LAST)
        x = data()
        for residual in (None, torch.randn_like(Stock(block)(x)).detach()):
            exact_conv.calls.clear()
            ours = step(block, x, residual)
            assert exact_conv.calls == ["statistics"]
            with deepops.backends.flags(conv="aten"):
                theirs = step(block, x, residual)
            assert exact_conv.calls == ["statistics"]
            assert_same_bits(ours, theirs, f"{name}, {activation}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_vectors_of_sixteen_bits_and_autocast_likewise(dtype: torch.dtype, exact_conv: Exact) -> None:
    for channels, options in ((8, {}), (2, {"momentum": None, "bias": True})):
        block = make_block(channels, 6, 3, padding=1, **options).to(memory_format=CHANNELS_LAST)
        x = data(channels=channels)
        for case, arguments in {"autocast": (block, x), "all": (copy.deepcopy(block).to(dtype), x.to(dtype))}.items():
            autocast = {"dtype": dtype} if case == "autocast" else {}
            ours = step(*arguments, None, **autocast)
            with deepops.backends.flags(conv="aten"):
                theirs = step(*arguments, None, **autocast)
            for results in (ours, theirs):  # on the CPU torch's way widens fp16 on another: see _convolution.py
                for gradient in ("x", "conv.weight"):
                    results.pop(gradient) if dtype is torch.float16 else None
            assert_same_bits(ours, theirs, case)
    assert exact_conv.calls == ["statistics"] * 4


def test_gradients_that_nobody_wants(exact_conv: Exact) -> None:
    x, weight = data(), torch.randn(6, 4, 3, 3)
    vectors = torch.ones(6), torch.zeros(6)
    y = conv_bn_act(x, weight, None, None, None, *vectors, training=True)
    assert y.grad_fn is None
    for wanted in (x, weight, *vectors):
        wanted.requires_grad_()
        y = conv_bn_act(x, weight, None, None, None, *vectors, training=True)
        y.sum().backward()
        assert wanted.grad is not None
        assert [t.grad is None for t in (x, weight, *vectors)].count(True) == 3
        wanted.requires_grad_(False)
        wanted.grad = None
    assert exact_conv.calls == ["statistics"] * 5


@pytest.mark.parametrize("name", ["stride", "same", "dilation"])
def test_gradients_of_gradients(name: str, exact_conv: Exact, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64, which the kernels do not cover: the ops that stand in for them do."""
    monkeypatch.setattr(_conv_problem, "not_covered", lambda *_: "")
    options = {"training": True, "activation": "silu"}
    geometry = {key: value for key, value in COVERED[name].items() if key in ("stride", "padding", "dilation")}
    size = COVERED[name]["kernel_size"]
    size = (size, size) if isinstance(size, int) else size
    tensors = [torch.randn(2, 1, 4, 5).to(memory_format=CHANNELS_LAST), torch.randn(2, 1, *size), torch.rand(2) + 0.5]
    x, weight, gamma = (tensor.double().requires_grad_() for tensor in tensors)
    residual = torch.randn_like(F.conv2d(x, weight, None, **geometry)).detach().requires_grad_()

    def block(x: Tensor, weight: Tensor, gamma: Tensor, residual: Tensor) -> Tensor:
        return conv_bn_act(x, weight, None, None, None, gamma, None, residual=residual, **options, **geometry)

    assert torch.autograd.gradcheck(block, (x, weight, gamma, residual))
    assert torch.autograd.gradgradcheck(block, (x, weight, gamma, residual))
    assert set(exact_conv.calls) == {"statistics"}


def test_a_block_used_twice(exact_conv: Exact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights lead to themselves: gradients of gradients, with and without checkpointing."""
    monkeypatch.setattr(_conv_problem, "not_covered", lambda *_: "")
    weight = torch.randn(4, 4, 3, 3, dtype=torch.float64).requires_grad_()
    x = data().double().requires_grad_()

    def twice(x: Tensor) -> Tensor:
        for _ in range(2):
            x = conv_bn_act(x, weight, None, None, None, training=True, padding=1, activation="silu")
        return x

    def penalty(y: Tensor) -> list[Tensor]:
        grads = torch.autograd.grad(y.square().sum(), [x, weight], create_graph=True)
        return [*grads, *torch.autograd.grad(sum(grad.square().sum() for grad in grads), [x, weight])]

    with deepops.backends.flags(conv="aten"):
        expected = penalty(twice(x))
    assert not exact_conv.calls
    for y in (twice(x), checkpoint(twice, x, use_reentrant=False)):
        assert exact_conv.calls
        for actual, wanted in zip(penalty(y), expected, strict=True):
            torch.testing.assert_close(actual, wanted)  # fp64: torch's own measure


def test_evaluation_uses_what_was_computed_once(exact_conv: Exact) -> None:
    block, x = make_block(4, 6, 3, bias=True).eval(), data()
    with torch.no_grad():
        first = block(x)
        block(x)
        assert (exact_conv.calls, block._folded.folds) == (["eval"] * 2, 1)
        block.bn.running_mean.add_(1)
        assert not torch.equal(block(x), first)
        assert block._folded.folds == 2
        block.train()
        block.eval()
        block(x)
        assert block._folded.folds == 3
        block.bn.weight.fill_(2.0)
        torch.testing.assert_close(block(x), Stock(block)(x))


@pytest.mark.parametrize("mode", ["eval", "frozen", "frozen affine"])
def test_evaluation_with_gradients_is_torchs(mode: str, exact_conv: Exact) -> None:
    """Frozen batch normalization is still folded into the weights."""
    block, x = make_block(4, 6, 3, bias=True), data().requires_grad_()
    set_mode(block, mode)
    y = block(x)
    assert not exact_conv.calls
    assert ("BatchNormAct" not in str(y.grad_fn)) == (mode == "frozen affine")
    with torch.no_grad():
        torch.testing.assert_close(block(x), y)
    assert exact_conv.calls == ["eval"]


def test_one_value_per_channel_and_no_values(exact_conv: Exact) -> None:
    block = make_block(4, 6, 3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        block(data(1)[:, :, :3, :3].contiguous(memory_format=CHANNELS_LAST))
    assert block(data(0)).shape == (0, 6, 9, 8)
    assert block.bn.num_batches_tracked == 1
    assert block.eval()(data(0)).shape == (0, 6, 9, 8)
    assert not exact_conv.calls
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        block(data()[:, :, :2].contiguous(memory_format=CHANNELS_LAST))


def test_wrong_arguments_change_nothing(exact_conv: Exact) -> None:
    x, weight, mean, var = data(), torch.randn(6, 4, 3, 3), torch.zeros(6), torch.ones(6)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("weight: expected shape", {"weight": torch.ones(5)}),
        ("residual: expected shape", {"residual": torch.randn(4, 6, 9, 9)}),
        ("residual: expected torch.float32", {"residual": torch.randn(4, 6, 9, 8).double()}),
        ("eps must be positive", {"eps": 0.0}),
        ("num_batches_tracked: expected", {"num_batches_tracked": torch.zeros(2)}),
        ("num_batches_tracked: expected", {"momentum": None}),
    ]
    for message, options in wrong:
        with pytest.raises((TypeError, ValueError), match=message):
            conv_bn_act(x, weight, None, mean, var, training=True, **options)
    for message, options in wrong[:3]:
        with pytest.raises((TypeError, ValueError), match=message), torch.no_grad():
            conv_bn_act(x, weight, None, mean, var, **options)
    assert not exact_conv.calls
    assert torch.equal(mean, torch.zeros(6))
    assert torch.equal(var, torch.ones(6))
