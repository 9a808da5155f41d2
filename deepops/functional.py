"""Functions behind ``deepops.nn``: the argument order mirrors ``torch.nn.functional.batch_norm``, ``torch.lstm_cell``.

    >>> import torch, deepops
    >>> x = torch.randn(8, 16, 14, 14)
    >>> y = deepops.functional.batch_norm_act(x, None, None, training=True)
    >>> torch.testing.assert_close(y, torch.relu(torch.nn.functional.batch_norm(x, None, None, training=True)))

Each call runs a compiled kernel where one is registered for the device, and plain PyTorch (``deepops.reference``)
elsewhere: on another device, on an empty batch, and under ``torch.func`` transforms or forward-mode differentiation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepops import _conv_problem, _fake, _fused_conv
from deepops._batch_norm_act import after_training, dispatch, fit, in_group, name_in_op, run_op
from deepops._checks import (
    Size,
    autocast_enabled,
    check_activation,
    check_batch_norm,
    check_convolution,
    check_data,
    check_padding,
    check_residual,
)
from deepops._convolution import convolution
from deepops._depthwise import DepthwiseBatchNormAct
from deepops._folding import conv_act, fold, folds_with_gradients
from deepops._lstm_functional import lstm, lstm_cell
from deepops._pointwise import PointwiseBatchNormAct

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["batch_norm_act", "conv_bn_act", "lstm", "lstm_cell"]

if hasattr(torch.ops.deepops, "batch_norm_act_train"):
    _fake.register()


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
    approximate: str = "none",
    residual: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Batch normalization, an optional residual and an activation in one pass.

    ``act((x - mean) / sqrt(var + eps) * weight + bias + residual)`` per channel; the mean and the biased variance are
    those of the batch with ``training``, else the running ones. (Ioffe & Szegedy 2015, arXiv:1502.03167.)

    Args:
        x: ``[N, C, ...]``, fp32, fp64, fp16 or bf16. The result has its dtype, also under autocast, and its layout
            (contiguous or channels_last; other strides are copied first).
        running_mean, running_var: ``[C]``; with ``training`` updated in place or None. fp32 beside 16-bit data (16-bit
            ones work too), else the dtype of ``x``.
        weight, bias: ``[C]`` or None for ones and zeros; dtype as above.
        training: use the statistics of the batch and update the running ones.
        momentum: weight of the new batch in the running statistics; None is the cumulative average, which needs
            ``num_batches_tracked``.
        eps: added to the variance.
        activation: ``"relu"``, ``"leaky_relu"``, ``"relu6"``, ``"silu"``, ``"gelu"``, ``"hardswish"``, ``"identity"``.
        negative_slope: of leaky_relu.
        approximate: of gelu: ``"none"`` or ``"tanh"``.
        residual: added before the activation; shape and dtype of ``x``.
        num_batches_tracked: int64 scalar, counted up by one with ``training``.
        process_group: processes that share the batch, each with a part of it; parts may differ in size or be empty.
            With ``training`` the statistics are those of the whole batch, the same bits in every process, as by
            ``torch.nn.SyncBatchNorm``, but on the CPU too. All processes have to call, and all or none of them have to
            want the gradient of ``x``: they exchange one vector in the forward and one in its backward. Gradients are
            those of the sum of the processes' losses; those of ``weight`` and ``bias`` come by way of this process'
            part alone, for ``DistributedDataParallel`` to average. None, a group of one process, or evaluation:
            nothing is exchanged. ``torch.compile`` breaks the graph here.

    Returns:
        Tensor of the shape of ``x``. The backward keeps ``x`` and per-channel vectors, nothing of the size of the
        output; with a residual one more: the output for the ReLU family, the residual for the smooth activations.

    Raises:
        TypeError: a non-tensor, a sparse or integer tensor, dtypes that do not go together.
        ValueError: wrong shape, device or option; one value per channel in training, of which only the processes of a
            group on GPUs do not learn: their running statistics stay; a process group that is gone or without this
            process.
        RuntimeError: a process group under ``torch.func`` or forward-mode differentiation.
    """
    check_activation(activation, approximate)
    settings = (training, momentum, eps, activation, negative_slope, approximate, None)
    if process_group is not None and training:
        check_data("x", x)
        vectors = (running_mean, running_var, num_batches_tracked)
        return in_group(x, residual, weight, bias, None, *vectors, settings, process_group)
    if fit(x, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps):
        return run_op(x, residual, weight, bias, None, running_mean, running_var, num_batches_tracked, settings)
    check_data("x", x)
    check_batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    if residual is not None:
        check_residual(residual, x, x.shape)
    return dispatch(x, residual, weight, bias, None, running_mean, running_var, num_batches_tracked, settings)


def conv_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    activation: str = "relu",
    negative_slope: float = 0.01,
    approximate: str = "none",
    residual: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """``batch_norm_act`` of a convolution with one to three spatial dimensions; for the other arguments see there.

    The convolution is PyTorch's own and takes part in autocast like ``torch.nn.functional.conv2d``; the rank of
    ``conv_weight`` says whether it is ``conv1d``, ``conv2d`` or ``conv3d``. The backward keeps ``x``, the weights and
    one tensor of the size of the output (stock modules keep two).

    With ``training``, batch statistics remove ``conv_bias`` again, so it is never added: the running mean gets it and
    its gradient is exactly 0. Without (frozen batch normalization) and where gradients are wanted, but none for
    ``weight`` and ``bias``, these and the running statistics are folded into the weights of the convolution: there is
    no pass of batch normalization, forward or backward, and the tensor kept is the output itself for the ReLU family.

    In training, a depthwise convolution (``groups`` = C = K) of 16 channels or more on the CPU, without residual,
    compilation or ``torch.func``, is one op with the rest: in channels_last, in fp16 and bf16 with or without autocast,
    else without; and of contiguous fp32 or fp64 data unless that is fp32, the filter has up to 9 values, and rows have
    few outputs. These must be more than 64 or at least 7/8 of the next multiple of 16, and with a stride 48 or more.
    The op computes the convolution again wherever it needs it: the backward then keeps nothing of the size of the
    output, and in 16 bits no rounded convolution lies between.

    So is, of fp32 or fp64 data without autocast and in either layout, an expanding 1x1 convolution without stride and
    padding, from 8 to 64 channels (32 for activations other than identity and the ReLU family) to at least three times
    as many, with 256 values or more per channel, above 32 channels 4,096. Its result is never stored, as its statistics
    follow from the covariances of ``x``, and the backward keeps a bit per value of the output for the ReLU family,
    nothing for other activations.

    On NVIDIA GPUs the convolution may be deepops' own: in training without a process group, where it leaves the
    statistics of its result behind, and in evaluation without gradients, which is one kernel then. It covers
    ``conv2d`` of channels_last data without groups, in fp16 and bf16 (autocast too) with a multiple of 8 channels, in
    these and fp32 with up to 4. ``deepops.backends.conv`` decides: by default, both ways of each shape are timed once,
    and the faster one is taken from then on. Both round the convolution's result once to the dtype of ``x``, from sums
    in fp32 in different orders; gradients are computed alike.

    Args:
        x: ``[N, C, L]``, ``[N, C, H, W]`` or ``[N, C, D, H, W]``.
        conv_weight: ``[K, C / groups, *kernel_size]``, dtype of ``x``.
        conv_bias: ``[K]`` or None.
        running_mean, running_var, weight, bias: ``[K]``.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``.
        residual: shape of the output, ``[N, K, ...]``.

    Raises:
        TypeError, ValueError: as ``batch_norm_act``; where ``deepops.backends.conv`` is ``"fused"`` also for a call on
            a GPU which that convolution does not cover.

    >>> x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    >>> conv_bn_act(x, w, None, None, None, training=True, padding=1).shape
    torch.Size([2, 4, 8, 8])
    """
    check_data("x", x)
    check_activation(activation, approximate)
    check_convolution(x, conv_weight, conv_bias, groups, autocast_enabled(x))
    check_padding(padding, stride)
    geometry = (stride, padding, dilation, groups)
    if (
        not training
        and running_mean is not None
        and running_var is not None
        and folds_with_gradients(x, weight, bias, conv_weight, conv_bias, residual)
    ):
        folded, folded_bias = fold(conv_weight, conv_bias, running_mean, running_var, weight, bias, eps)
        return conv_act(x, folded, folded_bias, residual, *geometry, activation, negative_slope, approximate)
    shift = conv_bias if training else None
    statistics = (running_mean, running_var, num_batches_tracked)
    settings = (training, momentum, eps, activation, negative_slope, approximate, None)
    if x.is_cuda or _conv_problem.executor is not None:
        shared = training and process_group is not None
        vectors = (residual, weight, bias, statistics)
        fused = _fused_conv.conv_bn_act(x, conv_weight, conv_bias, *vectors, geometry, settings, shared)
        if fused is not None:
            return fused
    if training and residual is None and process_group is None:
        for op in (DepthwiseBatchNormAct, PointwiseBatchNormAct):
            covered = op.covers(x, conv_weight, *geometry, activation)
            if covered and fit(covered[0], None, weight, bias, *statistics, training, momentum, eps):
                options = (*covered[1], momentum, eps, name_in_op(activation, approximate), negative_slope)
                y = op.run(x, conv_weight, shift, weight, bias, statistics, options)
                after_training(*statistics, shift, momentum)
                return y
    y = convolution(x, conv_weight, None if training else conv_bias, *geometry)
    if process_group is not None and training:
        return in_group(y, residual, weight, bias, shift, *statistics, settings, process_group)
    if fit(y, residual, weight, bias, *statistics, training, momentum, eps):
        return run_op(y, residual, weight, bias, shift, *statistics, settings)
    check_batch_norm(y, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    if residual is not None:
        check_residual(residual, x, y.shape)
    return dispatch(y, residual, weight, bias, shift, *statistics, settings)
