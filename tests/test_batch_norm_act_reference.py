"""The plain-PyTorch reference of ``batch_norm_act`` against PyTorch's own modules: it is the oracle of all the rest."""

from __future__ import annotations

import doctest
import sys
from itertools import product

import pytest
import torch
from bn_cases import DTYPES
from torch import nn

from deepops import reference
from deepops.reference import activation, batch_norm_act
from deepops.testing import ErrorPool, make_layouts

MODULES = {
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(0.2),
    "relu6": nn.ReLU6(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "hardswish": nn.Hardswish(),
    "identity": nn.Identity(),
}
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SHAPES = [(9, 4), (5, 4, 3), (3, 4, 5, 2), (2, 4, 3, 2, 2)]


def near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Both are fp64: a few rounding errors apart."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def norm_like(shape: tuple[int, ...], **options) -> nn.Module:
    norm = NORMS[len(shape)](shape[1], **options).double()
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


def call(norm: nn.Module, x: torch.Tensor, **options) -> torch.Tensor:
    return batch_norm_act(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps,
        num_batches_tracked=norm.num_batches_tracked, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients_are_those_of_the_modules(shape, name):
    for training, residual, affine in product((True, False), repeat=3):
        norm, same = norm_like(shape, affine=affine), norm_like(shape, affine=affine)
        same.load_state_dict(norm.state_dict())
        norm.train(training)
        same.train(training)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        expected = MODULES[name](norm(x) + z if residual else norm(x))
        approximate = "tanh" if name == "gelu_tanh" else "none"
        options = {"activation": name.removesuffix("_tanh"), "negative_slope": 0.2, "approximate": approximate}
        actual = call(same, x, residual=z if residual else None, **options)
        near(actual, expected)
        grad_y = torch.randn_like(expected)
        leaves = [x, *([z] if residual else [])]
        for ours, theirs in zip(
            torch.autograd.grad(actual, [*leaves, *same.parameters()], grad_y),
            torch.autograd.grad(expected, [*leaves, *norm.parameters()], grad_y),
            strict=True,
        ):
            near(ours, theirs)
        for ours, theirs in zip(same.buffers(), norm.buffers(), strict=True):
            near(ours, theirs)


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
def test_running_statistics_over_steps(momentum):
    norm, same = norm_like((6, 4, 3), momentum=momentum), norm_like((6, 4, 3), momentum=momentum)
    for _ in range(4):
        x = torch.randn(6, 4, 3, dtype=torch.float64) * 3 + 1
        norm(x)
        call(same, x)
        for ours, theirs in zip(same.buffers(), norm.buffers(), strict=True):
            near(ours, theirs)
    assert same.num_batches_tracked.item() == 4
    running = torch.zeros(4), torch.ones(4)
    batch_norm_act(torch.randn(6, 4, 3), *running, training=True, momentum=None)  # no counter: as nn.BatchNorm1d
    assert torch.equal(running[0], torch.zeros(4))
    assert torch.equal(running[1], torch.ones(4))


def test_momentum_none_reads_nothing_back():
    """The meta device has no values: a read to the host would raise."""
    tensors = [torch.empty(4, device="meta"), torch.empty(4, device="meta")]
    counter = torch.tensor(0, device="meta")
    x = torch.empty(2, 4, 3, device="meta")
    y = batch_norm_act(x, *tensors, training=True, momentum=None, num_batches_tracked=counter)
    assert y.shape == x.shape


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "identity", "hardswish"])
def test_second_derivatives(name):
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    z = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def function(x, z, weight, bias):
        return batch_norm_act(x, None, None, weight, bias, True, activation=name, residual=z)

    assert torch.autograd.gradcheck(function, (x, z, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, z, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_once_at_the_end(dtype):
    """16-bit data with fp32 affine: as good as the fp32 computation, rounded."""
    pool = ErrorPool()
    for shape in [(16, 32, 5, 5), (64, 48), (4, 64, 9)]:
        x, weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[1]), torch.randn(shape[1])
        wide = torch.promote_types(dtype, torch.float32)
        y = batch_norm_act(x, None, None, weight.to(wide), bias.to(wide), True, activation="silu")
        assert y.dtype == dtype
        oracle = batch_norm_act(x.double(), None, None, weight.double(), bias.double(), True, activation="silu")
        if dtype == torch.float64:
            assert torch.equal(y, oracle)
            continue
        rounded = nn.functional.silu(nn.functional.batch_norm(x.float(), None, None, weight, bias, True))
        pool.add(y, rounded, oracle)
    if dtype != torch.float64:
        pool.check()


def test_running_statistics_keep_their_dtype():
    running = torch.zeros(4, dtype=torch.bfloat16), torch.ones(4)
    batch_norm_act(torch.randn(8, 4, dtype=torch.float16), *running, training=True)
    assert [t.dtype for t in running] == [torch.bfloat16, torch.float32]
    assert not torch.equal(running[0], torch.zeros(4, dtype=torch.bfloat16))


def test_every_layout():
    x = torch.randn(4, 3, 2, 5, dtype=torch.float64)
    for name, layout in make_layouts(x).items():
        expected = batch_norm_act(layout.contiguous(), None, None, training=True)
        near(batch_norm_act(layout, None, None, training=True), expected)
        assert name != "channels_last" or batch_norm_act(layout, None, None, training=True).stride(1) == 1


@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1, 1)])
def test_one_value_per_channel_is_torchs_error(shape):
    x, norm = torch.randn(shape, dtype=torch.float64), norm_like(shape)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as ours:
        call(norm, x)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as theirs:
        nn.functional.batch_norm(x, None, None, training=True)
    assert str(ours.value) == str(theirs.value)
    assert norm.num_batches_tracked.item() == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4)])
def test_empty_batches(shape):
    norm, same = norm_like(shape), norm_like(shape)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    norm(x)
    y = call(same, x)
    y.sum().backward()
    assert y.shape == shape
    assert x.grad.shape == shape
    assert same.weight.grad.tolist() == [0, 0, 0]
    for ours, theirs in zip(same.buffers(), norm.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_bad_input():
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="activation: 'tanh' is not one of relu, leaky_relu"):
        batch_norm_act(x, None, None, training=True, activation="tanh")
    with pytest.raises(ValueError, match="running_mean, running_var: None"):
        batch_norm_act(x, None, None)
    with pytest.raises(ValueError, match="activation: 'elu'"):
        activation(x, "elu")


def test_examples_of_the_docstrings():
    module = sys.modules["deepops.reference.batch_norm_act"]
    result = doctest.testmod(module)
    assert result.attempted >= 3
    assert result.failed == 0
    assert reference.ACTIVATIONS[0] == "relu"
