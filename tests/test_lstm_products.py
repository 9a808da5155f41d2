"""The large products around an LSTM's sequence on the CPU: ``_lstm_product`` and ``_lstm_weight_gradient``."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from deepops import functional, testing
from deepops._library import has_kernel
from deepops.testing import ErrorPool, count_parallel_regions, use_isa, use_threads

assert functional  # registers the fakes
pytestmark = pytest.mark.usefixtures("one_thread")
if not has_kernel("_lstm_product", "cpu"):
    pytest.skip("no compiled kernels", allow_module_level=True)

# rows, size, columns: of the product; rows are what a gradient is summed over
SHAPES = [(1, 1, 1), (5, 3, 7), (17, 64, 65), (130, 129, 63), (257, 20, 128), (700, 33, 80), (64, 300, 200)]


def weight_gradient(grad, x, start=None, start_last=False, sums=False):
    return torch.ops.deepops._lstm_weight_gradient(grad, x, start, start_last, sums)


@pytest.mark.parametrize("isa", testing.isas())
def test_values(isa):
    pools = {name: ErrorPool() for name in ("x W^T + b", "x W", "g^T x", "sums of g")}
    with use_isa(isa):
        for (rows, size, columns), _ in product(SHAPES, range(2)):
            x, weight, bias = torch.randn(rows, size), torch.randn(columns, size), torch.randn(columns)
            back, grad = torch.randn(size, columns), torch.randn(rows, columns)
            of_weight, sums = weight_gradient(grad, x, sums=True)
            results = {
                "x W^T + b": (
                    torch.ops.deepops._lstm_product(x, weight, bias, True),
                    torch.addmm(bias, x, weight.T),
                    torch.addmm(bias.double(), x.double(), weight.T.double()),
                ),
                "x W": (torch.ops.deepops._lstm_product(x, back, None, False), x @ back, x.double() @ back.double()),
                "g^T x": (of_weight, grad.T @ x, grad.T.double() @ x.double()),
                "sums of g": (sums, grad.sum(0), grad.double().sum(0)),
            }
            for name, (actual, stock, oracle) in results.items():
                pools[name].add(actual, stock, oracle, name=f"{name} {(rows, size, columns)}")
    for pool in pools.values():
        pool.check()


@pytest.mark.parametrize("start_last", [False, True])
@pytest.mark.parametrize("at", [0, 1, 255, 256, 257, 699, 700])
def test_rows_in_two_parts(at, start_last):
    x, grad = torch.randn(700, 33), torch.randn(700, 80)
    expected = weight_gradient(grad, x, sums=True)
    start, others = (x[at:], x[:at]) if start_last else (x[:at], x[at:])
    for part, again in zip(expected, weight_gradient(grad, others, start, start_last, sums=True), strict=True):
        assert torch.equal(part, again)


def test_double_precision():
    for rows, size, columns in SHAPES:
        x, weight, grad = (
            torch.randn(s, dtype=torch.float64) for s in ((rows, size), (size, columns), (rows, columns))
        )
        actual = torch.ops.deepops._lstm_product(x, weight, None, False)
        torch.testing.assert_close(actual, x @ weight, rtol=1e-11, atol=1e-11)
        of_weight, sums = weight_gradient(grad, x, sums=True)
        torch.testing.assert_close(of_weight, grad.T @ x, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(sums, grad.sum(0), rtol=1e-11, atol=1e-11)


def test_same_bits_for_every_thread_count():
    x, weight, grad = torch.randn(700, 150), torch.randn(600, 150), torch.randn(700, 600)
    expected = torch.ops.deepops._lstm_product(x, weight, None, True), weight_gradient(grad, x, sums=True)
    for threads in (2, 3):
        with use_threads(threads), count_parallel_regions() as regions:
            product_again = torch.ops.deepops._lstm_product(x, weight, None, True)
            gradient_again = weight_gradient(grad, x, sums=True)
        assert torch.equal(product_again, expected[0])
        assert all(map(torch.equal, gradient_again, expected[1]))
        assert regions.count == 3  # packing, the product; the gradient


def test_a_row_does_not_depend_on_the_others():
    x, weight = torch.randn(100, 70), torch.randn(70, 90)
    whole = torch.ops.deepops._lstm_product(x, weight, None, False)
    for rows in (1, 2, 5, 6, 7, 13):
        assert torch.equal(torch.ops.deepops._lstm_product(x[:rows], weight, None, False), whole[:rows])


def test_empty():
    assert torch.ops.deepops._lstm_product(torch.zeros(0, 5), torch.zeros(5, 7), None, False).shape == (0, 7)
    bias = torch.arange(7.0)
    nothing = torch.ops.deepops._lstm_product(torch.zeros(3, 0), torch.zeros(7, 0), bias, True)
    assert torch.equal(nothing, bias.expand(3, 7))


def test_values_that_are_not_finite():
    x = torch.randn(9, 20)
    x[3, 4], x[5, 6] = float("nan"), float("inf")
    actual = torch.ops.deepops._lstm_product(x, torch.ones(20, 70), None, False)
    assert actual[3].isnan().all()
    assert actual[5].isposinf().all()
    assert actual[[0, 1, 2, 4, 6, 7, 8]].isfinite().all()


def test_fakes():
    checks = ("test_schema", "test_faketensor")
    x, weight = torch.randn(9, 20), torch.randn(30, 20)
    torch.library.opcheck(torch.ops.deepops._lstm_product, (x, weight, torch.randn(30), True), test_utils=checks)
    grad, op = torch.randn(9, 30), torch.ops.deepops._lstm_weight_gradient
    torch.library.opcheck(op, (grad, x, None, False, False), test_utils=checks)
    torch.library.opcheck(op, (grad, x[:7], x[7:], True, True), test_utils=checks)


def test_bad_input():
    x, weight, multiply = torch.randn(9, 20), torch.randn(30, 20), torch.ops.deepops._lstm_product
    for arguments, message in (
        ((x[0], weight, None, True), "a must be a contiguous matrix"),
        ((x.T, weight, None, True), "a must be a contiguous matrix"),
        ((x, weight, None, False), "weight does not fit a"),
        ((x, weight.double(), None, True), "weight must be float32 or float64, as all others"),
        ((x.half(), weight.half(), None, True), "a must be float32 or float64"),
        ((x, weight, torch.zeros(29), True), r"bias must be \[30\], contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            multiply(*arguments)
    with pytest.raises(RuntimeError, match="the same rows, at least one"):
        weight_gradient(x, x[:5])
    with pytest.raises(RuntimeError, match="the same rows, at least one"):
        weight_gradient(x, x, x[:1])
    with pytest.raises(RuntimeError, match="start must have the columns of x"):
        weight_gradient(x, x[1:], x[:1, 1:])
    with pytest.raises(RuntimeError, match="start must be a contiguous matrix"):
        weight_gradient(x, x[1:], x[0])
