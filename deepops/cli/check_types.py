"""What the checks of all ops share: the settings they run in, what they yield, and what names a check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Setting:
    """Where and on what an op is checked."""

    device: str
    dtype: torch.dtype
    layout: str  # "contiguous" or "channels_last"

    def tensor(self, *shape: int, generator: torch.Generator, scale: float = 1.0) -> Tensor:
        """Random normal data of this setting, the same for every device."""
        data = (scale * torch.randn(shape, generator=generator)).to(self.device, self.dtype)
        if self.layout == "contiguous":
            return data
        return data.to(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)


class Comparison(NamedTuple):
    """One result; the tolerance rule pools those of equal ``output``."""

    name: str  # the case: "relu, residual"
    output: str  # "y", "grad_x", ...
    actual: Tensor
    stock: Tensor
    oracle: Tensor  # float64


@dataclass(frozen=True)
class OpCheck:
    """An op (or one pass of it) and how to check it."""

    op: str
    kernel: str  # the name in torch.ops.deepops whose presence says that there is a kernel
    compare: Callable[[Setting], Iterator[Comparison]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    layouts: tuple[str, ...] = ("contiguous", "channels_last")
    devices: tuple[str, ...] = ("cpu", "cuda")
