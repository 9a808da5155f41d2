"""``BatchNormAct2d``: batch normalization, optional residual and activation in one layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepops import functional
from deepops._explain import kernel_note
from deepops.nn._activation import as_activation


class BatchNormAct2d(nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` followed by an activation: ``act(bn(x) + residual)``.

    Same parameters, buffers and state_dict as ``torch.nn.BatchNorm2d``; the backward keeps one tensor of the size of
    the output instead of two. Do not give a model with this layer to ``SyncBatchNorm.convert_sync_batchnorm``, which
    replaces every batch normalization and knows nothing of the activation: split it first, with ``to_modules()``.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as ``torch.nn.BatchNorm2d``.
        activation: ``"relu"``, ``"leaky_relu"``, ``"relu6"``, ``"silu"``, ``"gelu"``, ``"hardswish"``, ``"identity"``
            or the ``torch.nn`` module of one of these.
        negative_slope: of leaky_relu.
        approximate: of gelu: ``"none"`` or ``"tanh"``.

    Shapes: input, residual and output ``[N, C, H, W]``; fp32, fp64, fp16 or bf16.

    >>> layer = BatchNormAct2d(16, activation="silu")
    >>> layer(torch.randn(4, 16, 8, 8)).shape
    torch.Size([4, 16, 8, 8])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | nn.Module = "relu",
        negative_slope: float = 0.01,
        approximate: str = "none",
    ) -> None:
        """See the class."""
        parsed = as_activation(activation, negative_slope, approximate)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._activation = parsed

    @property
    def activation(self) -> str:
        """Name of the activation."""
        return self._activation.name

    @classmethod
    def from_modules(cls, bn: nn.BatchNorm2d, activation: str | nn.Module | None = None) -> BatchNormAct2d:
        """A layer that shares the parameters and buffers of ``bn``; ``activation=None`` is the identity."""
        if type(bn) is not nn.BatchNorm2d:
            raise TypeError(f"bn: expected torch.nn.BatchNorm2d, got {type(bn).__name__}")
        layer = cls(bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats, device="meta")
        layer._activation = as_activation(activation, 0.01, "none")
        _share(bn, layer)
        return layer

    def to_modules(self) -> tuple[nn.BatchNorm2d, nn.Module]:
        """``(bn, act)``: torch's own modules on the same parameters and buffers."""
        bn = nn.BatchNorm2d(
            self.num_features, self.eps, self.momentum, self.affine, self.track_running_stats, device="meta"
        )
        _share(self, bn)
        return bn, self._activation.to_module()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``act(bn(x) + residual)``, both ``[N, C, H, W]``."""
        if isinstance(x, Tensor) and x.dim() != 4:
            raise ValueError(f"x: expected 4D input, [N, C, H, W] (got {x.dim()}D input of shape {list(x.shape)})")
        name, negative_slope, approximate = self._activation
        mean, var, counter, training, momentum = batch_norm_state(self)
        return functional.batch_norm_act(
            x,
            mean,
            var,
            self._parameters["weight"],
            self._parameters["bias"],
            training,
            momentum,
            self.eps,
            activation=name,
            negative_slope=negative_slope,
            approximate=approximate,
            residual=residual,
            num_batches_tracked=counter,
        )

    def extra_repr(self) -> str:
        """The arguments of the layer."""
        stock: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{stock}, {self._activation.extra_repr()}"

    def _explain(self) -> str:
        tensor = self.weight if self.weight is not None else self.running_mean
        device = "cpu" if tensor is None else tensor.device.type
        return f"batch norm + {self.activation} in one pass: {kernel_note('batch_norm_act_train', device)}"


def batch_norm_state(
    bn: nn.BatchNorm2d,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, bool, float | None]:
    """``(running_mean, running_var, num_batches_tracked, training, momentum)`` for ``functional.batch_norm_act``.

    The rules of ``torch.nn.BatchNorm2d.forward``: running statistics are used in evaluation wherever there are some,
    and updated in training when they are tracked.
    """
    training = bn.training
    buffers = bn._buffers  # a direct look: nn.Module.__getattr__ is slow
    mean, var = buffers["running_mean"], buffers["running_var"]
    if not training:
        return mean, var, None, mean is None and var is None, bn.momentum
    if not bn.track_running_stats:
        return None, None, None, True, bn.momentum
    counter = buffers["num_batches_tracked"]
    momentum = 0.0 if bn.momentum is None and counter is None else bn.momentum
    return mean, var, counter, True, momentum


def _share(source: nn.Module, target: nn.Module) -> None:
    """Make ``target`` hold the very parameters and buffers of ``source``, and its mode."""
    for name, parameter in source._parameters.items():
        target._parameters[name] = parameter
    for name, buffer in source._buffers.items():
        target._buffers[name] = buffer
    target.training = source.training
