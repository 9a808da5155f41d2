"""Shapes, dtypes and strides of every op's results, for tracing and compiling (``torch.library.register_fake``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepops import _fake_conv, _fake_lstm
from deepops._checks import statistics_dtype
from deepops._convolution import output_sizes


def _vectors(x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Two per-channel vectors beside data like ``x``: a mean and an inverse standard deviation, or two gradients."""
    vector = x.new_empty(channels, dtype=statistics_dtype(x.dtype))
    return vector, torch.empty_like(vector)


def _like(tensor: Tensor, needed: bool = True) -> Tensor:
    """A gradient of ``tensor``; empty where it is not needed."""
    return torch.empty_like(tensor) if needed else tensor.new_empty(0)


def _data(x: Tensor, channels: int, sizes: Sequence[int]) -> Tensor:
    """A convolution's output, in the layout of ``x``."""
    data = x.new_empty([x.size(0), channels, *sizes])
    return data.contiguous(memory_format=torch.channels_last) if _channels_last(x) else data


def _channels_last(x: Tensor) -> bool:
    """Which layout the kernels see where it may be either."""
    return x.is_contiguous(memory_format=torch.channels_last)


def _batch_norm_act_train(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), *_vectors(x, x.size(1))


def _batch_norm_act_eval(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str,
    negative_slope: float,
) -> Tensor:
    return torch.empty_like(x)


def _batch_norm_act_backward(
    grad_y: Tensor,
    x: Tensor,
    kept: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    activation: str,
    negative_slope: float,
    need_x: bool,
    need_residual: bool,
    need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(x, need_x), _like(x, need_residual), *_vectors(x, x.size(1) if need_affine else 0)


def _batch_norm_act_statistics(x: Tensor) -> Tensor:
    return x.new_empty(2 * x.size(1) + 1, dtype=torch.float64)


def _batch_norm_act_merge(
    x: Tensor,
    gathered: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return *_vectors(x, x.size(1)), x.new_empty(1, dtype=torch.float64)


def _batch_norm_act_reduce(
    grad_y: Tensor,
    x: Tensor,
    kept: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str,
    negative_slope: float,
    need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(2 * x.size(1), dtype=torch.float64), *_vectors(x, x.size(1) if need_affine else 0)


def _batch_norm_act_input_grad(
    grad_y: Tensor,
    x: Tensor,
    kept: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    sums: Tensor,
    count: Tensor,
    activation: str,
    negative_slope: float,
    need_residual: bool,
) -> tuple[Tensor, Tensor]:
    return _like(x), _like(x, need_residual)


def _depthwise_bn_act_eval(
    x: Tensor,
    conv_weight: Tensor,
    bias: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
    negative_slope: float,
) -> Tensor:
    return _data(x, conv_weight.size(0), output_sizes(x, conv_weight, stride, padding, dilation))


def _pointwise_bn_act_pack(conv_weight: Tensor) -> Tensor:
    columns, inputs = conv_weight.shape[:2]
    return conv_weight.new_empty((columns + 63) // 64 * 64 * inputs)  # panels of 64 columns


def _pointwise_bn_act_eval(
    x: Tensor,
    conv_weight: Tensor,
    packed: Tensor | None,
    bias: Tensor,
    residual: Tensor | None,
    stride: list[int],
    activation: str,
    negative_slope: float,
) -> Tensor:
    sizes = output_sizes(x, conv_weight, stride, [0] * 4, [1, 1])
    y = _data(x, conv_weight.size(0), sizes)
    return y.contiguous() if x.is_contiguous() else y


def _depthwise_bn_act_train(
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    momentum: float | None,
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = output_sizes(x, conv_weight, stride, padding, dilation)
    return _data(x, x.size(1), sizes), *_vectors(x, x.size(1))


def _depthwise_bn_act_backward(
    grad_y: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
    negative_slope: float,
    need_x: bool,
    need_conv_weight: bool,
    need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    vectors = _vectors(x, x.size(1) if need_affine else 0)
    return _like(x, need_x), _like(conv_weight, need_conv_weight), *vectors


def _pointwise_bn_act_train(
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str,
    negative_slope: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    channels, inputs = conv_weight.shape[:2]
    moments = x.new_empty((1 + inputs) * inputs, dtype=torch.float64)
    rows, pixels = x.numel() // inputs, x.size(2) * x.size(3)
    words = rows * ((channels + 15) // 16) if _channels_last(x) else x.size(0) * ((pixels + 15) // 16) * channels
    two_slopes = activation in ("relu", "relu6", "leaky_relu")
    bits = x.new_empty(words if save and two_slopes else 0, dtype=torch.int16)
    return _data(x, channels, x.shape[2:]), *_vectors(x, channels), moments, bits


def _pointwise_bn_act_backward(
    grad_y: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    moments: Tensor,
    bits: Tensor,
    activation: str,
    negative_slope: float,
    need_x: bool,
    need_conv_weight: bool,
    need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    vectors = _vectors(x, conv_weight.size(0) if need_affine else 0)
    return _like(x, need_x), _like(conv_weight, need_conv_weight), *vectors


def _adam(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    decoupled_weight_decay: bool,
) -> None:
    """It changes its arguments and returns nothing."""


def _sgd(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """It changes its arguments and returns nothing."""


def _rmsprop(
    params: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    grad_avgs: list[Tensor],
    momentum_buffers: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    centered: bool,
    maximize: bool,
) -> None:
    """It changes its arguments and returns nothing."""


def register() -> None:
    """Register the functions above, each by its name. Called once, after the ops were loaded."""
    for fake in (
        _batch_norm_act_train,
        _batch_norm_act_eval,
        _batch_norm_act_backward,
        _batch_norm_act_statistics,
        _batch_norm_act_merge,
        _batch_norm_act_reduce,
        _batch_norm_act_input_grad,
        _depthwise_bn_act_eval,
        _depthwise_bn_act_train,
        _pointwise_bn_act_eval,
        _pointwise_bn_act_pack,
        _depthwise_bn_act_backward,
        _pointwise_bn_act_train,
        _pointwise_bn_act_backward,
        _adam,
        _sgd,
        _rmsprop,
    ):
        torch.library.register_fake(f"deepops::{fake.__name__[1:]}", fake)
    _fake_conv.register()
    _fake_lstm.register()
