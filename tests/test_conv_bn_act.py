"""``deepops.nn``: the modules against the stock modules they replace."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import deepops
from deepops._library import has_kernel
from deepops.nn import BatchNormAct2d, ConvBNAct2d, ConvBNReLU2d
from deepops.testing import ErrorPool, assert_close_to_oracle, make_layouts, saved_storages, use_threads


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are small here: a second thread costs more than it brings."""
    with use_threads(1):
        yield


needs_kernel = pytest.mark.skipif(not has_kernel("batch_norm_act_train", "cpu"), reason="no compiled kernels")

ACTIVATION_MODULES = [
    nn.ReLU(),
    nn.LeakyReLU(0.2),
    nn.ReLU6(inplace=True),
    nn.SiLU(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.Hardswish(),
    nn.Identity(),
]


class Stock(nn.Module):
    """What ``ConvBNAct2d`` stands for, in torch's modules."""

    def __init__(self, block: ConvBNAct2d) -> None:
        super().__init__()
        self.conv, self.bn, self.act = copy.deepcopy(block).to_modules()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.bn(self.conv(x))
        return self.act(y if residual is None else y + residual)


def make_block(*args: Any, seed: int = 0, **options: Any) -> ConvBNAct2d:
    """A block with parameters and statistics that are not the initial ones."""
    torch.manual_seed(seed)
    block = ConvBNAct2d(*args, **options)
    with torch.no_grad():
        for name, tensor in [*block.bn.named_parameters(), *block.bn.named_buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if name in ("weight", "running_var") else tensor.uniform_(-0.5, 0.5)
    return block


def run(module: nn.Module, x: Tensor, residual: Tensor | None, train: bool) -> dict[str, Tensor]:
    """Output, gradients and state after a step. The gradient is chosen so that no mask of ReLU matters: see below."""
    module.train(train)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    residual = None if residual is None else residual.detach().clone().requires_grad_()
    y = module(x, residual)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    results = {"y": y.detach(), "x.grad": x.grad}
    if residual is not None:
        results["residual.grad"] = residual.grad
    for name, parameter in module.named_parameters():
        results[f"{name}.grad"] = parameter.grad
    return {**results, **dict(module.named_buffers())}


Pools = defaultdict[str, ErrorPool]


def compare(pools: Pools, block: ConvBNAct2d, x: Tensor, residual: Tensor | None, train: bool, case: str) -> None:
    """Take everything that a step leaves behind into the pool of its name; the tolerance rule is ``check``'s."""
    stock = Stock(block)
    wide = copy.deepcopy(stock).double()
    oracle = run(wide, x.double(), None if residual is None else residual.double(), train)
    theirs = run(stock, x, residual, train)
    ours = run(block, x, residual, train)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if not value.is_floating_point():
            assert torch.equal(value, theirs[name]), name
        elif name == "conv.bias.grad" and train:
            assert torch.equal(value, torch.zeros_like(value))
        else:
            pools[name].add(value, theirs[name], oracle[name], name=f"{name}, {case}")
    assert ours["y"].stride() == theirs["y"].stride()


def check(pools: Pools) -> None:
    for pool in pools.values():
        pool.check()


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "bias": {"kernel_size": 3, "bias": True, "padding": 1},
    "stride": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "groups": {"kernel_size": 3, "groups": 2, "bias": True},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1},
    "1x1": {"kernel_size": 1},
    "same": {"kernel_size": (2, 4), "padding": "same", "bias": True},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"},
    "momentum None": {"kernel_size": 3, "momentum": None, "bias": True},
    "momentum 0.3, eps": {"kernel_size": 3, "momentum": 0.3, "eps": 1e-2},
    "affine False": {"kernel_size": 3, "affine": False, "bias": True},
    "no statistics": {"kernel_size": 3, "track_running_stats": False},
}


# Errors are pooled over many cases: on the eight numbers of one bn.weight.grad stock is often right by luck.
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_convolutions(train: bool) -> None:
    # A smooth activation: a mask of ReLU that flips near 0 is an error of order 1 that neither side is to blame for.
    pools: Pools = defaultdict(ErrorPool)
    for seed in range(3):
        for name, options in CONVOLUTIONS.items():
            for memory_format in (torch.contiguous_format, torch.channels_last):
                block = make_block(4, 8, **options, activation="silu", seed=seed)
                x = torch.randn(6, 4, 11, 10).to(memory_format=memory_format)
                compare(pools, block, x, None, train, name)
    check(pools)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_activations(with_residual: bool, train: bool) -> None:
    pools: Pools = defaultdict(ErrorPool)
    for seed in range(8):
        for activation in ACTIVATION_MODULES:
            block = make_block(4, 8, 3, padding=1, activation=activation, seed=seed)
            x = torch.randn(4, 4, 10, 10)
            compare(pools, block, x, torch.randn(4, 8, 10, 10) if with_residual else None, train, str(activation))
    check(pools)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("statistics", ["wide", "narrow"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_16_bit_modules(dtype: torch.dtype, statistics: str, train: bool) -> None:
    pools: Pools = defaultdict(ErrorPool)
    for seed in range(3):
        block = make_block(4, 8, 3, padding=1, bias=not train, activation="silu", seed=seed)
        block.conv.to(dtype)
        if statistics == "narrow":
            block.bn.to(dtype)
        compare(pools, block, torch.randn(8, 4, 6, 6).to(dtype), None, train, f"seed {seed}")
    check(pools)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    block = make_block(4, 8, 3, padding=1, activation="silu")
    stock = Stock(block)
    wide = copy.deepcopy(stock).double()
    x = torch.randn(8, 4, 6, 6)
    outputs = {}
    for name, module in (("ours", block), ("stock", stock)):
        with torch.autocast("cpu", dtype=dtype):
            outputs[name] = module(x)
        outputs[name].float().square().mean().backward()
    oracle = wide(x.double())
    oracle.square().mean().backward()
    assert outputs["ours"].dtype is dtype
    assert_close_to_oracle(outputs["ours"], outputs["stock"], oracle, name="y")
    for (name, ours), theirs, best in zip(block.named_parameters(), stock.parameters(), wide.parameters(), strict=True):
        assert ours.grad.dtype is torch.float32
        assert_close_to_oracle(ours.grad, theirs.grad, best.grad, name=f"{name}.grad")
    for (name, ours), theirs, best in zip(block.named_buffers(), stock.buffers(), wide.buffers(), strict=True):
        if name.startswith("bn.running"):
            assert ours.dtype is torch.float32
            assert_close_to_oracle(ours, theirs, best, name=name)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_batch_norm_act_module(train: bool) -> None:
    torch.manual_seed(1)
    pool = ErrorPool()
    for activation in ACTIVATION_MODULES:
        layer = BatchNormAct2d(6, activation=activation)
        bn, act = copy.deepcopy(layer).to_modules()
        wide = copy.deepcopy(bn).double()
        for module in (layer, bn, wide):
            module.train(train)
        x = torch.randn(4, 6, 5, 5)
        ours, theirs, best = layer(x), act(bn(x)), act(wide(x.double()))
        pool.add(ours, theirs, best, name=str(activation))
        assert torch.equal(layer.num_batches_tracked, bn.num_batches_tracked)
    pool.check()
    layer.load_state_dict(nn.BatchNorm2d(6).state_dict())
    nn.BatchNorm2d(6).load_state_dict(layer.state_dict())


# ---- evaluation with folded weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_folded_evaluation(dtype: torch.dtype) -> None:
    cases = [(options, nn.ReLU()) for options in CONVOLUTIONS.values()]
    cases += [(CONVOLUTIONS["bias"], activation) for activation in ACTIVATION_MODULES]
    pool = ErrorPool()
    for seed, (options, activation) in enumerate(cases):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            block = make_block(4, 8, **options, activation=activation, seed=seed).eval()
            block.conv.to(dtype)
            block.bn.to(torch.float64 if dtype is torch.float64 else torch.float32)
            stock = Stock(block)
            x = torch.randn(2, 4, 9, 8).to(dtype).to(memory_format=memory_format)
            with torch.no_grad():
                ours, theirs, oracle = block(x), stock(x), stock.double()(x.double())
            assert block._folded.folds == (0 if block.bn.running_mean is None else 1)
            assert ours.dtype is dtype
            assert ours.stride() == theirs.stride()
            if dtype is torch.float64:
                torch.testing.assert_close(ours, theirs)  # nothing finer to compare with
            else:
                pool.add(ours, theirs, oracle, name=f"{activation} {options}")
    if dtype is not torch.float64:
        pool.check()


@pytest.mark.parametrize("activation", ["relu", "identity", "silu"])
def test_folded_evaluation_with_a_residual(activation: str) -> None:
    pool = ErrorPool()
    for seed, (name, options) in enumerate(CONVOLUTIONS.items()):
        block = make_block(4, 8, **options, activation=activation, seed=seed).eval()
        stock = Stock(block)
        wide = copy.deepcopy(stock).double()
        x = torch.randn(2, 4, 9, 8)
        with torch.no_grad():
            for residual in make_layouts(torch.randn_like(block(x))).values():
                before = residual.clone()
                ours, theirs, oracle = block(x, residual), stock(x, residual), wide(x.double(), residual.double())
                assert torch.equal(residual, before)
                assert ours.stride() == theirs.stride()
                pool.add(ours, theirs, oracle, name=name)
            for bad in (torch.randn(1, 8, 1, 1), ours[:, :4], ours[..., 1:]):
                with pytest.raises(ValueError, match="residual: expected shape"):
                    block(x, bad)
            with pytest.raises(TypeError, match=r"residual: expected torch.float32"):
                block(x, ours.double())
            with pytest.raises(TypeError, match=r"residual: expected a torch.Tensor, got int"):
                block(x, 1)
            with torch.enable_grad(), pytest.raises(TypeError, match=r"residual: expected a torch.Tensor, got int"):
                block(x, 1)
    pool.check()


def test_input_smaller_than_the_kernel() -> None:
    """An error like torch's, folded or not."""
    block = make_block(4, 8, 5, bias=True)
    for train in (True, False):
        with torch.no_grad(), pytest.raises(RuntimeError, match="Kernel size can't be greater"):
            block.train(train)(torch.randn(2, 4, 3, 3))


def edit_parameter(block: ConvBNAct2d) -> None:
    block.conv.weight.mul_(1.5)


def edit_statistic(block: ConvBNAct2d) -> None:
    block.bn.running_mean.add_(1)


def replace_parameter(block: ConvBNAct2d) -> None:
    block.conv.weight = nn.Parameter(torch.randn_like(block.conv.weight))


def replace_data(block: ConvBNAct2d) -> None:
    block.bn.bias.data = torch.randn_like(block.bn.bias)


def load(block: ConvBNAct2d) -> None:
    block.load_state_dict(make_block(4, 8, 3, bias=True, eps=0.1).state_dict())
    block.bn.weight.fill_(3)


def change_eps(block: ConvBNAct2d) -> None:
    block.bn.eps = 0.5


def optimizer_step(block: ConvBNAct2d) -> None:
    for parameter in block.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam(block.parameters(), lr=0.1).step()


def train_statistics(block: ConvBNAct2d) -> None:
    """A training forward of the layer itself; the mode of ``bn`` alone, so that nothing drops the cache."""
    block.bn.train()
    block(torch.randn(4, 4, 9, 8))
    block.bn.eval()


def data_edit_and_eval(block: ConvBNAct2d) -> None:
    block.conv.weight.data.mul_(2)
    block.eval()


def cast(block: ConvBNAct2d) -> None:
    block.double().float()


EDITS = [
    edit_parameter,
    edit_statistic,
    replace_parameter,
    replace_data,
    load,
    change_eps,
    optimizer_step,
    train_statistics,
    data_edit_and_eval,
    cast,
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_refolds_exactly_when_something_changed(edit: Callable[[ConvBNAct2d], None]) -> None:
    block = make_block(4, 8, 3, bias=True).eval()
    x = torch.randn(2, 4, 9, 8)
    with torch.no_grad():
        block(x)
        block(x)
        assert block._folded.folds == 1
        edit(block)
        y = block(x)
        block(x)
        assert block._folded.folds == 2
        assert torch.equal(y, copy.deepcopy(block)(x))  # a copy has an empty cache


def test_tensors_without_memory() -> None:
    """Fake tensors have no address to compare: they must not reach the cache."""
    with FakeTensorMode(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        block = ConvBNAct2d(4, 8, 3).eval()
        assert block(torch.randn(2, 4, 9, 8)).shape == (2, 8, 7, 6)
        assert block._folded.folds == 0


def test_deepops_optimizer_is_noticed() -> None:
    optim = pytest.importorskip("deepops.optim")
    block = make_block(4, 8, 3, bias=True).eval()
    optimizer = optim.Adam(block.parameters(), lr=0.1)
    x = torch.randn(2, 4, 9, 8)
    with torch.no_grad():
        block(x)
    for _ in range(2):
        block(x).sum().backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.equal(block(x), copy.deepcopy(block)(x))


def test_no_folding_where_gradients_are_wanted() -> None:
    block = make_block(4, 8, 3).eval()
    x = torch.randn(2, 4, 9, 8)
    assert block(x).requires_grad
    block.requires_grad_(False)
    assert block(x.clone().requires_grad_()).requires_grad
    assert block._folded.folds == 0
    assert not block(x).requires_grad
    assert block._folded.folds == 1


def test_inference_mode() -> None:
    block = make_block(4, 8, 3).eval()
    x = torch.randn(2, 4, 9, 8)
    with torch.inference_mode():
        y = block(x)
        made_inside = make_block(4, 8, 3).eval()  # inference tensors do not count writes: nothing may be cached
        assert torch.equal(made_inside(x), y)
        made_inside.conv.weight.mul_(0)
        assert not torch.equal(made_inside(x), y)
    with torch.no_grad():
        assert torch.equal(block(x), y)
    block.train()
    block(x).sum().backward()


# ---- building, copying, taking apart --------------------------------------------------------------------------------


def test_from_modules_shares_everything() -> None:
    conv, bn = nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4)
    block = ConvBNAct2d.from_modules(conv, bn, nn.LeakyReLU(0.3))
    assert block.conv is conv
    assert block.bn is bn
    assert "activation='leaky_relu', negative_slope=0.3" in repr(block)
    parts = block.to_modules()
    assert parts[0] is conv
    assert parts[1] is bn
    assert isinstance(parts[2], nn.LeakyReLU)
    assert parts[2].negative_slope == 0.3
    assert ConvBNAct2d.from_modules(conv, bn).activation == "identity"
    assert ConvBNAct2d.from_modules(conv, bn, "gelu").activation == "gelu"
    assert ConvBNReLU2d.from_modules(conv, bn).activation == "relu"
    layer = BatchNormAct2d.from_modules(bn, nn.SiLU())
    back, act = layer.to_modules()
    for module in (layer, back):
        mine, theirs = module.state_dict(keep_vars=True), bn.state_dict(keep_vars=True)
        assert list(mine) == list(theirs)
        assert all(mine[name] is theirs[name] for name in mine)
    assert isinstance(act, nn.SiLU)


def test_bad_modules() -> None:
    conv, bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    with pytest.raises(TypeError, match=r"conv: expected torch.nn.Conv2d, got Linear"):
        ConvBNAct2d.from_modules(nn.Linear(3, 4), bn)
    with pytest.raises(TypeError, match=r"bn: expected torch.nn.BatchNorm2d, got GroupNorm"):
        ConvBNAct2d.from_modules(conv, nn.GroupNorm(2, 4))
    with pytest.raises(ValueError, match="bn: expected 4 features, the channels of conv, got 5"):
        ConvBNAct2d.from_modules(conv, nn.BatchNorm2d(5))
    with pytest.raises(TypeError, match=r"activation: expected a name or one of nn.ReLU.* got Tanh"):
        ConvBNAct2d.from_modules(conv, bn, nn.Tanh())
    with pytest.raises(ValueError, match=r"activation: expected one of relu, .* got 'tanh'"):
        ConvBNAct2d(3, 4, 3, activation="tanh")
    with pytest.raises(ValueError, match="approximate: expected"):
        BatchNormAct2d(4, activation="gelu", approximate="exact")
    with pytest.raises(ValueError, match="activation: expected relu"):
        ConvBNReLU2d.from_modules(conv, bn, "silu")
    with pytest.raises(TypeError, match=r"bn: expected torch.nn.BatchNorm2d"):
        BatchNormAct2d.from_modules(nn.BatchNorm1d(4))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_bad_input_to_modules(train: bool) -> None:
    block, layer = make_block(4, 8, 3).train(train), BatchNormAct2d(4).train(train)
    before = copy.deepcopy([block.state_dict(), layer.state_dict()])
    cases: list[tuple[Any, type[Exception], str]] = [
        ([1.0], TypeError, "x: expected a torch.Tensor, got list"),
        (torch.randn(4, 9, 9), ValueError, "x: expected "),
        (torch.randn(2, 4, 9, 9).to_sparse(), TypeError, "x: expected a dense"),
        (torch.randn(2, 4, 9, 9, device="meta"), ValueError, "expected device"),
    ]
    with torch.no_grad():
        for x, error, message in cases:
            for module in (block, layer):
                with pytest.raises(error, match=message):
                    module(x)
        with pytest.raises(ValueError, match=r"x: expected 4 channels"):
            block(torch.randn(2, 3, 9, 9))
        with pytest.raises(TypeError, match=r"conv_weight: expected torch.float64"):
            block(torch.randn(2, 4, 9, 9).double())
        with pytest.raises(ValueError, match="residual: expected shape"):
            block(torch.randn(2, 4, 9, 9), torch.randn(2, 8, 9, 9))
        block.bn = nn.BatchNorm2d(1).train(train)
        with pytest.raises(ValueError, match=r"running_mean: expected shape \[8\]"):
            block(torch.randn(2, 4, 9, 9))
    assert str(before[1]) == str(layer.state_dict())


def test_deepcopy_pickle_save() -> None:
    block = make_block(4, 8, 3, activation="leaky_relu", negative_slope=0.2).eval()
    x = torch.randn(2, 4, 9, 8)
    with torch.no_grad():
        y = block(x)
        buffer = io.BytesIO()
        torch.save(block, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), loaded):
            assert other._folded.folds == 0
            assert other._folded is not block._folded
            assert torch.equal(other(x), y)
            other.conv.weight.zero_()
        assert torch.equal(block(x), y)
        assert list(block.state_dict()) == [
            "conv.weight",
            "bn.weight",
            "bn.bias",
            "bn.running_mean",
            "bn.running_var",
            "bn.num_batches_tracked",
        ]


def test_same_initial_parameters_as_stock() -> None:
    torch.manual_seed(2)
    block = ConvBNReLU2d(3, 4, 3, bias=True)
    torch.manual_seed(2)
    conv, bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    stock = [*conv.state_dict().values(), *bn.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(block.state_dict().values(), stock, strict=True))


def test_memory_format_of_the_module() -> None:
    block = make_block(4, 8, 3).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 9, 8)
    for train in (True, False):
        with torch.no_grad():
            y = block.train(train)(x)
            assert y.stride() == Stock(block)(x).stride()
            assert y.is_contiguous(memory_format=torch.channels_last)


# ---- the plain path -------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "change",
    [forward_hook, forward_pre_hook, backward_hook, backward_pre_hook, own_forward, other_class, parametrized],
    ids=lambda change: change.__name__,
)
def test_plain_path(change: Callable[[ConvBNAct2d, list[str]], None], train: bool) -> None:
    block = make_block(4, 8, 3, activation="silu").train(train)
    stock = Stock(block).train(train)
    assert "fused: torch's convolution" in deepops.explain(block)
    calls: list[str] = []
    change(block, calls)
    block.train(train)
    assert "not fused" in deepops.explain(block)
    x = torch.randn(2, 4, 9, 8)
    y = block(x)
    torch.testing.assert_close(y, stock(x), rtol=0, atol=0)
    y.sum().backward()
    assert "hook" in calls


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


def test_sync_batch_norm_conversion_keeps_the_activation() -> None:
    block = make_block(4, 8, 3, activation="silu")
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
    assert type(converted.bn) is nn.SyncBatchNorm
    assert "bn is a SyncBatchNorm" in deepops.explain(converted)
    x = torch.randn(2, 4, 9, 8)
    torch.testing.assert_close(converted.eval()(x), block.eval()(x))


def test_frozen_batch_norm_inside_a_training_block() -> None:
    block = make_block(4, 8, 3, bias=True, activation="silu")
    stock = Stock(block)
    block.bn.eval()
    stock.bn.eval()
    x = torch.randn(2, 4, 9, 8)
    y, expected = block(x), stock(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(block.conv.bias.grad, stock.conv.bias.grad)
    assert torch.equal(block.bn.running_mean, stock.bn.running_mean)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_compile_fullgraph(train: bool) -> None:
    block = nn.Sequential(make_block(4, 8, 3, bias=True), BatchNormAct2d(8, activation="silu")).train(train)
    other = copy.deepcopy(block)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 9, 8)
    for _ in range(2):
        block(x).square().sum().backward()
        compiled(x).square().sum().backward()
    torch.testing.assert_close([p.grad for p in other.parameters()], [p.grad for p in block.parameters()])
    torch.testing.assert_close(list(other.buffers()), list(block.buffers()))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))


def test_explain() -> None:
    model = nn.Sequential(ConvBNReLU2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    assert deepops.explain(model).startswith("0 (ConvBNReLU2d): fused")
    assert "plain PyTorch" in deepops.explain(nn.Linear(2, 2))
    assert "batch norm + silu" in deepops.explain(BatchNormAct2d(4, activation="silu"))


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
