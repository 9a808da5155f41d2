"""``ConvBNReLU1d``, ``2d`` and ``3d``: the layers of ``conv_bn_act.py`` without a choice of the activation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from deepops._checks import Size
from deepops.nn._activation import Activation, as_activation
from deepops.nn.conv_bn_act import Conv, ConvBNAct1d, ConvBNAct2d, ConvBNAct3d, _ConvBNAct

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self


class _OnlyReLU(_ConvBNAct):
    """The constructor without an activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        """See the class."""
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            eps,
            momentum,
            affine,
            track_running_stats,
            device=device,
            dtype=dtype,
            process_group=process_group,
        )

    @classmethod
    def from_modules(cls, conv: Conv, bn: _BatchNorm, activation: str | nn.Module | None = "relu") -> Self:
        """As ``ConvBNAct2d.from_modules``; the activation can only be relu."""
        if as_activation(activation, 0.01, "none") != Activation("relu"):
            other = cls.__name__.replace("ReLU", "Act")
            raise ValueError(f"activation: expected relu, got {activation!r}; use {other} for others")
        return super().from_modules(conv, bn, activation)


class ConvBNReLU2d(_OnlyReLU, ConvBNAct2d):
    """:class:`ConvBNAct2d` with its default activation, relu.

    >>> ConvBNReLU2d(3, 16, 3, padding=1)(torch.randn(2, 3, 8, 8)).min() >= 0
    tensor(True)
    """


class ConvBNReLU1d(_OnlyReLU, ConvBNAct1d):
    """:class:`ConvBNAct1d` with relu."""


class ConvBNReLU3d(_OnlyReLU, ConvBNAct3d):
    """:class:`ConvBNAct3d` with relu."""
