"""Expanding 1x1 convolution, batch normalization and activation as one op in training, for ``deepops.functional``.

The convolution is linear in ``x``, so the statistics of its result follow from the means and covariances of ``x``, and
most of batch normalization's backward from sums over ``x``: the result itself, several times as large, is never stored.
The backward keeps ``x``, the weights, per-channel vectors and, for activations of the ReLU family, a bit a value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepops import reference
from deepops._autograd import Grad, differentiate, grads_of_arguments
from deepops._checks import Size, autocast_enabled
from deepops._convolution import per_dimension
from deepops._library import has_kernel

# momentum, eps, activation, negative_slope
Options = tuple[float | None, float, str, float]

_KERNEL = has_kernel("pointwise_bn_act_train", "cpu")
_PLAIN = (Tensor, torch.nn.Parameter)


def applies(
    x: Tensor, conv_weight: Tensor, stride: Size, padding: Size | str, dilation: Size, groups: int
) -> bool:
    return False


def pointwise_bn_act(
    x: Tensor,  # [N, C, H, W], channels_last
    conv_weight: Tensor,  # [K, C, 1, 1]
    shift: Tensor | None,  # [K], the convolution's bias: batch statistics remove it, its gradient is 0
    weight: Tensor | None,  # [K], as the following
    bias: Tensor | None,
    statistics: tuple[Tensor | None, Tensor | None, Tensor | None],  # running mean and variance, counter
    options: Options,
) -> Tensor:
    """``act(batch_norm(conv2d(x, conv_weight)))`` with checked arguments to which the op ``applies``."""
    conv_weight = conv_weight.contiguous()
    tensors = (x, conv_weight, weight, bias, shift)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y: Tensor = PointwiseBatchNormAct.apply(*tensors, *statistics, options)  # type: ignore[no-untyped-call]
        return y
    y = torch.ops.deepops.pointwise_bn_act_train.default(x, conv_weight, weight, bias, *statistics, *options, False)[0]
    return y


class PointwiseBatchNormAct(torch.autograd.Function):
    """The op under autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        conv_weight: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shift: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        options: Options,
    ) -> Tensor:
        y, *kept = torch.ops.deepops.pointwise_bn_act_train.default(
            x, conv_weight, weight, bias, running_mean, running_var, num_batches_tracked, *options, True
        )
        ctx.save_for_backward(x, conv_weight, weight, bias, *kept)
        ctx.options = options
        ctx.shift_dtype = None if shift is None else shift.dtype
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Grad, ...]:
        saved = ctx.saved_tensors
        _, _, activation, negative_slope = ctx.options
        need_x, need_conv_weight, need_weight, need_bias, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            grads = _differentiable_backward(ctx, grad_y)
        else:
            grads = torch.ops.deepops.pointwise_bn_act_backward.default(
                grad_y.contiguous(memory_format=torch.channels_last),
                *saved,
                activation,
                negative_slope,
                need_x,
                need_conv_weight,
                need_weight or need_bias,
            )
        return grads_of_arguments(ctx, grads, saved[4])


def _differentiable_backward(ctx: Any, grad_y: Tensor) -> list[Grad]:
    """The same gradients by differentiable torch operations, for double backward (``create_graph=True``)."""
    x, conv_weight, weight, bias, *_ = ctx.saved_tensors
    _, eps, activation, negative_slope = ctx.options
    y = reference.pointwise_bn_act(
        x, conv_weight, weight, bias, eps, activation=activation, negative_slope=negative_slope
    )
    return differentiate(ctx, y, [x, conv_weight, weight, bias], grad_y)
