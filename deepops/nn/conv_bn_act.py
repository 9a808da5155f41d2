"""``ConvBNAct2d``: convolution, batch normalization, optional residual and activation in one layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from deepops import functional
from deepops._checks import check_convolution, check_data
from deepops._explain import kernel_note
from deepops.nn._activation import Activation, as_activation
from deepops.nn._folding import FoldedWeights, folded_forward, folds
from deepops.nn.batch_norm_act import batch_norm_state
from deepops.reference.batch_norm_act import activation as apply_activation

if TYPE_CHECKING:
    from typing_extensions import Self


class ConvBNAct2d(nn.Module):
    """``act(bn(conv(x)) + residual)`` with the submodules ``conv`` (``nn.Conv2d``) and ``bn`` (``nn.BatchNorm2d``).

    Results, gradients and running statistics are those of the three stock modules. In training the backward keeps the
    input, the weights and the convolution's output (stock modules keep the activation's output too).

    If ``conv`` or ``bn`` is replaced by another class (``SyncBatchNorm``, a parametrization, a quantized layer), has
    hooks or an own ``forward``, or while global module hooks are set, the layer calls its submodules one by one
    instead; ``deepops.explain(layer)`` says so.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as
            ``torch.nn.Conv2d``, but ``bias`` is False by default: batch normalization removes it again.
        eps, momentum, affine, track_running_stats: as ``torch.nn.BatchNorm2d``.
        activation: ``"relu"``, ``"leaky_relu"``, ``"relu6"``, ``"silu"``, ``"gelu"``, ``"hardswish"``, ``"identity"``
            or the ``torch.nn`` module of one of these.
        negative_slope: of leaky_relu.
        approximate: of gelu: ``"none"`` or ``"tanh"``.
        device, dtype: of parameters and buffers.

    Shapes: input ``[N, C, H, W]``, residual and output ``[N, K, H', W']``; fp32, fp64, fp16 or bf16.

    >>> block = ConvBNAct2d(3, 16, 3, padding=1, activation="silu")
    >>> block(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 16, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str | nn.Module = "relu",
        negative_slope: float = 0.01,
        approximate: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See the class."""
        super().__init__()
        self._folded = FoldedWeights()
        self._activation = as_activation(activation, negative_slope, approximate)
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device=device,
            dtype=dtype,
        )
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)

    @property
    def activation(self) -> str:
        """Name of the activation."""
        return self._activation.name

    @classmethod
    def from_modules(
        cls, conv: nn.Conv2d, bn: nn.BatchNorm2d, activation: str | nn.Module | None = None
    ) -> ConvBNAct2d:
        """A layer on these very modules, so that parameters, buffers and whoever holds them stay what they are.

        Args:
            conv: ``[N, C, H, W]`` to ``[N, K, H', W']``.
            bn: over ``K`` channels.
            activation: a name, one of torch's modules, or None for the identity.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv: expected torch.nn.Conv2d, got {type(conv).__name__}")
        if not isinstance(bn, nn.BatchNorm2d):
            raise TypeError(f"bn: expected torch.nn.BatchNorm2d, got {type(bn).__name__}")
        if bn.num_features != conv.out_channels:
            raise ValueError(f"bn: expected {conv.out_channels} features, the channels of conv, got {bn.num_features}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._folded = FoldedWeights()
        layer._activation = as_activation(activation, 0.01, "none")
        layer.conv, layer.bn = conv, bn
        layer.training = bn.training
        return layer

    def to_modules(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """``(conv, bn, act)``: the submodules themselves and torch's module of the activation."""
        return self.conv, self.bn, self._activation.to_module()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``act(bn(conv(x)) + residual)``; ``x`` is ``[N, C, H, W]``, ``residual`` has the shape of the output."""
        conv, bn = self._modules["conv"], self._modules["bn"]
        if _plain_reason(conv, bn) is not None:
            return self._plain(x, residual)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(bn, nn.BatchNorm2d)
        check_data("x", x)
        if residual is not None:
            check_data("residual", residual)
        padding: Any = conv.padding
        if conv.padding_mode != "zeros":
            check_convolution(x, conv.weight, conv.bias, conv.groups, autocast=True)
            x = F.pad(x, conv._reversed_padding_repeated_twice, conv.padding_mode)
            padding = (0, 0)
        if not bn.training and folds(x, residual, conv, bn, self._activation):
            check_convolution(x, conv.weight, conv.bias, conv.groups, autocast=False)
            return folded_forward(x, residual, *self._folded.get(conv, bn), conv, padding, self._activation)
        name, negative_slope, approximate = self._activation
        mean, var, counter, training, momentum = batch_norm_state(bn)
        return functional.conv_bn_act(
            x,
            conv.weight,
            conv._parameters["bias"],
            mean,
            var,
            bn._parameters["weight"],
            bn._parameters["bias"],
            training,
            momentum,
            bn.eps,
            stride=conv.stride,  # type: ignore[arg-type]
            padding=padding,
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=conv.groups,
            activation=name,
            negative_slope=negative_slope,
            approximate=approximate,
            residual=residual,
            num_batches_tracked=counter,
        )

    def _plain(self, x: Tensor, residual: Tensor | None) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return apply_activation(y if residual is None else y + residual, *self._activation)

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``; also drops the weights folded for evaluation."""
        self._folded.drop()
        return super().train(mode)

    def extra_repr(self) -> str:
        """The activation; the submodules show the rest."""
        return self._activation.extra_repr()

    def _explain(self) -> str:
        reason = _plain_reason(self._modules["conv"], self._modules["bn"])
        if reason is not None:
            return f"not fused, calls its submodules one by one: {reason}"
        device = self.conv.weight.device.type
        note = kernel_note("batch_norm_act_train", device)
        return f"fused: torch's convolution, then batch norm + {self.activation} in one pass ({note})"


class ConvBNReLU2d(ConvBNAct2d):
    """``ConvBNAct2d`` with its default activation, relu.

    >>> ConvBNReLU2d(3, 16, 3, padding=1)(torch.randn(2, 3, 8, 8)).min() >= 0
    tensor(True)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
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
        )

    @classmethod
    def from_modules(
        cls, conv: nn.Conv2d, bn: nn.BatchNorm2d, activation: str | nn.Module | None = "relu"
    ) -> ConvBNAct2d:
        """As ``ConvBNAct2d.from_modules``; the activation can only be relu."""
        if as_activation(activation, 0.01, "none") != Activation("relu"):
            raise ValueError(f"activation: expected relu, got {activation!r}; use ConvBNAct2d for others")
        return super().from_modules(conv, bn, activation)


def _plain_reason(conv: nn.Module | None, bn: nn.Module | None) -> str | None:
    """Why the submodules must be called one by one, or None. Runs in every forward."""
    if type(conv) is not nn.Conv2d or type(bn) is not nn.BatchNorm2d:
        name, module = ("conv", conv) if type(conv) is not nn.Conv2d else ("bn", bn)
        return f"{name} is a {type(module).__name__}"
    for name, module in (("conv", conv), ("bn", bn)):
        state = module.__dict__
        if "forward" in state:
            return f"{name} has its own forward"
        if (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
        ):
            return f"{name} has hooks"
    return "global module hooks are set" if _has_any_global_hook() else None  # type: ignore[no-untyped-call]
