"""Activations as names and as ``torch.nn`` modules."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from deepops._checks import check_activation


class Activation(NamedTuple):
    """What the ops need to know of an activation."""

    name: str
    negative_slope: float = 0.01
    approximate: str = "none"

    def to_module(self) -> nn.Module:
        """The ``torch.nn`` module that computes it."""
        if self.name == "leaky_relu":
            return nn.LeakyReLU(self.negative_slope)
        if self.name == "gelu":
            return nn.GELU(self.approximate)
        return _MODULES[self.name]()

    def extra_repr(self) -> str:
        """The arguments that matter for this activation, as a constructor call shows them."""
        text = f"activation={self.name!r}"
        if self.name == "leaky_relu":
            text += f", negative_slope={self.negative_slope}"
        if self.name == "gelu":
            text += f", approximate={self.approximate!r}"
        return text


_MODULES: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "identity": nn.Identity,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
}
_NAMES = {module: name for name, module in _MODULES.items()}


def as_activation(activation: str | nn.Module | None, negative_slope: float, approximate: str) -> Activation:
    """Read an activation given as a name, as one of torch's modules, or as None for the identity.

    Raises:
        ValueError: unknown name.
        TypeError: a module of another class (a subclass may compute something else).
    """
    if activation is None:
        return Activation("identity")
    if isinstance(activation, str):
        check_activation(activation, approximate)
        return Activation(activation, negative_slope, approximate)
    name = _NAMES.get(type(activation))
    if name is None:
        allowed = ", ".join(f"nn.{module.__name__}" for module in _NAMES)
        raise TypeError(f"activation: expected a name or one of {allowed}, got {type(activation).__name__}")
    if isinstance(activation, nn.LeakyReLU):
        negative_slope = float(activation.negative_slope)
    if isinstance(activation, nn.GELU):
        approximate = activation.approximate
    return Activation(name, negative_slope, approximate)
