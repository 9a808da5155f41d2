"""What an LSTM layer in one direction is made of: its weights, and what it does beyond the plain LSTM."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Weights(NamedTuple):
    """The weights of a layer in one direction; all of one dtype. None: the layer does not have it."""

    weight_ih: Tensor  # [4H, I]
    weight_hh: Tensor  # [4H, R], R = P with a projection, else H
    bias_ih: Tensor | None = None  # [4H]
    bias_hh: Tensor | None = None  # [4H]
    weight_hr: Tensor | None = None  # [P, H]
    weight_peephole: Tensor | None = None  # [3H]
    weight_ln_ih: Tensor | None = None  # [4H], the four of layer norm come together
    weight_ln_hh: Tensor | None = None  # [4H]
    weight_ln_c: Tensor | None = None  # [H]
    bias_ln_c: Tensor | None = None  # [H]


class Variant(NamedTuple):
    """What a layer does beyond the plain LSTM, apart from its weights. Numbers are probabilities but for the first."""

    layer_norm_eps: float = 1e-5
    cell_clip: float | None = None
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    input_dropout: float = 0.0  # one mask for a whole sequence
    hidden_dropout: float = 0.0  # the same, of the state
    recurrent_dropout: float = 0.0  # on g, for each step anew

    def is_random(self) -> bool:
        """Whether training takes random masks."""
        return max(self[2:]) > 0


PLAIN = Variant()
