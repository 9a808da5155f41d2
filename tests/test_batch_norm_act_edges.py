"""Edges of the ``batch_norm_act`` ops: NaN and infinity, nothing at all, fakes, and shapes that hypothesis finds."""

from __future__ import annotations

import math
from dataclasses import replace

import backends
import pytest
import torch
from bn_cases import (
    ACTIVATIONS,
    DTYPES,
    Pools,
    backward,
    evaluate,
    kept,
    make_case,
    op_results,
    stock_results,
    train,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepops import testing

pytestmark = pytest.mark.usefixtures("backend")

each_layout = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"]
)


def special_places(t: torch.Tensor) -> str:
    """NaN, +inf, -inf and finite elements as one letter each."""
    letters = {math.inf: "+", -math.inf: "-"}
    return "".join("N" if math.isnan(v) else letters.get(v, ".") for v in t.flatten().tolist())


@each_layout
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values_in_evaluation(activation, dtype, memory_format):
    """As stock's fp64 kernels, element by element (its fp32 gelu turns +inf into NaN).

    At -inf the smooth activations are 0 * inf in stock; the limit, 0, is as good.
    """
    case = make_case((3, 5, 3, 7), dtype, memory_format, activation=activation, training=False)
    x = case.x.clone()
    x[0, 0, 1], x[1, 1, :, 2], x[2, 2, 0, :3], x[1, 3, 2, 6] = math.nan, math.inf, -math.inf, math.nan
    case = replace(case, x=x, weight=case.weight.abs())
    y = evaluate(case)
    expected = stock_results(replace(case, x=x.double(), grad_y=case.grad_y.double()), False)["y"]
    if activation in ("silu", "gelu", "gelu_tanh", "hardswish"):
        free = (x == -math.inf) & ((y == 0) | y.isnan())
        y, expected = y.masked_fill(free, 0), expected.masked_fill(free, 0)
    assert special_places(y) == special_places(expected)
    assert "N" in special_places(y)


@each_layout
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "identity"])
def test_a_special_value_in_training_spoils_its_channel_and_no_other(activation, value, memory_format):
    case = make_case((3, 5, 3, 7), memory_format=memory_format, activation=activation)
    x = case.x.clone()
    x[2, 3, 1, 4] = value
    clean, spoilt = op_results(case, True), op_results(replace(case, x=x), True)
    others = [0, 1, 2, 4]
    for name in ("y", "grad_x"):
        assert spoilt[name][:, 3].isnan().all(), name
        assert torch.equal(spoilt[name][:, others], clean[name][:, others]), name
    for name in ("running_mean", "running_var", "grad_weight", "grad_bias"):
        assert torch.equal(spoilt[name][others], clean[name][others]), name
    assert not spoilt["running_mean"][3].isfinite()
    assert spoilt["running_var"][3].isnan()
    stock = stock_results(replace(case, x=x), True)
    for name in ("running_mean", "running_var", "grad_weight"):
        assert special_places(spoilt[name]) == special_places(stock[name]), name


@each_layout
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "identity", "silu"])
def test_special_values_in_the_gradient(activation, memory_format):
    """NaN and infinity in grad_y reach grad_x, grad_weight and grad_bias of their channel alone, as in stock."""
    for training in (True, False):
        case = make_case((3, 5, 3, 7), memory_format=memory_format, activation=activation, training=training)
        case = replace(case, bias=case.bias + 9)  # all masks open
        grad_y = case.grad_y.clone()
        grad_y[1, 2, 0, 5], grad_y[0, 4, 2, 2] = math.nan, math.inf
        case = replace(case, grad_y=grad_y)
        actual, stock = op_results(case, training), stock_results(case, training)
        for name in ("y", "grad_x", "grad_weight", "grad_bias"):
            assert special_places(actual[name]) == special_places(stock[name]), f"{name} training={training}"
        assert actual["grad_bias"][2].isnan()


@each_layout
def test_nan_in_residual_weight_and_bias(memory_format):
    for name, at in [("residual", (1, 2, 0, 5)), ("weight", (2,)), ("bias", (2,))]:
        for activation in ("relu", "relu6", "leaky_relu", "silu"):
            case = make_case((3, 5, 3, 7), memory_format=memory_format, residual=True, activation=activation)
            getattr(case, name)[at] = math.nan
            actual, stock = op_results(case, True), stock_results(case, True)
            for key in ("y", "grad_weight", "grad_bias"):
                assert special_places(actual[key]) == special_places(stock[key]), f"{name} {activation} {key}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_values_do_not_overflow_inside(dtype):
    """fp16 reaches 65504: sums and squares need the fp32 range. fp32 data near 1e18 have squares near 1e36."""
    large = {torch.float16: 3e4, torch.bfloat16: 1e18, torch.float32: 1e18, torch.float64: 1e150}[dtype]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        case = make_case((4, 5, 6, 6), dtype, memory_format, activation="relu")
        case = replace(
            case, x=(case.x.double().clamp(-2, 2) / 2 * large).to(dtype).contiguous(memory_format=memory_format)
        )
        y, mean, invstd = train(replace(case.clone(), running_mean=None, running_var=None))
        assert y.isfinite().all()
        assert mean.isfinite().all()
        assert (invstd > 0).all()
        oracle = testing.oracle(torch.nn.functional.batch_norm, case.x, None, None, case.weight, case.bias, True).relu()
        wide = torch.promote_types(dtype, torch.float32)
        if dtype != torch.float64:
            stock = torch.nn.functional.batch_norm(
                case.x.to(wide).contiguous(), None, None, case.weight, case.bias, True
            ).relu()
            testing.assert_close_to_oracle(y, stock, oracle)


@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 5), (2, 3, 0, 5), (0, 3), (0, 3, 7), (2, 3, 4, 0, 5), (0, 0, 2, 2), (4, 0)], ids=str
)
@pytest.mark.parametrize("residual", [False, True])
def test_nothing_in_nothing_out(residual, shape):
    """As torch: the batch is counted, the running statistics stay, gradients of weight and bias are zeros."""
    case = make_case(shape, residual=residual)
    updated = case.clone()
    y, mean, invstd = train(updated)
    assert y.shape == shape
    assert mean.shape == invstd.shape == (shape[1],)
    assert torch.equal(updated.running_mean, case.running_mean)
    assert torch.equal(updated.running_var, case.running_var)
    assert updated.num_batches_tracked.item() == case.num_batches_tracked.item() + 1
    assert evaluate(case).shape == shape
    for training in (True, False):
        gradients = backends.ops().batch_norm_act_backward(
            case.grad_y, case.x, kept(case, y), case.weight, case.bias, *case.statistics(), training, "relu", 0.0,
            True, residual, True,
        )  # fmt: skip
        assert gradients[0].shape == shape
        assert gradients[2].tolist() == gradients[3].tolist() == [0.0] * shape[1]


shapes = st.integers(2, 5).flatmap(
    lambda rank: st.tuples(
        st.integers(1, 9), st.sampled_from([1, 2, 3, 5, 8, 9, 16, 17, 33, 40]), *[st.integers(1, 9)] * (rank - 2)
    )
)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=shapes,
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    last=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    residual=st.booleans(),
    affine=st.booleans(),
    training=st.booleans(),
    mean=st.sampled_from([0.0, 0.5, -20.0]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(shape, dtype, last, activation, residual, affine, training, mean, seed):
    """Compare with the oracle; stock's error is taken from larger cases with the same options, too."""
    if training and math.prod(shape) == shape[1]:
        return  # one value per channel
    torch.manual_seed(seed)
    memory_format = torch.contiguous_format
    if last and len(shape) >= 4:
        memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    pools = Pools()
    options = {"activation": activation, "residual": residual, "affine": affine, "training": training, "mean": mean}
    for _ in range(2):
        pools.anchor(make_case((16, 96, 9), dtype, **options), training)
    for _ in range(2):
        pools.add(make_case(shape, dtype, memory_format, **options), training, f"{list(shape)}")
    pools.check()


def test_backward_of_evaluation_treats_the_statistics_as_constants():
    case = make_case((4, 5, 3, 3), activation="identity", training=False)
    mean, invstd = case.statistics()
    gradients = backward(case, evaluate(case), mean, invstd, training=False)
    exact = case.grad_y.double() * (invstd.double() * case.weight.double()).view(1, -1, 1, 1)
    stock = case.grad_y * (invstd * case.weight).view(1, -1, 1, 1)
    testing.assert_close_to_oracle(gradients["grad_x"], stock, exact)
