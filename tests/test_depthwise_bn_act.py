"""The ``depthwise_bn_act`` ops and ``functional.conv_bn_act`` on top of them."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from dataclasses import replace
from itertools import product
from typing import Any

import backends
import pytest
import torch
import torch.nn.functional as F
from bn_cases import ACTIVATIONS
from depthwise_cases import GEOMETRIES, DepthwisePools, backward, make_case, op_results, oracle_results, train
from torch import Tensor

import deepops
from deepops import functional, testing
from deepops._depthwise import DepthwiseBatchNormAct
from deepops._library import has_kernel
from deepops.testing import ErrorPool, saved_storages, use_isa, use_threads

pytestmark = pytest.mark.usefixtures("one_thread")
if not has_kernel("depthwise_bn_act_train", "cpu"):
    pytest.skip("no compiled kernels", allow_module_level=True)

SIZES = [(2, 16, 9, 10), (3, 17, 6, 8), (1, 33, 11, 7), (4, 64, 10, 12)]
LAYOUTS = {"channels_last": torch.channels_last, "planes": torch.contiguous_format}
# GPU kernels take channels_last alone.
everywhere = pytest.mark.parametrize(
    ("backend", "layout"),
    [(backend, torch.channels_last) for backend in backends.BACKENDS] + [("cpu", torch.contiguous_format)],
    indirect=["backend"],
    ids=[*backends.BACKENDS, "cpu-planes"],
)
both_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@everywhere
def test_geometries(backend, layout):
    """Against the oracle; kernels of every remainder of blocks and strips.

    One pool for all of them: where sums cancel, stock is now and then right by luck.
    """
    pools = DepthwisePools()
    widths = [(2, 16, 5, 37), (1, 24, 4, 70)] if backend == "cpu" else []
    for (name, geometry), shape in product(GEOMETRIES.items(), [*SIZES, *widths]):
        pools.add(make_case(shape, **geometry, activation="silu", layout=layout), f"{name} {shape}")
    pools.check()


@everywhere
def test_channels(backend, layout):
    pools = DepthwisePools()
    for channels, stride in product((16, 17, 31, 32, 33, 48, 96), (1, 2)):
        for shape, activation in [((2, channels, 8, 9), "identity"), ((4, channels, 14, 14), "relu")]:
            case = make_case(shape, stride=(stride, stride), activation=activation, layout=layout)
            pools.add(case, f"{channels} channels, stride {stride}")
    pools.check()


@both_layouts
def test_more_than_the_cache_holds(layout):
    """The forward then computes z twice; work items of several row blocks and strips."""
    pools = DepthwisePools()
    case = make_case((2, 17, 256, 250), activation="silu", layout=layout)
    assert case.grad_y.numel() > 2**21
    pools.add(case)
    pools.check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit(dtype):
    """Computed in float32 throughout: no rounded convolution result lies between."""
    pools = DepthwisePools()
    for (name, geometry), shape in product(GEOMETRIES.items(), [*SIZES, (2, 16, 5, 37), (4, 40, 14, 14)]):
        for activation in ("silu", "relu6"):
            pools.add(make_case(shape, **geometry, dtype=dtype, activation=activation), f"{name} {shape} {activation}")
    pools.check()


@everywhere
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, backend, layout):
    pools = DepthwisePools()
    for shape, slope in product(
        [(3, 19, 7, 8), (2, 32, 9, 9), (4, 48, 7, 7), (1, 80, 6, 15)],
        (0.2, -0.5) if activation == "leaky_relu" else (0.01,),
    ):
        pools.add(make_case(shape, activation=activation, negative_slope=slope, layout=layout), f"{shape}")
    pools.check()


@everywhere
def test_smaller_than_the_filter(backend, layout):
    """Many such cases in one pool: on a few values stock is often right by luck."""
    pools = DepthwisePools()
    for shape in [(1, 16, 1, 2), (2, 16, 1, 1), (3, 20, 2, 1), (1, 40, 2, 2), (2, 16, 3, 1), (5, 33, 2, 3)]:
        for geometry in ("3x3", "5x5", "3x3 stride 2", "asymmetric"):
            if (geometry == "asymmetric" and shape[3] == 1) or (geometry == "3x3 stride 2" and shape[0] == 1):
                continue
            for affine in (True, False):
                case = make_case(
                    shape, **GEOMETRIES[geometry], activation="silu", eps=1e-1, affine=affine, layout=layout
                )
                pools.add(case, f"{shape} {geometry}")
    pools.check()


@everywhere
@pytest.mark.parametrize("mean", [100.0, -1000.0])
def test_mean_far_above_sigma(mean, backend, layout):
    pools = DepthwisePools()
    for activation in ("identity", "relu"):
        for shape in [(4, 64, 14, 14), (2, 96, 20, 20), (8, 70, 7, 7), (3, 128, 12, 12)]:
            pools.add(
                make_case(shape, padding=(0, 0, 0, 0), mean=mean, activation=activation, layout=layout), f"{shape}"
            )
    pools.check()


@everywhere
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
def test_momentum(momentum, backend, layout):
    pools = DepthwisePools()
    for shape in [(2, 20, 6, 6), (5, 16, 9, 9), (2, 64, 7, 11), (9, 40, 5, 5)]:
        pools.add(make_case(shape, momentum=momentum, mean=0.5, layout=layout), f"{momentum}")
    pools.check()


@everywhere
def test_absent_vectors(backend, layout):
    pools = DepthwisePools()
    for absent in (["weight"], ["bias"], ["weight", "bias"], ["running_mean", "running_var"], ["num_batches_tracked"]):
        for shape in [(3, 32, 7, 9), (2, 18, 12, 12)]:
            case = make_case(shape, activation="silu", layout=layout)
            pools.add(replace(case, **dict.fromkeys(absent)), f"no {absent}")
    pools.check()


@everywhere
def test_double_precision(backend, layout):
    """fp64 has nothing finer to be compared with."""
    for geometry in GEOMETRIES.values():
        case = make_case((2, 18, 9, 11), **geometry, dtype=torch.float64, activation="gelu", layout=layout)
        actual, expected = op_results(case), oracle_results(case)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-9, msg=f"{geometry} {name}")


@everywhere
def test_only_the_wanted_gradients(backend, layout):
    case = make_case((2, 17, 8, 9), activation="silu", stride=(2, 1), layout=layout)
    _, mean, invstd = train(case.clone())
    everything = backward(case, mean, invstd)
    for need in product((True, False), repeat=3):
        for name, gradient in backward(case, mean, invstd, need).items():
            assert torch.equal(gradient, everything[name]), (need, name)


@everywhere
def test_values_whose_squares_overflow(backend, layout):
    """1e20 squared does not fit fp32; the statistics of its channel are taken in double, those of others as ever."""
    case = make_case((4, 16, 12, 12), activation="identity", layout=layout)
    before = op_results(case)
    x = case.x.clone()
    x[:, 3] *= 1e20
    huge = replace(case, x=x)
    after = op_results(huge)
    oracle = oracle_results(huge)
    torch.testing.assert_close(after["y"].double(), oracle["y"], rtol=1e-4, atol=1e-4)
    others = [c for c in range(16) if c != 3]
    for name in ("y", "grad_x"):
        assert torch.equal(before[name][:, others], after[name][:, others])


@everywhere
def test_constant_channels(backend, layout):
    """Variance 0 without padding: the result is act(bias)."""
    case = make_case((3, 32, 8, 8), padding=(0, 0, 0, 0), activation="identity", layout=layout)
    x = case.x.clone()
    x[:, ::2] = 0.5
    y = train(replace(case, x=x).clone())[0]
    assert torch.equal(y[:, ::2], case.bias[::2].view(1, -1, 1, 1).expand_as(y[:, ::2]))


@everywhere
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(value, backend, layout):
    """They stay in their channel, where everything is NaN."""
    case = make_case((2, 18, 7, 9), activation="relu", layout=layout)
    clean = op_results(case)
    x = case.x.clone()
    x[1, 5, 3, 4] = value
    broken = op_results(replace(case, x=x))
    assert broken["y"][:, 5].isnan().all()
    assert broken["grad_x"][:, 5].isnan().all()
    others = [c for c in range(18) if c != 5]
    for name in ("y", "grad_x"):
        assert torch.equal(broken[name][:, others], clean[name][:, others])
    for name in ("grad_conv_weight", "grad_weight", "grad_bias"):
        assert torch.equal(broken[name][others], clean[name][others])


@both_layouts
@pytest.mark.parametrize("geometry", ["3x3", "5x5 stride 2", "dilation", "uneven"])
def test_same_bits_for_every_instruction_set_and_thread_count(geometry, layout):
    for shape, dtype in product([(3, 40, 29, 37), (40, 33, 8, 9), (2, 16, 9, 17)], (torch.float32, torch.float64)):
        case = make_case(shape, **GEOMETRIES[geometry], dtype=dtype, activation="gelu", layout=layout)
        expected = op_results(case)
        for isa, threads in product(testing.isas(), (1, 2, 3)):
            with use_isa(isa), use_threads(threads):
                actual = op_results(case)
            for name, value in expected.items():
                assert torch.equal(actual[name], value), (isa, threads, name)


@both_layouts
def test_parallel_regions(layout):
    case = make_case((4, 32, 28, 28), layout=layout)
    with testing.count_parallel_regions() as forward:
        _, mean, invstd = train(case)
    with testing.count_parallel_regions() as both:
        backward(case, mean, invstd)
    passes = 2 if layout is torch.channels_last else 1  # where one channel after the other takes both
    assert (forward.count, both.count) == (passes, passes)


@both_layouts
@pytest.mark.filterwarnings("ignore:.*requires_grad")
def test_opcheck(layout):
    for geometry in ("3x3", "asymmetric", "dilation and stride"):
        case = make_case((2, 17, 8, 9), **GEOMETRIES[geometry], activation="silu", layout=layout)
        _, mean, invstd = train(case.clone())
        options = (case.stride, case.padding, case.dilation)
        torch.library.opcheck(
            torch.ops.deepops.depthwise_bn_act_train,
            (case.x, case.conv_weight, case.weight, case.bias, case.running_mean, case.running_var,
             case.num_batches_tracked, *options, 0.1, 1e-5, "silu", 0.01),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip
        torch.library.opcheck(
            torch.ops.deepops.depthwise_bn_act_backward,
            (case.grad_y, case.x, case.conv_weight, case.weight, case.bias, mean, invstd, *options, "silu", 0.01,
             True, True, True),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


@everywhere
def test_what_kernels_could_not_read_is_refused(backend, layout):
    case = make_case((2, 16, 6, 6), layout=layout)
    bad: dict[str, dict[str, Any]] = {
        "channels_last": {"x": case.x.transpose(2, 3)},
        "conv_weight must be": {"conv_weight": case.conv_weight[:8]},
        "at least 16 channels": {"x": case.x[:, :8].contiguous(memory_format=torch.channels_last),
                                 "conv_weight": case.conv_weight[:8]},
        "larger than x": {"conv_weight": torch.ones(16, 1, 9, 9, device=backends.device())},
        "positive": {"stride": [0, 1]},
        "negative": {"padding": [0, 0, -1, 0]},
        "2 numbers": {"padding": [1, 1]},
        "weight must be": {"weight": case.weight[:8]},
    }  # fmt: skip
    for message, changes in bad.items():
        with pytest.raises(RuntimeError, match=message):
            train(replace(case, **changes))
    taken = backend == "cpu" and layout is torch.channels_last
    with pytest.raises(RuntimeError, match="float32 beside 16-bit data" if taken else "x must be float32 or float64"):
        train(replace(case, x=case.x.bfloat16(), conv_weight=case.conv_weight.bfloat16()))
    _, mean, invstd = train(case)
    if backend != "cpu":
        with pytest.raises(RuntimeError, match="channels_last"):
            train(replace(case, x=case.x.contiguous()))
    for grad_y in (case.grad_y[..., 1:], case.grad_y.transpose(2, 3), case.grad_y.double()):
        with pytest.raises(RuntimeError, match="grad_y"):
            backward(replace(case, grad_y=grad_y), mean, invstd)


# ---- functional.conv_bn_act -----------------------------------------------------------------------------------------


def channels_last(*shape: int, **options: Any) -> Tensor:
    return torch.randn(*shape, **options).contiguous(memory_format=torch.channels_last).requires_grad_()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with each call of the fused op."""
    seen: list[str] = []
    original = DepthwiseBatchNormAct.train

    def counting(*args: Any) -> Tensor:
        seen.append("depthwise")
        return original(*args)

    monkeypatch.setattr(DepthwiseBatchNormAct, "train", staticmethod(counting))
    return seen


MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "stride": {"stride": (2, 1)},
    "dilation": {"dilation": 2},
    "same": {"kernel_size": (2, 4), "padding": "same", "bias": True},
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


@both_layouts
def test_the_module(calls, layout):
    """Forward, gradients and buffers; fewer than 16 channels take the path of all other convolutions."""
    pools: dict[str, ErrorPool] = defaultdict(ErrorPool)
    for channels, (name, given) in product((1, 3, 15, 16, 33, 96), MODULES.items()):
        options = {"kernel_size": 3, "padding": 1, "activation": "silu", **given}
        block = deepops.nn.ConvBNAct2d(channels, channels, groups=channels, **options)
        conv, bn, act = copy.deepcopy(block).to_modules()
        stock = torch.nn.Sequential(OrderedDict(conv=conv, bn=bn, act=act))
        wide = copy.deepcopy(stock).double()
        x, before = torch.randn(4, channels, 6, 48).contiguous(memory_format=layout) + 0.5, len(calls)
        results = step(block, x), step(stock, x.contiguous()), step(wide, x.double())
        assert len(calls) - before == (channels >= 16)
        torch.testing.assert_close(results[0]["y"], results[1]["y"])
        for key, actual in results[0].items():
            if key == "conv.bias":
                assert torch.equal(actual, torch.zeros_like(actual))
            elif channels >= 16:  # tests/test_conv_bn_act.py has the others
                pools[key].add(actual, results[1][key], results[2][key], name=f"{channels} {name} {key}")
    for pool in pools.values():
        pool.check()


def test_when_the_op_applies(calls):
    x, weight = channels_last(2, 16, 8, 8), torch.randn(16, 1, 3, 3)

    def call(x: Tensor = x, weight: Tensor = weight, groups: int = 16, **options: Any) -> int:
        before = len(calls)
        functional.conv_bn_act(x, weight, None, None, None, training=True, groups=groups, **options)
        return len(calls) - before

    assert call() == 1
    assert call(x.double(), weight.double()) == 1
    assert call(weight=weight.expand(16, 1, 3, 3)[..., ::1]) == 1
    assert call(weight=torch.randn(16, 1, 6, 3)[:, :, ::2]) == 1
    with torch.no_grad():
        assert call() == 1
    assert call(x.transpose(2, 3)) == 0
    assert call(x.bfloat16(), weight.bfloat16()) == call(x.half(), weight.half()) == 1
    assert call(x.bfloat16().contiguous(), weight.bfloat16()) == 0
    assert call(weight=torch.randn(16, 2, 3, 3), groups=8) == 0
    assert call(weight=torch.randn(32, 1, 3, 3)) == 0
    assert call(padding=1, residual=torch.randn(2, 16, 8, 8)) == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call() == call(x.half()) == 0
        assert call(x.bfloat16()) == call(x.bfloat16(), weight.bfloat16()) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype, calls):
    """The filter takes part as autocast rounds it; its gradient is float32. Gradients of gradients, too."""
    x = channels_last(3, 16, 7, 9).to(dtype)
    leaves = [x, torch.randn(16, 1, 3, 3), torch.rand(16), torch.rand(16)]
    grad_y = torch.randn(3, 16, 5, 7).to(dtype)

    def ours(x: Tensor, weight: Tensor, *vectors: Tensor) -> Tensor:
        options: dict[str, Any] = {"training": True, "groups": 16, "activation": "silu"}
        return functional.conv_bn_act(x, weight, None, None, None, *vectors, **options)

    def stock(x: Tensor, weight: Tensor, *vectors: Tensor) -> Tensor:
        z = F.conv2d(x, weight, groups=16)
        return F.silu(F.batch_norm(z, None, None, *vectors, training=True))

    def results(function: Any, leaves: list[Tensor], autocast: bool) -> list[Tensor]:
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            y = function(*leaves)
        grads = torch.autograd.grad(y, leaves, grad_y.to(y.dtype), retain_graph=True)
        again = torch.autograd.grad(y, leaves, grad_y.to(y.dtype), create_graph=True)
        twice = torch.autograd.grad([g.double().square().sum() for g in again], leaves)
        return [y.detach(), *grads, *(g.detach() for g in again), *twice]

    rounded = [leaf.to(dtype).double() if leaf.dim() == 4 else leaf.double() for leaf in leaves]
    found = results(ours, leaves, True)
    assert len(calls) == 1
    assert [g.dtype for g in found[:5]] == [dtype, dtype, torch.float32, torch.float32, torch.float32]
    for one, other, oracle in zip(found, results(stock, leaves, True), results(stock, rounded, False), strict=True):
        testing.assert_close_to_oracle(one, other, oracle)


def test_when_the_op_applies_to_planes(calls):
    """Small filters in fp32 need rows that fill lanes, whatever makes them so long."""

    def call(
        width: int,
        filter_size: tuple[int, int] = (3, 3),
        channels: int = 16,
        dtype: torch.dtype = torch.float32,
        **options,
    ) -> int:
        before = len(calls)
        x, weight = torch.randn(1, channels, 6, width, dtype=dtype), torch.randn(channels, 1, *filter_size, dtype=dtype)
        functional.conv_bn_act(x, weight, None, None, None, training=True, groups=channels, **options)
        return len(calls) - before

    taken = {width for width in range(1, 81) if call(width, padding=1)}
    assert taken == {*range(14, 17), *range(28, 33), *range(42, 49), *range(56, 81)}
    with_stride = {width for width in range(1, 161) if call(width, padding=1, stride=2)}
    assert with_stride == {95, 96, *range(111, 161)}
    assert call(16) == call(58) == call(48, padding=1, stride=(2, 1)) == 1
    assert call(15) == call(19) == call(32, padding=1, stride=(2, 1)) == call(16, padding=1, stride=(2, 1)) == 0
    assert call(16, channels=15, padding=1) == 0
    assert call(4, (5, 2)) == call(21, (5, 3)) == call(10, dtype=torch.float64) == call(9, (2, 5), stride=2) == 1


def test_errors_are_those_of_the_other_path(calls):
    """Nothing is changed by a call that fails."""
    x, weight = channels_last(1, 16, 3, 3), torch.randn(16, 1, 3, 3)
    mean, count = torch.zeros(16), torch.tensor(0)
    options: dict[str, Any] = {"training": True, "groups": 16, "num_batches_tracked": count}
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training, got input size"):
        functional.conv_bn_act(x, weight, None, mean, None, **options)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        functional.conv_bn_act(x, torch.randn(16, 1, 5, 5), None, mean, None, **options)
    with pytest.raises(ValueError, match=r"weight: expected shape \[16\]"):
        functional.conv_bn_act(x, weight, None, mean, None, torch.ones(8), **options, padding=1)
    with pytest.raises(RuntimeError, match="stride"):
        functional.conv_bn_act(x, weight, None, mean, None, **options, stride=0)
    with pytest.raises(ValueError, match="same"):
        functional.conv_bn_act(x, weight, None, mean, None, **options, stride=2, padding="same")
    assert not calls
    assert count.item() == 0
    assert not mean.any()


@both_layouts
@pytest.mark.parametrize("activation", ["identity", "silu", "gelu"])
def test_gradcheck(activation, layout):
    x = torch.randn(2, 16, 3, 4, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    vectors = [torch.rand(16, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    weight = torch.randn(16, 1, 4, 3, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, weight: Tensor, *vectors: Tensor) -> Tensor:
        x = x.contiguous(memory_format=layout)
        options: dict[str, Any] = {"padding": 1, "stride": (1, 2), "activation": activation, "approximate": "tanh"}
        return functional.conv_bn_act(x, weight, None, None, None, *vectors, training=True, groups=16, **options)

    assert torch.autograd.gradcheck(call, (x, weight, *vectors), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, weight, *vectors), fast_mode=True)


def test_functional_transforms_take_the_other_path(calls):
    x, weight = channels_last(2, 16, 5, 5), torch.randn(16, 1, 3, 3)

    def call(weight: Tensor) -> Tensor:
        return functional.conv_bn_act(x.detach(), weight, None, None, None, training=True, groups=16).square().sum()

    got = torch.func.grad(call)(weight)
    assert not calls
    leaf = weight.clone().requires_grad_()
    call(leaf).backward()
    assert calls
    torch.testing.assert_close(got, leaf.grad)


def test_compiled(calls):
    block = deepops.nn.ConvBNAct2d(16, 16, 3, padding=1, groups=16, activation="silu")
    x = channels_last(2, 16, 6, 6)
    y = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    assert not calls
    torch.testing.assert_close(y, block(x))
    assert calls


@both_layouts
def test_the_backward_keeps_x_and_vectors_alone(layout):
    block = deepops.nn.ConvBNReLU2d(32, 32, 3, padding=1, groups=32)
    x = torch.randn(2, 32, 9, 14).contiguous(memory_format=layout)
    sizes = sorted(storage.nbytes() for storage in saved_storages(lambda: block(x)))
    vectors = [4 * 32] * 4  # weight, bias, mean, invstd
    assert sizes == sorted([x.numel() * 4, block.conv.weight.numel() * 4, *vectors])


@both_layouts
def test_memory_of_the_results_is_all_that_is_taken(layout):
    """Nothing of the size of the output but y in the forward, but grad_x in the backward."""
    deepops.memory.empty_cache()
    block = deepops.nn.ConvBNReLU2d(64, 64, 3, padding=1, groups=64)
    x = torch.randn(8, 64, 28, 28).contiguous(memory_format=layout).requires_grad_()  # 1.6 MB
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
    assert after.live - before.live < 1.2 * x.numel() * 4
    taken, _ = allocated(lambda: y.backward(torch.ones_like(y)))
    assert taken <= 1.1 * x.numel() * 4  # grad_y of this test


def test_the_bias_of_the_convolution():
    """It moves the running mean and nothing else; its gradient is exactly 0."""
    x, weight, conv_bias = channels_last(3, 20, 6, 7), torch.randn(20, 1, 3, 3), torch.randn(20, requires_grad=True)
    means = [torch.zeros(20), torch.zeros(20)]
    results = [
        functional.conv_bn_act(x, weight, bias, mean, None, training=True, groups=20)
        for bias, mean in zip((conv_bias, None), means, strict=True)
    ]
    assert torch.equal(*results)
    torch.testing.assert_close(means[0], means[1] + 0.1 * conv_bias.detach())
    results[0].sum().backward()
    assert torch.equal(conv_bias.grad, torch.zeros(20))


def test_in_place_changes_are_noticed():
    x, weight = channels_last(2, 16, 5, 5), torch.randn(16, 1, 3, 3, requires_grad=True)
    mean = torch.zeros(16)
    before = mean._version
    y = functional.conv_bn_act(x, weight, None, mean, None, training=True, groups=16)
    assert mean._version > before
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_one_step_lowers_the_loss():
    torch.manual_seed(1)
    block = deepops.nn.ConvBNReLU2d(16, 16, 3, padding=1, groups=16)
    x, target = channels_last(4, 16, 8, 8), torch.rand(4, 16, 8, 8)
    losses = []
    optimizer = torch.optim.SGD(block.parameters(), lr=0.5)
    for _ in range(5):
        loss = F.mse_loss(block(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
