"""How ``deepops check`` compares the LSTM's ops: a layer in one direction with its variants, and a loop over a cell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import deepops.nn
from deepops._lstm import PLAIN, Variant, Weights, lstm_layer, runs_on_kernel
from deepops.cli.check_types import Comparison, Setting
from deepops.testing import to_double

_STEPS, _BATCH, _INPUTS, _HIDDEN, _PROJECTED = 3, 5, 9, 20, 7
_SEEDS = range(5)  # an error's way through later steps is luck: many cases, few numbers

# What each variant needs: probabilities and options, weights beyond the plain ones, then direction and lengths. Few
# numbers of nearly the same size make layer norm magnify every error: hence its eps.
_LAYER_NORM = ("weight_ln_ih", "weight_ln_hh", "weight_ln_c", "bias_ln_c")
_NORMALIZED = Variant(layer_norm_eps=1.0)
_CASES: dict[str, tuple[Variant, tuple[str, ...], bool, bool]] = {
    "plain": (PLAIN, (), False, False),
    "reverse, lengths": (PLAIN, (), True, True),
    "projection": (PLAIN, ("weight_hr",), False, False),
    "peephole": (PLAIN, ("weight_peephole",), False, False),
    "layer norm": (_NORMALIZED, _LAYER_NORM, False, True),
    "zoneout": (Variant(zoneout_h=0.3, zoneout_c=0.2), (), False, False),
    "dropouts": (Variant(input_dropout=0.2, hidden_dropout=0.3, recurrent_dropout=0.2), (), False, False),
    "all": (Variant(1.0, None, 0.1, 0.1, 0.1, 0.1, 0.1), ("weight_hr", "weight_peephole", *_LAYER_NORM), True, True),
}


def check_lstm(setting: Setting) -> Iterator[Comparison]:
    """Forward and backward of ``lstm_layer`` with and without the kernel, and without it in fp64."""
    for name, (variant, extra, reverse, with_lengths) in _CASES.items():
        for seed in _SEEDS:
            generator = torch.Generator().manual_seed(seed)
            inputs, weights = _layer_inputs(setting, extra, generator)
            size = _PROJECTED if weights.weight_hr is not None else _HIDDEN
            shapes = ((_STEPS, _BATCH, size), (_STEPS, _BATCH, _HIDDEN), (_BATCH, size), (_BATCH, _HIDDEN))
            grads = [setting.tensor(*shape, generator=generator) for shape in shapes]
            lengths = torch.tensor([3, 2, 0, 3, 1], device=setting.device) if with_lengths else None
            masks = torch.tensor([seed], device=setting.device)

            options = {"reverse": reverse, "lengths": lengths, "seed": masks}
            tensors = [*inputs, *weights]
            names = (("x", "h_0", "c_0", *Weights._fields), ("h", "c", "h_n", "c_n"))
            plain = _layer(variant, kernel=False, **options)
            actual = _differentiated(
                _layer(variant, kernel=runs_on_kernel(inputs[0]), **options), tensors, grads, names
            )
            stock = _differentiated(plain, tensors, grads, names)
            oracle = _differentiated(plain, to_double(tensors), to_double(grads), names)
            yield from _compared(f"{name}, seed {seed}", actual, stock, oracle)


def _layer(variant: Variant, **options: Any) -> Callable[..., Sequence[Tensor]]:
    """``lstm_layer`` as a function of tensors alone."""

    def layer(x: Tensor, h0: Tensor, c0: Tensor, *weights: Any) -> Sequence[Tensor]:
        return lstm_layer(x, h0, c0, Weights(*weights), variant, **options)

    return layer


def _layer_inputs(setting: Setting, extra: tuple[str, ...], generator: torch.Generator) -> tuple[list[Tensor], Weights]:
    """``x``, ``h0``, ``c0`` and the weights."""
    size = _PROJECTED if "weight_hr" in extra else _HIDDEN
    gates = 4 * _HIDDEN
    shapes = {
        "weight_ih": (gates, _INPUTS),
        "weight_hh": (gates, size),
        "bias_ih": (gates,),
        "bias_hh": (gates,),
        "weight_hr": (_PROJECTED, _HIDDEN),
        "weight_peephole": (3 * _HIDDEN,),
        "weight_ln_ih": (gates,),
        "weight_ln_hh": (gates,),
        "weight_ln_c": (_HIDDEN,),
        "bias_ln_c": (_HIDDEN,),
    }
    values = {
        name: setting.tensor(*shape, generator=generator, scale=0.3)
        for name, shape in shapes.items()
        if name in extra or name in Weights._fields[:4]
    }
    for name in values:
        if name.startswith("weight_ln"):
            values[name] = values[name] + 1
    inputs = [
        setting.tensor(*shape, generator=generator)
        for shape in ((_STEPS, _BATCH, _INPUTS), (_BATCH, size), (_BATCH, _HIDDEN))
    ]
    return inputs, Weights(**values)


def check_lstm_cell(setting: Setting) -> Iterator[Comparison]:
    """A loop over ``LSTMCell`` beside one over torch's."""
    for seed in _SEEDS:
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            stock = nn.LSTMCell(_INPUTS, _HIDDEN, dtype=setting.dtype).to(setting.device)
        exact = nn.LSTMCell(_INPUTS, _HIDDEN, dtype=torch.float64).to(setting.device)
        exact.load_state_dict(stock.state_dict())
        shapes = ((_STEPS, _BATCH, _INPUTS), (_BATCH, _HIDDEN), (_BATCH, _HIDDEN))
        inputs = [setting.tensor(*shape, generator=generator) for shape in shapes]
        grads = [setting.tensor(*shape, generator=generator) for shape in ((_STEPS, *shapes[1]), shapes[1])]
        results = []
        for cell in (deepops.nn.LSTMCell.from_module(stock), stock, exact):
            names, parameters = zip(*cell.named_parameters(), strict=True)
            tensors, cotangents = (to_double(inputs), to_double(grads)) if cell is exact else (inputs, grads)
            kinds = (("x", "h_0", "c_0", *names), ("h", "c_n"))
            results.append(_differentiated(_loop(cell), [*tensors, *parameters], cotangents, kinds))
        yield from _compared(f"seed {seed}", *results)


def _loop(cell: nn.LSTMCell) -> Callable[..., Sequence[Tensor]]:
    """All h and the last c of ``cell`` over a sequence; its parameters are not looked at."""

    def loop(x: Tensor, h: Tensor, c: Tensor, *_: Tensor | None) -> Sequence[Tensor]:
        outputs = []
        for step in x:
            h, c = cell(step, (h, c))
            outputs.append(h)
        return torch.stack(outputs), c

    return loop


def _differentiated(
    function: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    names: tuple[Sequence[str], Sequence[str]],  # of inputs, of results
) -> dict[str, Tensor]:
    """Results and gradients by name; parameters of modules stay what they are."""
    fresh = [t if t is None or isinstance(t, nn.Parameter) else t.detach().clone().requires_grad_() for t in tensors]
    results = function(*fresh)
    given = {name: t for name, t in zip(names[0], fresh, strict=True) if t is not None}
    found = torch.autograd.grad(list(results), list(given.values()), list(grads))
    outputs = {name: result.detach() for name, result in zip(names[1], results, strict=True)}
    return outputs | {f"grad_{name}": grad for name, grad in zip(given, found, strict=True)}


def _compared(
    case: str, actual: dict[str, Tensor], stock: dict[str, Tensor], oracle: dict[str, Tensor]
) -> Iterator[Comparison]:
    """Pooled as states and gradients: single ones have too few numbers to tell luck from error."""
    for name, value in actual.items():
        kind = "gradients" if name.startswith("grad") else "states"
        yield Comparison(f"{case}, {name}", kind, value, stock[name], oracle[name])
