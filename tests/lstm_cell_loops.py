"""Loops over ``deepops._lstm_cell``'s step and over stock's cell, and how near the one is to the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

from deepops._lstm_cell import CellCache
from deepops.testing import ErrorPool, oracle

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


def train(cell: nn.LSTMCell, xs: Tensor, h: Tensor, c: Tensor) -> dict[str, Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (xs, h, c)]
    outputs = loop(cell, leaves[0], (leaves[1], leaves[2]))
    loss_of(outputs).backward()
    states = {f"state {i}": t.detach() for i, t in enumerate(outputs)}
    return states | gradients(cell) | {n: t.grad for n, t in zip(("xs", "h", "c"), leaves, strict=True)}


def inputs_for(cell: nn.LSTMCell, steps: int = 5, batch: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    dtype, hidden = cell.weight_hh.dtype, cell.hidden_size
    xs = torch.randn(steps, batch, cell.input_size).to(dtype)
    return xs, torch.randn(batch, hidden).to(dtype), torch.randn(batch, hidden).to(dtype)


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
