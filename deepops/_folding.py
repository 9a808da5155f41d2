"""Batch normalization by running statistics, folded into the weights of the convolution before it.

act((conv(x, W) + b - mean) * s + beta) = act(conv(x, W * s) + (b - mean) * s + beta),  s = weight / sqrt(var + eps)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepops._autograd import derivative_from_output
from deepops._checks import (
    Size,
    autocast_enabled,
    check_eps,
    check_residual,
    check_residual_dtype,
    check_vectors,
    transforms_active,
)
from deepops._convolution import convolution
from deepops.reference import activation as apply_activation


def scale_and_shift(
    conv_weight: Tensor,  # [K, C / groups, ...]
    conv_bias: Tensor | None,  # [K], as the others
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """What the result of the convolution without its bias is multiplied by, and what is added to it.

    In at least single precision, differentiable but for the statistics.
    """
    check_vectors(conv_weight, conv_weight.size(0), running_mean, running_var, weight, bias)
    check_eps(eps, training=False)
    dtype = torch.promote_types(conv_weight.dtype, torch.float32)
    mean, var = running_mean.detach().to(dtype), running_var.detach().to(dtype)
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean if conv_bias is None else conv_bias.to(dtype) - mean
    return scale, shift * scale if bias is None else shift * scale + bias


def fold(conv_weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does the work of both. Arguments as ``scale_and_shift``.

    Rounded to the dtype of the convolution once.
    """
    scale, shift = scale_and_shift(conv_weight, *others)
    folded = conv_weight * scale.view([-1] + [1] * (conv_weight.dim() - 1))
    return folded.to(conv_weight.dtype), shift.to(conv_weight.dtype)


def folds_with_gradients(x: Tensor, weight: Tensor | None, bias: Tensor | None, *others: Tensor | None) -> bool:
    """Whether evaluation with gradients is best done with weights folded on the fly: ``weight`` and ``bias`` frozen.

    Theirs could be had from the gradients of the folded weights. But these are sums that a convolution takes in its own
    precision, in fp32 3 to 85 times less accurate than those of batch norm's own backward, measured on small blocks.
    """
    if (
        not torch.is_grad_enabled()
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in (x, *others))


def conv_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    activation: str,
    negative_slope: float,
    approximate: str,
) -> Tensor:
    """``act(conv(x) + residual)``; the backward keeps ``x``, the weights and one tensor of the size of the output.

    That one is the output itself for the ReLU family, and what the activation was applied to for the smooth ones.
    """
    z = convolution(x, weight, bias, stride, padding, dilation, groups)
    # z is nobody else's; a compiler decides for itself.
    in_place = not torch.compiler.is_compiling() and not transforms_active()
    if residual is not None:
        check_residual(residual, x, z.shape)
        if not autocast_enabled(x):
            check_residual_dtype(residual, x)
        z = z.add_(residual) if in_place and residual.dtype is z.dtype else z + residual
    if z.requires_grad:
        if in_place and activation == "relu6":
            in_place_relu6: Callable[..., Tensor] = _ReLU6.apply
            return in_place_relu6(z)
        in_place = in_place and derivative_from_output(activation, negative_slope)
    return apply_activation(z, activation, negative_slope, approximate, inplace=in_place)


class _ReLU6(torch.autograd.Function):
    """In place, with a backward from the output alone; torch's own in place keeps a copy of the input."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.mark_dirty(z)
        F.relu6(z, inplace=True)
        ctx.save_for_backward(z)
        return z

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        grad_z: Tensor = torch.ops.aten.hardtanh_backward(grad_y, y, 0.0, 6.0)
        return grad_z
