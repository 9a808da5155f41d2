"""Evaluation of ``conv, bn, act`` as one convolution without gradients: weights folded once, activation included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from deepops import _fused_conv
from deepops._batch_norm_act import name_in_op
from deepops._checks import (
    autocast_enabled,
    check_convolution,
    check_residual,
    check_residual_dtype,
    transforms_active,
)
from deepops._convolution import output_sizes, pad_explicitly, per_dimension
from deepops._evaluation import depthwise_geometry, pointwise_applies
from deepops._folding import conv_act, fold, scale_and_shift
from deepops.nn._activation import Activation

Fold = Callable[..., tuple[Tensor, ...]]  # fold, fold_and_pack or scale_and_shift

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

    On a GPU it also has scale and shift of the fused convolution, which takes its weights as they are.

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
        self._entry: tuple[Any, list[Tensor | None], dict[Fold, tuple[Tensor, ...]]] | None = None

    def drop(self) -> None:
        """Forget the weights."""
        self._entry = None

    def get(self, conv: Any, bn: _BatchNorm, how: Fold = fold) -> tuple[Tensor, ...]:
        """``(weight, bias)`` of the convolution that does the work of both modules, in the dtype of ``conv``.

        With ``fold_and_pack`` or ``scale_and_shift`` for ``how`` what that function gives.
        """
        sources = (conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias)
        if any(tensor is not None and tensor.is_inference() for tensor in sources):
            self.drop()  # inference tensors do not count writes
            return self._fold(how, *sources, bn.eps)
        key = [bn.eps, *(None if t is None else (id(t), t.data_ptr(), t._version) for t in sources)]
        entry = self._entry
        if entry is None or entry[0] != key:
            alive = [*sources, *(None if t is None else t.detach() for t in sources)]
            entry = self._entry = key, alive, {}
        made = entry[2].get(how)
        if made is None:
            made = entry[2][how] = self._fold(how, *sources, bn.eps)
        return made

    def _fold(self, how: Fold, *arguments: Any) -> tuple[Tensor, ...]:
        self.folds += 1
        with torch.no_grad():
            return how(*arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldedWeights:
        """A copied block starts with an empty cache."""
        return FoldedWeights()

    def __reduce__(self) -> tuple[type[FoldedWeights], tuple[()]]:
        """Neither does a pickle hold it."""
        return FoldedWeights, ()


def fold_and_pack(*arguments: Any) -> tuple[Tensor, ...]:
    """``fold``, and the weight once more in the order in which ``pointwise_bn_act_eval`` reads it."""
    weight, bias = fold(*arguments)
    return weight, bias, torch.ops.deepops.pointwise_bn_act_pack.default(weight.contiguous())


def folds(x: Tensor, residual: Tensor | None, conv: Any, bn: _BatchNorm, activation: Activation) -> bool:
    """Whether this evaluation may run as one convolution: running statistics, no gradient, one dtype, eager.

    A residual only goes with a post-op that oneDNN has: fp32, two or three dimensions, relu or nothing after the sum.
    """
    if bn.training or bn.running_mean is None or bn.running_var is None or torch.compiler.is_compiling():
        return False
    if type(x) is not Tensor:  # a subclass may stand for anything: FakeTensor has no memory to compare
        return False
    if x.dtype is torch.float16 or x.dtype is not conv.weight.dtype or autocast_enabled(x) or transforms_active():
        return False
    if residual is not None and not (
        activation.name in ("relu", "identity") and x.dtype is torch.float32 and x.dim() > 3 and _has_post_ops(x)
    ):
        return False
    tensors = (x, residual, conv.weight, conv.bias, bn.weight, bn.bias)
    return not (torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors))


def folded_forward(
    x: Tensor,
    residual: Tensor | None,
    weights: FoldedWeights,
    conv: Any,
    bn: _BatchNorm,
    padding: Any,
    activation: Activation,
) -> Tensor:
    """One convolution with folded weights: by our kernel, or oneDNN's with its post-op, where they apply."""
    if pointwise_applies(x, conv.weight, conv.stride, padding, conv.groups):
        return _pointwise(x, residual, weights, conv, bn, activation)
    weight, bias = weights.get(conv, bn)
    if residual is None and (
        geometry := depthwise_geometry(x, weight, conv.stride, padding, conv.dilation, conv.groups)
    ):
        name = name_in_op(activation.name, activation.approximate)
        y: Tensor = torch.ops.deepops.depthwise_bn_act_eval.default(
            x, weight, bias, *geometry, name, activation.negative_slope
        )
        return y
    return _by_onednn(x, residual, weight, bias, conv, padding, activation)


def _pointwise(
    x: Tensor, residual: Tensor | None, weights: FoldedWeights, conv: Any, bn: _BatchNorm, activation: Activation
) -> Tensor:
    channels_last = not x.is_contiguous()
    weight, bias, *rest = weights.get(conv, bn, fold_and_pack if channels_last else fold)
    packed = rest[0] if channels_last else None
    if residual is not None:
        _check_residual(residual, x, weight, conv, (0, 0))
        residual = residual.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    name = name_in_op(activation.name, activation.approximate)
    y: Tensor = torch.ops.deepops.pointwise_bn_act_eval.default(
        x, weight.contiguous(), packed, bias, residual, conv.stride, name, activation.negative_slope
    )
    return y


def _by_onednn(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    conv: Any,
    padding: Any,
    activation: Activation,
) -> Tensor:
    if not _has_post_ops(x):
        return conv_act(x, weight, bias, None, conv.stride, padding, conv.dilation, conv.groups, *activation)
    if isinstance(padding, str):
        x, padding = pad_explicitly(x, weight, padding, conv.dilation)
    name, negative_slope, approximate = activation
    padding = per_dimension(padding, weight)
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


def fused_forward(
    x: Tensor, residual: Tensor | None, folded: FoldedWeights, conv: Any, bn: Any, padding: Any, activation: Activation
) -> Tensor | None:
    """Evaluation without gradients by deepops' own convolution on a GPU; None where that is not the way to go."""
    check_convolution(x, conv.weight, conv.bias, conv.groups, autocast_enabled(x))
    as_one = folds(x, residual, conv, bn, activation)
    return _fused_conv.evaluate(
        x,
        conv.weight,
        conv.bias,
        residual,
        bn.weight,
        bn.bias,
        (bn.running_mean, bn.running_var, None),
        (conv.stride, padding, conv.dilation, conv.groups),
        (False, bn.momentum, bn.eps, *activation, None),
        scaled=lambda: folded.get(conv, bn, scale_and_shift),  # type: ignore[arg-type, return-value]
        folded=(lambda: folded_forward(x, residual, folded, conv, bn, padding, activation)) if as_one else None,
    )


def _check_residual(residual: Tensor, x: Tensor, weight: Tensor, conv: Any, padding: tuple[int, ...]) -> None:
    """Here the residual goes into the convolution, so that the output's shape must be known before."""
    sides = [side for side in padding for _ in range(2)]
    sizes = output_sizes(x, weight, conv.stride, sides, conv.dilation)
    check_residual(residual, x, torch.Size([x.size(0), weight.size(0), *sizes]))
    check_residual_dtype(residual, x)


def _has_post_ops(x: Tensor) -> bool:
    if x.device.type != "cpu" or not torch._C._has_mkldnn or not torch._C._get_mkldnn_enabled() or x.numel() == 0:
        return False
    return x.dtype is torch.float32 or (x.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
