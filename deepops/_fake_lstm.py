"""Shapes and dtypes of the LSTM ops' results, for tracing and compiling; ``deepops/_fake.py`` registers them."""

from __future__ import annotations

import torch
from torch import Tensor

from deepops._checks import statistics_dtype


def sums_dtype(data: Tensor) -> torch.dtype:
    """Of ``gates_x`` and of the gradients of what gates and projection gave: on the CPU what sums are taken in."""
    return statistics_dtype(data.dtype) if data.device.type == "cpu" else data.dtype


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    steps, batch = gates_x.size(0), gates_x.size(1)

    def sequence(size: int, wanted: bool = True, dtype: torch.dtype = h0.dtype) -> Tensor:
        return h0.new_empty((steps, batch, size) if wanted else 0, dtype=dtype)

    normalizes = weight_ln_hh is not None
    return (
        sequence(h0.size(1)),
        sequence(c0.size(1), save or all_c),
        torch.empty_like(h0, memory_format=torch.contiguous_format),
        torch.empty_like(c0, memory_format=torch.contiguous_format),
        sequence(gates_x.size(2), save),
        sequence(c0.size(1), save and weight_hr is not None),
        sequence(gates_x.size(2), save and normalizes),
        sequence(4, save and normalizes, statistics_dtype(h0.dtype)),
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    steps, batch = gates.size(0), gates.size(1)
    sums = sums_dtype(c0)

    def sequence(size: int, wanted: bool = True) -> Tensor:
        return c0.new_empty((steps, batch, size) if wanted else 0, dtype=sums)

    def small(weight: Tensor | None) -> Tensor:
        return c0.new_empty(0 if weight is None else weight.size(0), dtype=statistics_dtype(c0.dtype))

    return (
        sequence(gates.size(2)),
        sequence(gates.size(2), weight_ln_hh is not None),
        sequence(weight_hh.size(1), weight_hr is not None),
        c0.new_empty(batch, weight_hh.size(1)),
        c0.new_empty(batch, c0.size(1)),
        small(weight_peephole),
        small(weight_ln_hh),
        small(weight_ln_c),
        small(bias_ln_c),
    )


def _lstm_product(a: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return a.new_empty(a.size(0), weight.size(0 if transposed else 1))


def _lstm_weight_gradient(
    grad: Tensor, x: Tensor, start: Tensor | None, start_last: bool, sums: bool
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.size(1), x.size(1)), grad.new_empty(grad.size(1) if sums else 0)


def _lstm_pack(weight_ih: Tensor, weight_hh: Tensor) -> Tensor:
    rows, size, hidden = weight_ih.size(0), weight_ih.size(1), weight_hh.size(1)
    count = rows * (size + hidden)
    if weight_hh.device.type == "cpu":  # once for the gates, once for the gradients, in panels of 64 columns
        panels = (size + 63) // 64 + (hidden + 63) // 64
        count = 64 * ((hidden + 15) // 16 * (size + hidden) + panels * rows)
    return weight_hh.new_empty(count, dtype=sums_dtype(weight_hh))


def _lstm_cell(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    weight_peephole: Tensor | None,
    cell_clip: float | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    def rows(size: int, wanted: bool = True) -> Tensor:
        return h.new_empty((h.size(0), size) if wanted else 0)

    return rows(h.size(1)), rows(c.size(1)), rows(4 * c.size(1), save)


def _lstm_cell_backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    gates: Tensor,
    c_before: Tensor,
    packed: Tensor,
    weight_peephole: Tensor | None,
    cell_clip: float | None,
    input_size: int,
    need_x: bool,
    need_h: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, hidden = c_before.size(0), c_before.size(1)

    def rows(size: int, wanted: bool = True) -> Tensor:
        return c_before.new_empty((batch, size) if wanted else 0)

    small = c_before.new_empty(0 if weight_peephole is None else 3 * hidden, dtype=statistics_dtype(c_before.dtype))
    return rows(4 * hidden), rows(input_size, need_x), rows(hidden, need_h), rows(hidden), small


def register() -> None:
    """Register the functions above."""
    torch.library.register_fake("deepops::lstm_sequence", _lstm_sequence)
    torch.library.register_fake("deepops::lstm_sequence_backward", _lstm_sequence_backward)
    torch.library.register_fake("deepops::_lstm_product", _lstm_product)
    torch.library.register_fake("deepops::_lstm_weight_gradient", _lstm_weight_gradient)
    torch.library.register_fake("deepops::lstm_pack", _lstm_pack)
    torch.library.register_fake("deepops::lstm_cell", _lstm_cell)
    torch.library.register_fake("deepops::lstm_cell_backward", _lstm_cell_backward)
