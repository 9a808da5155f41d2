"""LSTM in plain PyTorch: one layer in one direction, with every variant. Oracle, documentation, fallback.

One step, for inputs ``x_t`` and the state ``(h, c)`` of the step before; gates in the order i, f, g, o as in torch::

    a = x_t W_ih^T, r = (h * hidden_mask) W_hh^T       layer norm: a = LN(a) * weight_ln_ih, r = LN(r) * weight_ln_hh
    i, f, g, o = a + r + b_ih + b_hh                    peepholes: i += p_i * c, f += p_f * c
    i, f, g = sigmoid(i), sigmoid(f), tanh(g)           recurrent dropout: g = dropout(g)
    new = f * c + i * g                                 cell clipping: new = clamp(new, -clip, clip)
    o = sigmoid(o)                                      peepholes: sigmoid(o + p_o * new)
    out = o * tanh(new)                                 layer norm: o * tanh(LN(new) * weight_ln_c + bias_ln_c)
                                                        projection: out = out W_hr^T
    h, c = out, new                                     zoneout: with probability z the value of the step before

Sources: LSTM with forget gate, Gers, Schmidhuber, Cummins 2000; peepholes, Gers, Schmidhuber 2000; projection, Sak,
Senior, Beaufays 2014; layer norm, Ba, Kiros, Hinton 2016, equations 20 to 22 (``b_ih``, ``b_hh`` are its two biases);
``hidden_mask``, one for a whole sequence, Gal, Ghahramani 2016; recurrent dropout on ``g``, Semeniuta, Severyn, Barth
2016; zoneout, Krueger et al. 2017. Random masks: Philox4x32-10, Salmon et al. 2011, see ``random_words``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# What a random word is for: the last of the four numbers of Philox's counter.
ZONEOUT_H, ZONEOUT_C, RECURRENT_DROPOUT, HIDDEN_MASK, INPUT_MASK = range(5)


def lstm_sequence(
    gates_x: Tensor,  # [T, B, 4H], a + b_ih + b_hh
    h0: Tensor,  # [B, R], R = P with a projection, else H
    c0: Tensor,  # [B, H]
    weight_hh: Tensor,  # [4H, R]
    weight_hr: Tensor | None = None,  # [P, H]
    weight_peephole: Tensor | None = None,  # [3H]: p_i, p_f, p_o
    weight_ln_hh: Tensor | None = None,  # [4H]; the three of layer norm come together
    weight_ln_c: Tensor | None = None,  # [H]
    bias_ln_c: Tensor | None = None,  # [H]
    hidden_mask: Tensor | None = None,  # [B, R]: 0 or 1 / (1 - p)
    lengths: Tensor | None = None,  # [B], int64: steps of each sequence, at most T
    seed: Tensor | None = None,  # [1], int64; None in evaluation: zoneout takes expectations, nothing is dropped
    *,
    reverse: bool = False,
    cell_clip: float | None = None,
    layer_norm_eps: float = 1e-5,
    zoneout_h: float = 0.0,
    zoneout_c: float = 0.0,
    recurrent_dropout: float = 0.0,
    first_step: int = 0,  # the number of the first step, for the masks
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What follows the product of inputs and ``W_ih``: ``(h, c, h_n, c_n)``, ``h`` [T, B, R] and ``c`` [T, B, H].

    ``h`` and ``c`` are those of every step, 0 after a sequence's end; ``h_n`` and ``c_n`` those of the last step (in
    ``reverse`` of step 0).
    """
    steps, batch = gates_x.shape[:2]
    hidden = c0.size(1)
    h, c = h0, c0
    all_h: list[Tensor] = [h0.new_zeros(h0.shape)] * steps
    all_c: list[Tensor] = [c0.new_zeros(c0.shape)] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        r = F.linear(h if hidden_mask is None else h * hidden_mask, weight_hh)
        if weight_ln_hh is not None:
            r = F.layer_norm(r, (4 * hidden,), weight_ln_hh, None, layer_norm_eps)
        i, f, g, o = (gates_x[t] + r).chunk(4, 1)
        if weight_peephole is not None:
            p_i, p_f, p_o = weight_peephole.chunk(3)
            i, f = i + p_i * c, f + p_f * c
        i, f, g = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g)
        if seed is not None and recurrent_dropout > 0:
            scale = 1 / (1 - recurrent_dropout) if recurrent_dropout < 1 else 0.0
            dropped = random_mask(seed, RECURRENT_DROPOUT, first_step + t, batch, hidden, recurrent_dropout)
            g = torch.where(dropped, 0, g * scale)
        new_c = f * c + i * g
        if cell_clip is not None:
            new_c = new_c.clamp(-cell_clip, cell_clip)
        o = torch.sigmoid(o if weight_peephole is None else o + p_o * new_c)
        shown = new_c
        if weight_ln_c is not None:
            shown = F.layer_norm(new_c, (hidden,), weight_ln_c, bias_ln_c, layer_norm_eps)
        new_h = o * torch.tanh(shown)
        if weight_hr is not None:
            new_h = F.linear(new_h, weight_hr)
        new_h = zoneout(new_h, h, zoneout_h, seed, ZONEOUT_H, first_step + t)
        new_c = zoneout(new_c, c, zoneout_c, seed, ZONEOUT_C, first_step + t)
        if lengths is None:
            h, c = all_h[t], all_c[t] = new_h, new_c
        else:
            runs = (t < lengths)[:, None]
            all_h[t], all_c[t] = torch.where(runs, new_h, 0), torch.where(runs, new_c, 0)
            h, c = torch.where(runs, new_h, h), torch.where(runs, new_c, c)
    if not steps:
        return h0.new_zeros((0, *h0.shape)), c0.new_zeros((0, *c0.shape)), h0, c0
    return torch.stack(all_h), torch.stack(all_c), h, c


def zoneout(new: Tensor, old: Tensor, p: float, seed: Tensor | None, stream: int, step: int) -> Tensor:
    """``old`` with probability ``p`` for each element of [B, N]; in evaluation the expectation of that."""
    if p == 0:
        return new
    if seed is None:
        return p * old + (1 - p) * new
    return torch.where(random_mask(seed, stream, step, new.size(0), new.size(1), p), old, new)


def random_mask(seed: Tensor, stream: int, step: int, rows: int, columns: int, p: float) -> Tensor:
    """True with probability ``p`` for each element of [rows, columns]: where its random word is below ``p * 2^32``."""
    return random_words(seed, stream, step, rows, columns) < int(p * 2**32)


def random_words(seed: Tensor, stream: int, step: int, rows: int, columns: int) -> Tensor:
    """32 random bits, as int64, for each element of [rows, columns]; the same on every device.

    Element (row, column) is word ``column % 4`` of Philox4x32-10 with the counter (column // 4, row, step, stream) and
    the two halves of ``seed`` as key, the lower one first.
    """
    low = 0xFFFFFFFF
    device = seed.device
    column = torch.arange((columns + 3) // 4, device=device).expand(rows, -1)
    row = torch.arange(rows, device=device)[:, None].expand_as(column)
    c0, c1, c2, c3 = column, row, torch.full_like(column, step), torch.full_like(column, stream)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        high0, low0 = _product(c0, 0xD2511F53)
        high1, low1 = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack((c0, c1, c2, c3), 2).flatten(1)[:, :columns]


def _product(a: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of the product of two 32-bit numbers; int64 has no room for all of it at once."""
    below = a * (factor & 0xFFFF)
    above = a * (factor >> 16) + (below >> 16)
    return above >> 16, ((above & 0xFFFF) << 16) | (below & 0xFFFF)
