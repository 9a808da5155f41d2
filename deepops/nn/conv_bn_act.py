"""``ConvBNAct1d``, ``2d``, ``3d``: convolution, batch normalization, optional residual and activation in one layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from deepops import _conv_problem, _fused_conv, functional
from deepops._checks import Size, check_convolution, check_data
from deepops._explain import kernel_note
from deepops._pointwise import expands
from deepops.nn._activation import as_activation
from deepops.nn._folding import FoldedWeights, folded_forward, folds, fused_forward
from deepops.nn._tools import is_recorded, shared_with
from deepops.nn.batch_norm_act import batch_norm_state
from deepops.reference.batch_norm_act import activation as apply_activation

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class _ConvBNAct(nn.Module):
    """All of the layers below but their torch classes."""

    _conv_class: ClassVar[type[Conv]]
    _bn_class: ClassVar[type[_BatchNorm]]

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
        activation: str | nn.Module = "relu",
        negative_slope: float = 0.01,
        approximate: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        """See the class."""
        super().__init__()
        self._folded = FoldedWeights()
        self._activation = as_activation(activation, negative_slope, approximate)
        conv_class: Any = self._conv_class
        self.conv: Conv = conv_class(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        bn_options = (out_channels, eps, momentum, affine, track_running_stats)
        self.bn: _BatchNorm
        if process_group is None:
            self.bn = self._bn_class(*bn_options, device=device, dtype=dtype)
        else:
            self.bn = nn.SyncBatchNorm(*bn_options, process_group, device=device, dtype=dtype)

    @property
    def activation(self) -> str:
        """Name of the activation."""
        return self._activation.name

    @classmethod
    def from_modules(cls, conv: Conv, bn: _BatchNorm, activation: str | nn.Module | None = None) -> Self:
        """A layer on these very modules, so that parameters, buffers and whoever holds them stay what they are.

        Args:
            conv: the convolution, ``C`` to ``K`` channels.
            bn: over ``K`` channels, of as many dimensions, or ``torch.nn.SyncBatchNorm``.
            activation: a name, one of torch's modules, or None for the identity.
        """
        for name, module, wanted in (("conv", conv, cls._conv_class), ("bn", bn, cls._bn_class)):
            if not isinstance(module, wanted) and not (name == "bn" and isinstance(module, nn.SyncBatchNorm)):
                raise TypeError(f"{name}: expected torch.nn.{wanted.__name__}, got {type(module).__name__}")
        if bn.num_features != conv.out_channels:
            raise ValueError(f"bn: expected {conv.out_channels} features, the channels of conv, got {bn.num_features}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._folded = FoldedWeights()
        layer._activation = as_activation(activation, 0.01, "none")
        layer.conv, layer.bn = conv, bn
        layer.training = conv.training
        return layer

    def to_modules(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """``(conv, bn, act)``: the submodules themselves and torch's module of the activation."""
        return self.conv, self.bn, self._activation.to_module()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``act(bn(conv(x)) + residual)``; ``residual`` has the shape of the output."""
        conv: Any = self._modules["conv"]
        bn: Any = self._modules["bn"]
        if self._plain_reason(conv, bn) is not None or is_recorded(x):
            y: Tensor = self.bn(self.conv(x))
            return apply_activation(y if residual is None else y + residual, *self._activation)
        check_data("x", x)
        if residual is not None:
            check_data("residual", residual)
        padding: Any = conv.padding
        if conv.padding_mode != "zeros":
            check_convolution(x, conv.weight, conv.bias, conv.groups, autocast=True)
            x = F.pad(x, conv._reversed_padding_repeated_twice, conv.padding_mode)
            padding = 0
        if not bn.training:
            if x.is_cuda or _conv_problem.executor is not None:
                fused = fused_forward(x, residual, self._folded, conv, bn, padding, self._activation)
                if fused is not None:
                    return fused
            if folds(x, residual, conv, bn, self._activation):
                check_convolution(x, conv.weight, conv.bias, conv.groups, autocast=False)
                return folded_forward(x, residual, self._folded, conv, bn, padding, self._activation)
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
            stride=conv.stride,
            padding=padding,
            dilation=conv.dilation,
            groups=conv.groups,
            activation=name,
            negative_slope=negative_slope,
            approximate=approximate,
            residual=residual,
            num_batches_tracked=counter,
            process_group=shared_with(bn),
        )

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``; also drops the weights folded for evaluation."""
        self._folded.drop()
        return super().train(mode)

    def extra_repr(self) -> str:
        """The activation; the submodules show the rest."""
        return self._activation.extra_repr()

    def _plain_reason(self, conv: nn.Module | None, bn: nn.Module | None) -> str | None:
        """Why the submodules must be called one by one, or None. Runs in every forward."""
        if type(conv) is not self._conv_class or type(bn) not in (self._bn_class, nn.SyncBatchNorm):
            name, module = ("conv", conv) if type(conv) is not self._conv_class else ("bn", bn)
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

    def _explain(self) -> str:
        reason = self._plain_reason(self._modules["conv"], self._modules["bn"])
        if reason is not None:  # then even a look at the weight may change it: spectral_norm counts them
            return f"not fused, calls its submodules one by one: {reason}"
        return "\n  ".join([self._way(), *_fused_conv.explain(self.conv)])

    def _way(self) -> str:
        """Of a layer that is fused."""
        device = self.conv.weight.device.type
        depthwise = 1 < self.conv.groups == self.conv.in_channels == self.conv.out_channels
        one_pass = f"torch's convolution, then batch norm + {self.activation} in one pass"
        one_pass += f" ({kernel_note('batch_norm_act_train', device)})"
        if batch_norm_state(self.bn)[3]:
            if depthwise and self.conv.weight.dim() == 4 and device == "cpu":
                narrow = "of contiguous data not in 16 bits, nor in fp32 with a small filter and short rows"
                return f"fused: one op from 16 channels on, {narrow}; else {one_pass}"
            geometry = (self.conv.stride, self.conv.padding, self.conv.dilation, self.conv.groups)
            if device == "cpu" and expands(self.conv.weight, *geometry, self.activation):
                return f"fused: one op for fp32 and fp64, statistics by covariances; else {one_pass}"
            return f"fused: {one_pass}"
        folded = "fused, by running statistics: one convolution with weights folded once"
        if any(parameter.requires_grad for parameter in self.bn.parameters()):
            return f"{folded}; with gradients, under autocast and in fp16 {one_pass}"
        return f"{folded}, with gradients in each call; without, but under autocast or in fp16, {one_pass}"


class ConvBNAct2d(_ConvBNAct):
    """``act(bn(conv(x)) + residual)`` with the submodules ``conv`` (``nn.Conv2d``) and ``bn`` (``nn.BatchNorm2d``).

    Results, gradients and running statistics are those of the three stock modules. In training the backward keeps the
    input, the weights and the convolution's output (stock modules keep the activation's output too); not even that of a
    depthwise or an expanding 1x1 convolution on the CPU, which is one op with the rest (conditions: see
    :func:`deepops.functional.conv_bn_act`).

    In evaluation without gradients it is one convolution, with batch normalization folded into its weights once and, on
    the CPU, the activation inside (not in fp16 or under autocast): a kernel of our own for depthwise convolutions of
    channels_last data and for 1x1 convolutions (of channels_last data from 64 input channels or 16 MB of output on) in
    fp32 and fp64, oneDNN's for others. Frozen batch normalization (``bn`` in evaluation,
    its parameters without gradients) in a model that is trained is folded in every call: there is no pass of batch
    normalization either way, and for the ReLU family the backward keeps nothing of the size of the output but the
    output. Where ``bn.weight`` or ``bn.bias`` want gradients, batch normalization by running statistics is one pass, as
    in training.

    On NVIDIA GPUs the convolution may be deepops' own, with what follows it in the same kernel, where that was measured
    to be faster than torch's: see ``deepops.backends`` and :func:`deepops.functional.conv_bn_act`.
    ``deepops.explain(layer)`` has the way and both times of each shape that the layer has seen.

    With ``process_group``, or where ``SyncBatchNorm.convert_sync_batchnorm`` has made it so, ``bn`` is a
    ``torch.nn.SyncBatchNorm``: its processes share the batch in training, on every device, in the same passes (see
    :func:`deepops.functional.batch_norm_act`).

    If ``conv`` or ``bn`` is replaced by another class (a parametrization, a quantized layer), has hooks or an own
    ``forward``, or while global module hooks are set, the layer calls its submodules one by one instead;
    ``deepops.explain(layer)`` says so. So it does while ``torch.jit.trace``, ``torch.export``, ONNX export or
    ``torch.fx`` records it, so that what they make needs no deepops.

    When ``torch.utils.checkpoint`` runs the forward once more, inside the backward, the running statistics and their
    counter are left alone (stock modules update them twice). ``torch.func`` transforms run on plain PyTorch; ``vmap``
    needs what torch's batch normalization needs for it, running statistics that are batched or not tracked.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as
            ``torch.nn.Conv2d``, but ``bias`` is False by default: batch normalization removes it again, so that in
            training it reaches nothing but the running mean and has a gradient of exactly 0.
        eps, momentum, affine, track_running_stats: as ``torch.nn.BatchNorm2d``.
        activation: ``"relu"``, ``"leaky_relu"``, ``"relu6"``, ``"silu"``, ``"gelu"``, ``"hardswish"``, ``"identity"``
            or the ``torch.nn`` module of one of these.
        negative_slope: of leaky_relu.
        approximate: of gelu: ``"none"`` or ``"tanh"``.
        device, dtype: of parameters and buffers.
        process_group: processes that share the batch (default None: this one has all of it).

    Shapes: input ``[N, C, H, W]``, residual and output ``[N, K, H', W']``; fp32, fp64, fp16 or bf16. Without a batch
    dimension there is an error, as from ``torch.nn.BatchNorm2d``.

    >>> block = ConvBNAct2d(3, 16, 3, padding=1, activation="silu")
    >>> block(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 16, 8, 8])
    """

    _conv_class = nn.Conv2d
    _bn_class = nn.BatchNorm2d


class ConvBNAct1d(_ConvBNAct):
    """:class:`ConvBNAct2d` in one dimension: ``nn.Conv1d``, ``nn.BatchNorm1d``, input ``[N, C, L]``.

    >>> ConvBNAct1d(3, 16, 3, stride=2)(torch.randn(2, 3, 9)).shape
    torch.Size([2, 16, 4])
    """

    _conv_class = nn.Conv1d
    _bn_class = nn.BatchNorm1d


class ConvBNAct3d(_ConvBNAct):
    """:class:`ConvBNAct2d` in three dimensions: ``nn.Conv3d``, ``nn.BatchNorm3d``, input ``[N, C, D, H, W]``.

    >>> ConvBNAct3d(3, 16, (1, 3, 3), padding="same")(torch.randn(2, 3, 4, 8, 8)).shape
    torch.Size([2, 16, 4, 8, 8])
    """

    _conv_class = nn.Conv3d
    _bn_class = nn.BatchNorm3d
