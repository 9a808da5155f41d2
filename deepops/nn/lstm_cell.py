"""``LSTMCell``: torch's, with variants that torch does not have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deepops._checks import check_data, transforms_active
from deepops._explain import kernel_note
from deepops._library import has_kernel
from deepops._lstm import autocasts, choice, lstm_layer
from deepops._lstm_cell import CellCache
from deepops._lstm_checks import Pair, Seed, as_pair, check_like_input
from deepops._lstm_types import Variant, Weights
from deepops.nn._lstm_options import LSTMOptions
from deepops.nn._tools import is_recorded

if TYPE_CHECKING:
    from typing_extensions import Self

Hidden = tuple[Tensor, Tensor]

_KERNEL_ON = {device: has_kernel("lstm_cell", device) for device in ("cpu", "cuda")}
_ON = (_KERNEL_ON["cpu"], _KERNEL_ON["cuda"])
_NOT_RANDOM = (0.0,) * (len(Variant._fields) - 2)


class LSTMCell(LSTMOptions, nn.LSTMCell):
    """``torch.nn.LSTMCell`` with the same arguments, parameters, state_dict and results, and with variants of it.

    One step of :class:`LSTM`: formulas, sources and the options are described there. A loop over the cell with the same
    seed and ``step=t`` gives what the layer gives.

    Where gradients are recorded, the weights are packed once for a sequence: when its state is one that no step made
    (None, or detached), after a backward, and when torch has counted a write to a weight. A write through ``.data`` in
    the middle of a sequence is seen at the next one. Without gradients a plain step is torch's own. h and c are two
    results of one operation: the gradient that a hook sees at c is what comes by way of later steps, not through h.

    Args:
        input_size, hidden_size, bias, device, dtype: as ``torch.nn.LSTMCell``.
        layer_norm, layer_norm_eps, peephole, zoneout, variational_dropout, recurrent_dropout, forget_bias, cell_clip:
            as :class:`LSTM`; the parameters are ``weight_ln_ih``, ``weight_ln_hh``, ``weight_ln_c``, ``bias_ln_c`` and
            ``weight_peephole``.

    Shapes: input ``[B, I]`` or ``[I]``, h and c ``[B, H]`` or ``[H]``; fp32, fp64, fp16 or bf16, the dtype of the
    parameters.

    >>> cell = LSTMCell(8, 16, zoneout=0.1)
    >>> state = None
    >>> for step, x in enumerate(torch.randn(5, 3, 8)):
    ...     state = cell(x, state, seed=1, step=step)
    >>> state[0].shape
    torch.Size([3, 16])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
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
    ) -> None:
        """See the class."""
        super().__init__(input_size, hidden_size, bias, device, dtype)
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
        self._weight_names = self._add_parameters("", device, dtype)
        self._cache = CellCache()
        self._reset_options()

    def reset_parameters(self) -> None:
        """Initial values, as torch's; layer norm starts as the identity."""
        super().reset_parameters()
        self._reset_options()

    @classmethod
    def from_module(cls, cell: nn.LSTMCell) -> Self:
        """A plain cell that shares the parameters of ``cell``."""
        if type(cell) is not nn.LSTMCell:
            raise TypeError(f"cell: expected torch.nn.LSTMCell, got {type(cell).__name__}")
        layer = cls(cell.input_size, cell.hidden_size, cell.bias, device="meta")
        _share(cell, layer)
        return layer

    def to_module(self) -> nn.LSTMCell:
        """``torch.nn.LSTMCell`` on the same parameters. Raise ValueError for a variant, which torch does not have."""
        if not self._is_plain():
            raise ValueError(f"{self}: torch.nn.LSTMCell has no such variant")
        stock = nn.LSTMCell(self.input_size, self.hidden_size, self.bias, device="meta")
        _share(self, stock)
        return stock

    def forward(self, input: Tensor, hx: Hidden | None = None, *, seed: Seed = None, step: int = 0) -> Hidden:
        """``(h, c)`` after one more step.

        Args:
            input: ``[B, I]`` or ``[I]``.
            hx: ``(h, c)`` of the step before; None for zeros.
            seed: an integer, or an int64 tensor of one number, for the masks of zoneout, variational and recurrent
                dropout in training; one and the same for all steps of a sequence. None draws one from torch's
                generator, for this step alone, and is refused with ``variational_dropout``, whose mask is that of a
                whole sequence.
            step: the number of this step, for the masks (0).

        Raises:
            TypeError: something that is no tensor, not a pair of states, another dtype than the parameters have, a step
                that is no integer.
            ValueError: wrong rank, a negative step, no seed with ``variational_dropout`` in training.
            RuntimeError: a wrong number of features, states of a wrong shape: as torch.
        """
        if seed is None and not step and (state := self._usual(input, hx)) is not None:
            return state
        plain, recorded = self._is_plain(), is_recorded(input)
        if plain and recorded:
            return super().forward(input, hx)
        check_data("input", input)
        path = choice(input, plain, recorded)
        if path == "torch":
            return super().forward(input, hx)
        if input.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        if not isinstance(step, (int, torch.SymInt)) or isinstance(step, bool):
            raise TypeError(f"step: expected an integer, got {type(step).__name__}")
        if step < 0:
            raise ValueError(f"step: expected a number of at least 0, got {step}")
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        weights = self._named_weights(self._weight_names)
        h, c = self._states(x, hx, weights, batched)
        drops = max(self._variant.input_dropout, self._variant.hidden_dropout) > 0
        if seed is None and drops and self.training:
            raise ValueError("seed: expected one for all steps of a sequence with variational_dropout, got None")
        autocast = autocasts(x)
        if autocast:
            x, h, c, weights = _to_one_dtype(x, h, c, weights)
        masks = self._seed(seed, x.device)
        if path == "kernel" and self._has_op() and _KERNEL_ON.get(x.device.type) and not torch.compiler.is_compiling():
            h_n, c_n = self._cache.step(x, h, c, (*weights[:4], weights.weight_peephole), self.cell_clip)
        else:
            options: Any = {"seed": masks, "first_step": step, "kernel": path == "kernel"}
            h_n, c_n = lstm_layer(x.unsqueeze(0), h, c, weights, self._variant, **options)[2:]
        return (h_n, c_n) if batched else (h_n.squeeze(0), c_n.squeeze(0))

    def _usual(self, x: Tensor, hx: Hidden | None) -> Hidden | None:
        """The usual case, in one look: the step by its op, of tensors that need no conversion. None: look closer.

        What it asks for is what is cheap to ask: ``x.device.type`` alone takes 0.5 us.
        """
        if (
            torch.compiler.is_compiling()
            or not self._has_op()
            or type(x) is not Tensor
            or not (_ON[0] if x.is_cpu else x.is_cuda and _ON[1])
            or x.dim() != 2
            or torch._C._is_tracing()
            or torch._C._is_any_autocast_enabled()
            or transforms_active()
        ):
            return None
        parameters, dtype, on_cpu = self._parameters, x.dtype, x.is_cpu
        weight, recurrent = parameters.get("weight_ih"), parameters.get("weight_hh")
        if weight is None or recurrent is None or dtype is not weight.dtype or on_cpu is not weight.is_cpu:
            return None
        batch, features = x.shape
        if features != self.input_size or batch == 0 or x.layout is not torch.strided or weight.device != x.device:
            return None
        if hx is None:
            h = c = x.new_zeros(batch, self.hidden_size)
        elif type(hx) is not tuple or len(hx) != 2:
            return None
        else:
            h, c = hx
            size = (batch, self.hidden_size)
            for state in hx:
                if type(state) is not Tensor or state.dtype is not dtype or state.shape != size:
                    return None
                if state.layout is not torch.strided or state.device != x.device:
                    return None
        vectors = (parameters.get("bias_ih"), parameters.get("bias_hh"), parameters.get("weight_peephole"))
        tensors = (weight, recurrent, *vectors)
        recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (h, x, c, *tensors))
        if not recorded and self._is_plain():
            return super().forward(x, (h, c))  # the weights would have to be packed for every step
        return self._cache.step(x, h, c, tensors, self.cell_clip)

    def _has_op(self) -> bool:
        """Whether a step has an op of its own; otherwise it is a sequence of one step."""
        return not self.layer_norm and self._variant[2:] == _NOT_RANDOM

    def _states(self, x: Tensor, hx: Hidden | None, weights: Weights, batched: bool) -> Hidden:
        """``hx`` or zeros, for x of [B, I]. Raise, in torch's words, unless sizes fit."""
        if x.size(1) != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {x.size(1)} expected {self.input_size}")
        weight, autocast = weights.weight_ih, autocasts(x)
        if x.dtype is not weight.dtype and not autocast:
            raise TypeError(f"input: expected {weight.dtype}, the dtype of the parameters, got {x.dtype}")
        if x.device != weight.device:
            raise ValueError(f"input: expected device {weight.device}, where the parameters are, got {x.device}")
        if hx is None:
            zeros = x.new_zeros(x.size(0), self.hidden_size)
            return zeros, zeros.clone() if torch.compiler.is_compiling() else zeros  # which takes no tensor twice
        states = as_pair(hx)
        for i, state in enumerate(states):
            if state.dim() not in (1, 2):
                raise ValueError(f"LSTMCell: Expected hx[{i}] to be 1D or 2D, got {state.dim()}D instead")
        if not batched:
            states = (states[0].unsqueeze(0), states[1].unsqueeze(0))
        for i, state in enumerate(states):
            if state.dim() != 2 or state.size(0) != x.size(0):
                raise RuntimeError(f"Input batch size {x.size(0)} doesn't match hidden{i} batch size {state.size(0)}")
            if state.size(1) != self.hidden_size:
                wanted = f"got {state.size(1)}, expected {self.hidden_size}"
                raise RuntimeError(f"hidden{i} has inconsistent hidden_size: {wanted}")
            check_like_input(f"hx[{i}]", state, x, None if autocast else x.dtype)
        return states

    def extra_repr(self) -> str:
        """The arguments of the cell."""
        return super().extra_repr() + self._options_repr()

    def _explain(self) -> str:
        device = self._named_weights(self._weight_names).weight_ih.device.type
        if _KERNEL_ON.get(device):
            note = "; torch's own where no gradient is recorded" if self._is_plain() else ""
            return f"fused: one op: {kernel_note('lstm_cell', device)}{note}"
        what = "torch's own cell" if self._is_plain() else "plain PyTorch"
        return f"not fused, {what}: there is no kernel for {device}"


def _to_one_dtype(x: Tensor, h: Tensor, c: Tensor, weights: Weights) -> tuple[Tensor, Tensor, Tensor, Weights]:
    """Under autocast: stock's results have the dtype of the weights on the CPU, elsewhere that of autocast."""
    own = weights.weight_ih.dtype
    dtype = own if x.is_cpu or own is torch.float64 else torch.get_autocast_dtype(x.device.type)
    converted: Any = (None if w is None else w.to(dtype) for w in weights)
    return x.to(dtype), h.to(dtype), c.to(dtype), Weights(*converted)


def _share(source: nn.LSTMCell, target: nn.LSTMCell) -> None:
    """Make ``target`` hold the very parameters of ``source``, and its mode."""
    target._parameters.update(source._parameters)
    target.training = source.training
