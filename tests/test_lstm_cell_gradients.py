"""``deepops._lstm_cell``: gradients of loops over a cell, and gradients of gradients, against stock and differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lstm_cell_loops import (
    SIZES,
    Cell,
    State,
    compare,
    gradients,
    inputs_for,
    loop,
    loss_of,
    products,
    same_weights,
    train,
)
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from deepops import _lstm_cell
from deepops._library import has_kernel
from deepops._lstm_cell import CellWeights, step
from deepops.reference import lstm as formulas
from deepops.testing import ErrorPool, saved_storages

pytestmark = pytest.mark.usefixtures("one_thread")
if not has_kernel("lstm_cell", "cpu"):
    pytest.skip("no compiled kernels", allow_module_level=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_as_stock(dtype, bias):
    """A loop forward and backward; all gradients."""
    pool = ErrorPool()
    for inputs, hidden, steps, batch in ((6, 11, 5, 3), (40, 64, 20, 2), (17, 3, 9, 30), (5, 16, 1, 8)):
        cell = Cell(inputs, hidden, bias=bias).to(dtype)
        compare(train, cell, *inputs_for(cell, steps, batch), pool=pool)
    pool.check()


@pytest.mark.parametrize("rows", [0, 10, 1000])
def test_products_in_several_parts(rows, monkeypatch):
    """What is gathered is multiplied when there is much of it."""
    cell = Cell()
    monkeypatch.setattr(_lstm_cell, "_MOST_GATHERED", rows * 4 * SIZES[1] * 4)
    with products() as count:
        compare(train, cell, *inputs_for(cell, 7))
    assert count() == {0: 14, 10: 8, 1000: 4}[rows]


def function_of(peephole: bool, clip: float | None, steps: int) -> Callable[..., State]:
    """Some steps as a function of everything."""

    def run(x: Tensor, h: Tensor, c: Tensor, *tensors: Tensor) -> State:
        weights = CellWeights((*tensors, None)[:5], clip, x.dtype)
        for _ in range(steps):
            h, c = step(x, h, c, weights)
        return h, c

    return run


def doubles(peephole: bool) -> list[Tensor]:
    shapes = [(2, 3), (2, 4), (2, 4), (16, 3), (16, 4), (16,), (16,), *([(12,)] if peephole else [])]
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("peephole", "clip"), [(False, None), (True, None), (True, 0.6)])
def test_gradcheck(peephole, clip, steps):
    run, tensors = function_of(peephole, clip, steps), doubles(peephole)
    assert gradcheck(run, tensors)
    assert gradgradcheck(run, tensors)


def test_gradients_of_gradients_through_a_loop():
    """A gradient penalty: nothing is counted twice, though states and weights have the same history."""

    def penalty(cell: nn.LSTMCell, xs: Tensor, h: Tensor, c: Tensor) -> dict[str, Tensor]:
        leaf = xs.detach().clone().requires_grad_()
        outputs = loop(cell, leaf, (h, c))
        wanted = [leaf, *cell.parameters()]
        grads = torch.autograd.grad(loss_of(outputs), wanted, create_graph=True)
        (sum(g.square().sum() for g in grads) + loss_of(outputs)).backward()
        return {"leaf": leaf.grad, **gradients(cell), **{f"first {i}": g.detach() for i, g in enumerate(grads)}}

    cell = Cell()
    compare(penalty, cell, *inputs_for(cell))


def test_double_backward_of_a_part():
    """The gradient of inputs alone, differentiated for the weights: nothing is gathered for them in the first."""

    def run(cell: nn.LSTMCell, xs: Tensor) -> dict[str, Tensor]:
        leaf = xs.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(loop(cell, leaf)), [leaf], create_graph=True)
        grad.square().sum().backward()
        return {"leaf": leaf.grad, **gradients(cell)}

    cell = Cell()
    compare(run, cell, inputs_for(cell)[0])


def test_gradients_of_inputs_alone_gather_nothing(monkeypatch):
    monkeypatch.setattr(_lstm_cell, "_MOST_GATHERED", 0)
    cell = Cell()
    xs = inputs_for(cell)[0].requires_grad_()
    with products() as count:
        torch.autograd.grad(loss_of(loop(cell, xs)), [xs])
    assert count() == 0


def test_biases_do_not_share_their_gradients():
    """Clipping scales each of them in place."""
    cell = Cell()
    loss = loss_of(loop(cell, inputs_for(cell)[0]))
    first, second = torch.autograd.grad(loss, [cell.bias_ih, cell.bias_hh])
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, second)


def test_frozen_tensors():
    """One of the weights or one of the biases."""
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        cell = Cell()
        getattr(cell, name).requires_grad_(False)
        results = compare(train, cell, *inputs_for(cell))
        assert name not in results


def test_saves_no_more_than_stock():
    cell = Cell(30, 64)
    xs = torch.randn(6, 8, 30)

    def kept(cell: nn.LSTMCell) -> int:
        return sum(storage.nbytes() for storage in saved_storages(lambda: loop(cell, xs)))

    assert kept(cell) <= kept(same_weights(cell))


def test_inputs_without_gradients_and_expanded_ones():
    """Rows of a batch-first tensor, an expanded state, an expanded gradient."""

    def run(cell: nn.LSTMCell, inputs: Tensor, h: Tensor) -> dict[str, Tensor]:
        state = (h[:1].expand_as(h), h)
        for t in range(inputs.size(1)):
            state = cell(inputs[:, t], state)
        state[0].sum().backward()
        return gradients(cell)

    cell = Cell()
    compare(run, cell, torch.randn(3, 4, SIZES[0]), torch.randn(3, SIZES[1]))


def test_empty_batch():
    def run(cell: nn.LSTMCell, xs: Tensor) -> dict[str, Tensor]:
        loop(cell, xs)[0].sum().backward()
        return gradients(cell)

    cell = Cell()
    for name, grad in compare(run, cell, torch.randn(3, 0, SIZES[0])).items():
        assert not grad.any(), name


def test_another_dtype_than_the_weights():
    """16-bit steps with fp32 weights, as under autocast: rounded once, gradients in the dtype of the weights."""
    cell = Cell()
    x, h, c = inputs_for(cell)
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        cell.zero_grad()
        state = (h.to(dtype), c.to(dtype))
        for row in x:
            state = cell.cache.step(row.to(dtype), *state, (*cell.parameters(), None))
        with torch.autocast("cpu"):
            loss_of([*state]).backward()
        results.append(gradients(cell))
        assert all(grad.dtype is torch.float32 for grad in gradients(cell).values())
    stock = nn.LSTMCell(*SIZES).bfloat16()
    stock.load_state_dict(cell.state_dict())
    wide = nn.LSTMCell(*SIZES).double()
    wide.load_state_dict(cell.state_dict())
    loss_of(loop(stock, x.bfloat16(), (h.bfloat16(), c.bfloat16()))[-2:]).backward()
    loss_of(loop(wide, x.double(), (h.double(), c.double()))[-2:]).backward()
    pool = ErrorPool()
    for name, grad in gradients(wide).items():
        pool.add(results[0][name].bfloat16(), gradients(stock)[name], grad, name=name)
    pool.check()


def test_peepholes_and_clipping_in_a_loop():
    """Against the reference: these have no stock."""
    dtypes = (torch.float32, torch.float64)
    shapes = ((5, 3, 6), (44, 6), (44, 11), (44,), (44,), (33,))
    tensors = [torch.randn(shape) for shape in shapes]

    def reference(*tensors: Tensor) -> list[Tensor]:
        xs, weight_ih, weight_hh, bias_ih, bias_hh, peephole = (t.detach().clone().requires_grad_() for t in tensors)
        gates = F.linear(xs, weight_ih, bias_ih + bias_hh)
        zero = xs.new_zeros(3, 11)
        h, _, _, c = formulas.lstm_sequence(gates, zero, zero, weight_hh, weight_peephole=peephole, cell_clip=1.1)
        leaves = (xs, weight_ih, weight_hh, bias_ih, bias_hh, peephole)
        return list(torch.autograd.grad(loss_of([*h, c]), leaves))

    leaves = [t.clone().requires_grad_() for t in tensors]
    weights = CellWeights((*leaves[1:],), 1.1, torch.float32)  # type: ignore[arg-type]
    outputs = loop(lambda x, state: step(x, *(state or (x.new_zeros(3, 11),) * 2), weights), leaves[0])
    actual = torch.autograd.grad(loss_of(outputs), leaves)
    stock, wide = (reference(*(t.to(dtype) for t in tensors)) for dtype in dtypes)
    pool = ErrorPool()
    for i, values in enumerate(zip(actual, stock, wide, strict=True)):
        pool.add(*values, name=f"gradient {i}")
    pool.check()
