"""Depthwise convolution, batch normalization and activation as one op in training, for ``deepops.functional``.

The convolution costs R * S multiplications a value, less than storing and loading it: the op computes it again from
``x`` wherever it needs it. The backward keeps ``x``, the weights and per-channel vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepops import reference
from deepops._autograd import Grad, aliases, differentiate, grads_of_arguments
from deepops._checks import Size, autocast_enabled
from deepops._convolution import output_sizes, padding_of, per_dimension
from deepops._library import has_kernel

# stride (y, x), padding (top, bottom, left, right), dilation (y, x)
Geometry = tuple[list[int], list[int], list[int]]
# geometry, momentum, eps, activation, negative_slope
Options = tuple[Geometry, float | None, float, str, float]

_KERNEL = has_kernel("depthwise_bn_act_train", "cpu")
_PLAIN = (Tensor, torch.nn.Parameter)
LEAST_CHANNELS = 16  # the op takes so many at a time


def geometry_of(
    x: Tensor, conv_weight: Tensor, stride: Size, padding: Size | str, dilation: Size, groups: int
) -> Geometry | None:
    """What the op is told of a convolution; None where it does not apply.

    It applies to ``C`` groups of one channel, 16 or more, fp32 or fp64 without autocast, channels_last, on the CPU,
    with more than one value per channel.
    """
    channels = conv_weight.size(0)
    if not (
        _KERNEL
        and groups == channels >= LEAST_CHANNELS
        and conv_weight.dim() == 4
        and type(conv_weight) in _PLAIN  # subclasses may mean anything by their memory
        and x.is_cpu
        and x.dtype is conv_weight.dtype
        and (x.dtype is torch.float32 or x.dtype is torch.float64)
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
        and not autocast_enabled(x)
    ):
        return None
    strides, dilations = [list(per_dimension(value, conv_weight)) for value in (stride, dilation)]
    if isinstance(padding, str):
        pads = padding_of(padding, conv_weight, dilation)
    else:
        pads = [side for side in per_dimension(padding, conv_weight) for _ in range(2)]
    if min(*strides, *dilations, *conv_weight.shape[2:]) < 1 or min(pads) < 0:
        return None  # torch's convolution says what is wrong
    sizes = output_sizes(x, conv_weight, strides, pads, dilations)
    if min(sizes) < 1 or x.size(0) * sizes[0] * sizes[1] == 1:
        return None  # here too; a single value has no variance
    return strides, pads, dilations


def depthwise_bn_act(
    x: Tensor,  # [N, C, H, W], channels_last
    conv_weight: Tensor,  # [C, 1, R, S]
    shift: Tensor | None,  # [C], the convolution's bias: batch statistics remove it, its gradient is 0
    weight: Tensor | None,  # [C], as the following
    bias: Tensor | None,
    statistics: tuple[Tensor | None, Tensor | None, Tensor | None],  # running mean and variance, counter
    options: Options,
) -> Tensor:
    """``act(batch_norm(conv2d(x, conv_weight)))`` with checked arguments for which ``geometry_of`` has an answer."""
    if not (conv_weight.is_contiguous() or conv_weight.is_contiguous(memory_format=torch.channels_last)):
        conv_weight = conv_weight.contiguous()
    tensors = (x, conv_weight, weight, bias, shift)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y: Tensor = DepthwiseBatchNormAct.apply(*tensors, *statistics, options)  # type: ignore[no-untyped-call]
        return y
    geometry, *numbers = options
    y = torch.ops.deepops.depthwise_bn_act_train.default(
        x, conv_weight, weight, bias, *statistics, *geometry, *numbers
    )[0]
    return y


class DepthwiseBatchNormAct(torch.autograd.Function):
    """The op under autograd; keeps ``x``, ``conv_weight`` and the per-channel vectors."""

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
        geometry, *numbers = options
        y, mean, invstd = torch.ops.deepops.depthwise_bn_act_train.default(
            x, conv_weight, weight, bias, running_mean, running_var, num_batches_tracked, *geometry, *numbers
        )
        ctx.save_for_backward(x, conv_weight, weight, bias, mean, invstd)
        ctx.options = options
        ctx.shift_dtype = None if shift is None else shift.dtype
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Grad, ...]:
        saved = ctx.saved_tensors
        x, conv_weight, weight, bias, mean, invstd = saved
        geometry, _, _, activation, negative_slope = ctx.options
        need_x, need_conv_weight, need_weight, need_bias, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            grads = _differentiable_backward(ctx, saved, grad_y)
        else:
            grads = torch.ops.deepops.depthwise_bn_act_backward.default(
                grad_y.contiguous(memory_format=torch.channels_last),
                x,
                conv_weight,
                weight,
                bias,
                mean,
                invstd,
                *geometry,
                activation,
                negative_slope,
                need_x,
                need_conv_weight,
                need_weight or need_bias,
            )
        return grads_of_arguments(ctx, grads, mean)


def _differentiable_backward(ctx: Any, saved: Sequence[Any], grad_y: Tensor) -> list[Grad]:
    """The same gradients by differentiable torch operations, for double backward (``create_graph=True``)."""
    x, conv_weight, weight, bias, _, _ = aliases(saved)
    geometry, _, eps, activation, negative_slope = ctx.options
    stride, padding, dilation = geometry
    y = reference.depthwise_bn_act(
        x,
        conv_weight,
        weight,
        bias,
        stride,
        padding,
        dilation,
        eps,
        activation=activation,
        negative_slope=negative_slope,
    )
    return differentiate(ctx, y, [x, conv_weight, weight, bias], grad_y)
