"""LSTM layers beside stock's, and the fp64 oracle of their variants: the formulas unrolled in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepops.nn import LSTM, LSTMCell
from deepops.reference import lstm as formulas
from deepops.testing import ErrorPool, to_double

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# What torch has too, and what it has not: arguments of the constructor.
STOCK: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "projection": {"proj_size": 2},
    "bidirectional": {"bidirectional": True},
    "two layers": {"num_layers": 2, "bidirectional": True, "proj_size": 2},
}
LAYER_NORM = {"layer_norm": True, "layer_norm_eps": 0.1}  # smaller: norms of few, nearly equal numbers magnify errors
VARIANTS: dict[str, dict[str, Any]] = {
    "layer norm": LAYER_NORM,
    "peephole": {"peephole": True},
    "zoneout": {"zoneout": 0.3},
    "zoneout of c": {"zoneout": (0.0, 0.4)},
    "variational": {"variational_dropout": (0.3, 0.4)},
    "recurrent dropout": {"recurrent_dropout": 0.3},
    "clip": {"cell_clip": 0.5},
}
COMBINED: dict[str, dict[str, Any]] = {
    "all": {
        **LAYER_NORM,
        "peephole": True,
        "zoneout": (0.2, 0.3),
        "variational_dropout": 0.2,
        "recurrent_dropout": 0.1,
        "num_layers": 2,
        "bidirectional": True,
        "proj_size": 2,
    },
    "layer norm without bias": {**LAYER_NORM, "bias": False, "proj_size": 2},
    "all but masks": {**LAYER_NORM, "peephole": True, "proj_size": 2, "num_layers": 2, "forget_bias": 1.0},
}
LAYERS = STOCK | VARIANTS | COMBINED
CELLS = {name: options for name, options in (STOCK | VARIANTS).items() if name in ("plain", "no bias", *VARIANTS)}


def make(steps: int, batch: int, features: int, hidden: int, dtype: torch.dtype, **options: Any) -> tuple[LSTM, Tensor]:
    """A layer with weights that matter, and an input for it."""
    lstm = LSTM(features, hidden, dtype=dtype, **options)
    disturb(lstm)
    return lstm, torch.randn(steps, batch, features).to(dtype)


def disturb(module: nn.Module) -> None:
    """Give layer norm's vectors, which start as ones and zeros, other values."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "_ln_" in name:
                parameter.add_(torch.randn(parameter.shape).mul(0.3).to(parameter.dtype))


def initial_states(lstm: LSTM, batch: int) -> tuple[Tensor, Tensor]:
    places, dtype = lstm.num_layers * (1 + lstm.bidirectional), lstm.weight_ih_l0.dtype
    h, c = torch.randn(places, batch, lstm.proj_size or lstm.hidden_size), torch.randn(places, batch, lstm.hidden_size)
    return h.to(dtype), c.to(dtype)


def seed_of(seed: int, number: int) -> Tensor:
    """The seed of one layer and direction, from that of the call."""
    value = (seed + number * 0x9E3779B97F4A7C15) % 2**64
    return torch.tensor([value - 2**64 if value >= 2**63 else value])


def scaled_mask(seed: Tensor, stream: int, rows: int, columns: int, p: float) -> Tensor:
    kept = ~formulas.random_mask(seed, stream, 0, rows, columns, p)
    return kept.double() / (1 - p)


def unrolled(
    lstm: LSTM,
    weights: dict[str, Tensor],
    x: Tensor,  # [T, B, I]
    hx: tuple[Tensor, Tensor],
    lengths: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(output, h_n, c_n, h, c)`` of what ``lstm`` is, with ``weights`` in its place; no dropout between layers."""
    every: list[tuple[Tensor, ...]] = []
    two = lambda value: value if isinstance(value, tuple) else (value, value)  # noqa: E731
    p_input, p_hidden = two(lstm.variational_dropout)
    zoneout_h, zoneout_c = two(lstm.zoneout)
    for layer in range(lstm.num_layers):
        outputs = []
        for suffix in ("", "_reverse")[: 1 + lstm.bidirectional]:
            own = {key.removesuffix(f"_l{layer}{suffix}"): value for key, value in weights.items()}
            number, inputs, mask, own_seed = len(every), x, None, None
            h0, c0 = hx[0][number], hx[1][number]
            if lstm.training:
                own_seed = seed_of(seed, number)
                if p_input:
                    inputs = x * scaled_mask(own_seed, formulas.INPUT_MASK, *x.shape[1:], p_input).to(x.dtype)
                if p_hidden:
                    mask = scaled_mask(own_seed, formulas.HIDDEN_MASK, *h0.shape, p_hidden).to(x.dtype)
            gates = F.linear(inputs, own.get("weight_ih"))
            if lstm.layer_norm:
                gates = F.layer_norm(gates, gates.shape[-1:], own.get("weight_ln_ih"), None, lstm.layer_norm_eps)
            if lstm.bias:
                gates = gates + own.get("bias_ih") + own.get("bias_hh")
            names = ("weight_hh", "weight_hr", "weight_peephole", "weight_ln_hh", "weight_ln_c", "bias_ln_c")
            states = formulas.lstm_sequence(
                gates, h0, c0, *(own.get(name) for name in names), mask, lengths, own_seed,
                reverse=suffix != "", cell_clip=lstm.cell_clip, layer_norm_eps=lstm.layer_norm_eps,
                zoneout_h=zoneout_h, zoneout_c=zoneout_c, recurrent_dropout=lstm.recurrent_dropout,
            )  # fmt: skip
            every.append(states)
            outputs.append(states[0])
        x = torch.cat(outputs, 2)
    h, c, h_n, c_n = (torch.stack(states) for states in zip(*every, strict=True))
    return x, h_n, c_n, h, c


def differentiate(
    forward: Callable[..., Iterable[Tensor]],
    x: Tensor,
    hx: tuple[Tensor, Tensor],
    parameters: dict[str, Tensor],
    grads: list[Tensor],
) -> dict[str, Tensor]:
    """``output``, ``h_n``, ``c_n`` of ``forward(x, hx)`` and the gradients of everything, by name."""
    x = x.clone().requires_grad_()
    states = (hx[0].clone().requires_grad_(), hx[1].clone().requires_grad_())
    results = list(forward(x, states))[:3]
    grads = [grad.to(result.dtype) for grad, result in zip(grads, results, strict=True)]
    inputs = {"x": x, "h_0": states[0], "c_0": states[1], **parameters}
    found = torch.autograd.grad(results, list(inputs.values()), grads)
    named = dict(zip(("output", "h_n", "c_n"), (result.detach() for result in results), strict=True))
    return named | {f"grad {name}": grad for name, grad in zip(inputs, found, strict=True)}


def call(lstm: nn.LSTM, **options: Any) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """``forward`` for ``differentiate``."""

    def forward(x: Tensor, hx: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        output, (h, c), *_ = lstm(x, hx, **options)
        return output, h, c

    return forward


def random_grads(lstm: LSTM, steps: int, batch: int) -> list[Tensor]:
    """For output, h_n and c_n, with values that the dtype of ``lstm`` can hold."""
    dtype, (h, c) = lstm.weight_ih_l0.dtype, initial_states(lstm, batch)
    output = torch.randn(steps, batch, h.size(2) * (1 + lstm.bidirectional)).to(dtype)
    return [output, torch.randn_like(h), torch.randn_like(c)]


def add_to_pools(pools: dict[str, ErrorPool], lstm: LSTM, x: Tensor, lengths: Tensor | None, name: str) -> None:
    """Compare ``lstm`` with stock (torch's LSTM, or torch's operations in the same dtype) and the oracle."""
    steps, batch = x.shape[:2]
    hx, grads, seed = initial_states(lstm, batch), random_grads(lstm, steps, batch), 12345
    parameters = dict(lstm.named_parameters())
    actual = differentiate(call(lstm, lengths=lengths, seed=seed), x, hx, parameters, grads)
    if lstm._is_plain() and lengths is None and x.dtype is torch.float32:  # oneDNN keeps c of 16-bit data in float32
        other = lstm.to_module()
        stock = differentiate(call(other), x, hx, dict(other.named_parameters()), grads)
    else:
        stock = differentiate(lambda x, hx: unrolled(lstm, parameters, x, hx, lengths, seed), x, hx, parameters, grads)
    exact = to_double(parameters)
    oracle = differentiate(
        lambda x, hx: unrolled(lstm, exact, x, hx, lengths, seed), x.double(), to_double(hx), exact, to_double(grads)
    )
    for key, value in actual.items():
        add(pools, key, value, stock[key], oracle[key], f"{name}, {key}")


def add(pools: dict[str, ErrorPool], key: str, actual: Tensor, stock: Tensor, oracle: Tensor, name: str) -> None:
    """Take one result into the pool of its kind; fp64 has nothing finer to be compared with."""
    kind = "gradients" if key.startswith("grad") else "states"
    if actual.dtype is torch.float64:
        torch.testing.assert_close(actual, oracle, msg=lambda text: f"{name}: {text}")
    else:
        scale = max(1.0, oracle.abs().max().item())  # what is small is left over from sums of numbers around 1
        pools.setdefault(kind, ErrorPool()).add(actual, stock, oracle, name=name, scale=scale)


def choose_clip(lstm: LSTM, x: Tensor) -> None:
    """Set ``cell_clip`` such that some cells pass it and none comes near: on it the gradient jumps."""
    assert lstm.cell_clip is not None
    exact, hx = to_double(dict(lstm.named_parameters())), to_double(initial_states(lstm, x.size(1)))
    clamp, best, seen = Tensor.clamp, (-1.0, 0.0), []

    def spy(tensor: Tensor, *limits: float) -> Tensor:
        seen.append(tensor.flatten())
        return clamp(tensor, *limits)

    enough = 1e-3 if x.dtype.itemsize > 2 else math.inf  # fp32's rounding carries no cell so far
    candidates = torch.linspace(0.2, 0.7, 50).tolist()
    for candidate in (candidates[7 * i % 50] for i in range(50)):
        lstm.cell_clip = candidate
        seen.clear()
        with mock.patch.object(Tensor, "clamp", spy):
            unrolled(lstm, exact, x.double(), hx)
        best = max(best, ((torch.cat(seen).abs() - candidate).abs().min().item(), candidate))
        if best[0] > enough:
            break
    lstm.cell_clip = best[1]
    lstm._variant = lstm._variant._replace(cell_clip=best[1])


def loop(cell: nn.LSTMCell, x: Tensor, hx: Any = None, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Output, h and c of a cell in a loop; ours gets the number of the step."""
    outputs = []
    for step in range(x.size(0)):
        hx = cell(x[step], hx, step=step, **options) if isinstance(cell, LSTMCell) else cell(x[step], hx)
        outputs.append(hx[0])
    return torch.stack(outputs), hx[0], hx[1]
