"""The blocks on deepops' own convolution, run by the SIMT executor, beside stock modules and the fp64 oracle.

Where not the kernels but what is around them is tested, ``exact`` ops made of torch's stand in for them: then the two
ways must agree in every bit.
"""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import simt
import torch
import torch.nn.functional as F
from conv_cases import CONVOLUTIONS, Stock, compare, make_block, make_input, needs_kernel, set_mode
from conv_cases import check as check_pools
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import deepops
from deepops import _conv_choice, _conv_problem, _fused_conv, reference
from deepops._convolution import convolution
from deepops.cli import check_ops
from deepops.cli.check import check_rows
from deepops.cli.check_types import Setting
from deepops.functional import conv_bn_act
from deepops.nn import ConvBNAct1d, ConvBNAct2d
from deepops.testing import ErrorPool, oracle

pytestmark = [pytest.mark.usefixtures("one_thread"), needs_kernel]

# Torch pads by wrapping around into NCHW.
COVERED = {
    name: options
    for name, options in CONVOLUTIONS.items()
    if options.get("groups", 1) == 1 and options.get("padding_mode") != "circular"
}
ACTIVATIONS = ("relu", "leaky_relu", "relu6", "silu", "gelu", "hardswish", "identity")
CHANNELS_LAST = torch.channels_last


@pytest.fixture
def on_executor(on_simt: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks on CPU tensors behave as on a GPU, and their own convolution is the one that they use."""
    monkeypatch.setattr(_conv_problem, "executor", torch.ops.deepops_simt)
    monkeypatch.setattr(deepops.backends, "conv", "fused")


class Exact:
    """The two ops in torch's operations; ``calls`` has their names."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.conv_bn_act_eval = SimpleNamespace(default=self._evaluate)
        self.conv_bn_act_statistics = SimpleNamespace(default=self._statistics)

    def _evaluate(self, *arguments: Any) -> Tensor:
        self.calls.append("eval")
        assert all(t.is_contiguous(memory_format=CHANNELS_LAST) for t in arguments[:3] if t is not None)
        *tensors, activation, negative_slope = arguments
        return reference.conv_bn_act_eval(*tensors, activation=activation, negative_slope=negative_slope)

    def _statistics(self, x: Tensor, conv_weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append("statistics")
        assert x.is_contiguous(memory_format=CHANNELS_LAST)
        assert conv_weight.is_contiguous(memory_format=CHANNELS_LAST)
        mean, var, counter, stride, (top, bottom, left, right), dilation, momentum, eps = rest
        symmetric = top == bottom and left == right
        padded, padding = (x, (top, left)) if symmetric else (F.pad(x, [left, right, top, bottom]), (0, 0))
        z = convolution(padded, conv_weight, None, tuple(stride), padding, tuple(dilation), 1)
        options = (mean, var, counter, momentum, eps, "identity", 0.0)
        _, mean, invstd = torch.ops.deepops.batch_norm_act_train.default(z, None, None, None, *options)
        return z, mean, invstd


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> Exact:
    ops = Exact()
    monkeypatch.setattr(_conv_problem, "executor", ops)
    monkeypatch.setattr(deepops.backends, "conv", "fused")
    return ops


@pytest.fixture
def timed(exact: Exact, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Under "auto", with a clock by which the two ways take what it says."""
    times = {"fused": 1.0, "aten": 2.0}

    def timer(call: Callable[[], object], device: torch.device) -> float:
        before = len(exact.calls)
        call()
        return times["fused" if len(exact.calls) > before else "aten"]

    monkeypatch.setattr(deepops.backends, "conv", "auto")
    monkeypatch.setattr(_conv_choice, "timer", timer)
    monkeypatch.setattr(_conv_choice, "_measured", {})
    monkeypatch.setattr(_conv_choice, "_left_to_torch", set())
    return times


def data(batch: int = 4, channels: int = 4) -> Tensor:
    return make_input(2, batch, channels, channels_last=True)


def launches(counts: simt.Counts) -> list[str]:
    return [launch.name for launch in counts.kernels if launch.name.startswith("conv_bn_act")]


# ---- the kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_executor")
@pytest.mark.parametrize("name", COVERED)
def test_a_step(name: str) -> None:
    pools: Any = defaultdict(ErrorPool)
    for seed, activation in enumerate(("relu", "silu")):
        block = make_block(4, 6, **COVERED[name], activation=activation, seed=seed)
        with simt.counting() as counts:
            compare(pools, block, data(), None, "train", f"{activation}, {name}")
        assert len(launches(counts)) == 1
    check_pools(pools)


@pytest.mark.usefixtures("on_executor")
@pytest.mark.parametrize("with_residual", [False, True])
def test_every_activation(with_residual: bool) -> None:
    pools: Any = defaultdict(ErrorPool)
    for seed, activation in enumerate(ACTIVATIONS):
        block = make_block(3, 8, 3, padding=1, bias=True, activation=activation, seed=seed)
        x = data(channels=3)
        residual = torch.randn_like(Stock(block)(x)) if with_residual else None
        compare(pools, block, x, residual, "train", activation)
    check_pools(pools)


@pytest.mark.usefixtures("on_executor")
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


@pytest.mark.usefixtures("on_executor")
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


@pytest.mark.usefixtures("on_executor")
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


@pytest.mark.usefixtures("on_executor")
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


@pytest.mark.usefixtures("on_executor")
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


def step(block: nn.Module, x: Tensor, residual: Tensor | None, **autocast: Any) -> dict[str, Tensor | None]:
    """Output, gradients and buffers after a step."""
    block = copy.deepcopy(block)
    x, residual = (None if t is None else t.detach().requires_grad_() for t in (x, residual))
    with torch.autocast("cpu", **autocast) if autocast else torch.enable_grad():
        y = block(x, residual)
    y.backward(torch.linspace(-0.5, 1, y.numel()).view(y.shape).to(y.dtype))
    grads = {name: parameter.grad for name, parameter in block.named_parameters()}
    given = {"y": y.detach(), "x": x.grad, "residual": None if residual is None else residual.grad}
    return {**given, **grads, **dict(block.named_buffers())}


def assert_same_bits(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None], case: str) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        other = theirs[name]
        assert (value is None) == (other is None), f"{name}, {case}"
        if value is not None:
            assert value.dtype is other.dtype, f"{name}, {case}"
            assert torch.equal(value, other), f"{name}, {case}"


@pytest.mark.parametrize("name", COVERED)
def test_gradients_do_not_depend_on_the_way(name: str, exact: Exact) -> None:
    """Nor anything else, where the convolution has the same bits."""
    for seed, activation in enumerate(ACTIVATIONS):
        block = make_block(4, 6, **COVERED[name], activation=activation, seed=seed).to(memory_format=CHANNELS_LAST)
        x = data()
        for residual in (None, torch.randn_like(Stock(block)(x)).detach()):
            exact.calls.clear()
            ours = step(block, x, residual)
            assert exact.calls == ["statistics"]
            with deepops.backends.flags(conv="aten"):
                theirs = step(block, x, residual)
            assert exact.calls == ["statistics"]
            assert_same_bits(ours, theirs, f"{name}, {activation}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_vectors_of_sixteen_bits_and_autocast_likewise(dtype: torch.dtype, exact: Exact) -> None:
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
    assert exact.calls == ["statistics"] * 4


def test_gradients_that_nobody_wants(exact: Exact) -> None:
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
    assert exact.calls == ["statistics"] * 5


@pytest.mark.parametrize("name", ["stride", "same", "dilation"])
def test_gradients_of_gradients(name: str, exact: Exact, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert set(exact.calls) == {"statistics"}


def test_a_block_used_twice(exact: Exact, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert not exact.calls
    for y in (twice(x), checkpoint(twice, x, use_reentrant=False)):
        assert exact.calls
        for actual, wanted in zip(penalty(y), expected, strict=True):
            torch.testing.assert_close(actual, wanted)  # fp64: torch's own measure


def test_evaluation_uses_what_was_computed_once(exact: Exact) -> None:
    block, x = make_block(4, 6, 3, bias=True).eval(), data()
    with torch.no_grad():
        first = block(x)
        block(x)
        assert (exact.calls, block._folded.folds) == (["eval"] * 2, 1)
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
def test_evaluation_with_gradients_is_torchs(mode: str, exact: Exact) -> None:
    """Frozen batch normalization is still folded into the weights."""
    block, x = make_block(4, 6, 3, bias=True), data().requires_grad_()
    set_mode(block, mode)
    y = block(x)
    assert not exact.calls
    assert ("BatchNormAct" not in str(y.grad_fn)) == (mode == "frozen affine")
    with torch.no_grad():
        torch.testing.assert_close(block(x), y)
    assert exact.calls == ["eval"]


def test_one_value_per_channel_and_no_values(exact: Exact) -> None:
    block = make_block(4, 6, 3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        block(data(1)[:, :, :3, :3].contiguous(memory_format=CHANNELS_LAST))
    assert block(data(0)).shape == (0, 6, 9, 8)
    assert block.bn.num_batches_tracked == 1
    assert block.eval()(data(0)).shape == (0, 6, 9, 8)
    assert not exact.calls
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        block(data()[:, :, :2].contiguous(memory_format=CHANNELS_LAST))


def test_wrong_arguments_change_nothing(exact: Exact) -> None:
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
    assert not exact.calls
    assert torch.equal(mean, torch.zeros(6))
    assert torch.equal(var, torch.ones(6))


# ---- what is not covered ---------------------------------------------------------------------------------------------


def wide(channels: int = 8, dtype: torch.dtype = torch.float16) -> Tensor:
    return data(channels=channels).to(dtype)


NOT_COVERED: dict[str, tuple[str, Callable[[], tuple[Tensor, tuple[int, ...], dict[str, Any]]]]] = {
    "groups": ("groups=2", lambda: (data(), (6, 2, 3, 3), {"groups": 2})),
    "depthwise": ("groups=4", lambda: (data(), (4, 1, 3, 3), {"groups": 4})),
    "channels": ("12 channels of torch.float16", lambda: (wide(12), (6, 12, 3, 3), {})),
    "fp32": ("8 channels of torch.float32", lambda: (wide(8, torch.float32), (6, 8, 3, 3), {})),
    "fp64": ("x of torch.float64", lambda: (wide(4, torch.float64), (6, 4, 3, 3), {})),
    "NCHW": ("x of strides", lambda: (data().contiguous(), (6, 4, 3, 3), {})),
    "one channel in NCHW": ("x of strides", lambda: (torch.randn(2, 1, 8, 8), (6, 1, 3, 3), {})),
    "sliced": ("x of strides", lambda: (data()[..., ::2], (6, 4, 3, 3), {})),
    "1d": ("conv_weight of shape", lambda: (torch.randn(2, 4, 9), (6, 4, 3), {})),
    "3d": ("conv_weight of shape", lambda: (make_input(3), (6, 4, 3, 3, 3), {})),
    "misaligned": (
        "x that begins between 16-byte boundaries",
        lambda: (wide().new_zeros(2 * 8 * 81 + 1)[1:].view(2, 9, 9, 8).permute(0, 3, 1, 2), (6, 8, 3, 3), {}),
    ),
    "a class of its own": ("a tensor of class Own", lambda: (data().as_subclass(Own), (6, 4, 3, 3), {})),
}


class Own(Tensor):
    """May mean anything by its memory."""


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NOT_COVERED)
def test_what_is_not_covered(name: str, training: bool, timed: dict[str, float], exact: Exact) -> None:
    """An error where the way is forced, else torch's way without a word or a measurement."""
    message, make = NOT_COVERED[name]
    x, shape, options = make()
    weight = torch.randn(shape, dtype=x.dtype)
    vectors = torch.float64 if x.dtype is torch.float64 else torch.float32
    mean, var = torch.zeros(shape[0], dtype=vectors), torch.ones(shape[0], dtype=vectors)
    with (
        deepops.backends.flags(conv="fused"),
        pytest.raises(ValueError, match=f"deepops.backends.conv: 'fused' covers .*; got {message}"),
    ):
        conv_bn_act(x, weight, None, mean, var, training=training, **options)
    assert torch.equal(mean, torch.zeros_like(mean))
    timed["aten"] = 0.0  # not that it matters
    conv_bn_act(x, weight, None, mean, var, training=training, **options)
    assert not exact.calls
    assert not _conv_choice.measured()


def test_a_residual_of_another_dtype_under_autocast(timed: dict[str, float], exact: Exact) -> None:
    """The sum has the wider dtype then."""
    block, x = make_block(4, 4, 3, padding=1), data()
    with torch.autocast("cpu", torch.bfloat16):
        with deepops.backends.flags(conv="fused"), pytest.raises(ValueError, match=r"a residual of torch.float32"):
            block(x, x)
        assert block(x, x).dtype is torch.float32
        assert not exact.calls
        assert block(x, x.bfloat16()).dtype is torch.bfloat16
    assert exact.calls


def test_a_build_or_a_gpu_without_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = wide(), torch.randn(6, 8, 3, 3).half()
    monkeypatch.setattr(_conv_problem, "has_kernel", lambda op, device: False)
    assert _conv_problem.not_covered(x, weight, 1, False).startswith("a build without these kernels (_cuda ")
    monkeypatch.setattr(_conv_problem, "has_kernel", lambda op, device: True)
    monkeypatch.setattr(_conv_problem, "gpu_not_covered", lambda index: "")
    for capability, reason in {(7, 5): "a GPU of compute capability 7.5", (8, 0): "", (12, 0): ""}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert _conv_problem.not_covered(x, weight, 1, False) == reason
    monkeypatch.setattr(_conv_problem, "gpu_not_covered", lambda index: "too old")
    assert _conv_problem.not_covered(x, weight, 1, False) == "too old"


def test_one_channel_has_the_layout_that_strides_tell() -> None:
    """As torch decides it for the result."""
    x, weight = torch.randn(2, 1, 8, 8), torch.randn(6, 1, 3, 3)
    for data_last in (False, True):
        for weight_last in (False, True):
            tensors = [
                t.to(memory_format=CHANNELS_LAST) if last else t for t, last in ((x, data_last), (weight, weight_last))
            ]
            stock = F.conv2d(*tensors).is_contiguous(memory_format=CHANNELS_LAST)
            assert _conv_problem._is_channels_last(*tensors) == stock


def test_other_tools_take_torchs_way(exact: Exact) -> None:
    """Whatever the setting: they do not see into the ops, or have compilers of their own."""
    block, x = make_block(4, 6, 3), data()
    weight = block.conv.weight.detach()

    def loss(weight: Tensor) -> Tensor:
        return conv_bn_act(x, weight, None, None, None, training=True).square().sum()

    torch.func.grad(loss)(weight)
    torch.func.jvp(loss, (weight,), (torch.ones_like(weight),))
    torch.jit.trace(block, x, check_trace=False)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    with torch.no_grad():
        compiled.eval()(x)
    assert not exact.calls
    block.train()(x)
    assert exact.calls


def test_fake_tensors_take_torchs_way(timed: dict[str, float], exact: Exact) -> None:
    """They have no memory to look at, and nothing to time."""
    block = make_block(4, 6, 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert block(data()).shape == (4, 6, 9, 8)
        with torch.no_grad():
            assert block.eval()(data()).shape == (4, 6, 9, 8)
    assert not exact.calls


def test_cpu_tensors_know_no_choice() -> None:
    assert _conv_problem.executor is None
    block, x = make_block(4, 6, 3, groups=2), make_input(2)
    expected = copy.deepcopy(block)(x)
    with deepops.backends.flags(conv="fused"):
        assert torch.equal(block(x), expected)
        block.eval()(x)
        ConvBNAct1d(4, 6, 3)(torch.randn(2, 4, 9))


# ---- the choice ------------------------------------------------------------------------------------------------------


def test_the_faster_way_is_taken_and_measuring_teaches_nothing(timed: dict[str, float], exact: Exact) -> None:
    once = _conv_choice.WARM_UP + _conv_choice.ROUNDS
    for way in ("fused", "aten"):
        timed.update({"fused": 1.0, "aten": 1.0, way: 0.5})
        _conv_choice.forget()
        exact.calls.clear()
        block, x = make_block(4, 6, 3, bias=True).to(memory_format=CHANNELS_LAST), data()
        with deepops.backends.flags(conv="aten"):
            expected = step(block, x, None)
        ours = copy.deepcopy(block)
        results = step(ours, x, None)
        assert exact.calls == ["statistics"] * (once + (way == "fused"))
        assert_same_bits(results, expected, way)
        assert results["bn.num_batches_tracked"] == 1
        step(ours, x, None)
        assert exact.calls == ["statistics"] * (once + 2 * (way == "fused"))


def test_what_is_torchs_is_known_at_a_glance(
    timed: dict[str, float], exact: Exact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small networks on a GPU wait for Python: a call that goes torch's way anyway must not be looked at again."""
    looked = []
    look = _fused_conv.problem_of
    monkeypatch.setattr(_fused_conv, "problem_of", lambda *arguments: looked.append(1) or look(*arguments))
    timed["fused"] = 3.0
    blocks = [make_block(4, 6, 3, groups=groups) for groups in (1, 2)]
    for _ in range(3):
        for block in blocks:
            block.train()(data())
            with torch.no_grad():
                block.eval()(data())
    assert len(looked) == 4
    for changed in (data(3), data()[:, :, 1:].contiguous(memory_format=CHANNELS_LAST), data().bfloat16().float()):
        blocks[0].train()(changed)
    with torch.autocast("cpu", torch.bfloat16):
        blocks[0](data())
    conv_bn_act(data(), blocks[0].conv.weight, None, None, None, training=True, stride=[1, 2], padding=[0, 0])
    assert len(looked) == 8  # the last of the three is nothing new
    assert set(exact.calls) == {"eval", "statistics"}
    count = len(exact.calls)
    with deepops.backends.flags(conv="fused"):
        blocks[0](data())
    assert len(exact.calls) == count + 1
    torch.use_deterministic_algorithms(True)
    try:
        timed["fused"] = 1.0
        _conv_choice.forget()
        blocks[0](data())
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(exact.calls) == count + 1
    blocks[0](data())
    assert len(exact.calls) > count + 1  # it was torch's for that time alone


def test_the_choice_is_one_of_the_process(timed: dict[str, float], exact: Exact) -> None:
    """Copies and pickles of a block, and other blocks of its shapes, know it."""
    block, x = make_block(4, 6, 3), data()
    block(x)
    count = len(exact.calls)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), make_block(4, 6, 3, seed=1)):
        other(x)
        count += 1
        assert len(exact.calls) == count
        assert deepops.explain(other) == deepops.explain(block)
    assert len(_conv_choice.measured()) == 1


def test_explain_tells_ways_and_times(timed: dict[str, float], exact: Exact) -> None:
    block, x = make_block(4, 6, 3, padding=1), data(2)
    before = deepops.explain(block)
    block(x)
    timed["fused"] = 4.0
    with torch.no_grad():
        block.eval()(x)
        block(x, torch.randn(2, 6, 11, 10))
    head, *lines = deepops.explain(block.train()).split("\n")
    assert head == before
    assert lines == [
        "  float32 [2, 4, 11, 10] in training: deepops' convolution; timed 1.0000 ms (deepops), 2.0000 ms (torch)",
        "  float32 [2, 4, 11, 10] in evaluation: torch's convolution; timed 4.0000 ms (deepops), 2.0000 ms (torch)",
        "  float32 [2, 4, 11, 10] in evaluation with a residual: torch's convolution; "
        "timed 4.0000 ms (deepops), 2.0000 ms (torch)",
    ]
    with deepops.backends.flags(conv="aten"):
        assert deepops.explain(block).endswith("\n  but deepops.backends.conv is 'aten'")
    assert deepops.explain(make_block(4, 6, 3)).count("\n") == 0  # without padding it is another convolution
    assert _fused_conv.explain(nn.Conv1d(4, 6, 3)) == []


def test_evaluation_is_measured_apart(timed: dict[str, float], exact: Exact) -> None:
    block, x = make_block(4, 6, 3), data()
    block(x)
    with torch.no_grad():
        block.eval()(x)
        with torch.autocast("cpu", torch.bfloat16):
            block(x)
    modes = [(key.mode, key.dtype) for key in _conv_choice.measured()]
    assert modes == [("training", torch.float32), ("folded", torch.float32), ("evaluation", torch.bfloat16)]


def test_nothing_is_measured_while_a_graph_is_captured(
    timed: dict[str, float], exact: Exact, monkeypatch: pytest.MonkeyPatch
) -> None:
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    block, x = make_block(4, 6, 3), data()
    block(x)
    assert not exact.calls
    with deepops.backends.flags(conv="fused"):
        block(x)
    assert len(exact.calls) == 1
    capturing[0] = False
    block(x)
    count = len(exact.calls)
    assert count > 2
    capturing[0] = True
    block(x)
    assert len(exact.calls) == count + 1


def test_the_relu_family_is_one_kind(timed: dict[str, float], exact: Exact) -> None:
    for activation in ACTIVATIONS:
        ConvBNAct2d(4, 6, 3, activation=activation)(data())
    assert [key.smooth for key in _conv_choice.measured()] == [False, True]
