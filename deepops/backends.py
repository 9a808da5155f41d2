"""Which of two ways deepops goes, where it has two: settings of the process, like those of ``torch.backends``.

``deepops.backends.conv`` is about blocks of convolution, batch normalization and activation on NVIDIA GPUs:

- ``"auto"``, the default: the first call of a kind (device, dtype, shapes, options) times both ways, a few runs each,
  and the faster one is kept for all calls of that kind. While a CUDA graph is captured nothing is timed: what is not
  known by then takes torch's way. So does everything under ``torch.use_deterministic_algorithms``, where time must not
  decide about bits.
- ``"fused"``: deepops' own convolution. A call that it does not cover is a ``ValueError``, which says what is covered.
- ``"aten"``: torch's convolution, which is cuDNN's.

On the CPU, under ``torch.compile`` and ``torch.func``, and in evaluation with gradients there are no two ways, and the
setting has no effect.

    >>> import deepops
    >>> deepops.backends.conv
    'auto'
    >>> with deepops.backends.flags(conv="aten"):
    ...     deepops.backends.conv
    'aten'
    >>> deepops.backends.conv = "fastest"
    Traceback (most recent call last):
    ValueError: conv: expected one of 'auto', 'fused', 'aten', got 'fastest'
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Literal

Conv = Literal["auto", "fused", "aten"]
_CONV = ("auto", "fused", "aten")

conv: Conv  # a property of the module: see _Backends


class _Backends(ModuleType):
    """This module: what is assigned to it is checked at once."""

    _conv: Conv = "auto"

    @property
    def conv(self) -> Conv:
        """See the module."""
        return self._conv

    @conv.setter
    def conv(self, value: Conv) -> None:
        if value not in _CONV:
            raise ValueError(f"conv: expected one of {', '.join(map(repr, _CONV))}, got {value!r}")
        self._conv = value


@contextmanager
def flags(*, conv: Conv) -> Iterator[None]:
    """Set ``deepops.backends.conv`` for the block; afterwards it is what it was. Other threads see it too."""
    module = sys.modules[__name__]
    assert isinstance(module, _Backends)
    before = module.conv
    module.conv = conv
    try:
        yield
    finally:
        module.conv = before


sys.modules[__name__].__class__ = _Backends
