"""Shapes, dtypes and strides of the results of ``conv_bn_act_eval`` and ``conv_bn_act_statistics``."""

from __future__ import annotations

import torch
from torch import Tensor

from deepops._convolution import output_sizes


def _output(x: Tensor, conv_weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    sizes = output_sizes(x, conv_weight, stride, padding, dilation)
    return x.new_empty([x.size(0), conv_weight.size(0), *sizes]).contiguous(memory_format=torch.channels_last)


def _conv_bn_act_eval(
    x: Tensor,
    conv_weight: Tensor,
    residual: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
    negative_slope: float,
) -> Tensor:
    return _output(x, conv_weight, stride, padding, dilation)


def _conv_bn_act_statistics(
    x: Tensor,
    conv_weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(conv_weight.size(0), dtype=torch.float32)
    return _output(x, conv_weight, stride, padding, dilation), mean, torch.empty_like(mean)


def register() -> None:
    """Register the functions above."""
    torch.library.register_fake("deepops::conv_bn_act_eval", _conv_bn_act_eval)
    torch.library.register_fake("deepops::conv_bn_act_statistics", _conv_bn_act_statistics)
