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
from deepops._autograd import Grad
from deepops._block import SIXTEEN_BIT, ConvBatchNormAct, Statistics, rounded_as
from deepops._checks import Size, autocast_enabled
from deepops._convolution import output_sizes, padding_of, per_dimension
from deepops._library import has_kernel

# stride (y, x), padding (top, bottom, left, right), dilation (y, x)
Geometry = tuple[list[int], list[int], list[int]]
# geometry, momentum, eps, activation, negative_slope
Options = tuple[Geometry, float | None, float, str, float]

_KERNEL = has_kernel("depthwise_bn_act_train", "cpu")
_PLAIN = (Tensor, torch.nn.Parameter)
LEAST_CHANNELS = 16  # in channels_last the op takes so many at a time; of contiguous data a thread takes whole channels
SMALL_FILTER = 9  # values; see small_filter_pays


def small_filter_pays(out_width: int, stride: int) -> bool:
    """Whether the op is the faster way for contiguous fp32 data and a filter of up to 9 values.

    Of contiguous data it takes rows, 16 outputs at a time, and torch's convolution is fast here. With a batch of 8 it
    took 0.7 to 1 times as long as that and ``batch_norm_act`` where the outputs fill 7/8 of those 16, or rows are
    long; up to 1.2 times as long elsewhere, 1.7 times with rows of 7; with a stride up to 1.2 times as long below 48
    outputs. In fp64 and with larger filters it was faster at any width, 1.2 to 5 times.
    """
    filled = out_width > 64 or 8 * out_width >= 7 * 16 * ((out_width + 15) // 16)
    return filled and (stride == 1 or out_width >= 48)


def dtypes_fit(x: Tensor, conv_weight: Tensor) -> bool:
    """Whether the op has the dtypes: fp32, fp64, and fp16 and bf16 in channels_last, which autocast may have made."""
    if x.dtype is torch.float32 or x.dtype is torch.float64:
        return x.dtype is conv_weight.dtype and not autocast_enabled(x)
    if x.dtype not in SIXTEEN_BIT or x.is_contiguous():
        return False
    if autocast_enabled(x):
        return torch.get_autocast_dtype("cpu") is x.dtype and conv_weight.dtype in (torch.float32, x.dtype)
    return x.dtype is conv_weight.dtype


class DepthwiseBatchNormAct(ConvBatchNormAct):
    """The op; its backward keeps ``x``, the weights and the per-channel vectors."""

    @staticmethod
    def covers(
        x: Tensor,
        conv_weight: Tensor,
        stride: Size,
        padding: Size | str,
        dilation: Size,
        groups: int,
        activation: str,
    ) -> tuple[Tensor, tuple[Geometry]] | None:
        """Those of ``C`` groups of one channel, 16 or more, on the CPU; for the dtypes see ``dtypes_fit``.

        ``x``: channels_last; or contiguous, in fp32 with a filter of up to 9 values only where ``small_filter_pays``.
        With more than one value per channel.
        """
        channels, planes = conv_weight.size(0), x.is_contiguous()
        if not (
            _KERNEL
            and groups == channels >= LEAST_CHANNELS
            and conv_weight.dim() == 4
            and type(conv_weight) in _PLAIN  # subclasses may mean anything by their memory
            and x.is_cpu
            and x.is_contiguous(memory_format=torch.channels_last) != planes
            and dtypes_fit(x, conv_weight)
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
        small = x.dtype is torch.float32 and conv_weight.size(2) * conv_weight.size(3) <= SMALL_FILTER
        if planes and small and not small_filter_pays(sizes[1], max(strides)):
            return None
        return x, ((strides, pads, dilations),)

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
        geometry, *numbers = options
        found: Sequence[Tensor] = torch.ops.deepops.depthwise_bn_act_train.default(
            x, rounded_as(x, conv_weight), weight, bias, *statistics, *geometry, *numbers
        )
        return found

    @staticmethod
    def gradients(
        grad_y: Tensor, saved: Sequence[Any], options: Options, needed: tuple[bool, bool, bool]
    ) -> Sequence[Grad]:
        geometry, _, _, activation, negative_slope = options
        x, conv_weight, *vectors = saved
        grad_x, grad_conv_weight, *grads = torch.ops.deepops.depthwise_bn_act_backward.default(
            grad_y, x, rounded_as(x, conv_weight), *vectors, *geometry, activation, negative_slope, *needed
        )
        return grad_x, grad_conv_weight.to(conv_weight.dtype), *grads

    @staticmethod
    def plain(x: Tensor, conv_weight: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options) -> Tensor:
        geometry, _, eps, activation, negative_slope = options
        wide = x.float() if x.dtype in SIXTEEN_BIT else x
        y = reference.depthwise_bn_act(
            wide,
            rounded_as(x, conv_weight),
            weight,
            bias,
            *geometry,
            eps,
            activation=activation,
            negative_slope=negative_slope,
        )
        return y.to(x.dtype)
