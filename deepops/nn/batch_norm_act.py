"""``BatchNormAct1d``, ``2d`` and ``3d``: batch normalization, optional residual and activation in one layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deepops import functional
from deepops._explain import kernel_note
from deepops.nn._activation import as_activation
from deepops.nn._tools import RefusesSyncConversion, is_recomputation, is_recorded, shared_with
from deepops.reference.batch_norm_act import activation as apply_activation

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self


class _BatchNormAct(_BatchNorm):
    """All of the layers below but their torch class and the shapes that they take."""

    qconfig = RefusesSyncConversion()

    _stock: ClassVar[type[_BatchNorm]]
    _shapes: ClassVar[dict[int, str]]  # by rank

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
        bias: bool = True,
        activation: str | nn.Module = "relu",
        negative_slope: float = 0.01,
        approximate: str = "none",
        process_group: ProcessGroup | None = None,
    ) -> None:
        """See the class."""
        parsed = as_activation(activation, negative_slope, approximate)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)  # torch's own layers take the argument from 2.13 on
        self._activation = parsed
        self.process_group = process_group

    @property
    def activation(self) -> str:
        """Name of the activation."""
        return self._activation.name

    @classmethod
    def from_modules(cls, bn: _BatchNorm, activation: str | nn.Module | None = None) -> Self:
        """A layer that shares the parameters and buffers of ``bn``; ``activation=None`` is the identity."""
        if type(bn) is not cls._stock:
            raise TypeError(f"bn: expected torch.nn.{cls._stock.__name__}, got {type(bn).__name__}")
        layer = cls(bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats, device="meta")
        layer._activation = as_activation(activation, 0.01, "none")
        _share(bn, layer)
        return layer

    def to_modules(self) -> tuple[_BatchNorm, nn.Module]:
        """``(bn, act)``: torch's own modules on the same parameters and buffers."""
        options = (self.num_features, self.eps, self.momentum, self.affine, self.track_running_stats)
        bn: _BatchNorm
        if self.process_group is None:
            bn = self._stock(*options, device="meta")
        else:
            bn = nn.SyncBatchNorm(*options, self.process_group, device="meta")
        _share(self, bn)
        return bn, self._activation.to_module()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``act(bn(x) + residual)``, both of the same shape."""
        if is_recorded(x):
            y = super().forward(x)
            return apply_activation(y if residual is None else y + residual, *self._activation)
        if isinstance(x, Tensor) and x.dim() not in self._shapes:
            wanted = " or ".join(f"{rank}D" for rank in self._shapes)
            shapes = " or ".join(self._shapes.values())
            raise ValueError(f"x: expected {wanted} input, {shapes} (got {x.dim()}D input of shape {list(x.shape)})")
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
            process_group=shared_with(self),
        )

    def extra_repr(self) -> str:
        """The arguments of the layer."""
        stock: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{stock}, {self._activation.extra_repr()}"

    def _explain(self) -> str:
        tensor = self.weight if self.weight is not None else self.running_mean
        device = "cpu" if tensor is None else tensor.device.type
        return f"batch norm + {self.activation} in one pass: {kernel_note('batch_norm_act_train', device)}"


class BatchNormAct2d(_BatchNormAct, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` followed by an activation: ``act(bn(x) + residual)``.

    Same parameters, buffers and state_dict as ``torch.nn.BatchNorm2d``; the backward keeps one tensor of the size of
    the output instead of two. ``torch.jit.trace``, ``torch.export`` and ONNX export record torch's own operations. When
    ``torch.utils.checkpoint`` runs the forward once more, inside the backward, the running statistics and their counter
    are left alone (stock modules update them twice). ``SyncBatchNorm.convert_sync_batchnorm`` knows nothing of the
    activation and would drop it: it raises a TypeError; use ``process_group``.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as ``torch.nn.BatchNorm2d``.
        activation: ``"relu"``, ``"leaky_relu"``, ``"relu6"``, ``"silu"``, ``"gelu"``, ``"hardswish"``, ``"identity"``
            or the ``torch.nn`` module of one of these.
        negative_slope: of leaky_relu.
        approximate: of gelu: ``"none"`` or ``"tanh"``.
        process_group: processes that share the batch in training, as those of ``torch.nn.SyncBatchNorm``, on every
            device: see :func:`deepops.functional.batch_norm_act` (default None: this process has all of it;
            ``torch.distributed.group.WORLD``: all processes).

    Shapes: input, residual and output ``[N, C, H, W]``; fp32, fp64, fp16 or bf16.

    >>> layer = BatchNormAct2d(16, activation="silu")
    >>> layer(torch.randn(4, 16, 8, 8)).shape
    torch.Size([4, 16, 8, 8])
    """

    _stock = nn.BatchNorm2d
    _shapes: ClassVar[dict[int, str]] = {4: "[N, C, H, W]"}


class BatchNormAct1d(_BatchNormAct, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` followed by an activation; all else as :class:`BatchNormAct2d`.

    Shapes: input, residual and output ``[N, C]`` or ``[N, C, L]``.

    >>> BatchNormAct1d(16)(torch.randn(4, 16)).min() >= 0
    tensor(True)
    """

    _stock = nn.BatchNorm1d
    _shapes: ClassVar[dict[int, str]] = {2: "[N, C]", 3: "[N, C, L]"}


class BatchNormAct3d(_BatchNormAct, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` followed by an activation; all else as :class:`BatchNormAct2d`.

    Shapes: input, residual and output ``[N, C, D, H, W]``.

    >>> BatchNormAct3d(16)(torch.randn(2, 16, 3, 4, 5)).shape
    torch.Size([2, 16, 3, 4, 5])
    """

    _stock = nn.BatchNorm3d
    _shapes: ClassVar[dict[int, str]] = {5: "[N, C, D, H, W]"}


def batch_norm_state(
    bn: _BatchNorm,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, bool, float | None]:
    """``(running_mean, running_var, num_batches_tracked, training, momentum)`` for ``functional.batch_norm_act``.

    The rules of ``torch.nn.BatchNorm2d.forward``: running statistics are used in evaluation wherever there are some,
    and updated in training when they are tracked; but not again when a checkpointed forward is recomputed.
    """
    training = bn.training
    buffers = bn._buffers  # a direct look: nn.Module.__getattr__ is slow
    mean, var = buffers["running_mean"], buffers["running_var"]
    if not training:
        return mean, var, None, mean is None and var is None, bn.momentum
    if not bn.track_running_stats or is_recomputation():
        return None, None, None, True, 0.0
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
