"""The ``pointwise_bn_act`` ops and ``functional.conv_bn_act`` on top of them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bn_cases import ACTIVATIONS
from pointwise_cases import Case, PointwisePools, backward, make_case, op_results, oracle_results, train
from torch import Tensor

import deepops
from deepops import functional, testing
from deepops._autograd import memory_format_of
from deepops._library import has_kernel
from deepops._pointwise import PointwiseBatchNormAct
from deepops.testing import ErrorPool, saved_storages, use_isa, use_threads

pytestmark = pytest.mark.usefixtures("one_thread")
if not has_kernel("pointwise_bn_act_train", "cpu"):
    pytest.skip("no compiled kernels", allow_module_level=True)

TWO_SLOPES = ("relu", "relu6", "leaky_relu")


@pytest.fixture(params=[torch.channels_last, torch.contiguous_format], ids=["channels_last", "planes"])
def layout(request: pytest.FixtureRequest) -> torch.memory_format:
    """Each layout that the kernels take."""
    return request.param


def assert_equal_in_double(case: Case, name: str) -> None:
    actual = op_results(case)
    for key, value in oracle_results(case).items():
        torch.testing.assert_close(actual[key], value, rtol=1e-9, atol=1e-9, msg=f"{name} {key}")


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("activation", ["identity", "relu6", "silu"])
def test_channels(isa, activation, layout):
    """Tails of lanes on either side, panels of every width; one pool, as stock is now and then right by luck."""
    pools = PointwisePools()
    with use_isa(isa):
        for inputs, outputs in [(8, 16), (16, 96), (17, 33), (24, 144), (13, 50), (32, 77), (40, 256), (64, 200)]:
            for shape in [(2, inputs, 9, 10), (3, inputs, 14, 15)]:
                pools.add(
                    make_case(shape, outputs, activation=activation, layout=layout), f"{inputs} to {outputs} channels"
                )
    pools.check()


@pytest.mark.parametrize("isa", testing.isas())
def test_rows(isa, layout):
    """Around the blocks of 24 rows or 32 pixels, the tiles within them and the work items of 240 rows.

    In fp64 alone below 24: there nearly all of grad_x cancels, and ``conv_bn_act`` does not take the op.
    """
    pools = PointwisePools()
    for rows in (2, 3, 5, 7, 8, 9, 15, 17, 23, 24, 25, 31, 33, 47, 48, 49, 239, 240, 479, 481, 507, 8000):
        for inputs, outputs in [(16, 40), (20, 96)]:
            double = make_case(
                (1, inputs, rows, 1), outputs, dtype=torch.float64, activation="silu", eps=1e-3, layout=layout
            )
            with use_isa(isa):
                assert_equal_in_double(double, f"{rows} rows")
                if rows >= 24:
                    pools.add(
                        make_case((1, inputs, rows, 1), outputs, activation="silu", eps=1e-3, layout=layout),
                        f"{rows} rows",
                    )
    pools.check()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, layout):
    pools = PointwisePools()
    slopes = (0.2, -0.5) if activation == "leaky_relu" else (0.01,)
    for shape, slope in product([(3, 16, 7, 8), (2, 32, 9, 9), (4, 48, 7, 7), (1, 20, 16, 15)], slopes):
        for outputs in (96, 130):
            pools.add(
                make_case(shape, outputs, activation=activation, negative_slope=slope, layout=layout),
                f"{shape} to {outputs}",
            )
    pools.check()


@pytest.mark.parametrize("mean", [100.0, -1000.0])
def test_mean_far_above_sigma(mean, layout):
    pools = PointwisePools()
    for activation in ("identity", "relu"):
        for shape in [(4, 64, 14, 14), (2, 24, 20, 20), (8, 16, 7, 7), (3, 32, 12, 12)]:
            pools.add(make_case(shape, 96, mean=mean, activation=activation, layout=layout), f"{shape}")
    pools.check()


def correlated(case: Case, share: float) -> Case:
    """The channels of x are one and the same but for a part of ``share``; every second filter takes differences.

    The others are positive: a sum that cancels by chance would be alone in deciding the test.
    """
    x = case.x * share + torch.randn_like(case.x[:, :1])
    weight = case.conv_weight.clone()
    weight[::2] -= weight[::2].mean(1, keepdim=True)
    weight[1::2] = weight[1::2].abs()
    return replace(case, x=x.contiguous(memory_format=memory_format_of(case.x)), conv_weight=weight)


@pytest.mark.parametrize("share", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_variances_far_below_those_of_the_inputs(share, layout):
    """w^T cov w cancels, and so does (x - mean) M in grad_x. Both are taken in double."""
    pools = PointwisePools()
    for shape in [(4, 64, 14, 14), (2, 24, 20, 20), (8, 16, 7, 7), (3, 32, 12, 12)]:
        for eps, _ in product((1e-5, 1e-3), range(3)):
            pools.add(
                correlated(make_case(shape, 96, activation="identity", eps=eps, layout=layout), share), f"{shape} {eps}"
            )
    pools.check()


@pytest.mark.parametrize("deviation", [1e-1, 1e-2, 1e-3, 1e-5])
def test_variances_about_eps(deviation, layout):
    pools = PointwisePools()
    for shape, mean in product([(4, 64, 14, 14), (2, 24, 20, 20), (8, 16, 7, 7)], (0.0, 1.0)):
        pools.add(
            make_case(shape, 96, activation="identity", deviation=deviation, mean=mean, layout=layout),
            f"{shape} {mean}",
        )
    pools.check()


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
def test_momentum(momentum, layout):
    pools = PointwisePools()
    for shape in [(2, 20, 6, 6), (5, 16, 9, 9), (2, 64, 7, 11), (9, 40, 5, 5)]:
        pools.add(make_case(shape, 90, momentum=momentum, mean=0.5, layout=layout), f"{momentum}")
    pools.check()


def test_absent_vectors(layout):
    pools = PointwisePools()
    for absent in (["weight"], ["bias"], ["weight", "bias"], ["running_mean", "running_var"], ["num_batches_tracked"]):
        for shape in [(3, 32, 7, 9), (2, 18, 12, 12)]:
            case = make_case(shape, 72, activation="silu", layout=layout)
            pools.add(replace(case, **dict.fromkeys(absent)), f"no {absent}")
    pools.check()


@pytest.mark.parametrize("isa", testing.isas())
def test_double_precision(isa, layout):
    """fp64 has nothing finer to be compared with."""
    for inputs, outputs, activation in [(8, 16, "gelu"), (17, 50, "leaky_relu"), (24, 100, "relu6"), (64, 144, "silu")]:
        case = make_case(
            (2, inputs, 13, 21), outputs, dtype=torch.float64, activation=activation, mean=1.0, layout=layout
        )
        with use_isa(isa):
            assert_equal_in_double(case, f"{inputs} to {outputs}")


def test_only_the_wanted_gradients(layout):
    for activation in ("silu", "relu"):
        case = make_case((2, 17, 8, 9), 50, activation=activation, layout=layout)
        _, kept = train(case.clone())
        everything = backward(case, kept)
        for need in product((True, False), repeat=3):
            for name, gradient in backward(case, kept, need).items():
                assert torch.equal(gradient, everything[name]), (need, name)


def test_values_whose_squares_overflow(layout):
    """1e20 squared does not fit fp32; statistics are taken in double."""
    case = make_case((4, 16, 12, 12), 64, activation="identity", mean=0.5, layout=layout)
    huge = replace(case, x=case.x * 1e20, running_var=None)
    actual, oracle = op_results(huge), oracle_results(huge)
    for name in ("y", "grad_conv_weight", "grad_weight", "grad_bias", "running_mean"):
        scale = oracle[name].abs().max()
        torch.testing.assert_close(actual[name].double() / scale, oracle[name] / scale, rtol=1e-4, atol=1e-5, msg=name)


def test_constant_channels(layout):
    """Variance 0: the result is act(bias), and no gradient is large by 1 / sqrt(eps) for nothing."""
    case = make_case((3, 32, 8, 8), 96, activation="identity", layout=layout)
    x = torch.full_like(case.x, 0.3)
    y, kept = train(replace(case, x=x).clone())
    assert torch.equal(y, case.bias.view(1, -1, 1, 1).expand_as(y))
    assert torch.equal(kept[1], torch.full_like(kept[1], 1e-5**-0.5))
    # Where the inputs cancel in some outputs alone, they are constant, the others as ever.
    weight = case.conv_weight.clone()
    weight[::2] = 0
    y, _ = train(replace(case, conv_weight=weight).clone())
    assert torch.equal(y[:, ::2], case.bias[::2].view(1, -1, 1, 1).expand_as(y[:, ::2]))
    assert torch.equal(y[:, 1::2], train(case.clone())[0][:, 1::2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_values_that_are_not_finite(value, activation, layout):
    """Every output is a sum over all inputs: everything is NaN, as with stock; the bias' gradient needs no input."""
    case = make_case((2, 18, 7, 9), 54, activation=activation, layout=layout)
    x = case.x.clone()
    x[1, 5, 3, 4] = value
    broken = op_results(replace(case, x=x))
    for name in ("y", "grad_x", "grad_conv_weight", "grad_weight", "running_mean", "running_var"):
        assert not broken[name].isfinite().any(), name
    grad_y = case.grad_y.clone()
    grad_y[0, 3, 2, 1] = value
    clean, broken = op_results(case), op_results(replace(case, grad_y=grad_y))
    others = [k for k in range(54) if k != 3]
    for name in ("grad_conv_weight", "grad_weight", "grad_bias"):
        assert torch.equal(broken[name][others], clean[name][others])


def test_which_side_of_a_kink(layout):
    """Values exactly on it: relu's slope is 0 at 0, relu6's at 0 and 6, as in torch."""
    x = torch.ones(1, 8, 4, 4).contiguous(memory_format=layout)
    for activation, bias, slope in [
        ("relu", 0.0, 0.0), ("relu", 1.0, 1.0), ("relu6", 0.0, 0.0), ("relu6", 6.0, 0.0), ("relu6", 5.0, 1.0),
        ("leaky_relu", 0.0, 0.01), ("leaky_relu", -1.0, 0.01), ("leaky_relu", 1.0, 1.0),
    ]:  # fmt: skip
        case = make_case((1, 8, 4, 4), 32, activation=activation, layout=layout)
        case = replace(case, x=x, bias=torch.full((32,), bias), grad_y=torch.ones_like(case.grad_y))
        results = op_results(case)
        torch.testing.assert_close(results["grad_bias"], torch.full((32,), 16 * slope), rtol=1e-6, atol=0)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_same_bits_for_every_thread_count(activation, layout):
    for shape, outputs, dtype in product([(3, 40, 29, 37), (40, 17, 8, 9)], (130, 96), (torch.float32, torch.float64)):
        case = make_case(shape, outputs, dtype=dtype, activation=activation, layout=layout)
        for isa in testing.isas():
            with use_isa(isa):
                expected = op_results(case)
                for threads in (2, 3):
                    with use_threads(threads):
                        actual = op_results(case)
                    for name, value in expected.items():
                        assert torch.equal(actual[name], value), (isa, threads, name)


def test_more_than_the_cache_holds(layout):
    """The forward then stores past it, where rows lie on the boundaries of vectors."""
    for outputs in (64, 60):
        case = make_case((2, 16, 192, 184), outputs, activation="silu", layout=layout)
        assert case.grad_y.nbytes > 2**24
        pools = PointwisePools()
        pools.add(case)
        pools.check()


def test_parallel_regions(layout):
    case = make_case((4, 32, 28, 28), 96, layout=layout)
    with testing.count_parallel_regions() as forward:
        _, kept = train(case)
    with testing.count_parallel_regions() as both:
        backward(case, kept)
    with testing.count_parallel_regions() as weights_alone:
        backward(case, kept, (False, True, True))
    assert (forward.count, both.count, weights_alone.count) == (2, 2, 1)


@pytest.mark.filterwarnings("ignore:.*requires_grad")
def test_opcheck(layout):
    for activation in ("silu", "relu"):
        case = make_case((2, 17, 8, 9), 50, activation=activation, layout=layout)
        _, kept = train(case.clone())
        for save in (True, False):
            torch.library.opcheck(
                torch.ops.deepops.pointwise_bn_act_train,
                (case.x, case.conv_weight, case.weight, case.bias, case.running_mean, case.running_var,
                 case.num_batches_tracked, 0.1, 1e-5, activation, 0.01, save),
                test_utils=("test_schema", "test_faketensor"),
            )  # fmt: skip
        torch.library.opcheck(
            torch.ops.deepops.pointwise_bn_act_backward,
            (case.grad_y, case.x, case.conv_weight, case.weight, case.bias, *kept, activation, 0.01, True, True, True),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_what_kernels_could_not_read_is_refused(layout):
    case = make_case((2, 16, 6, 6), 64, layout=layout)
    bad: dict[str, dict[str, Any]] = {
        "channels_last or contiguous": {"x": case.x.transpose(2, 3)},
        "float32 or float64": {"x": case.x.bfloat16(), "conv_weight": case.conv_weight.bfloat16()},
        "conv_weight must be": {"conv_weight": case.conv_weight[:, :8]},
        "contiguous": {"conv_weight": case.conv_weight.transpose(0, 1)[:16, :16]},
        r"\[K, C, 1, 1\]": {"conv_weight": torch.ones(64, 16, 3, 3)},
        "weight must be": {"weight": case.weight[:8]},
        "running_var": {"running_var": case.running_var.double()},
        "more than one value": {"x": case.x[:1, :, :1, :1].contiguous(memory_format=layout)},
    }
    for message, changes in bad.items():
        with pytest.raises(RuntimeError, match=message):
            train(replace(case, **changes))
    _, kept = train(case)
    for grad_y in (case.grad_y[..., 1:], case.grad_y.transpose(2, 3), case.grad_y.double(), case.grad_y[:, :8]):
        with pytest.raises(RuntimeError, match="grad_y"):
            backward(replace(case, grad_y=grad_y), kept)
    mean, invstd, moments, bits = kept
    for name, changed in {
        "mean": [mean[:8], invstd, moments, bits],
        "invstd": [mean, invstd.double(), moments, bits],
        "moments": [mean, invstd, moments[1:], bits],
        "bits": [mean, invstd, moments, bits[1:]],
    }.items():
        with pytest.raises(RuntimeError, match=name):
            backward(case, changed)


# ---- functional.conv_bn_act -----------------------------------------------------------------------------------------


def channels_last(*shape: int, **options: Any) -> Tensor:
    return torch.randn(*shape, **options).contiguous(memory_format=torch.channels_last).requires_grad_()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with each call of the fused op."""
    seen: list[str] = []
    original = PointwiseBatchNormAct.train

    def counting(*args: Any) -> Tensor:
        seen.append("pointwise")
        return original(*args)

    monkeypatch.setattr(PointwiseBatchNormAct, "train", staticmethod(counting))
    return seen


MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "dilation": {"dilation": 2},
    "same": {"padding": "same", "bias": True},
    "valid": {"padding": "valid"},
    "momentum None": {"momentum": None, "bias": True},
    "no affine": {"affine": False},
    "no statistics": {"track_running_stats": False},
}


def step(module: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and statistics of a training step."""
    x = x.detach().clone().requires_grad_()
    y = module(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    buffers = {name: b for name, b in module.named_buffers() if b.is_floating_point()}
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}, **buffers}


def test_the_module(calls, layout):
    """Forward, gradients and buffers."""
    pools: dict[str, ErrorPool] = {}
    for (inputs, outputs), (name, given) in product([(8, 24), (16, 96), (24, 100), (32, 192)], MODULES.items()):
        block = deepops.nn.ConvBNAct2d(inputs, outputs, 1, **{"activation": "silu", **given})
        conv, bn, act = copy.deepcopy(block).to_modules()
        stock = torch.nn.Sequential(OrderedDict(conv=conv, bn=bn, act=act))
        wide = copy.deepcopy(stock).double()
        x, before = torch.randn(4, inputs, 9, 10).contiguous(memory_format=layout) + 0.5, len(calls)
        results = step(block, x), step(stock, x.contiguous()), step(wide, x.double())
        assert len(calls) - before == 1
        torch.testing.assert_close(results[0]["y"], results[1]["y"])
        for key, actual in results[0].items():
            if key == "conv.bias":
                assert torch.equal(actual, torch.zeros_like(actual))
            else:
                pool = pools.setdefault(key, ErrorPool())
                pool.add(actual, results[1][key], results[2][key], name=f"{inputs} to {outputs} {name} {key}")
    for pool in pools.values():
        pool.check()


def test_when_the_op_applies(calls):
    x, weight = channels_last(4, 16, 8, 8), torch.randn(64, 16, 1, 1)

    def call(x: Tensor = x, weight: Tensor = weight, activation: str = "relu", **options: Any) -> int:
        before = len(calls)
        functional.conv_bn_act(
            x, weight, None, None, None, training=True, activation=activation, **options
        ).sum().backward()
        return len(calls) - before

    def shaped(outputs: int, inputs: int, activation: str = "relu", size: int = 8) -> int:
        return call(channels_last(4, inputs, size, 8), torch.randn(outputs, inputs, 1, 1), activation)

    assert call() == 1
    assert call(x.double(), weight.double()) == 1
    assert call(weight=weight.contiguous(memory_format=torch.channels_last)) == 1
    assert call(weight=torch.randn(16, 64, 1, 1).transpose(0, 1)) == 1
    assert call(stride=(1, 1), padding=(0, 0), dilation=3) == 1
    assert call(padding="same") == 1
    with torch.no_grad():
        assert functional.conv_bn_act(x, weight, None, None, None, training=True).grad_fn is None
    assert len(calls) == 7
    assert shaped(192, 64, size=128) == shaped(24, 8) == shaped(96, 32, "silu") == 1
    assert shaped(192, 64, size=127) == shaped(99, 33) == shaped(191, 64, size=128) == shaped(390, 65, size=128) == 0
    assert shaped(191, 64) == shaped(23, 8) == shaped(21, 7) == shaped(390, 65) == shaped(99, 33, "silu") == 0
    assert call(x.contiguous()) == 1
    assert call(x.transpose(2, 3)) == call(x[:, :, 1:].contiguous(memory_format=torch.channels_last)) == 0
    assert call(weight=torch.randn(64, 16, 2, 2)[:, :, ::2, ::2]) == 0
    assert call(x.bfloat16(), weight.bfloat16()) == 0
    assert call(weight=torch.randn(64, 8, 1, 1), groups=2) == 0
    assert call(weight=torch.randn(64, 16, 3, 3)) == 0
    assert call(stride=2) == call(stride=(1, 2)) == call(padding=1) == call(padding=(0, 1)) == 0
    assert call(residual=torch.randn(4, 64, 8, 8)) == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call() == 0
    assert functional.conv_bn_act(x, weight, None, torch.zeros(64), torch.ones(64)).shape == (4, 64, 8, 8)
    assert len(calls) == 11


def test_errors_are_those_of_the_other_path(calls):
    """Nothing is changed by a call that fails."""
    x, weight = channels_last(1, 16, 16, 16), torch.randn(64, 16, 1, 1)
    mean, count = torch.zeros(64), torch.tensor(0)
    options: dict[str, Any] = {"training": True, "num_batches_tracked": count}
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training, got input size"):
        functional.conv_bn_act(x[:, :, :1, :1], weight, None, mean, None, **options)
    with pytest.raises(ValueError, match=r"weight: expected shape \[64\]"):
        functional.conv_bn_act(x, weight, None, mean, None, torch.ones(16), **options)
    with pytest.raises(ValueError, match=r"running_mean: expected shape \[64\]"):
        functional.conv_bn_act(x, weight, None, torch.zeros(16), None, **options)
    for message in ("stride", "dilation"):
        with pytest.raises(RuntimeError, match=message):
            functional.conv_bn_act(x, weight, None, mean, None, **options, **{message: 0})
    with pytest.raises(RuntimeError, match="padding"):
        functional.conv_bn_act(x, weight, None, mean, None, **options, padding=-1)
    assert not calls
    assert count.item() == 0
    assert not mean.any()


@pytest.mark.parametrize("activation", ["identity", "silu", "gelu", "leaky_relu"])
def test_gradcheck(activation, layout):
    x = torch.randn(2, 8, 8, 16, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    vectors = [torch.rand(24, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    weight = torch.randn(24, 8, 1, 1, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, weight: Tensor, *vectors: Tensor) -> Tensor:
        x = x.contiguous(memory_format=layout)
        options: dict[str, Any] = {"activation": activation, "approximate": "tanh", "negative_slope": 0.3}
        return functional.conv_bn_act(x, weight, None, None, None, *vectors, training=True, **options)

    assert torch.autograd.gradcheck(call, (x, weight, *vectors), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, weight, *vectors), fast_mode=True)


def test_functional_transforms_take_the_other_path(calls):
    x, weight = channels_last(2, 8, 12, 12, dtype=torch.float64), torch.randn(32, 8, 1, 1, dtype=torch.float64)

    def call(weight: Tensor) -> Tensor:
        return functional.conv_bn_act(x.detach(), weight, None, None, None, training=True).square().sum()

    got = torch.func.grad(call)(weight)
    assert not calls
    leaf = weight.clone().requires_grad_()
    call(leaf).backward()
    assert calls
    torch.testing.assert_close(got, leaf.grad)


def test_compiled(calls):
    block = deepops.nn.ConvBNAct2d(16, 64, 1, activation="silu")
    x = channels_last(2, 16, 12, 12)
    y = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    assert not calls
    torch.testing.assert_close(y, block(x))
    assert calls


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "identity"])
def test_what_the_backward_keeps(activation, layout):
    """x, the weights, vectors, the moments of x, and a bit a value where the activation has two slopes."""
    block = deepops.nn.ConvBNAct2d(16, 96, 1, activation=activation)
    x = torch.randn(2, 16, 12, 12).contiguous(memory_format=layout)
    sizes = sorted(storage.nbytes() for storage in saved_storages(lambda: block(x)))
    vectors = [4 * 96] * 4  # weight, bias, mean, invstd
    bits = [2 * 12 * 12 * 96 // 8] if activation in TWO_SLOPES else []
    assert sizes == sorted([x.numel() * 4, block.conv.weight.numel() * 4, 8 * 17 * 16, *vectors, *bits])


def test_memory_of_the_results_is_all_that_is_taken(layout):
    """Nothing of the size of the output but y in the forward, but grad_x in the backward."""
    deepops.memory.empty_cache()
    block = deepops.nn.ConvBNAct2d(16, 64, 1, activation="silu")
    x = torch.randn(8, 16, 56, 56).contiguous(memory_format=layout).requires_grad_()  # 1.6 MB; y: 6.4 MB
    block(x)

    def allocated(function: Any) -> tuple[int, Any]:
        with torch.profiler.profile(profile_memory=True) as profile:
            result = function()
        taken = [event.self_cpu_memory_usage for event in profile.key_averages()]
        return max([*taken, 0]), result

    before = deepops.memory.stats()
    taken, y = allocated(lambda: block(x))
    after = deepops.memory.stats()
    assert taken < 2**19
    assert after.live - before.live < 1.2 * y.numel() * 4
    grad_y = torch.ones_like(y)
    taken, _ = allocated(lambda: y.backward(grad_y))
    assert taken < 2**19
    assert deepops.memory.stats().live - after.live <= 1.2 * x.numel() * 4


def test_the_bias_of_the_convolution():
    """It moves the running mean and nothing else; its gradient is exactly 0."""
    x, weight, conv_bias = channels_last(3, 20, 12, 13), torch.randn(80, 20, 1, 1), torch.randn(80, requires_grad=True)
    means = [torch.zeros(80), torch.zeros(80)]
    results = [
        functional.conv_bn_act(x, weight, bias, mean, None, training=True)
        for bias, mean in zip((conv_bias, None), means, strict=True)
    ]
    assert torch.equal(*results)
    torch.testing.assert_close(means[0], means[1] + 0.1 * conv_bias.detach())
    results[0].sum().backward()
    assert torch.equal(conv_bias.grad, torch.zeros(80))


def test_in_place_changes_are_noticed():
    x, weight = channels_last(2, 16, 12, 12), torch.randn(64, 16, 1, 1, requires_grad=True)
    mean = torch.zeros(64)
    before = mean._version
    y = functional.conv_bn_act(x, weight, None, mean, None, training=True)
    assert mean._version > before
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_output_changed_in_place():
    """The backward does not need it."""
    x, weight = channels_last(2, 16, 12, 12), torch.randn(64, 16, 1, 1)
    grads = []
    for change in (False, True):
        y = functional.conv_bn_act(x, weight, None, None, None, training=True)
        if change:
            y = y.mul_(1)
        grads.append(torch.autograd.grad(y.sum(), x)[0])
    assert torch.equal(*grads)


def test_explain():
    assert "covariances" in deepops.explain(deepops.nn.ConvBNReLU2d(16, 96, 1))
    for block in (
        deepops.nn.ConvBNReLU2d(16, 96, 1, stride=2),
        deepops.nn.ConvBNReLU2d(16, 96, 3),
        deepops.nn.ConvBNReLU2d(96, 16, 1),
        deepops.nn.ConvBNReLU1d(16, 96, 1),
        deepops.nn.ConvBNReLU2d(16, 96, 1).eval(),
    ):
        assert "covariances" not in deepops.explain(block)


def test_one_step_lowers_the_loss():
    torch.manual_seed(1)
    block = deepops.nn.ConvBNReLU2d(16, 64, 1)
    x, target = channels_last(4, 16, 9, 8), torch.rand(4, 64, 9, 8)
    losses = []
    optimizer = torch.optim.SGD(block.parameters(), lr=0.5)
    for _ in range(5):
        loss = F.mse_loss(block(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
