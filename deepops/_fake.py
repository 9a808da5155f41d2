"""Shapes, dtypes and strides of every op's results, for tracing and compiling (``torch.library.register_fake``)."""

from __future__ import annotations

import torch
from torch import Tensor

from deepops import _fake_conv, _fake_lstm
from deepops._checks import statistics_dtype
from deepops._convolution import output_sizes


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
    statistics = x.new_empty(x.size(1), dtype=statistics_dtype(x.dtype))
    return torch.empty_like(x), statistics, torch.empty_like(statistics)


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
    def data(needed: bool) -> Tensor:
        return torch.empty_like(x) if needed else x.new_empty(0)

    def affine() -> Tensor:
        return x.new_empty(x.size(1) if need_affine else 0, dtype=statistics_dtype(x.dtype))

    return data(need_x), data(need_residual), affine(), affine()


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
    statistics = x.new_empty(x.size(1), dtype=statistics_dtype(x.dtype))
    return statistics, torch.empty_like(statistics), x.new_empty(1, dtype=torch.float64)


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
    affine = x.new_empty(x.size(1) if need_affine else 0, dtype=statistics_dtype(x.dtype))
    return x.new_empty(2 * x.size(1), dtype=torch.float64), affine, torch.empty_like(affine)


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
    return torch.empty_like(x), torch.empty_like(x) if need_residual else x.new_empty(0)


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
    y = x.new_empty([x.size(0), x.size(1), *sizes]).contiguous(memory_format=torch.channels_last)
    statistics = x.new_empty(x.size(1), dtype=statistics_dtype(x.dtype))
    return y, statistics, torch.empty_like(statistics)


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
    def affine() -> Tensor:
        return x.new_empty(x.size(1) if need_affine else 0, dtype=statistics_dtype(x.dtype))

    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    return grad_x, torch.empty_like(conv_weight) if need_conv_weight else x.new_empty(0), affine(), affine()


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
    y = x.new_empty([x.size(0), channels, *x.shape[2:]]).contiguous(memory_format=torch.channels_last)
    statistics = x.new_empty(channels, dtype=statistics_dtype(x.dtype))
    moments = x.new_empty((1 + inputs) * inputs, dtype=torch.float64)
    words = (x.numel() // inputs) * ((channels + 15) // 16)
    two_slopes = activation in ("relu", "relu6", "leaky_relu")
    bits = x.new_empty(words if save and two_slopes else 0, dtype=torch.int16)
    return y, statistics, torch.empty_like(statistics), moments, bits


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
    def affine() -> Tensor:
        return x.new_empty(conv_weight.size(0) if need_affine else 0, dtype=statistics_dtype(x.dtype))

    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    return grad_x, torch.empty_like(conv_weight) if need_conv_weight else x.new_empty(0), affine(), affine()


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
    """Register the functions above. Called once, after the ops were loaded."""
    torch.library.register_fake("deepops::batch_norm_act_train", _batch_norm_act_train)
    torch.library.register_fake("deepops::batch_norm_act_eval", _batch_norm_act_eval)
    torch.library.register_fake("deepops::batch_norm_act_backward", _batch_norm_act_backward)
    torch.library.register_fake("deepops::batch_norm_act_statistics", _batch_norm_act_statistics)
    torch.library.register_fake("deepops::batch_norm_act_merge", _batch_norm_act_merge)
    torch.library.register_fake("deepops::batch_norm_act_reduce", _batch_norm_act_reduce)
    torch.library.register_fake("deepops::batch_norm_act_input_grad", _batch_norm_act_input_grad)
    torch.library.register_fake("deepops::depthwise_bn_act_train", _depthwise_bn_act_train)
    torch.library.register_fake("deepops::depthwise_bn_act_backward", _depthwise_bn_act_backward)
    torch.library.register_fake("deepops::pointwise_bn_act_train", _pointwise_bn_act_train)
    torch.library.register_fake("deepops::pointwise_bn_act_backward", _pointwise_bn_act_backward)
    _fake_conv.register()
    _fake_lstm.register()
    torch.library.register_fake("deepops::adam", _adam)
    torch.library.register_fake("deepops::sgd", _sgd)
    torch.library.register_fake("deepops::rmsprop", _rmsprop)
