"""``deepops._lstm_cell``: weights are packed once for a sequence, and no change of them is missed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from lstm_cell_loops import (
    Cell,
    compare,
    gradients,
    inputs_for,
    loop,
    loss_of,
    products,
    train,
)
from torch import Tensor, nn

from deepops._library import has_kernel
from deepops._lstm_cell import CellCache

pytestmark = pytest.mark.usefixtures("one_thread")
if not has_kernel("lstm_cell", "cpu"):
    pytest.skip("no compiled kernels", allow_module_level=True)


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


def test_writes_that_torch_does_not_count_are_seen_without_a_backward():
    """By the next sequence: a state that is a leaf. As gradcheck writes to the tensors it is given."""
    cell = Cell()
    inputs = inputs_for(cell)
    loop(cell, *inputs[:1], inputs[1:])
    cell.weight_ih.data[3] += 1
    compare(train, cell, *inputs)


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


def changes() -> dict[str, Callable[[Cell], object]]:
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


@pytest.mark.parametrize("name", changes())
def test_changed_weights_are_seen(name):
    """At the beginning of the next sequence at the latest, also what torch does not count."""
    cell = Cell()
    inputs = inputs_for(cell)
    compare(train, cell, *inputs)
    cell.zero_grad()
    changes()[name](cell)
    compare(train, cell, *inputs)


def test_thawed_weights_get_gradients():
    cell = Cell().requires_grad_(False)
    inputs = inputs_for(cell)
    assert not gradients(cell)
    compare(train, cell, *inputs)
    assert not gradients(cell)
    cell.requires_grad_()
    assert compare(train, cell, *inputs).keys() >= gradients(cell).keys() == dict(cell.named_parameters()).keys()


def test_dtypechanges_with_the_module():
    cell = Cell()
    compare(train, cell, *inputs_for(cell))
    cell.zero_grad()
    cell.half()
    compare(train, cell, *inputs_for(cell))


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
        compare(train, other, *inputs_for(other))
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
