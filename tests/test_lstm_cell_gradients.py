"""``deepops._lstm_cell``: gradients of loops over a cell, in every situation that autograd can bring it into."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import on_ranks, process_pools  # noqa: F401
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from deepops import _lstm_cell
from deepops._library import has_kernel
from deepops._lstm_cell import CellCache, CellWeights, step
from deepops.reference import lstm as formulas
from deepops.testing import ErrorPool, oracle, saved_storages, use_threads

pytestmark = pytest.mark.usefixtures("one_thread")
if not has_kernel("lstm_cell", "cpu"):
    pytest.skip("no compiled kernels", allow_module_level=True)

State = tuple[Tensor, Tensor]
SIZES = (20, 33)  # inputs, units


class Cell(nn.LSTMCell):
    """Stock, with the step under test."""

    def __init__(self, inputs: int = SIZES[0], hidden: int = SIZES[1], **options: bool) -> None:
        super().__init__(inputs, hidden, **options)
        self.cache = CellCache()

    def forward(self, x: Tensor, state: State | None = None) -> State:
        h, c = state or (x.new_zeros(x.size(0), self.hidden_size),) * 2
        biases = (self.bias_ih, self.bias_hh) if self.bias else (None, None)
        return self.cache.step(x, h, c, (self.weight_ih, self.weight_hh, *biases, None))


def loop(cell: Callable[..., State], xs: Tensor, state: State | None = None) -> list[Tensor]:
    """The h of every step, and the last c."""
    hs = []
    for x in xs:
        state = cell(x, state)
        hs.append(state[0])
    assert state is not None
    return [*hs, state[1]]


def loss_of(tensors: list[Tensor]) -> Tensor:
    """A sum with a different weight for every value."""
    return sum(
        ((t * torch.linspace(-1, 1.5, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in tensors),
        torch.zeros((), dtype=tensors[0].dtype),
    )


def same_weights(cell: nn.LSTMCell) -> nn.LSTMCell:
    stock = nn.LSTMCell(cell.input_size, cell.hidden_size, cell.bias, dtype=cell.weight_hh.dtype)
    stock.load_state_dict(cell.state_dict())
    for mine, its in zip(stock.parameters(), cell.parameters(), strict=True):
        mine.requires_grad_(its.requires_grad)
    return stock


def gradients(cell: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in cell.named_parameters() if p.grad is not None}


def compare(
    scenario: Callable[..., dict[str, Tensor]], cell: Cell, *tensors: Tensor, pool: ErrorPool | None = None
) -> dict[str, Tensor]:
    """Run the scenario with the cell, with stock, and with stock in fp64: results must be as near to that as stock's.

    With a ``pool`` it takes in the errors, for its owner to check.
    """
    stock = same_weights(cell)
    expected = oracle(scenario, stock.double(), *tensors)
    other = scenario(same_weights(cell), *tensors)
    actual = scenario(cell, *tensors)
    assert actual.keys() == other.keys() == expected.keys()
    errors = pool or ErrorPool()
    for name, value in actual.items():
        assert value.dtype is other[name].dtype
        # States and gradients are numbers around 1: what is smaller is left over from sums of such.
        scale = max(1.0, expected[name].abs().max().item()) if value.numel() else None
        errors.add(value, other[name], expected[name], name=name, scale=scale)
    if pool is None:
        errors.check()
    return actual


def _train(cell: nn.LSTMCell, xs: Tensor, h: Tensor, c: Tensor) -> dict[str, Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (xs, h, c)]
    outputs = loop(cell, leaves[0], (leaves[1], leaves[2]))
    loss_of(outputs).backward()
    states = {f"state {i}": t.detach() for i, t in enumerate(outputs)}
    return states | gradients(cell) | {n: t.grad for n, t in zip(("xs", "h", "c"), leaves, strict=True)}


def inputs_for(cell: nn.LSTMCell, steps: int = 5, batch: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    dtype, hidden = cell.weight_hh.dtype, cell.hidden_size
    xs = torch.randn(steps, batch, cell.input_size).to(dtype)
    return xs, torch.randn(batch, hidden).to(dtype), torch.randn(batch, hidden).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_as_stock(dtype, bias):
    """A loop forward and backward; all gradients."""
    pool = ErrorPool()
    for inputs, hidden, steps, batch in ((6, 11, 5, 3), (40, 64, 20, 2), (17, 3, 9, 30), (5, 16, 1, 8)):
        cell = Cell(inputs, hidden, bias=bias).to(dtype)
        compare(_train, cell, *inputs_for(cell, steps, batch), pool=pool)
    pool.check()


@pytest.mark.parametrize("rows", [0, 10, 1000])
def test_products_in_several_parts(rows, monkeypatch):
    """What is gathered is multiplied when there is much of it."""
    cell = Cell()
    monkeypatch.setattr(_lstm_cell, "_MOST_GATHERED", rows * 4 * SIZES[1] * 4)
    with products() as count:
        compare(_train, cell, *inputs_for(cell, 7))
    assert count() == {0: 14, 10: 8, 1000: 4}[rows]


@contextmanager
def products() -> Iterator[Callable[[], int]]:
    """How many products with gathered gradients are taken inside the block."""
    taken = []
    mm, addmm = torch.mm, Tensor.addmm_

    def spy(function):
        def called(*args):
            taken.append(function)
            return function(*args)

        return called

    with mock.patch.object(torch, "mm", spy(mm)), mock.patch.object(Tensor, "addmm_", spy(addmm)):
        yield lambda: len(taken)


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


def test_weights_are_packed_once_for_a_sequence():
    cell = Cell()
    xs = inputs_for(cell)[0]
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)
    for n in range(1, 4):
        with products() as count:
            loss_of(loop(cell, xs)).backward()
        assert count() == 4  # two for each half of the 40 rows
        assert cell.cache.packs == n
        optimizer.step()


def test_writes_that_torch_does_not_count_are_seen_without_gradients():
    """Nothing tells that a weight was written to through ``.data``, or by another process."""
    cell = Cell()
    xs = inputs_for(cell)[0]
    loss_of(loop(cell, xs)).backward()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            for parameter in cell.parameters():
                parameter.data.mul_(0.5)
            state = cell(xs[0])
            cell.weight_hh.data.mul_(0.5)
            state = cell(xs[1], state)
            fresh = Cell()
            fresh.load_state_dict(cell.state_dict())
            fresh.weight_hh.data.mul_(2)
            expected = fresh(xs[0])
            fresh.weight_hh.data.mul_(0.5)
            expected = fresh(xs[1], expected)
        assert torch.equal(state[0], expected[0])
        assert torch.equal(state[1], expected[1])


def test_a_frozen_cell_sees_its_weights_at_every_sequence():
    """Its states have a history, that of what made the first one; no backward comes to its weights."""
    cell = Cell()
    cell.requires_grad_(False)
    xs = inputs_for(cell)[0]
    first = torch.randn(xs[0].size(0), cell.weight_hh.size(1), requires_grad=True) * 2
    outputs = []
    for _ in range(2):
        outputs.append(cell(xs[0], (first, first))[0])
        for parameter in cell.parameters():
            parameter.data.mul_(2)
    fresh = Cell()
    fresh.load_state_dict({name: value / 2 for name, value in cell.state_dict().items()})
    assert torch.equal(outputs[1], fresh(xs[0], (first, first))[0])


@pytest.mark.parametrize("name", ["bias_ih", "bias_hh", "weight_ih", "weight_hh"])
def test_double_backward_refuses_weights_that_were_written_to(name: str):
    """It computes the step again, from all of them; x and the first state want no gradient here."""
    cell = Cell()
    x = inputs_for(cell)[0][0].detach()
    h, c = cell(x)
    with torch.no_grad():
        getattr(cell, name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(h.sum() + c.sum(), list(cell.parameters()), create_graph=True)


def _changes() -> dict[str, Callable[[Cell], object]]:
    def writes_through_data(cell: Cell) -> None:
        cell.weight_hh.data.mul_(0.5)

    def other_memory(cell: Cell) -> None:
        cell.weight_ih.data = cell.weight_ih.data * 2

    def other_parameter(cell: Cell) -> None:
        cell.bias_hh = nn.Parameter(torch.ones_like(cell.bias_hh))

    def in_place(cell: Cell) -> None:
        with torch.no_grad():
            cell.bias_ih.add_(1)

    def loads(cell: Cell) -> None:
        cell.load_state_dict({name: value + 1 for name, value in cell.state_dict().items()})

    def freezes(cell: Cell) -> None:
        cell.weight_ih.requires_grad_(False)

    def steps(cell: Cell) -> None:
        torch.optim.Adam(cell.parameters()).step()

    changes = (writes_through_data, other_memory, other_parameter, in_place, loads, freezes, steps)
    return {change.__name__: change for change in changes}


@pytest.mark.parametrize("name", _changes())
def test_changed_weights_are_seen(name):
    """At the beginning of the next sequence at the latest, also what torch does not count."""
    cell = Cell()
    inputs = inputs_for(cell)
    compare(_train, cell, *inputs)
    cell.zero_grad()
    _changes()[name](cell)
    compare(_train, cell, *inputs)


def test_thawed_weights_get_gradients():
    cell = Cell().requires_grad_(False)
    inputs = inputs_for(cell)
    assert not gradients(cell)
    compare(_train, cell, *inputs)
    assert not gradients(cell)
    cell.requires_grad_()
    assert compare(_train, cell, *inputs).keys() >= gradients(cell).keys() == dict(cell.named_parameters()).keys()


def test_dtype_changes_with_the_module():
    cell = Cell()
    compare(_train, cell, *inputs_for(cell))
    cell.zero_grad()
    cell.half()
    compare(_train, cell, *inputs_for(cell))


@pytest.mark.parametrize("create_graph", [False, True])
def test_modified_weights_are_refused(create_graph):
    """In torch's words, where a backward needs them; not where it does not."""
    cell = Cell()
    for name in ("weight_ih", "weight_hh"):
        xs = inputs_for(cell)[0].requires_grad_()
        outputs = loop(cell, xs)
        with torch.no_grad():
            getattr(cell, name).add_(1)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation: .* is at version .*; expected"):
            loss_of(outputs).backward(create_graph=create_graph)
    x, h, c = (t[0] if t.dim() == 3 else t for t in inputs_for(cell))
    outputs = [*cell(x, (h, c))]  # one step, no gradient but the weights'
    with torch.no_grad():
        cell.weight_hh.add_(1)
    loss_of(outputs).backward()
    assert gradients(cell)


def test_retained_graph():
    """Twice over the same steps: twice the gradients. A third time, without the graph, is refused as torch does."""
    cell = Cell()
    xs = inputs_for(cell)[0]

    def run(cell: nn.LSTMCell, xs: Tensor) -> dict[str, Tensor]:
        loss = loss_of(loop(cell, xs))
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        return gradients(cell)

    compare(run, cell, xs)


def test_two_loops():
    """With one cell, in one backward or in two, in any order; interleaved."""

    def one_backward(cell: nn.LSTMCell, xs: Tensor, ys: Tensor) -> dict[str, Tensor]:
        (loss_of(loop(cell, xs)) + 2 * loss_of(loop(cell, ys))).backward()
        return gradients(cell)

    def two_backwards(cell: nn.LSTMCell, xs: Tensor, ys: Tensor) -> dict[str, Tensor]:
        first, second = loss_of(loop(cell, xs)), loss_of(loop(cell, ys))
        second.backward()
        first.backward()
        return gradients(cell)

    def accumulated(cell: nn.LSTMCell, xs: Tensor, ys: Tensor) -> dict[str, Tensor]:
        loss_of(loop(cell, xs)).backward()
        loss_of(loop(cell, ys)).backward()
        return gradients(cell)

    def interleaved(cell: nn.LSTMCell, xs: Tensor, ys: Tensor) -> dict[str, Tensor]:
        a = b = None
        for x, y in zip(xs, ys, strict=True):
            a, b = cell(x, a), cell(y, b)
        assert a is not None
        assert b is not None
        loss_of([*a, *b]).backward()
        return gradients(cell)

    pool = ErrorPool()
    for scenario in (one_backward, two_backwards, accumulated, interleaved) * 2:
        cell = Cell()
        compare(scenario, cell, inputs_for(cell)[0], inputs_for(cell)[0], pool=pool)
    pool.check()


def test_parts_of_a_graph():
    """Losses of some steps, gradients of some inputs."""

    def early_steps(cell: nn.LSTMCell, xs: Tensor) -> dict[str, Tensor]:
        hs = loop(cell, xs)
        loss_of(hs[:2]).backward(retain_graph=True)
        loss_of(hs[1:3]).backward()
        return gradients(cell)

    def one_weight(cell: nn.LSTMCell, xs: Tensor) -> dict[str, Tensor]:
        loss = loss_of(loop(cell, xs))
        hh = torch.autograd.grad(loss, [cell.weight_hh], retain_graph=True)
        return {"hh": hh[0], "bias": torch.autograd.grad(loss, [cell.bias_hh, cell.weight_ih])[0]}

    def only_c(cell: nn.LSTMCell, xs: Tensor) -> dict[str, Tensor]:
        loop(cell, xs)[-1].sum().backward()
        return gradients(cell)

    def through_a_weight_as_well(cell: nn.LSTMCell, xs: Tensor) -> dict[str, Tensor]:
        (loss_of(loop(cell, xs)) + cell.weight_hh.square().sum()).backward()
        return gradients(cell)

    def backward_to_some(cell: nn.LSTMCell, xs: Tensor) -> dict[str, Tensor]:
        loss_of(loop(cell, xs)).backward(inputs=[cell.weight_ih, cell.bias_ih])
        return gradients(cell)

    pool = ErrorPool()
    for scenario in (early_steps, one_weight, only_c, through_a_weight_as_well, backward_to_some) * 2:
        cell = Cell()
        compare(scenario, cell, inputs_for(cell)[0], pool=pool)
    pool.check()


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


def test_writes_that_torch_does_not_count_are_seen_without_a_backward():
    """By the next sequence: a state that is a leaf. As gradcheck writes to the tensors it is given."""
    cell = Cell()
    inputs = inputs_for(cell)
    loop(cell, *inputs[:1], inputs[1:])
    cell.weight_ih.data[3] += 1
    compare(_train, cell, *inputs)


def test_frozen_tensors():
    """One of the weights or one of the biases."""
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        cell = Cell()
        getattr(cell, name).requires_grad_(False)
        results = compare(_train, cell, *inputs_for(cell))
        assert name not in results


def test_shared_parameters():
    """Two cells with one set of weights, in one loop."""

    def run(cell: nn.LSTMCell, xs: Tensor) -> dict[str, Tensor]:
        other = copy.copy(cell)
        if isinstance(other, Cell):
            other.cache = CellCache()
        state = None
        for x in xs:
            state = other(x, cell(x, state))
        assert state is not None
        loss_of([*state]).backward()
        return gradients(cell)

    cell = Cell()
    compare(run, cell, inputs_for(cell)[0])


def test_weights_with_a_history():
    """Computed anew for each step, as by a parametrization: not kept, and their history gets its gradients."""

    def run(cell: nn.LSTMCell, xs: Tensor) -> dict[str, Tensor]:
        nn.utils.parametrizations.weight_norm(cell, "weight_hh")
        loss_of(loop(cell, xs)).backward()
        return gradients(cell)

    cell = Cell()
    compare(run, cell, inputs_for(cell)[0])
    assert cell.cache._weights is None


def test_hooks():
    """On parameters: called once, with the whole gradient."""
    cell = Cell()
    calls: list[str] = []
    for name, p in cell.named_parameters():
        p.register_hook(lambda grad, name=name: (calls.append(name), grad * 2)[1])
        p.register_post_accumulate_grad_hook(lambda p, name=name: calls.append(f"{name} done"))
    xs = inputs_for(cell)[0]
    loss_of(loop(cell, xs)).backward()
    assert sorted(calls) == sorted(n + s for n, _ in cell.named_parameters() for s in ("", " done"))
    doubled = gradients(cell)
    plain = Cell()
    plain.load_state_dict(cell.state_dict())
    loss_of(loop(plain, xs)).backward()
    for name, grad in gradients(plain).items():
        assert torch.equal(grad * 2, doubled[name])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant):
    """Parts of the loop computed again in the backward."""

    def run(cell: nn.LSTMCell, xs: Tensor, h: Tensor, c: Tensor) -> dict[str, Tensor]:
        leaf = xs.detach().clone().requires_grad_()
        state = (h.detach().clone().requires_grad_(), c)

        def part(xs: Tensor, h: Tensor, c: Tensor) -> State:
            outputs = loop(cell, xs, (h, c))
            return outputs[-2], outputs[-1]

        for begin in (0, 2, 4):
            state = checkpoint(part, leaf[begin : begin + 2], *state, use_reentrant=use_reentrant)
        loss_of([*state]).backward()
        return {"leaf": leaf.grad, **gradients(cell)}

    cell = Cell()
    compare(run, cell, *inputs_for(cell, 6))


def test_threads():
    """Several forwards and backwards of one cell at a time."""
    cell = Cell()
    parameters = list(cell.parameters())
    xs = [inputs_for(cell)[0] for _ in range(4)]
    found: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def work(i: int) -> None:
        for n in range(10):
            found[i, n] = torch.autograd.grad(loss_of(loop(cell, xs[i])), parameters)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stock, wide = same_weights(cell), same_weights(cell).double()
    pool = ErrorPool()
    for (i, n), grads in found.items():
        others = torch.autograd.grad(loss_of(loop(stock, xs[i])), list(stock.parameters()))
        expected = torch.autograd.grad(loss_of(loop(wide, xs[i].double())), list(wide.parameters()))
        for j, values in enumerate(zip(grads, others, expected, strict=True)):
            pool.add(*values, name=f"thread {i}, turn {n}, gradient {j}")
    assert len(found) == 40
    pool.check()


def test_the_same_bits_with_any_number_of_threads():
    cell = Cell(100, 130)
    inputs = inputs_for(cell, 4, 40)
    results = []
    for threads in (1, 2, 2):
        cell.zero_grad()
        with use_threads(threads):
            results.append(_train(cell, *inputs))
    for name in ("state 0", "state 4", "xs", "h", "c"):  # those of weights are torch's products
        assert torch.equal(results[0][name], results[1][name])
    for name, value in results[1].items():
        assert torch.equal(value, results[2][name])


def test_nothing_is_left_after_an_error():
    """A backward that fails half way leaves nothing for the next one."""
    cell = Cell()
    xs = inputs_for(cell)[0]
    hs = loop(cell, xs)
    fail = True

    def hook(grad: Tensor) -> None:
        if fail:
            raise ValueError("half way")

    hs[2].register_hook(hook)
    weights = cell.cache._weights
    assert weights is not None
    with pytest.raises(ValueError, match="half way"):
        loss_of(hs).backward(retain_graph=True)
    gc.collect()
    assert not weights.running
    assert not gradients(cell)
    fail = False
    loss_of(hs).backward()
    expected = gradients(cell)
    plain = Cell()
    plain.load_state_dict(cell.state_dict())
    loss_of(loop(plain, xs)).backward()
    for name, grad in gradients(plain).items():
        assert torch.equal(grad, expected[name])


def test_memory_is_given_back_without_the_garbage_collector():
    """No reference leads from the weights around to themselves."""
    cell = Cell()
    gc.collect()
    gc.disable()
    try:
        loss_of(loop(cell, inputs_for(cell)[0])).backward()
        assert cell.cache._weights is not None
        packed = weakref.ref(cell.cache._weights)
        loss_of(loop(cell, inputs_for(cell)[0])).backward()
        assert packed() is None
    finally:
        gc.enable()


def test_copies_and_pickles_have_a_cache_of_their_own():
    cell = Cell()
    xs = inputs_for(cell)[0]
    loss_of(loop(cell, xs)).backward()
    assert cell.cache._weights is not None
    plain = pickle.dumps(Cell())
    for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        assert other.cache._weights is None
        other.zero_grad()
        with torch.no_grad():
            other.weight_hh.mul_(2)
        compare(_train, other, *inputs_for(other))
    cell.zero_grad()
    assert abs(len(pickle.dumps(cell)) - len(plain)) < 100


def test_evaluation():
    """Without gradients: the same states, nothing saved, no weights kept; in inference mode, too."""
    cell = Cell()
    xs = inputs_for(cell)[0]
    expected = loop(cell, xs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for a, b in zip(loop(cell, xs), expected, strict=True):
                assert torch.equal(a, b)
                assert a.grad_fn is None
        assert cell.cache._weights is None
    loss_of(loop(cell, xs)).backward()
    with torch.inference_mode():
        made_there = Cell()
        first = loop(made_there, xs)
        made_there.weight_hh.mul_(2)
        assert not torch.equal(first[-1], loop(made_there, xs)[-1])


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


@on_ranks(2)
def test_ddp():
    """Each process has half of the batch; gradients are those of the whole."""
    torch.manual_seed(0)
    cell = Cell()
    xs = torch.randn(5, 4, SIZES[0])
    mine = xs[:, dist.get_rank() * 2 :][:, :2]
    ddp = DistributedDataParallel(Loop(cell))
    for _ in range(2):
        cell.zero_grad()
        ddp(mine).backward()
    whole = Cell()
    whole.load_state_dict(cell.state_dict())
    (sum(Loop(whole)(xs[:, 2 * rank :][:, :2]) for rank in range(2)) / 2).backward()
    for name, grad in gradients(whole).items():
        torch.testing.assert_close(gradients(cell)[name], grad)


class Loop(nn.Module):
    """The loss of a loop over a cell."""

    def __init__(self, cell: nn.LSTMCell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, xs: Tensor) -> Tensor:
        return loss_of(loop(self.cell, xs))
