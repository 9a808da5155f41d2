"""``LSTM`` and ``LSTMCell`` in the place of torch's: construction, checkpoints, packed sequences, dropout, copies."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lstm_layers import LAYERS, STOCK, call, differentiate, initial_states, loop, make, random_grads
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_leaves

from deepops.nn import LSTM, LSTMCell
from deepops.nn.convert import map_state_dict, swap_layers

pytestmark = pytest.mark.usefixtures("one_thread")

DOUBLE = torch.float64


def same_results(ours: LSTM, stock: nn.LSTM, x: Any, hx: Any = None, seed: int = 1) -> None:
    """Outputs, final states, gradients; in fp64 the default tolerance leaves room for another order of summation."""
    results = []
    for module in (ours, stock):
        torch.manual_seed(seed)
        output, (h, c) = module(x, hx)
        data = output.data if isinstance(output, PackedSequence) else output
        grads = torch.autograd.grad(data.square().sum() + h.sum() + c.sin().sum(), list(module.parameters()))
        results.append((data, h, c, *grads))
        if isinstance(output, PackedSequence):
            results[-1] += tuple(output[1:])
    for actual, expected in zip(*results, strict=True):
        if expected is None:
            assert actual is None
        else:
            assert actual.shape == expected.shape
            torch.testing.assert_close(actual, expected)


# ---- torch's own module database -------------------------------------------------------------------------------------

INFOS = {info.module_cls: info for info in module_db}
CLASSES: dict[Any, Any] = {nn.LSTM: LSTM, nn.LSTMCell: LSTMCell}


def samples(kind: Any, dtype: torch.dtype, train: bool) -> Iterator[Any]:
    info = INFOS[kind]
    return iter(info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=train))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_samples_of_the_module_database(kind: Any, train: bool, dtype: torch.dtype) -> None:
    count = 0
    for sample in samples(kind, dtype, train):
        arguments, inputs = sample.constructor_input, sample.forward_input
        torch.manual_seed(2)
        stock = kind(*arguments.args, **arguments.kwargs, dtype=dtype).train(train)
        ours = CLASSES[kind](*arguments.args, **arguments.kwargs, dtype=dtype).train(train)
        ours.load_state_dict(stock.state_dict())
        results = []
        for module in (ours, stock):
            torch.manual_seed(3)
            found = module(*inputs.args, **inputs.kwargs)
            leaves = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            grads = torch.autograd.grad(sum(leaf.sum() for leaf in leaves), list(module.parameters()))
            results.append((found, grads))
        torch.testing.assert_close(*results)
        count += 1
    assert count >= 2


# ---- construction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STOCK)
def test_same_seed_same_parameters(name: str) -> None:
    modules = []
    for kind in (LSTM, nn.LSTM):
        torch.manual_seed(4)
        modules.append(kind(5, 7, **STOCK[name]))
    for (ours, p), (theirs, q) in zip(*(module.named_parameters() for module in modules), strict=True):
        assert ours == theirs
        assert torch.equal(p, q)
    assert repr(modules[0]) == repr(modules[1])
    assert isinstance(modules[0], nn.RNNBase)
    assert [len(weights) for weights in modules[0].all_weights] == [len(weights) for weights in modules[1].all_weights]


def test_signatures_begin_as_torchs() -> None:
    """Positional arguments of torch's classes mean the same."""
    own = list(inspect.signature(LSTM.__init__).parameters)[:11]
    base = list(inspect.signature(nn.RNNBase.__init__).parameters)
    assert own == ["self", *base[2:]]  # without mode
    cell = list(inspect.signature(LSTMCell.__init__).parameters)[:6]
    assert cell == list(inspect.signature(nn.LSTMCell.__init__).parameters)


def test_parameters_of_the_variants() -> None:
    lstm = LSTM(3, 4, bidirectional=True, layer_norm=True, peephole=True)
    extra = {name: tuple(p.shape) for name, p in lstm.named_parameters() if "_ln_" in name or "peephole" in name}
    one = {"weight_peephole": (12,), "weight_ln_ih": (16,), "weight_ln_hh": (16,)}
    one |= {"weight_ln_c": (4,), "bias_ln_c": (4,)}
    assert extra == {name + end: shape for end in ("_l0", "_l0_reverse") for name, shape in one.items()}
    assert all(lstm.get_parameter(f"weight_ln_{kind}_l0").eq(1).all() for kind in ("ih", "hh", "c"))
    assert not lstm.bias_ln_c_l0.any()
    assert 0 < lstm.weight_peephole_l0.abs().max() <= 0.5
    with torch.no_grad():
        lstm.weight_ln_c_l0.zero_()
    lstm.reset_parameters()
    assert lstm.weight_ln_c_l0.eq(1).all()
    cell = LSTMCell(3, 4, layer_norm=True, peephole=True, dtype=DOUBLE)
    assert {n: tuple(p.shape) for n, p in cell.named_parameters() if n in one} == one
    assert {p.dtype for p in cell.parameters()} == {DOUBLE}


@pytest.mark.parametrize("kind", [LSTM, LSTMCell])
def test_forget_bias(kind: Any) -> None:
    torch.manual_seed(0)
    module = kind(3, 4, forget_bias=1.5)
    torch.manual_seed(0)
    plain = kind(3, 4)
    for (name, ours), theirs in zip(module.named_parameters(), plain.parameters(), strict=True):
        changed = ours != theirs
        if name.startswith("bias"):
            assert changed.nonzero().flatten().tolist() == [4, 5, 6, 7]
            assert ours[4:8].unique().tolist() == [1.5 if name.startswith("bias_ih") else 0.0]
        else:
            assert not changed.any()
    assert "forget_bias=1.5" in repr(module)


def test_repr() -> None:
    lstm = LSTM(3, 4, num_layers=2, layer_norm=True, zoneout=(0.1, 0.2), cell_clip=3.0, return_all_states=True)
    options = "layer_norm=True, zoneout=(0.1, 0.2), cell_clip=3.0, return_all_states=True"
    assert repr(lstm) == f"LSTM(3, 4, num_layers=2, {options})"
    assert repr(LSTMCell(3, 4, bias=False, peephole=True)) == "LSTMCell(3, 4, bias=False, peephole=True)"


def test_meta_device() -> None:
    with torch.device("meta"):
        lstm = LSTM(3, 4, layer_norm=True)
    y, _ = lstm(torch.randn(5, 2, 3, device="meta"))
    assert (y.shape, y.device.type) == ((5, 2, 4), "meta")
    lstm.to_empty(device="cpu").reset_parameters()
    assert torch.isfinite(lstm(torch.randn(5, 2, 3))[0]).all()
    plain = LSTM(3, 4, device="meta")
    assert plain(torch.randn(5, 2, 3, device="meta"))[0].shape == (5, 2, 4)


# ---- the forms of input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("name", STOCK)
def test_as_stock(name: str, with_states: bool, batch_first: bool) -> None:
    lstm, x = make(5, 4, 3, 6, DOUBLE, batch_first=batch_first, **STOCK[name])
    hx = initial_states(lstm, 5 if batch_first else 4) if with_states else None
    same_results(lstm, lstm.to_module(), x, hx)
    same_results(lstm, lstm.to_module(), x[:, 0], None if hx is None else tuple(state[:, 0] for state in hx))
    same_results(lstm, lstm.to_module(), x.transpose(0, 1))
    assert lstm(x)[0].stride() == lstm.to_module()(x)[0].stride()


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("name", STOCK)
def test_packed(name: str, with_states: bool, enforce_sorted: bool) -> None:
    lstm, x = make(5, 4, 3, 6, DOUBLE, **STOCK[name])
    lengths = [5, 4, 4, 1] if enforce_sorted else [2, 5, 1, 4]
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=enforce_sorted)
    hx = initial_states(lstm, 4) if with_states else None
    same_results(lstm, lstm.to_module(), packed, hx)
    output, (h, c) = lstm(packed, hx)
    padded, _ = pad_packed_sequence(output, total_length=5)
    y, (h_n, c_n) = lstm(x, hx, lengths=lengths)
    torch.testing.assert_close((y, h_n, c_n), (padded, h, c))


def test_packed_sequences_of_one_length() -> None:
    lstm, x = make(5, 4, 3, 6, DOUBLE, num_layers=2, bidirectional=True)
    same_results(lstm, lstm.to_module(), pack_sequence(list(x.transpose(0, 1))))


@pytest.mark.parametrize("form", ["padded", "batch first", "packed", "unsorted", "unbatched"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_between_layers_draws_what_stock_draws(form: str, bidirectional: bool) -> None:
    lstm, x = make(
        5, 4, 3, 6, DOUBLE, num_layers=3, dropout=0.4, bidirectional=bidirectional, batch_first=form == "batch first"
    )
    inputs = {
        "packed": pack_padded_sequence(x, torch.tensor([5, 3, 3, 2])),
        "unsorted": pack_padded_sequence(x, torch.tensor([1, 5, 3, 2]), enforce_sorted=False),
        "unbatched": x[:, 0],
    }
    stock = lstm.to_module()
    for seed in range(3):
        same_results(lstm, stock, inputs.get(form, x), seed=seed)
    assert not torch.equal(lstm(x)[0], lstm(x)[0])
    same_results(lstm.eval(), stock.eval(), inputs.get(form, x))


def test_empty_batch() -> None:
    lstm, _ = make(1, 1, 3, 6, torch.float32, num_layers=2, bidirectional=True)
    results = []
    for module in (lstm, lstm.to_module()):
        x = torch.randn(4, 0, 3, requires_grad=True)
        y, (h, c) = module(x)
        grads = torch.autograd.grad(y.sum() + c.sum(), [x, *module.parameters()])
        results.append([y, h, c, *grads])
    torch.testing.assert_close(*results)
    variant = LSTM(3, 6, layer_norm=True, zoneout=0.5)
    y, (h, c) = variant(torch.randn(4, 0, 3), lengths=torch.zeros(0, dtype=torch.int64))
    assert (y.shape, h.shape, c.shape) == ((4, 0, 6), (1, 0, 6), (1, 0, 6))
    y.sum().backward()
    assert all(not parameter.grad.any() for parameter in variant.parameters())
    h, c = LSTMCell(3, 6)(torch.randn(0, 3))
    assert (h.shape, c.shape) == ((0, 6), (0, 6))


@pytest.mark.parametrize("name", [*STOCK, "all but masks"])
def test_states_of_all_steps(name: str) -> None:
    lstm, x = make(5, 3, 4, 6, DOUBLE, **LAYERS[name])
    lstm.return_all_states = True
    y, (h_n, c_n), (h, c) = lstm(x, lengths=[5, 2, 3])
    places, size = lstm.num_layers * (1 + lstm.bidirectional), lstm.proj_size or 6
    assert (h.shape, c.shape) == ((places, 5, 3, size), (places, 5, 3, 6))
    directions = 1 + lstm.bidirectional
    assert torch.equal(torch.cat(list(h[-directions:]), 2), y)
    for number in range(places):
        for i, length in enumerate([5, 2, 3]):
            step = length - 1 if number % directions == 0 else 0
            assert torch.equal(h[number, step, i], h_n[number, i])
            assert torch.equal(c[number, step, i], c_n[number, i])
            assert not c[number, length:, i].any()
    packed = pack_padded_sequence(x, torch.tensor([5, 2, 3]), enforce_sorted=False)
    torch.testing.assert_close(lstm(packed)[2], (h, c))
    lstm.batch_first = True
    other = lstm(x.transpose(0, 1), lengths=[5, 2, 3])
    torch.testing.assert_close(other[2], (h.transpose(1, 2), c.transpose(1, 2)))
    lstm.batch_first = False
    one = lstm(x[:, 0])
    torch.testing.assert_close(one[2][1], lstm(x[:, :1])[2][1].squeeze(2))
    c.square().sum().backward()
    assert lstm.weight_hh_l0.grad.any()


def test_states_of_all_steps_are_differentiated() -> None:
    lstm, x = make(4, 2, 3, 5, DOUBLE, return_all_states=True)
    cell = LSTMCell.from_module(nn.LSTMCell(3, 5, dtype=DOUBLE))
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in lstm.state_dict().items()})
    weight = torch.randn(4, 2, 5, dtype=DOUBLE)
    (lstm(x)[2][1][0] * weight).sum().backward()
    hx, total = None, torch.zeros(())
    for t in range(4):
        hx = cell(x[t], hx)
        total = total + (hx[1] * weight[t]).sum()
    total.backward()
    for ours, theirs in zip(lstm.parameters(), cell.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("with_states", [False, True])
def test_cell_as_stock(with_states: bool, batched: bool, bias: bool) -> None:
    cell = LSTMCell(3, 6, bias, dtype=DOUBLE)
    stock = cell.to_module()
    shape = (4,) if batched else ()
    x = torch.randn(5, *shape, 3, dtype=DOUBLE)
    hx = (torch.randn(*shape, 6, dtype=DOUBLE), torch.randn(*shape, 6, dtype=DOUBLE)) if with_states else None
    results = []
    for module in (cell, stock):
        y, h, c = loop(module, x, hx)
        results.append([y, h, c, *torch.autograd.grad(y.sin().sum() + c.sum(), list(module.parameters()))])
    torch.testing.assert_close(*results)


# ---- checkpoints, copies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STOCK)
def test_checkpoints_both_ways(name: str) -> None:
    ours, stock = LSTM(3, 6, **STOCK[name]), nn.LSTM(3, 6, **STOCK[name])
    assert list(ours.state_dict()) == list(stock.state_dict())
    x = torch.randn(4, 2, 3)
    stock.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x)[0], stock(x)[0])
    other = LSTM(3, 6, **STOCK[name])
    other.load_state_dict(stock.state_dict())
    assert torch.equal(other(x)[0], ours(x)[0])
    mapped = map_state_dict(ours.state_dict(), ours, stock)
    assert list(mapped) == list(stock.state_dict())


@pytest.mark.parametrize("kind", [LSTM, LSTMCell])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how: str, kind: Any) -> None:
    module = kind(3, 6, layer_norm=True, zoneout=0.5, forget_bias=1.0)
    if how == "deepcopy":
        other = copy.deepcopy(module)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(module))
    else:
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert repr(other) == repr(module)
    x = torch.randn(4, 3)
    assert torch.equal(other(x, seed=3)[0], module(x, seed=3)[0])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(x, seed=3)[0].any()
    assert module(x, seed=3)[0].any()


def test_parameters_that_move() -> None:
    lstm, x = make(4, 2, 3, 5, torch.float32, num_layers=2)
    y = lstm(x)[0]
    lstm.flatten_parameters()
    assert torch.equal(lstm(x)[0], y)
    assert lstm.half()(x.half())[0].dtype == torch.float16
    lstm.double()
    torch.testing.assert_close(lstm(x.double()), lstm.to_module()(x.double()))
    lstm.weight_ih_l0 = nn.Parameter(torch.zeros_like(lstm.weight_ih_l0))
    torch.testing.assert_close(lstm(x.double()), lstm.to_module()(x.double()))
    assert lstm.all_weights[0][0] is lstm.weight_ih_l0


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_from_module_and_back(kind: Any) -> None:
    stock = kind(3, 6, bias=False).eval()
    ours = CLASSES[kind].from_module(stock)
    assert not ours.training
    assert [id(p) for p in ours.parameters()] == [id(p) for p in stock.parameters()]
    back = ours.to_module()
    assert type(back) is kind
    assert [id(p) for p in back.parameters()] == [id(p) for p in stock.parameters()]
    x = torch.randn(4, 3)
    torch.testing.assert_close(ours(x), stock(x))
    with pytest.raises(TypeError, match=r"expected torch.nn.LSTM(Cell)?, got GRU"):
        CLASSES[kind].from_module(nn.GRU(3, 6))
    with pytest.raises(ValueError, match="has no such variant"):
        CLASSES[kind](3, 6, peephole=True).to_module()


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.encoder = nn.Embedding(10, 8), nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True)
        self.cells = nn.ModuleList([nn.LSTMCell(12, 5), nn.LSTMCell(5, 5)])
        self.head = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        y, states = self.encoder(self.embedding(tokens))[0], [None, None]
        for step in y.unbind(1):
            for i, cell in enumerate(self.cells):
                states[i] = cell(step, states[i])
                step = states[i][0]
        return self.head(step)


def test_swapping_a_model() -> None:
    model = Tagger().double()
    stock, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=0.1)
    assert swap_layers(model) == ["encoder", "cells.0", "cells.1"]
    assert isinstance(model.encoder, LSTM)
    assert isinstance(model.cells[1], LSTMCell)
    assert list(model.state_dict()) == list(stock.state_dict())
    tokens = torch.randint(0, 10, (4, 7))
    torch.testing.assert_close(model(tokens), stock(tokens))
    model(tokens).sum().backward()
    optimizer.step()
    stock.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(tokens), stock(tokens))
    assert swap_layers(model) == []


def test_swapping_leaves_alone_what_it_can_not_replace() -> None:
    model = nn.ModuleDict({name: nn.LSTM(3, 4) for name in ("hooked", "twice", "plain")} | {"gru": nn.GRU(3, 4)})
    model["hooked"].register_forward_hook(lambda *_: None)
    model["again"] = model["twice"]
    assert swap_layers(model) == ["plain"]
    assert type(model["twice"]) is nn.LSTM
    assert swap_layers(nn.LSTM(3, 4)) == []


def test_differentiated_with_respect_to_everything() -> None:
    """Also where only some of it wants gradients, or only some of the results are used."""
    lstm, x = make(4, 3, 5, 6, DOUBLE, proj_size=2)
    hx, grads = initial_states(lstm, 3), random_grads(lstm, 4, 3)
    parameters = dict(lstm.named_parameters())
    full = differentiate(call(lstm), x, hx, parameters, grads)
    for name, parameter in lstm.named_parameters():
        lstm.requires_grad_(False)
        parameter.requires_grad_()
        y, (h, c) = lstm(x, hx)
        (found,) = torch.autograd.grad((y, h, c), parameter, grads)
        torch.testing.assert_close(found, full[f"grad {name}"])
    lstm.requires_grad_(True)
    for i in range(3):
        results = [(out[0], *out[1]) for out in (lstm(x, hx), lstm.to_module()(x, hx))]
        ours, theirs = (
            torch.autograd.grad(result[i], list(parameters.values()), grads[i], allow_unused=True) for result in results
        )
        for actual, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(actual, torch.zeros_like(actual) if expected is None else expected)


def test_a_plain_cell_without_gradients_is_torchs() -> None:
    """Bit for bit, and whoever writes to its weights: they are read at every step."""
    cell = LSTMCell(5, 7)
    stock = cell.to_module()
    x, state = torch.randn(3, 5), (torch.randn(3, 7), torch.randn(3, 7))
    for _ in range(2):
        with torch.no_grad():
            for ours, theirs in zip(cell(x, state), stock(x, state), strict=True):
                assert torch.equal(ours, theirs)
        cell.requires_grad_(False)
        for ours, theirs in zip(cell(x), stock(x), strict=True):
            assert torch.equal(ours, theirs)
        cell.weight_hh.data.mul_(2)
    assert cell._cache.packs == 0
