"""A forward of ``LSTM`` through all layers and directions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from deepops._lstm import autocasts, lstm_layer
from deepops._lstm_checks import Seed, derived_seed
from deepops._lstm_types import Weights

if TYPE_CHECKING:
    from deepops.nn.lstm import LSTM

Hidden = tuple[Tensor, Tensor]


class Run:
    """One forward through all layers: what it needs beside its tensors."""

    def __init__(self, lstm: LSTM, kernel: bool, seed: Seed) -> None:
        """Nothing is drawn yet."""
        self.lstm, self.kernel, self.seed = lstm, kernel, seed

    def __call__(
        self, x: Tensor, h0: Tensor, c0: Tensor, lengths: Tensor | None, packed_lengths: Tensor | None = None
    ) -> tuple[Tensor, Hidden, tuple[Tensor, ...]]:
        """Output [T, B, D * R], ``(h_n, c_n)``, and all h and all c where they are wanted."""
        lstm = self.lstm
        seed = lstm._seed(self.seed, x.device)
        dtype, h_dtype, c_dtype = self._dtypes(x, packed_lengths is not None)
        if dtype is not None:
            x, h0, c0 = x.to(dtype), h0.to(dtype), c0.to(dtype)
        directions = 2 if lstm.bidirectional else 1
        results = []
        for layer in range(lstm.num_layers):
            outputs = []
            for direction in range(directions):
                number = layer * directions + direction
                weights = lstm._named_weights(lstm._weight_names[number])
                if dtype is not None:
                    weights = Weights(*(None if w is None else w.to(dtype) for w in weights))  # type: ignore[arg-type]
                states = lstm_layer(
                    x,
                    h0[number],
                    c0[number],
                    weights,
                    lstm._variant,
                    reverse=direction == 1,
                    lengths=lengths,
                    seed=None if seed is None else derived_seed(seed, number),
                    kernel=self.kernel,
                )
                results.append(states)
                outputs.append(states[0])
            x = outputs[0] if directions == 1 else torch.cat(outputs, 2)
            if lstm.dropout > 0 and lstm.training and layer < lstm.num_layers - 1:
                x = _dropout(x, lstm.dropout, packed_lengths)
        h, c, h_n, c_n = zip(*results, strict=True)
        last = (_stacked(h_n).to(h_dtype), _stacked(c_n).to(c_dtype))
        every = (_stacked(h).to(h_dtype), _stacked(c).to(c_dtype)) if lstm.return_all_states else ()
        return x.to(h_dtype), last, every

    def _dtypes(self, x: Tensor, packed: bool) -> tuple[torch.dtype | None, torch.dtype, torch.dtype]:
        """Under autocast: dtype to compute in, of output and h, of c, such that the results have stock's dtypes.

        On the CPU stock's are mixed: with a projection its c stays as wide as the weights, and of packed input
        everything. Then all is computed in that, and nothing is lost.
        """
        own = self.lstm._named_weights(self.lstm._weight_names[0]).weight_ih.dtype
        if not autocasts(x):
            return None, own, own
        lower = own if own is torch.float64 else torch.get_autocast_dtype(x.device.type)
        if not x.is_cpu or not (packed or self.lstm.proj_size):
            return lower, lower, lower
        return own, lower if self.lstm.proj_size else own, own


def _dropout(x: Tensor, p: float, packed_lengths: Tensor | None) -> Tensor:
    """Dropout that draws the numbers that torch's LSTM draws: of packed data none for the padding."""
    if packed_lengths is None:
        return F.dropout(x, p)
    packed = pack_padded_sequence(x, packed_lengths)
    return pad_packed_sequence(PackedSequence(F.dropout(packed.data, p), packed.batch_sizes))[0]


def _stacked(tensors: tuple[Tensor, ...]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def without_batch(states: tuple[Tensor, ...], batch: int) -> Any:
    """Without the batch dimension."""
    return tuple(state.squeeze(batch) for state in states)
