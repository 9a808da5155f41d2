"""``deepops.nn.LSTM`` and ``LSTMCell`` compute what they should: every dtype, variant, length and mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lstm_layers import (
    CELLS,
    COMBINED,
    DTYPES,
    LAYERS,
    STOCK,
    VARIANTS,
    add,
    add_to_pools,
    call,
    choose_clip,
    differentiate,
    disturb,
    initial_states,
    loop,
    make,
    random_grads,
    unrolled,
)
from torch import Tensor, nn

import deepops
from deepops.nn import LSTM, LSTMCell
from deepops.reference import lstm as formulas
from deepops.testing import ErrorPool, assert_close_to_oracle, saved_storages, to_double, use_threads

pytestmark = pytest.mark.usefixtures("one_thread")


def check(pools: dict[str, ErrorPool]) -> None:
    for pool in pools.values():
        pool.check()


# ---- values ----------------------------------------------------------------------------------------------------------

SHAPES = ((4, 3, 5, 7), (1, 2, 6, 4), (3, 2, 17, 20), (2, 5, 8, 33), (3, 8, 9, 16), (2, 17, 3, 8))  # T, B, I, H
SAMPLES = 3 * SHAPES  # each with other values: what errors do to later steps is luck
CLIPPED = 24 * ((2, 2, 6, 8),)  # few cells, so that there is room for a limit between them


def samples_of(name: str) -> tuple[tuple[int, ...], ...]:
    return CLIPPED if name == "clip" else SAMPLES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    pools: dict[str, ErrorPool] = {}
    for shape in samples_of(name):
        lstm, x = make(*shape, dtype, **LAYERS[name])
        if lstm.cell_clip is not None:
            choose_clip(lstm, x)
        add_to_pools(pools, lstm, x, None, str(shape))
    check(pools)


@pytest.mark.parametrize("name", ["plain", "two layers", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_with_lengths(name: str, dtype: torch.dtype) -> None:
    pools: dict[str, ErrorPool] = {}
    for shape in samples_of(name):
        lstm, x = make(*shape, dtype, **LAYERS[name])
        lengths = torch.randint(0, shape[0] + 1, (shape[1],))
        lengths[0] = shape[0]
        add_to_pools(pools, lstm, x, lengths, str(shape))
    check(pools)


@pytest.mark.parametrize("hidden", [1, 3, 127, 129])
def test_hidden_sizes(hidden: int) -> None:
    pools: dict[str, ErrorPool] = {}
    for dtype in (torch.float32, torch.float16):
        for batch in (3, 5, 16, 31) * (8 if hidden < 16 else 1):  # other values each time: few of them are luck
            lstm, x = make(3, batch, 9, hidden, dtype, bidirectional=True)
            add_to_pools(pools, lstm, x, None, f"{dtype}, B {batch}")
        check(pools)
        pools.clear()


@pytest.mark.parametrize("options", [{}, {"layer_norm": True, "peephole": True}], ids=str)
def test_long_sequence(options: dict[str, Any]) -> None:
    pools: dict[str, ErrorPool] = {}
    lstm, x = make(1000, 2, 4, 8, torch.float32, **options)
    add_to_pools(pools, lstm, x, None, "T 1000")
    check(pools)


@pytest.mark.parametrize("name", VARIANTS | COMBINED)
def test_evaluation(name: str) -> None:
    """Nothing is drawn; zoneout takes expectations."""
    pools: dict[str, ErrorPool] = {}
    for shape in samples_of(name):
        lstm, x = make(*shape, torch.float32, **LAYERS[name])
        if lstm.cell_clip is not None:
            choose_clip(lstm, x)
        before = torch.random.get_rng_state()
        lstm.eval()(x)
        assert torch.equal(torch.random.get_rng_state(), before)
        add_to_pools(pools, lstm, x, None, str(shape))
    check(pools)


def test_saturated_gates() -> None:
    lstm, x = make(5, 3, 4, 6, torch.float32)
    stock = lstm.to_module()
    with torch.no_grad():
        lstm.weight_ih_l0.mul_(1000)
    hx, grads = initial_states(lstm, 3), random_grads(lstm, 5, 3)
    actual, expected = (
        differentiate(call(module), 100 * x, hx, dict(module.named_parameters()), grads) for module in (lstm, stock)
    )
    exact = to_double(dict(lstm.named_parameters()))
    oracle = differentiate(
        lambda x, hx: unrolled(lstm, exact, x, hx), 100 * x.double(), to_double(hx), exact, to_double(grads)
    )
    for name, value in actual.items():
        assert torch.isfinite(value).all(), name
        assert_close_to_oracle(value, expected[name], oracle[name], name=name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_inputs(value: float) -> None:
    """A NaN stays in its sequence; an infinite input saturates gates, or cancels to NaN, as in stock."""
    lstm, x = make(4, 3, 5, 7, torch.float32)
    x[1, 2, 0] = value
    (y, (h, c)), (expected, (h_n, c_n)) = lstm(x), lstm.to_module()(x)
    torch.testing.assert_close((y, h, c), (expected, h_n, c_n), equal_nan=True)
    assert torch.isfinite(y[:, :2]).all()


# ---- relations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "projection", "layer norm"])
def test_bidirectional_is_two_directions(name: str) -> None:
    options = LAYERS[name]
    both, x = make(5, 3, 4, 6, torch.float64, bidirectional=True, **options)
    there, back = LSTM(4, 6, dtype=torch.float64, **options), LSTM(4, 6, dtype=torch.float64, **options)
    state = both.state_dict()
    there.load_state_dict({key: value for key, value in state.items() if not key.endswith("_reverse")})
    back.load_state_dict({k.removesuffix("_reverse"): v for k, v in state.items() if k.endswith("_reverse")})
    hx = initial_states(both, 3)
    y, (h, c) = both(x, hx)
    y0, (h0, c0) = there(x, (hx[0][:1], hx[1][:1]))
    y1, (h1, c1) = back(x.flip(0), (hx[0][1:], hx[1][1:]))
    torch.testing.assert_close(y, torch.cat((y0, y1.flip(0)), 2))
    torch.testing.assert_close((h, c), (torch.cat((h0, h1)), torch.cat((c0, c1))))


@pytest.mark.parametrize("name", ["plain", "two layers", "layer norm", "all but masks"])
def test_lengths_are_sequences_of_their_own(name: str) -> None:
    lstm, x = make(5, 4, 3, 6, torch.float64, **LAYERS[name])
    lengths, hx = [3, 5, 0, 1], initial_states(lstm, 4)
    y, (h, c) = lstm(x, hx, lengths=lengths)
    for i, length in enumerate(lengths):
        alone = (hx[0][:, i : i + 1], hx[1][:, i : i + 1])
        assert not y[length:, i].any()
        if length == 0:
            torch.testing.assert_close((h[:, i : i + 1], c[:, i : i + 1]), alone, rtol=0, atol=0)
            continue
        y_i, (h_i, c_i) = lstm(x[:length, i : i + 1], alone)
        torch.testing.assert_close(y[:length, i : i + 1], y_i)
        torch.testing.assert_close((h[:, i : i + 1], c[:, i : i + 1]), (h_i, c_i))


def test_what_is_beyond_the_end_does_not_matter() -> None:
    lstm, x = make(5, 3, 4, 6, torch.float32, num_layers=2, bidirectional=True)
    lengths = torch.tensor([2, 5, 4])
    other = x.clone()
    for i, length in enumerate(lengths.tolist()):
        other[length:, i] = 1e3
    results = []
    for data in (x, other):
        data.requires_grad_()
        y, (h, c) = lstm(data, lengths=lengths)
        grads = torch.autograd.grad(y.sum() + h.sum() + c.sum(), [data, *lstm.parameters()])
        results.append([y, h, c, *grads])
        assert not grads[0][2:, 0].any()
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_loop_over_the_cell_is_the_layer(name: str, training: bool) -> None:
    layer = LSTM(5, 7, dtype=torch.float64, **CELLS[name]).train(training)
    cell = LSTMCell(5, 7, dtype=torch.float64, **CELLS[name]).train(training)
    disturb(layer)
    cell.load_state_dict({key.removesuffix("_l0"): value for key, value in layer.state_dict().items()})
    x, (h0, c0) = torch.randn(6, 3, 5, dtype=torch.float64), initial_states(layer, 3)
    y, (h, c) = layer(x, (h0, c0), seed=7)
    y_cell, h_cell, c_cell = loop(cell, x, (h0[0], c0[0]), seed=7)
    torch.testing.assert_close((y_cell, h_cell, c_cell), (y, h[0], c[0]))
    (y.square().sum() + c.sum()).backward()
    (y_cell.square().sum() + c_cell.sum()).backward()
    for (key, ours), theirs in zip(cell.named_parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_values_and_gradients_of_the_cell(name: str, dtype: torch.dtype) -> None:
    pools: dict[str, ErrorPool] = {}
    for steps, batch, features, hidden in samples_of(name):
        layer, x = make(steps, batch, features, hidden, dtype, **CELLS[name])
        if layer.cell_clip is not None:
            choose_clip(layer, x)
        cell = LSTMCell(features, hidden, dtype=dtype, **(CELLS[name] | {"cell_clip": layer.cell_clip}))
        parameters = {key.removesuffix("_l0"): value for key, value in layer.named_parameters()}
        cell.load_state_dict(parameters)
        hx, grads = initial_states(layer, batch), random_grads(layer, steps, batch)
        exact = to_double(dict(layer.named_parameters()))
        oracle = differentiate(
            lambda x, hx, exact=exact, layer=layer: unrolled(layer, exact, x, hx, None, 5),
            x.double(), to_double(hx), exact, to_double(grads),
        )  # fmt: skip

        def run(module: nn.LSTMCell, x: Tensor, hx: Any, **options: Any) -> tuple[Tensor, ...]:
            y, h, c = loop(module, x, (hx[0][0], hx[1][0]), **options)
            return y, h[None], c[None]

        own = dict(layer.named_parameters())
        if name in ("plain", "no bias"):
            other = cell.to_module()
            stock = differentiate(
                lambda x, hx, other=other: run(other, x, hx), x, hx, dict(other.named_parameters()), grads
            )
            stock = {f"{k}_l0" if "grad weight" in k or "grad bias" in k else k: v for k, v in stock.items()}
        else:
            stock = differentiate(
                lambda x, hx, own=own, layer=layer: unrolled(layer, own, x, hx, None, 5), x, hx, own, grads
            )
        actual = differentiate(
            lambda x, hx, cell=cell: run(cell, x, hx, seed=5), x, hx, dict(cell.named_parameters()), grads
        )
        for key, value in actual.items():
            end = f"{key}_l0" if "grad weight" in key or "grad bias" in key else key
            add(pools, key, value, stock[end], oracle[end], f"H {hidden}, {key}")
    check(pools)


# ---- masks -----------------------------------------------------------------------------------------------------------

RANDOM = {name: VARIANTS[name] for name in ("zoneout", "zoneout of c", "variational", "recurrent dropout")}


@pytest.mark.parametrize("name", RANDOM)
def test_seeds(name: str) -> None:
    lstm, x = make(5, 3, 4, 6, torch.float32, num_layers=2, **RANDOM[name])

    def run(seed: Any) -> Tensor:
        return lstm(x, seed=seed)[0]

    assert torch.equal(run(5), run(5))
    assert torch.equal(run(5), run(torch.tensor(5)))
    assert torch.equal(run(-1), run(2**64 - 1))
    assert not torch.equal(run(5), run(6))
    assert not torch.equal(run(None), run(None))
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(run(None))
    assert torch.equal(*results)
    lstm.eval()
    assert torch.equal(run(5), run(6))


def test_layers_and_directions_have_masks_of_their_own() -> None:
    lstm = LSTM(6, 6, num_layers=2, bidirectional=True, zoneout=(0.0, 0.5), bias=False)
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.zero_()  # c stays half of c_0 or all of it
    _, (_, c) = lstm(torch.zeros(1, 8, 6), (torch.zeros(4, 8, 6), torch.ones(4, 8, 6)), seed=3)
    patterns = {tuple((state == 1).flatten().tolist()) for state in c}
    assert len(patterns) == 4
    assert set(c.unique().tolist()) == {0.5, 1.0}


def test_extreme_probabilities() -> None:
    lstm, x = make(3, 2, 4, 5, torch.float32, zoneout=1.0)
    hx = initial_states(lstm, 2)
    y, (h, c) = lstm(x, hx)
    assert torch.equal(y, hx[0].expand(3, -1, -1))
    assert torch.equal(torch.stack((h, c)), torch.stack(hx))
    lstm, x = make(3, 2, 4, 5, torch.float32, variational_dropout=1.0, recurrent_dropout=1.0)
    y, (_, c) = lstm(x, (hx[0], torch.zeros_like(hx[1])))
    assert not y.any()
    assert not c.any()


def test_variational_masks_last_for_a_sequence() -> None:
    """Features that the mask drops have no gradient at any step, the others at all."""
    lstm, x = make(5, 3, 40, 6, torch.float32, variational_dropout=(0.5, 0.0))
    x.requires_grad_()
    lstm(x, seed=4)[0].sum().backward()
    dropped = x.grad == 0
    assert torch.equal(dropped, dropped[:1].expand(5, -1, -1))
    expected = formulas.random_mask(torch.tensor([4]), formulas.INPUT_MASK, 0, 3, 40, 0.5)
    assert torch.equal(dropped[0], expected)


# ---- bits, memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "two layers", "all"])
def test_the_same_bits_again(name: str, dtype: torch.dtype) -> None:
    lstm, x = make(6, 9, 20, 33, dtype, **LAYERS[name])
    hx, grads, parameters = initial_states(lstm, 9), random_grads(lstm, 6, 9), dict(lstm.named_parameters())
    for threads in (1, 2):
        with use_threads(threads):
            first, second = (differentiate(call(lstm, seed=1), x, hx, parameters, grads) for _ in range(2))
        for key, value in first.items():
            assert torch.equal(value, second[key]), (key, threads)


@pytest.mark.parametrize("name", ["plain", "projection", "bidirectional"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_saved_for_backward_is_at_most_what_stock_saves(name: str, dtype: torch.dtype) -> None:
    steps, batch, hidden = 12, 16, 32
    lstm, x = make(steps, batch, 24, hidden, dtype, **(LAYERS[name] | ({"proj_size": 8} if "proj" in name else {})))
    stock, x = lstm.to_module(), x.requires_grad_()
    ours, theirs = (
        sum(s.nbytes() for s in saved_storages(lambda module=module: module(x))) for module in (lstm, stock)
    )
    assert ours <= theirs
    directions = 1 + lstm.bidirectional
    kept = 4 * hidden + hidden + (lstm.proj_size or hidden) + (hidden if lstm.proj_size else 0)  # gates, c, h, out
    weights = sum(parameter.nbytes for parameter in lstm.parameters())
    states = 2 * directions * batch * (hidden + (lstm.proj_size or hidden)) * x.element_size()
    assert ours <= directions * steps * batch * kept * x.element_size() + x.nbytes + weights + states


def test_nothing_is_saved_without_gradients() -> None:
    lstm, x = make(4, 3, 5, 7, torch.float32)
    lstm.requires_grad_(False)
    y, (h, c) = lstm(x)
    assert not any(result.requires_grad for result in (y, h, c))
    assert saved_storages(lambda: lstm(x)) == []
    with torch.no_grad():
        assert torch.equal(LSTM.from_module(lstm.to_module())(x)[0], y)


@pytest.mark.parametrize("name", STOCK)
def test_functional_is_one_layer_of_the_module(name: str) -> None:
    lstm, x = make(5, 3, 4, 6, torch.float64, **LAYERS[name])
    if lstm.num_layers > 1:
        pytest.skip("more than one layer")
    hx = initial_states(lstm, 3)
    y, (h_n, c_n) = lstm(x, hx)
    results = []
    for i, suffix in enumerate(("", "_reverse")[: 1 + lstm.bidirectional]):
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        weights = [getattr(lstm, f"{kind}_l0{suffix}", None) for kind in kinds]
        results.append(deepops.functional.lstm(x, (hx[0][i], hx[1][i]), *weights, reverse=i == 1))
    h, c, h_last, c_last = zip(*results, strict=True)
    assert torch.equal(torch.cat(h, 2), y)
    assert torch.equal(torch.stack(h_last), h_n)
    assert torch.equal(torch.stack(c_last), c_n)
    for states, last in ((h, h_last), (c, c_last)):
        assert torch.equal(states[0][-1], last[0])


def test_functional_cell_is_a_step() -> None:
    x, weight_ih, weight_hh = torch.randn(4, 3, 5), torch.randn(24, 5), torch.randn(24, 6)
    options: dict[str, Any] = {"training": True, "zoneout": 0.5, "seed": 3}
    h, c, h_n, c_n = deepops.functional.lstm(x, None, weight_ih, weight_hh, **options)
    state = None
    for step in range(4):
        state = deepops.functional.lstm_cell(x[step], state, weight_ih, weight_hh, step=step, **options)
        torch.testing.assert_close(state, (h[step], c[step]))
    first = deepops.functional.lstm(x[:2], None, weight_ih, weight_hh, **options)
    rest = deepops.functional.lstm(x[2:], first[2:], weight_ih, weight_hh, first_step=2, **options)
    torch.testing.assert_close(rest[2:], (h_n, c_n))
