"""Evaluation of ``conv, bn, act`` as one convolution: statistics folded into its weights, activation as a post-op.

act((conv(x, W) + b - mean) * s + beta) = act(conv(x, W * s) + (b - mean) * s + beta),  s = weight / sqrt(var + eps)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepops._checks import autocast_enabled, check_per_channel, check_residual
from deepops._convolution import pad_explicitly
from deepops.nn._activation import Activation
from deepops.reference import activation as apply_activation

# Post-ops of oneDNN's fused convolution: name, scalars, algorithm.
_POST_OPS: dict[str, tuple[str, list[float], str]] = {
    "identity": ("none", [], ""),
    "relu": ("relu", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
    "silu": ("swish", [], ""),
    "hardswish": ("hardswish", [], ""),
}


class FoldedWeights:
    """Folded weights of one block and what they were made from; a cache that is never saved or copied.

    Refolds exactly when a parameter or statistic is another tensor, has other memory, or was written to: torch counts
    in-place writes (``Tensor._version``), by optimizers and ``load_state_dict`` too. Writes through ``.data`` are not
    counted; ``train()`` and ``eval()`` therefore drop the cache as well.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.folds = 0  # how often weights were folded: what tests count
        # What the weights were made from and the weights. The tensors themselves and, as aliases, their memory are kept
        # too, so that neither an id nor an address can be given to another one. A single attribute, so that threads
        # evaluating the same block see a consistent pair.
        self._entry: tuple[Any, list[Tensor | None], tuple[Tensor, Tensor]] | None = None

    def drop(self) -> None:
        """Forget the weights."""
        self._entry = None

    def get(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
        """``(weight, bias)`` of the convolution that does the work of both modules, in the dtype of ``conv``."""
        sources = [conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var]
        if any(tensor is not None and tensor.is_inference() for tensor in sources):
            self.drop()  # inference tensors do not count writes
            return self._fold(sources, bn.eps)
        key = [bn.eps, *(None if t is None else (id(t), t.data_ptr(), t._version) for t in sources)]
        entry = self._entry
        if entry is None or entry[0] != key:
            alive = [*sources, *(None if t is None else t.detach() for t in sources)]
            entry = self._entry = key, alive, self._fold(sources, bn.eps)
        return entry[2]

    def _fold(self, sources: list[Tensor | None], eps: float) -> tuple[Tensor, Tensor]:
        """In at least single precision, rounded to the dtype of the convolution once."""
        self.folds += 1
        conv_weight, conv_bias, weight, bias, mean, var = sources
        assert conv_weight is not None
        assert mean is not None
        assert var is not None
        for name, tensor in (("running_mean", mean), ("running_var", var), ("weight", weight), ("bias", bias)):
            if tensor is not None:
                check_per_channel(name, tensor, conv_weight, conv_weight.size(0))
        dtype = torch.promote_types(conv_weight.dtype, torch.float32)
        with torch.no_grad():
            scale = torch.rsqrt(var.to(dtype) + eps)
            if weight is not None:
                scale = scale * weight
            shift = -mean.to(dtype) if conv_bias is None else conv_bias.to(dtype) - mean
            shift = shift * scale if bias is None else shift * scale + bias
            folded = conv_weight * scale.view(-1, 1, 1, 1)
            return folded.to(conv_weight.dtype), shift.to(conv_weight.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldedWeights:
        """A copied block starts with an empty cache."""
        return FoldedWeights()

    def __reduce__(self) -> tuple[type[FoldedWeights], tuple[()]]:
        """Neither does a pickle hold it."""
        return FoldedWeights, ()


def folds(x: Tensor, residual: Tensor | None, conv: nn.Conv2d, bn: nn.BatchNorm2d, activation: Activation) -> bool:
    """Whether this evaluation may run as one convolution: running statistics, no gradient, one dtype, eager.

    A residual only goes with a post-op that oneDNN has: fp32, and relu or nothing after the sum.
    """
    if bn.training or bn.running_mean is None or bn.running_var is None or torch.compiler.is_compiling():
        return False
    if type(x) is not Tensor:  # a subclass may stand for anything: FakeTensor has no memory to compare
        return False
    if x.dtype is torch.float16 or x.dtype is not conv.weight.dtype or autocast_enabled(x):
        return False
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return False
    if residual is not None and not (
        activation.name in ("relu", "identity") and x.dtype is torch.float32 and _has_post_ops(x)
    ):
        return False
    tensors = (x, residual, conv.weight, conv.bias, bn.weight, bn.bias)
    return not (torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors))


def folded_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    conv: nn.Conv2d,
    padding: Any,
    activation: Activation,
) -> Tensor:
    """One convolution with folded weights, with oneDNN's post-op where it applies."""
    if not _has_post_ops(x):
        z = F.conv2d(x, weight, bias, conv.stride, padding, conv.dilation, conv.groups)
        return apply_activation(z, *activation)
    if isinstance(padding, str):
        x, padding = pad_explicitly(x, weight, padding, conv.dilation)  # type: ignore[arg-type]
    name, negative_slope, approximate = activation
    geometry = (padding, conv.stride, conv.dilation, conv.groups)
    if residual is not None:
        _check_residual(residual, x, weight, conv, padding)
        unary = None if name == "identity" else name
        sum_: Tensor = torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, weight, bias, *geometry, "add", 1.0, unary, [], None
        )
        return sum_
    if name == "leaky_relu":
        post_op: tuple[str, list[float], str] = ("leaky_relu", [negative_slope], "")
    else:
        post_op = ("gelu", [], approximate) if name == "gelu" else _POST_OPS[name]
    y: Tensor = torch.ops.mkldnn._convolution_pointwise.default(x, weight, bias, *geometry, *post_op)
    return y


def _check_residual(residual: Tensor, x: Tensor, weight: Tensor, conv: nn.Conv2d, padding: tuple[int, int]) -> None:
    """Here the residual goes into the convolution, so that the output's shape must be known before."""
    spans = [
        size + 2 * pad - d * (k - 1) - 1
        for size, pad, d, k in zip(x.shape[2:], padding, conv.dilation, weight.shape[2:], strict=True)
    ]
    shape = [x.size(0), weight.size(0), *(span // step + 1 for span, step in zip(spans, conv.stride, strict=True))]
    check_residual(residual, x, torch.Size(shape))
    if residual.dtype is not x.dtype:
        raise TypeError(f"residual: expected {x.dtype}, the dtype of x, got {residual.dtype}")


def _has_post_ops(x: Tensor) -> bool:
    if x.device.type != "cpu" or not torch._C._has_mkldnn or not torch._C._get_mkldnn_enabled() or x.numel() == 0:
        return False
    return x.dtype is torch.float32 or (x.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
