"""Evaluation of 1x1 and depthwise convolutions with batch normalization folded into their weights, on the CPU.

Our kernels write each output once, activation and residual included, into memory that is used again. oneDNN has the
activation inside too; where its convolution itself is as fast, what is left is the memory: of a result of 51 MB every
page is new each time, which took longer than the convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepops._checks import Size
from deepops._convolution import output_sizes, padding_of, per_dimension
from deepops._library import has_kernel

_POINTWISE = has_kernel("pointwise_bn_act_eval", "cpu")
_DEPTHWISE = has_kernel("depthwise_bn_act_eval", "cpu")
# Measured on two threads against oneDNN's convolution with its activation inside: from so many input channels on or
# with so large a result a 1x1 convolution of channels_last data is as fast or faster.
LEAST_INPUTS, LEAST_BYTES = 64, 16 << 20
LEAST_ROWS = 64  # outputs per channel, for which a panel of weights is read
LEAST_CHANNELS = 16  # the depthwise op takes so many at a time


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Whether data and weights are of a kind that our kernels take."""
    return (
        x.is_cpu
        and weight.dim() == 4
        and x.dim() == 4
        and x.dtype is weight.dtype
        and (x.dtype is torch.float32 or x.dtype is torch.float64)
        and x.numel() > 0
    )


def pointwise_applies(x: Tensor, weight: Tensor, stride: Size, padding: Size | str, groups: int) -> bool:
    """Whether ``pointwise_bn_act_eval`` is for this convolution: 1x1, one group, no padding, of a size that pays.

    Of contiguous data it takes those whose images fill its panels of pixels, of channels_last data those with many
    input channels or a large result.
    """
    if not (_POINTWISE and _fits(x, weight) and groups == 1 and weight.size(2) == weight.size(3) == 1):
        return False
    if not isinstance(padding, str) and any(per_dimension(padding, weight)):
        return False
    height, width = output_sizes(x, weight, per_dimension(stride, weight), [0] * 4, [1, 1])
    pixels = height * width
    if x.size(0) * pixels < LEAST_ROWS:
        return False
    if x.is_contiguous():
        return -pixels % 16 * 8 <= pixels
    if x.is_contiguous(memory_format=torch.channels_last):
        bytes_ = x.size(0) * pixels * weight.size(0) * weight.element_size()
        return weight.size(1) >= LEAST_INPUTS or bytes_ >= LEAST_BYTES
    return False


def depthwise_geometry(
    x: Tensor, weight: Tensor, stride: Size, padding: Size | str, dilation: Size, groups: int
) -> tuple[list[int], list[int], list[int]] | None:
    """Stride, padding and dilation for ``depthwise_bn_act_eval``, if it is for this convolution: channels_last data.

    With one output for each of 16 or more channels.
    """
    if not (_DEPTHWISE and _fits(x, weight) and groups == weight.size(0) == x.size(1) >= LEAST_CHANNELS):
        return None
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return None
    strides, dilations = [list(per_dimension(value, weight)) for value in (stride, dilation)]
    if isinstance(padding, str):
        pads = padding_of(padding, weight, dilation)
    else:
        pads = [side for side in per_dimension(padding, weight) for _ in range(2)]
    sizes = output_sizes(x, weight, strides, pads, dilations)
    return (strides, pads, dilations) if min(sizes) > 0 else None
