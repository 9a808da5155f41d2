"""What ``LSTM`` and ``LSTMCell`` share: the options that torch's classes do not have, and their parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init

from deepops._lstm_checks import Pair, Seed, as_variant, checked_seed, is_number
from deepops._lstm_types import Variant, Weights

_NUMBERS = ("layer_norm_eps", "zoneout", "variational_dropout", "recurrent_dropout", "cell_clip")
LAYER_NORM = ("weight_ln_ih", "weight_ln_hh", "weight_ln_c", "bias_ln_c")


class LSTMOptions(nn.Module):
    """A mix-in before ``torch.nn.RNNBase`` or ``torch.nn.LSTMCell``."""

    input_size: int
    hidden_size: int
    bias: bool

    def _set_options(
        self,
        layer_norm: bool,
        layer_norm_eps: float,
        peephole: bool,
        zoneout: Pair,
        variational_dropout: Pair,
        recurrent_dropout: float,
        forget_bias: float | None,
        cell_clip: float | None,
    ) -> None:
        """Check and keep them."""
        for name, flag in (("layer_norm", layer_norm), ("peephole", peephole)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name}: expected True or False, got {flag!r}")
        if forget_bias is not None and not is_number(forget_bias):
            raise TypeError(f"forget_bias: expected a number or None, got {forget_bias!r}")
        if forget_bias is not None and not self.bias:
            raise ValueError(f"forget_bias: expected None with bias=False, got {forget_bias!r}")
        variant = as_variant(layer_norm_eps, zoneout, variational_dropout, recurrent_dropout, cell_clip)
        self.layer_norm, self.peephole, self.forget_bias = layer_norm, peephole, forget_bias
        self.layer_norm_eps, self.cell_clip = layer_norm_eps, cell_clip
        self.zoneout, self.variational_dropout = zoneout, variational_dropout
        self.recurrent_dropout = recurrent_dropout
        self._variant = variant

    def __setattr__(self, name: str, value: Any) -> None:
        """Options that are numbers can be changed at any time, as ``dropout`` of torch's; bad ones are refused."""
        if name in _NUMBERS and "_variant" in self.__dict__:
            self._variant = as_variant(**{key: getattr(self, key) for key in _NUMBERS} | {name: value})
        super().__setattr__(name, value)

    def _add_parameters(self, suffix: str, device: Any, dtype: torch.dtype | None) -> tuple[str | None, ...]:
        """The parameters of the options for one layer and direction; the names of all its weights.

        In the order of ``Weights``, None for those it does not have.
        """
        sizes = {"weight_peephole": 3 * self.hidden_size} if self.peephole else {}
        if self.layer_norm:
            sizes |= dict.fromkeys(LAYER_NORM[:2], 4 * self.hidden_size)
            sizes |= dict.fromkeys(LAYER_NORM[2:], self.hidden_size)
        for name, size in sizes.items():
            self.register_parameter(name + suffix, nn.Parameter(torch.empty(size, device=device, dtype=dtype)))
        names = [name + suffix for name in Weights._fields]
        return tuple(name if self._parameters.get(name) is not None else None for name in names)

    def _reset_options(self) -> None:
        """Initial values: peepholes as other weights, layer norm as torch's, the forget gate's bias if given."""
        state = self.__dict__
        if "_variant" not in state:  # torch's constructor calls before there is anything of ours
            return
        bound = self.hidden_size**-0.5 if self.hidden_size else 0.0
        for name, parameter in self._parameters.items():
            if parameter is None:
                continue
            if name.startswith("weight_peephole"):
                init.uniform_(parameter, -bound, bound)
            elif name.startswith(LAYER_NORM):
                init.constant_(parameter, 0.0 if name.startswith("bias") else 1.0)
            elif self.forget_bias is not None and name.startswith("bias_"):
                forget = parameter.detach()[self.hidden_size : 2 * self.hidden_size]
                forget.fill_(self.forget_bias if name.startswith("bias_ih") else 0.0)

    def _named_weights(self, names: tuple[str | None, ...]) -> Weights:
        """The weights as they are now: parameters, or what parametrizations, pruning or weight_norm made of them."""
        parameters = self._parameters
        return Weights(
            *(  # type: ignore[arg-type]
                None if name is None else parameters[name] if name in parameters else getattr(self, name)
                for name in names
            )
        )

    def _seed(self, seed: Seed, device: torch.device) -> Tensor | None:
        """The seed of the masks of a call; None where nothing is random."""
        random = self.training and self._variant.is_random()
        checked = checked_seed(seed, device) if random or seed is not None else None
        return checked if random else None

    def _is_plain(self) -> bool:
        """Whether this is the LSTM that torch has."""
        variant: Variant = self._variant
        return not (self.layer_norm or self.peephole or variant.cell_clip is not None or variant.is_random())

    def _options_repr(self) -> str:
        """The options that differ from their defaults."""
        defaults = {
            "layer_norm": False,
            "layer_norm_eps": 1e-5,
            "peephole": False,
            "zoneout": 0.0,
            "variational_dropout": 0.0,
            "recurrent_dropout": 0.0,
            "forget_bias": None,
            "cell_clip": None,
            "return_all_states": False,
        }
        given = [(name, getattr(self, name, default), default) for name, default in defaults.items()]
        return "".join(f", {name}={value}" for name, value, default in given if value != default)
