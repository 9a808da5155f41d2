"""``LSTM``: torch's, with one op per layer and direction, and with variants that torch does not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from deepops._checks import check_data
from deepops._explain import kernel_note
from deepops._lstm import _KERNEL_ON, Weights, _choice, autocasts, lstm_layer
from deepops._lstm_checks import Pair, Seed, as_pair, check_like_input, checked_lengths, derived_seed
from deepops.nn._lstm_options import LSTMOptions
from deepops.nn._tools import is_recorded

if TYPE_CHECKING:
    from typing_extensions import Self

Hidden = tuple[Tensor, Tensor]


class LSTM(LSTMOptions, nn.RNNBase):
    """``torch.nn.LSTM`` with the same arguments, parameters, state_dict and results, and with variants of it.

    Each layer and direction is one op: the product of all inputs first, then step by step the recurrent product with
    the gates fused to it; its backward gives the gradients of weights and inputs as a few large products. Gradients of
    gradients work in eager mode, on plain PyTorch. What a step computes, with all variants::

        a = (x * input_mask) W_ih^T, r = (h * hidden_mask) W_hh^T   layer norm: a = LN(a) * weight_ln_ih, r as well
        i, f, g, o = a + r + b_ih + b_hh                            peepholes: i += p_i * c, f += p_f * c
        c = clip(sigmoid(f) * c + sigmoid(i) * drop(tanh(g)))       peepholes: o += p_o * c
        h = sigmoid(o) * tanh(c)                                    layer norm: tanh(LN(c) * weight_ln_c + bias_ln_c)
        h = h W_hr^T; h, c = zoneout(h), zoneout(c)

    Sources: Gers, Schmidhuber 2000 (peepholes); Sak, Senior, Beaufays 2014 (projection); Ba, Kiros, Hinton 2016 (layer
    norm); Gal, Ghahramani 2016 (variational dropout); Semeniuta, Severyn, Barth 2016 (recurrent dropout); Krueger et
    al. 2017 (zoneout); ``deepops/reference/lstm.py`` has it in plain PyTorch.

    On the CPU 16-bit data is multiplied and added up in float32. Under autocast results have the dtypes of stock's.
    Where there is no kernel for a device the plain LSTM is torch's own, and variants run on plain PyTorch;
    ``deepops.explain(layer)`` says so. ``torch.jit.trace``, ``torch.export`` and ONNX export record torch's operations.

    It is a ``torch.nn.RNNBase``, not a ``torch.nn.LSTM``: ``torch.compile`` breaks its graph at all of these and their
    subclasses, and this one compiles with ``fullgraph=True``, one op per layer and direction, for any number of steps.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as
            ``torch.nn.LSTM``. A seed of torch gives the dropout between layers that it gives there.
        layer_norm: layer norm of both products and of the cell (default False); parameters ``weight_ln_ih_l0``,
            ``weight_ln_hh_l0`` ``[4H]``, ``weight_ln_c_l0``, ``bias_ln_c_l0`` ``[H]``, and so on as torch names them.
        layer_norm_eps: added to its variances (1e-5).
        peephole: the gates see the cell (False); parameter ``weight_peephole_l0`` ``[3H]``: of i, f, o.
        zoneout: probability that an element of the state stays what it was, for h and c or ``(h, c)`` (0.0); in
            evaluation the expectation of that.
        variational_dropout: dropout of the inputs of each layer and of the state with one mask for a whole sequence,
            for both or ``(input, hidden)`` (0.0).
        recurrent_dropout: dropout of g, for each step anew (0.0).
        forget_bias: initial value of the forget gate's bias: that part of ``bias_ih`` gets it, that of ``bias_hh`` 0;
            None (default) leaves them as torch initializes them.
        cell_clip: bound of the cell's absolute value; None (default) for no bound.
        return_all_states: also return h and c of every step, layer and direction (False).

    Shapes: input ``[T, B, I]``, with ``batch_first`` ``[B, T, I]``, without a batch ``[T, I]``, or a PackedSequence;
    output likewise with ``D * R`` features, D directions, ``R = proj_size or hidden_size``; h and c ``[L * D, B, R]``
    and ``[L * D, B, H]``. fp32, fp64, fp16 or bf16, the dtype of the parameters.

    >>> lstm = LSTM(8, 16, num_layers=2, layer_norm=True)
    >>> output, (h, c) = lstm(torch.randn(5, 3, 8), lengths=[5, 2, 4])
    >>> output.shape, h.shape
    (torch.Size([5, 3, 16]), torch.Size([2, 3, 16]))
    """

    # What torch's own forward asks for beyond RNNBase.
    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        layer_norm: bool = False,
        layer_norm_eps: float = 1e-5,
        peephole: bool = False,
        zoneout: Pair = 0.0,
        variational_dropout: Pair = 0.0,
        recurrent_dropout: float = 0.0,
        forget_bias: float | None = None,
        cell_clip: float | None = None,
        return_all_states: bool = False,
    ) -> None:
        """See the class."""
        sizes = (input_size, hidden_size, num_layers)
        super().__init__("LSTM", *sizes, bias, batch_first, dropout, bidirectional, proj_size, device, dtype)
        self._set_options(
            layer_norm,
            layer_norm_eps,
            peephole,
            zoneout,
            variational_dropout,
            recurrent_dropout,
            forget_bias,
            cell_clip,
        )
        if not isinstance(return_all_states, bool):
            raise TypeError(f"return_all_states: expected True or False, got {return_all_states!r}")
        self.return_all_states = return_all_states
        suffixes = ("", "_reverse") if bidirectional else ("",)
        self._weight_names = [
            self._add_parameters(f"_l{layer}{suffix}", device, dtype)
            for layer in range(num_layers)
            for suffix in suffixes
        ]
        self._reset_options()

    def reset_parameters(self) -> None:
        """Initial values, as torch's; layer norm starts as the identity."""
        super().reset_parameters()
        self._reset_options()

    @classmethod
    def from_module(cls, lstm: nn.LSTM) -> Self:
        """A plain layer that shares the parameters of ``lstm``."""
        if type(lstm) is not nn.LSTM:
            raise TypeError(f"lstm: expected torch.nn.LSTM, got {type(lstm).__name__}")
        layer = cls(*_arguments(lstm), device="meta")
        _share(lstm, layer)
        return layer

    def to_module(self) -> nn.LSTM:
        """``torch.nn.LSTM`` on the same parameters. Raise ValueError for a variant, which torch does not have."""
        if not self._is_plain():
            raise ValueError(f"{self}: torch.nn.LSTM has no such variant")
        stock = nn.LSTM(*_arguments(self), device="meta")
        _share(self, stock)
        return stock

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Hidden | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        seed: Seed = None,
    ) -> tuple[Any, ...]:
        """``(output, (h_n, c_n))``; with ``return_all_states`` also ``(h, c)`` of every step.

        Args:
            input: see the class.
            hx: ``(h_0, c_0)``; None for zeros.
            lengths: steps of each sequence in padded input, ``[B]``, int64, in any order, 0 to T. The output is 0
                beyond, ``h_n`` and ``c_n`` are those of each sequence's last step, and the other direction begins
                there. On a GPU the numbers are not looked at.
            seed: an integer, or an int64 tensor of one number, for the masks of zoneout, variational and recurrent
                dropout in training: equal seeds give equal masks, on every device. None draws one from torch's
                generator. Layer and direction n take ``seed + n * 0x9E3779B97F4A7C15``.

        Returns:
            ``output``, ``(h_n, c_n)``, and with ``return_all_states`` ``(h, c)`` of shape ``[L * D, T, B, R]`` and
            ``[L * D, T, B, H]``, with ``batch_first`` ``[L * D, B, T, ...]``; padded for a PackedSequence.

        Raises:
            TypeError: something that is no tensor, not a pair of states, another dtype than the parameters have.
            ValueError: wrong rank, ``lengths`` that do not fit, a seed of more than 64 bits.
            RuntimeError: a wrong number of features, states of a wrong shape, no steps at all: as torch.
        """
        packed = input if isinstance(input, PackedSequence) else None
        data: Tensor = input if packed is None else packed.data  # type: ignore[assignment]
        plain = self._is_plain() and lengths is None and not self.return_all_states
        recorded = is_recorded(data)
        if plain and recorded:
            return self._as_torch(input, hx)
        check_data("input", data)
        path = _choice(data, plain, recorded)
        if path == "torch":
            return self._as_torch(input, hx)
        run = _Run(self, path == "kernel", seed)
        if packed is not None:
            if lengths is not None:
                raise ValueError("lengths: expected None beside a PackedSequence, which has its own")
            return self._forward_packed(run, packed, hx)
        if data.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {data.dim()}D instead")
        batched = data.dim() == 3
        x = data.transpose(0, 1) if self.batch_first and batched else data if batched else data.unsqueeze(1)
        if not batched and lengths is not None:
            raise ValueError("lengths: expected None beside an input without a batch")
        h0, c0 = self._states(x, hx, batched)
        output, last, every = run(x, h0, c0, checked_lengths(lengths, x))
        if not batched:
            output, last, every = output.squeeze(1), _pair(last, 1), _pair(every, 2)
        elif self.batch_first:
            output, every = output.transpose(0, 1), tuple(state.transpose(1, 2) for state in every)
        return (output, last, every) if self.return_all_states else (output, last)

    def _as_torch(self, input: Any, hx: Any) -> tuple[Any, ...]:
        """What ``torch.nn.LSTM`` does with the same parameters."""
        forward: Any = nn.LSTM.forward
        results: tuple[Any, ...] = forward(self, input, hx)
        return results

    def _forward_packed(self, run: _Run, packed: PackedSequence, hx: Hidden | None) -> tuple[Any, ...]:
        """Padded, in the order of the packed data, and packed again."""
        data, batch_sizes, by_length, back = packed
        if data.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
        x, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes))
        h0, c0 = self._states(x, hx, True)
        if hx is not None and by_length is not None:
            h0, c0 = h0.index_select(1, by_length), c0.index_select(1, by_length)
        output, last, every = run(x, h0, c0, lengths.to(x.device), packed_lengths=lengths)
        output = pack_padded_sequence(output, lengths).data
        if back is not None:
            last = (last[0].index_select(1, back), last[1].index_select(1, back))
        result = PackedSequence(output, batch_sizes, by_length, back)
        if not self.return_all_states:
            return result, last
        if back is not None:
            every = tuple(state.index_select(2, back) for state in every)
        if self.batch_first:
            every = tuple(state.transpose(1, 2) for state in every)
        return result, last, every

    def _states(self, x: Tensor, hx: Hidden | None, batched: bool) -> Hidden:
        """``hx`` or zeros, for x of [T, B, I]. Raise, in torch's words, unless sizes fit."""
        steps, batch, features = x.shape
        if features != self.input_size:
            wanted = f"Expected {self.input_size}, got {features}"
            raise RuntimeError(f"input.size(-1) must be equal to input_size. {wanted}")
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        places = self.num_layers * (2 if self.bidirectional else 1)
        h_size, c_size = (places, batch, self.proj_size or self.hidden_size), (places, batch, self.hidden_size)
        weight = self._named_weights(self._weight_names[0]).weight_ih
        autocast = autocasts(x)
        if x.dtype is not weight.dtype and not autocast:  # torch's own words
            raise ValueError(
                f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
            )
        if x.device != weight.device:
            raise ValueError(f"input: expected device {weight.device}, where the parameters are, got {x.device}")
        if hx is None:
            h0 = x.new_zeros(h_size)
            # torch.compile takes no tensor twice
            alike = h_size == c_size and not torch.compiler.is_compiling()
            return h0, h0 if alike else x.new_zeros(c_size)
        h0, c0 = as_pair(hx)
        rank = 3 if batched else 2
        if h0.dim() != rank or c0.dim() != rank:
            kind = "batched 3-D" if batched else "unbatched 2-D"
            given = f"({h0.dim()}-D, {c0.dim()}-D) tensors"
            raise RuntimeError(f"For {kind} input, hx and cx should also be {rank}-D but got {given}")
        if not batched:
            h0, c0 = h0.unsqueeze(1), c0.unsqueeze(1)
        for i, (state, size) in enumerate(((h0, h_size), (c0, c_size))):
            if state.shape != size:
                raise RuntimeError(f"Expected hidden[{i}] size {size}, got {list(state.shape)}")
            check_like_input(f"hx[{i}]", state, x, None if autocast else x.dtype)
        return h0, c0

    def extra_repr(self) -> str:
        """The arguments of the layer."""
        return super().extra_repr() + self._options_repr()

    def _explain(self) -> str:
        device = self._named_weights(self._weight_names[0]).weight_ih.device.type
        if _KERNEL_ON.get(device):
            return f"fused: one op per layer and direction: {kernel_note('lstm_sequence', device)}"
        what = "torch's own LSTM" if self._is_plain() else "step by step in plain PyTorch"
        return f"not fused, {what}: there is no kernel for {device}"


class _Run:
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


def _pair(states: tuple[Tensor, ...], batch: int) -> Any:
    """Without the batch dimension."""
    return tuple(state.squeeze(batch) for state in states)


def _arguments(lstm: nn.RNNBase) -> tuple[int, int, int, bool, bool, float, bool, int]:
    """Arguments of the constructor, up to ``proj_size``."""
    return (
        lstm.input_size,
        lstm.hidden_size,
        lstm.num_layers,
        lstm.bias,
        lstm.batch_first,
        lstm.dropout,
        lstm.bidirectional,
        lstm.proj_size,
    )


def _share(source: nn.RNNBase, target: nn.RNNBase) -> None:
    """Make ``target`` hold the very parameters of ``source``, and its mode."""
    target._parameters.update(source._parameters)
    target._init_flat_weights()
    target.training = source.training
