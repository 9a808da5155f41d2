"""Gradients of the LSTM, and gradients of gradients, against finite differences in fp64; what autograd does with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lstm_layers import CELLS, LAYERS, choose_clip, disturb, initial_states, make
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from deepops.nn import LSTM, LSTMCell

pytestmark = pytest.mark.usefixtures("one_thread")

DOUBLE = torch.float64


def as_function(module: nn.Module, **options: Any) -> tuple[Any, list[Tensor]]:
    """``module`` as a function of everything it has, for gradcheck; its parameters in the order it takes them."""
    names = [name for name, _ in module.named_parameters()]

    def function(x: Tensor, h: Tensor, c: Tensor, *parameters: Tensor) -> list[Tensor]:
        found = torch.func.functional_call(
            module, dict(zip(names, parameters, strict=True)), (x, (h, c)), options, strict=True
        )
        return [leaf for leaf in torch.utils._pytree.tree_leaves(found) if isinstance(leaf, Tensor)]

    return function, [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]


def layer_inputs(name: str) -> tuple[LSTM, list[Tensor]]:
    lstm, x = make(3, 2, 2, 3, DOUBLE, **LAYERS[name])
    if lstm.cell_clip is not None:
        choose_clip(lstm, x)
    return lstm, [t.requires_grad_() for t in (x, *initial_states(lstm, 2))]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck_of_the_layer(name: str, training: bool) -> None:
    lstm, inputs = layer_inputs(name)
    lstm.return_all_states = True
    function, parameters = as_function(lstm.train(training), seed=3)
    assert gradcheck(function, (*inputs, *parameters), fast_mode=name in ("two layers", "all", "all but masks"))


@pytest.mark.parametrize("lengths", [[3, 1], [0, 3]], ids=str)
@pytest.mark.parametrize("name", ["plain", "two layers", "layer norm", "peephole", "zoneout"])
def test_gradcheck_with_lengths(name: str, lengths: list[int]) -> None:
    lstm, inputs = layer_inputs(name)
    function, parameters = as_function(lstm, seed=3, lengths=lengths)
    assert gradcheck(function, (*inputs, *parameters), fast_mode=name == "two layers")
    assert gradgradcheck(function, (*inputs, *parameters), fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
def test_gradgradcheck_of_the_layer(name: str) -> None:
    lstm, inputs = layer_inputs(name)
    function, parameters = as_function(lstm, seed=3)
    assert gradgradcheck(function, (*inputs, *parameters), fast_mode=True)


@pytest.mark.parametrize("name", CELLS)
def test_cell(name: str) -> None:
    cell = LSTMCell(2, 3, dtype=DOUBLE, **(CELLS[name] | ({"cell_clip": 5.0} if name == "clip" else {})))
    disturb(cell)
    inputs = [torch.randn(2, size, dtype=DOUBLE, requires_grad=True) for size in (2, 3, 3)]
    function, parameters = as_function(cell, seed=3, step=2)
    assert gradcheck(function, (*inputs, *parameters))
    assert gradgradcheck(function, (*inputs, *parameters), fast_mode=True)


@pytest.mark.parametrize("kind", ["layer", "cell"])
def test_gradients_of_gradients_as_stock(kind: str) -> None:
    """Also where a module is used twice: what comes by way of its own earlier results counts once."""
    module: Any = LSTM(3, 3, dtype=DOUBLE) if kind == "layer" else LSTMCell(3, 3, dtype=DOUBLE)
    x, results = torch.randn(4, 2, 3, dtype=DOUBLE, requires_grad=True), []
    for m in (module, module.to_module()):
        if kind == "layer":
            y = m(m(x)[0])[0]
        else:
            state = None
            for step in x:
                state = m(step, state)
            y = state[0]
        first = torch.autograd.grad(y.square().sum(), [x, *m.parameters()], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *m.parameters()])
        results.append((first, second))
    torch.testing.assert_close(*results)


def test_gradient_penalty() -> None:
    """The use that stock's cuDNN path refuses: a loss with the norm of a gradient in it, by ``backward``."""
    lstm, x = make(5, 3, 4, 6, DOUBLE, num_layers=2, bidirectional=True)
    stock, grads = lstm.to_module(), []
    for module in (lstm, stock):
        x = x.detach().requires_grad_()
        module.zero_grad()
        y, _ = module(x)
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (y.mean() + (gradient.norm() - 1) ** 2).backward()
        grads.append([parameter.grad for parameter in module.parameters()])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant: bool) -> None:
    """The masks of the forward are drawn again: torch's generator is put back, and a seed says it anyway."""
    lstm, x = make(5, 3, 4, 6, torch.float32, zoneout=0.3, num_layers=2, dropout=0.3)
    x.requires_grad_()
    results = []
    for wrapped in (True, False):
        torch.manual_seed(1)
        y = checkpoint(lambda x: lstm(x)[0], x, use_reentrant=use_reentrant) if wrapped else lstm(x)[0]
        x.grad = None
        y.sum().backward()
        results.append([y, x.grad])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_a_graph_is_kept_and_freed() -> None:
    lstm, x = make(4, 3, 5, 6, torch.float32)
    y = lstm(x)[0].sum()
    y.backward(retain_graph=True)
    first = lstm.weight_hh_l0.grad.clone()
    y.backward()
    torch.testing.assert_close(lstm.weight_hh_l0.grad, 2 * first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


def test_weights_written_between_forward_and_backward_are_noticed() -> None:
    lstm, x = make(4, 3, 5, 6, torch.float32)
    y = lstm(x)[0].sum()
    with torch.no_grad():
        lstm.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_biases_do_not_share_their_gradient() -> None:
    lstm, x = make(4, 3, 5, 6, torch.float32)
    lstm(x)[0].sum().backward()
    before = lstm.bias_hh_l0.grad.clone()
    lstm.bias_ih_l0.grad.zero_()
    assert torch.equal(lstm.bias_hh_l0.grad, before)


@pytest.mark.parametrize("shape", ["expanded", "transposed"])
def test_gradients_in_any_layout(shape: str) -> None:
    lstm, x = make(4, 3, 5, 6, DOUBLE)
    grad = torch.randn(3, 4, 6, dtype=DOUBLE).transpose(0, 1)
    if shape == "expanded":
        grad = grad[:1, :1].expand(4, 3, 6)
    ours, theirs = (
        torch.autograd.grad(module(x)[0], list(module.parameters()), grad) for module in (lstm, lstm.to_module())
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_inputs_in_any_layout(layout: str) -> None:
    lstm, _ = make(1, 1, 5, 6, DOUBLE, num_layers=2)
    x = {
        "sliced": torch.randn(4, 3, 10, dtype=DOUBLE)[..., ::2],
        "transposed": torch.randn(5, 3, 4, dtype=DOUBLE).transpose(0, 2),
        "expanded": torch.randn(1, 3, 5, dtype=DOUBLE).expand(4, 3, 5),
    }[layout]
    hx = tuple(torch.randn(6, 3, 2, dtype=DOUBLE).transpose(0, 2) for _ in range(2))
    torch.testing.assert_close(lstm(x, hx), lstm.to_module()(x, tuple(state.contiguous() for state in hx)))


def test_double_backward_of_a_layer_without_a_gradient() -> None:
    """Its gradient is undefined; the weights have another use."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    layer = LSTM(5, 7)
    y = Nothing.apply(layer(torch.randn(3, 2, 5))[0])
    (y.sum() + layer.weight_hh_l0.sum()).backward(create_graph=True)
    assert torch.equal(layer.weight_hh_l0.grad, torch.ones(28, 7))
