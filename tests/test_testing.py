"""The tolerance rule and its helpers; above all, what they must refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from deepops import testing
from deepops.testing import ErrorPool, assert_close_to_oracle, error_ratio, half_ulp, make_layouts, saved_storages

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def rejects(actual, stock, oracle, *, match, **kwargs):
    with pytest.raises(AssertionError, match=match):
        assert_close_to_oracle(actual, stock, oracle, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_ulp_is_half_the_distance_to_the_next_number(dtype):
    values = torch.tensor([1.0, -1.0, 1.5, 1.99, 2.0, 3.0, 1e-3, 250.0], dtype=dtype)
    magnitude = values.abs()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    following = (magnitude.view(integer) + 1).view(dtype)  # neighbours in the bit pattern are neighbours in value
    expected = (following.double() - magnitude.double()) / 2
    assert torch.equal(half_ulp(values, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_ulp_at_the_ends(dtype):
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps
    ends = torch.tensor([0.0, info.tiny / 2, info.tiny, math.inf, math.nan], dtype=torch.float64)
    assert half_ulp(ends, dtype).tolist() == [smallest / 2] * 3 + [0.0, 0.0]
    if dtype != torch.float64:
        assert half_ulp(torch.tensor([1e300]), dtype).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_correct_rounding_passes_without_stock_and_two_ulps_do_not(dtype):
    oracle = torch.randn(1000, dtype=torch.float64)
    rounded = oracle.to(dtype)
    assert_close_to_oracle(rounded, None, oracle)
    off = rounded.clone()
    off[17] += 4 * float(half_ulp(oracle[17], dtype))
    rejects(off, None, oracle, match=r"case: element \[17\]", name="case")


def test_limit_is_k_times_stocks_largest_error_plus_half_an_ulp():
    oracle = torch.full((8,), 1.0, dtype=torch.float64)
    stock = oracle.float()
    stock[3] += 1e-3
    error = stock[3].double().item() - 1.0
    inside, outside = oracle.float(), oracle.float()
    inside[5] += 1.5 * error
    outside[5] += 1.5 * error * 1.001
    assert_close_to_oracle(inside, stock, oracle)
    rejects(outside, stock, oracle, match=r"element \[5\].*times stock's")
    rejects(inside, stock, oracle, k=1.0, match=r"element \[5\]")
    errors = error_ratio(inside, stock, oracle)
    assert errors.worst == (5,)
    assert errors.stock == pytest.approx(error)
    assert errors.actual == pytest.approx(1.5 * error, rel=1e-3)
    assert 1.49 < errors.ratio <= 1.5


def test_k_above_one_and_a_half_is_refused():
    one = torch.ones(1)
    rejects(one, one, one.double(), k=1.6, match="k=1.6")


def test_ratio_is_infinite_where_only_stock_is_exact():
    oracle = torch.ones(2, dtype=torch.float64)
    errors = error_ratio(torch.tensor([1.0, 1.01]), oracle.float(), oracle)
    assert errors.ratio == math.inf
    assert errors.worst == (1,)


@pytest.mark.parametrize("place", ["actual", "oracle"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_must_stand_in_the_same_places(value, place):
    oracle = torch.zeros(4, dtype=torch.float64)
    actual = oracle.float()
    (actual if place == "actual" else oracle)[2] = value
    stock = torch.full((4,), 1e30)  # no error of stock can excuse it
    rejects(actual, stock, oracle, match=r"the first is \[2\]")
    both = torch.zeros(4)
    both[2] = value
    assert_close_to_oracle(both, both, both.double())
    rejects(-both if not math.isnan(value) else both[[2, 0, 1, 3]], stock, both.double(), match="NaN or infinite")


def test_overflow_of_the_dtype_is_expected_where_the_oracle_overflows():
    oracle = torch.tensor([1e5, 1.0], dtype=torch.float64)
    assert_close_to_oracle(torch.tensor([math.inf, 1.0], dtype=torch.float16), None, oracle)
    rejects(torch.tensor([65504.0, 1.0], dtype=torch.float16), None, oracle, match="NaN or infinite")


def test_stock_that_is_not_finite_excuses_nothing():
    oracle = torch.ones(3, dtype=torch.float64)
    stock = torch.tensor([math.nan, math.inf, 1.0])
    rejects(torch.tensor([1.0, 1.0, 1.1]), stock, oracle, match=r"element \[2\]")


def test_shapes_and_dtypes_must_match():
    one = torch.ones(2, 3)
    rejects(one, one, one, match=r"oracle is torch\.float32")
    rejects(one[0], one, one.double(), match=r"shape \[3\]")
    rejects(one, one[0], one.double(), match=r"stock's shape")
    rejects(one, one.bfloat16(), one.double(), match="not stock's")
    rejects(one.half(), one.bfloat16(), one.double(), match="not stock's")
    assert_close_to_oracle(one.half(), one, one.double())  # a finer stock is stricter
    assert_close_to_oracle(one[:0], None, one[:0].double())


def test_pool_shares_stocks_error_and_keeps_magnitudes_apart():
    oracle = torch.ones(2, dtype=torch.float64)
    exact = oracle.float()
    off = torch.tensor([1.0, 1.0 + 1e-4])
    pool = ErrorPool()
    pool.add(off, exact, oracle, name="lucky stock")
    with pytest.raises(AssertionError, match=r"lucky stock: element \[1\]"):
        pool.check()
    pool.add(exact, off, oracle, name="unlucky stock")
    pool.check()
    assert 0.9 < pool.ratio < 1
    pool.add(off * 1e3, exact * 1e3, oracle * 1e3, name="large")  # same relative error
    pool.check()
    pool.add(off, exact, oracle * 1e-3 + oracle * (1 - 1e-3), name="fine")
    pool.check()
    small = torch.tensor([1e-3, 1e-3 + 1e-4])
    pool.add(small, torch.full((2,), 1e-3), oracle * 1e-3, name="small")
    with pytest.raises(AssertionError, match="small"):
        pool.check()


def test_an_empty_pool_is_an_error():
    pool = ErrorPool()
    pool.add(torch.ones(0), None, torch.ones(0, dtype=torch.float64))
    with pytest.raises(AssertionError, match="nothing was compared"):
        pool.check()


def test_oracle_runs_on_fp64_copies():
    x, running = torch.ones(3, requires_grad=True), torch.zeros(3)

    def function(values, counters, *, scale):
        values[0].add_(scale)
        counters["n"].add_(1)
        assert values[0].dtype == scale.dtype == torch.float64
        return values[1] * 2

    counter = torch.tensor(0)
    result = testing.oracle(function, [running, x], {"n": counter}, scale=torch.tensor(5.0))
    assert result.dtype == torch.float64
    assert result.requires_grad
    assert running.tolist() == [0, 0, 0]
    assert counter.item() == 0


def test_saved_storages_counts_each_storage_once():
    x = torch.randn(4, 5, requires_grad=True)
    weight = torch.randn(6, 5, requires_grad=True)
    assert {s.data_ptr() for s in saved_storages(lambda: nn.functional.linear(x, weight))} == {
        x.data_ptr(),
        weight.data_ptr(),
    }
    assert len(saved_storages(lambda: x[:2] * x[2:])) == 1  # two views of one storage
    assert len(saved_storages(lambda: x.exp().sin())) == 1  # exp keeps its result, sin its input: the same storage
    assert len(saved_storages(lambda: x.sin().cos())) == 2
    assert sum(s.nbytes() for s in saved_storages(lambda: x.exp())) == 80
    with torch.no_grad():
        assert saved_storages(lambda: x.exp()) == []


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 5), (2, 3, 4, 5), (2, 3, 2, 4, 5), (0, 3, 4)])
def test_layouts_hold_the_values_in_the_promised_strides(shape):
    t = torch.randn(shape)
    layouts = make_layouts(t)
    expected = {"contiguous", "sliced", "offset", "transposed"}
    expected |= {"channels_last"} if len(shape) in (4, 5) else set()
    expected |= {"expanded"} if shape[0] else set()
    assert set(layouts) == expected
    for name, layout in layouts.items():
        assert layout.shape == t.shape
        assert torch.equal(layout, t[:1].expand(shape) if name == "expanded" else t)
    if not t.numel():
        return
    assert layouts["contiguous"].is_contiguous()
    assert layouts["sliced"].stride(-1) == 2
    assert layouts["offset"].is_contiguous()
    assert layouts["offset"].data_ptr() % 16 == 4
    assert layouts["expanded"].stride(0) == 0
    assert layouts["transposed"].stride(0) == 1
    assert not layouts["transposed"].is_contiguous()
    if len(shape) in (4, 5):
        assert layouts["channels_last"].stride(1) == 1
    assert len({layout.untyped_storage().data_ptr() for layout in layouts.values()}) == len(layouts)


def test_use_threads_restores():
    before = torch.get_num_threads()
    with testing.use_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_devices_names_the_cpu_first():
    assert testing.devices()[0] == "cpu"
    assert ("cuda" in testing.devices()) == torch.cuda.is_available()
