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
from deepops._autograd import Grad
from deepops._block import ConvBatchNormAct, Statistics
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


class PointwiseBatchNormAct(ConvBatchNormAct):
    """The op."""

    @staticmethod
    def covers(
        x: Tensor,
        conv_weight: Tensor,
        stride: Size,
        padding: Size | str,
        dilation: Size,
        groups: int,
        activation: str,
    ) -> tuple[Tensor, tuple[()]] | None:
        """Those of a convolution that ``expands``, fp32 or fp64 without autocast, on the CPU.

        ``x``: channels_last or contiguous, with 256 values per channel or more, above 32 channels 4,096.
        """
        rows = LEAST_ROWS if conv_weight.size(1) <= 32 else LEAST_ROWS_ABOVE_32_CHANNELS
        if not (
            _KERNEL
            and expands(conv_weight, stride, padding, dilation, groups, activation)
            and type(conv_weight) in _PLAIN  # subclasses may mean anything by their memory
            and type(x) in _PLAIN
            and x.is_cpu
            and conv_weight.is_cpu
            and x.dtype is conv_weight.dtype
            and (x.dtype is torch.float32 or x.dtype is torch.float64)
            and x.is_contiguous(memory_format=torch.channels_last) != x.is_contiguous()
            and x.numel() >= rows * x.size(1)
            and not autocast_enabled(x)
        ):
            return None
        return conv_weight.detach().reshape(1, conv_weight.size(0), conv_weight.size(1), 1), ()

    @staticmethod
    def train(
        x: Tensor,
        conv_weight: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Statistics,
        options: Options,
        save: bool,
    ) -> Sequence[Tensor]:
        found: Sequence[Tensor] = torch.ops.deepops.pointwise_bn_act_train.default(
            x, conv_weight, weight, bias, *statistics, *options, save
        )
        return found

    @staticmethod
    def gradients(
        grad_y: Tensor, saved: Sequence[Any], options: Options, needed: tuple[bool, bool, bool]
    ) -> Sequence[Grad]:
        _, _, activation, negative_slope = options
        grads: Sequence[Grad] = torch.ops.deepops.pointwise_bn_act_backward.default(
            grad_y, *saved, activation, negative_slope, *needed
        )
        return grads

    @staticmethod
    def plain(x: Tensor, conv_weight: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options) -> Tensor:
        _, eps, activation, negative_slope = options
        return reference.pointwise_bn_act(
            x, conv_weight, weight, bias, eps, activation=activation, negative_slope=negative_slope
        )
