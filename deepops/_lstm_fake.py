"""Shapes and dtypes of the LSTM ops' results, for tracing and compiling (``torch.library.register_fake``)."""

from __future__ import annotations

import torch
from torch import Tensor


def _lstm_sequence(
    gates_x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    weight_peephole: Tensor | None,
    weight_ln_hh: Tensor | None,
    weight_ln_c: Tensor | None,
    bias_ln_c: Tensor | None,
    hidden_mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    reverse: bool,
    cell_clip: float | None,
    layer_norm_eps: float,
    zoneout_h: float,
    zoneout_c: float,
    recurrent_dropout: float,
    first_step: int,
    save: bool,
    all_c: bool,
) -> tuple[Tensor, ...]:
    steps, batch, gates = gates_x.shape
    normed = save and weight_ln_hh is not None

    def steps_of(columns: int, wanted: bool) -> Tensor:
        return c0.new_empty((steps, batch, columns) if wanted else (0,))

    return (
        steps_of(h0.size(1), True),
        steps_of(c0.size(1), save or all_c),
        torch.empty_like(h0),
        torch.empty_like(c0),
        steps_of(gates, save),
        steps_of(c0.size(1), save and weight_hr is not None),
        steps_of(gates, normed),
        c0.new_empty((steps, batch, 4) if normed else (0,), dtype=_accumulated(c0.dtype)),
    )


def _lstm_sequence_backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    gates: Tensor,
    c: Tensor,
    r: Tensor,
    stats: Tensor,
    c0: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    weight_peephole: Tensor | None,
    weight_ln_hh: Tensor | None,
    weight_ln_c: Tensor | None,
    bias_ln_c: Tensor | None,
    hidden_mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    reverse: bool,
    cell_clip: float | None,
    layer_norm_eps: float,
    zoneout_h: float,
    zoneout_c: float,
    recurrent_dropout: float,
    first_step: int,
) -> tuple[Tensor, ...]:
    steps, batch, columns = gates.shape
    wide = _accumulated(c0.dtype) if c0.device.type == "cpu" else c0.dtype

    def like(weight: Tensor | None) -> Tensor:
        return c0.new_empty(0) if weight is None else torch.empty_like(weight)

    return (
        gates.new_empty((steps, batch, columns), dtype=wide),
        gates.new_empty((steps, batch, columns) if weight_ln_hh is not None else (0,), dtype=wide),
        c0.new_empty((steps, batch, weight_hr.size(0)) if weight_hr is not None else (0,)),
        c0.new_empty((batch, weight_hh.size(1))),
        torch.empty_like(c0),
        like(weight_peephole),
        like(weight_ln_hh),
        like(weight_ln_c),
        like(bias_ln_c),
    )


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def register() -> None:
    """Register the functions above. Called once, after the ops were loaded."""
    torch.library.register_fake("deepops::lstm_sequence", _lstm_sequence)
    torch.library.register_fake("deepops::lstm_sequence_backward", _lstm_sequence_backward)
