"""Expanding 1x1 convolution, batch normalization and activation as one op in training, for ``deepops.functional``.

The convolution is linear in ``x``, so the statistics of its result follow from the means and covariances of ``x``, and
most of batch normalization's backward from sums over ``x``: the result itself, several times as large, is never stored.
The backward keeps ``x``, the weights, per-channel vectors and, for activations of the ReLU family, a bit a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepops import reference
from deepops._autograd import Grad, aliases, differentiate, grads_of_arguments
from deepops._checks import Size, autocast_enabled
from deepops._convolution import per_dimension
from deepops._library import has_kernel

# momentum, eps, activation, negative_slope
Options = tuple[float | None, float, str, float]

_KERNEL = has_kernel("pointwise_bn_act_train", "cpu")
_PLAIN = (Tensor, torch.nn.Parameter)
# The ReLU family, whose derivative is one of two numbers: a bit a value says which.
_TWO_SLOPES = ("relu", "relu6", "leaky_relu", "identity")
# Where the op was measured to be faster than torch's convolution followed by batch norm and activation in one pass
# (benchmarks/bench_pointwise_bn_act.py). Other activations need the convolution computed twice.
LEAST_CHANNELS, MOST_CHANNELS, MOST_CHANNELS_COMPUTED_AGAIN, LEAST_EXPANSION = 8, 64, 32, 3
# Values per channel. Below, what is done with the weights alone, which grows with the square of the channels, costs as
# much as the data; and grad_x is the small rest of a difference. Measured on two threads against the two operations:
# 1.17 times as fast for 32 channels with 6,272 values, 0.87 for 64 with 1,568.
LEAST_ROWS, LEAST_ROWS_ABOVE_32_CHANNELS = 256, 4096


def expands(
    conv_weight: Tensor, stride: Size, padding: Size | str, dilation: Size, groups: int, activation: str
) -> bool:
    """Whether the op takes such a convolution: 1x1 filters, stride 1, no padding, one group, enough expansion.

    It takes those from 8 to 64 channels, or to 32 for activations other than the ReLU family and identity, to at least
    three times as many.
    """
    if conv_weight.dim() != 4 or groups != 1:
        return False
    outputs, inputs, height, width = conv_weight.shape
    most = MOST_CHANNELS if activation in _TWO_SLOPES else MOST_CHANNELS_COMPUTED_AGAIN
    if not (height == width == 1 and LEAST_CHANNELS <= inputs <= most and outputs >= LEAST_EXPANSION * inputs):
        return False
    strides, dilations = per_dimension(stride, conv_weight), per_dimension(dilation, conv_weight)
    padded = not isinstance(padding, str) and any(per_dimension(padding, conv_weight))
    return not padded and all(step == 1 for step in strides) and all(step >= 1 for step in dilations)


def applies(
    x: Tensor, conv_weight: Tensor, stride: Size, padding: Size | str, dilation: Size, groups: int, activation: str
) -> bool:
    """Whether the op takes a call: a convolution that ``expands``, fp32 or fp64 without autocast, channels_last, CPU.

    And 256 values per channel or more, above 32 channels 4,096.
    """
    rows = LEAST_ROWS if conv_weight.size(1) <= 32 else LEAST_ROWS_ABOVE_32_CHANNELS
    return (
        _KERNEL
        and expands(conv_weight, stride, padding, dilation, groups, activation)
        and type(conv_weight) in _PLAIN  # subclasses may mean anything by their memory
        and type(x) in _PLAIN
        and x.is_cpu
        and conv_weight.is_cpu
        and x.dtype is conv_weight.dtype
        and (x.dtype is torch.float32 or x.dtype is torch.float64)
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
        and x.numel() >= rows * x.size(1)
        and not autocast_enabled(x)
    )


def shaped_as_output(conv_weight: Tensor) -> Tensor:
    """A tensor with what the per-channel vectors have to go with: the number of channels, the dtype, the device."""
    return conv_weight.detach().reshape(1, conv_weight.size(0), conv_weight.size(1), 1)


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
            grads = _differentiable_backward(ctx, saved, grad_y)
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


def _differentiable_backward(ctx: Any, saved: Sequence[Any], grad_y: Tensor) -> list[Grad]:
    """The same gradients by differentiable torch operations, for double backward (``create_graph=True``)."""
    x, conv_weight, weight, bias, *_ = aliases(saved)
    _, eps, activation, negative_slope = ctx.options
    y = reference.pointwise_bn_act(
        x, conv_weight, weight, bias, eps, activation=activation, negative_slope=negative_slope
    )
    return differentiate(ctx, y, [x, conv_weight, weight, bias], grad_y)
