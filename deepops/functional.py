"""Functions behind ``deepops.nn``: the argument order mirrors ``torch.nn.functional.batch_norm``, ``torch.lstm_cell``.

    >>> import torch, deepops
    >>> x = torch.randn(8, 16, 14, 14)
    >>> y = deepops.functional.batch_norm_act(x, None, None, training=True)
    >>> torch.testing.assert_close(y, torch.relu(torch.nn.functional.batch_norm(x, None, None, training=True)))

Each call runs a compiled kernel where one is registered for the device, and plain PyTorch (``deepops.reference``)
elsewhere: on another device, on an empty batch, and under ``torch.func`` transforms or forward-mode differentiation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepops import _fake, reference
from deepops._autograd import ARGUMENTS, BatchNormAct, inverse_std, memory_format_of
from deepops._checks import (
    Size,
    autocast_enabled,
    check_activation,
    check_batch_norm,
    check_convolution,
    check_data,
    check_padding,
    check_residual,
    check_residual_dtype,
    checked_group,
    statistics_dtype,
    transforms_active,
)
from deepops._convolution import convolution
from deepops._depthwise import depthwise_bn_act, geometry_of
from deepops._folding import conv_act, fold, folds_with_gradients
from deepops._library import binaries, gpu_not_covered, has_kernel
from deepops._lstm_functional import lstm, lstm_cell
from deepops._sync import synchronized

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["batch_norm_act", "conv_bn_act", "lstm", "lstm_cell"]

if hasattr(torch.ops.deepops, "batch_norm_act_train"):
    _fake.register()

# Looked up once: a dictionary is something torch.compile can trace.
_KERNEL_ON = {device: has_kernel("batch_norm_act_train", device) for device in ("cpu", "cuda")}
_warned: set[str] = set()
# Function.apply first asks whether torch.func is at work. _fit has asked already: 4 us less a call.
_apply: Callable[..., Tensor] = super(torch.autograd.Function, BatchNormAct).apply
_traceable_apply: Callable[..., Tensor] = BatchNormAct.apply

# training, momentum, eps, activation, negative_slope, approximate, the group of the processes that share the batch, if
# there are any. No NamedTuple, which takes 0.3 us to make.
Settings = tuple[bool, float | None, float, str, float, str, "ProcessGroup | None"]


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
        return _in_group(x, residual, weight, bias, None, *vectors, settings, process_group)
    if _fit(x, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps):
        return _run(x, residual, weight, bias, None, running_mean, running_var, num_batches_tracked, settings)
    check_data("x", x)
    check_batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    if residual is not None:
        check_residual(residual, x, x.shape)
    return _batch_norm_act(x, residual, weight, bias, None, running_mean, running_var, num_batches_tracked, settings)


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

    In training, a depthwise convolution (``groups`` = C = K) of 16 channels or more, of channels_last fp32 or fp64 data
    on the CPU, without residual, autocast, compilation or ``torch.func``, is one op with the rest. It computes the
    convolution again wherever it needs it: the backward then keeps nothing of the size of the output.

    Args:
        x: ``[N, C, L]``, ``[N, C, H, W]`` or ``[N, C, D, H, W]``.
        conv_weight: ``[K, C / groups, *kernel_size]``, dtype of ``x``.
        conv_bias: ``[K]`` or None.
        running_mean, running_var, weight, bias: ``[K]``.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``.
        residual: shape of the output, ``[N, K, ...]``.

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
    if training and residual is None and process_group is None:
        depthwise = geometry_of(x, conv_weight, *geometry)
        statistics = (running_mean, running_var, num_batches_tracked)
        if depthwise and _fit(x, None, weight, bias, *statistics, training, momentum, eps):
            name = "gelu_tanh" if activation == "gelu" and approximate == "tanh" else activation
            options = (depthwise, momentum, eps, name, negative_slope)
            y = depthwise_bn_act(x, conv_weight, shift, weight, bias, statistics, options)
            _after_training(*statistics, shift, momentum)
            return y
    y = convolution(x, conv_weight, None if training else conv_bias, *geometry)
    settings = (training, momentum, eps, activation, negative_slope, approximate, None)
    if process_group is not None and training:
        vectors = (running_mean, running_var, num_batches_tracked)
        return _in_group(y, residual, weight, bias, shift, *vectors, settings, process_group)
    if _fit(y, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps):
        return _run(y, residual, weight, bias, shift, running_mean, running_var, num_batches_tracked, settings)
    check_batch_norm(y, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    if residual is not None:
        check_residual(residual, x, y.shape)
    return _batch_norm_act(y, residual, weight, bias, shift, running_mean, running_var, num_batches_tracked, settings)


def _in_group_impl(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    settings: Settings,
    process_group: ProcessGroup,
) -> Tensor:
    """``_batch_norm_act`` in training with a process group; checks everything but ``x`` and the activation."""
    group = checked_group(process_group)
    if group is not None and transforms_active():
        raise RuntimeError("process_group: torch.func and forward-mode differentiation do not reach other processes")
    _, momentum, eps, *_ = settings
    check_batch_norm(
        x, running_mean, running_var, weight, bias, True, momentum, eps, num_batches_tracked, alone=group is None
    )
    if residual is not None:
        check_residual(residual, x, x.shape)
    vectors = (running_mean, running_var, num_batches_tracked)
    return _batch_norm_act(x, residual, weight, bias, shift, *vectors, (*settings[:-1], group))


_in_group_outside_graph: Callable[..., Tensor] = torch._disable_dynamo(_in_group_impl)  # type: ignore[attr-defined]


def _in_group(*arguments: Tensor | Settings | ProcessGroup | None) -> Tensor:
    """``_in_group_impl``, which torch.compile runs between its graphs: what processes exchange is not traced."""
    if torch.compiler.is_compiling():
        return _in_group_outside_graph(*arguments)
    return _in_group_impl(*arguments)  # type: ignore[arg-type]


def _fit(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> bool:
    """Whether the compiled ops can take these very tensors: the usual case. False says nothing: look closer."""
    if ARGUMENTS is None or torch.compiler.is_compiling() or transforms_active():
        return False
    if (momentum is None and num_batches_tracked is None) or eps <= 0:
        return False
    fit: bool = ARGUMENTS.fit(x, residual, weight, bias, running_mean, running_var, num_batches_tracked, training)
    return fit


def _batch_norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    settings: Settings,
) -> Tensor:
    """``batch_norm_act`` of ``x + shift`` with checked arguments. ``shift`` (``[C]``): only with ``training``."""
    if residual is not None and residual.dtype is not x.dtype:
        if not autocast_enabled(x):
            check_residual_dtype(residual, x)  # raises
        # Under autocast the sum has the wider dtype, as with torch's own modules.
        wide = torch.promote_types(residual.dtype, x.dtype)
        x, residual = x.to(wide), residual.to(wide)
    in_group = settings[-1] is not None  # an empty part of a batch is not an empty batch
    run = _kernel if _kernel_applies(x) and (in_group or x.numel() > 0) else _plain
    return run(x, residual, weight, bias, shift, running_mean, running_var, num_batches_tracked, settings)


def _kernel_applies(x: Tensor) -> bool:
    device = x.device.type
    if not _KERNEL_ON.get(device, False):
        if device not in _warned and device != "meta":
            _warn_once(device)
        return False
    if device == "cuda" and not torch.compiler.is_compiling() and (reason := gpu_not_covered(x.device.index)):
        if device not in _warned:
            _warn_once(device, reason)
        return False
    return torch.compiler.is_compiling() or not transforms_active()


def _kernel(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    settings: Settings,
) -> Tensor:
    """Bring all tensors to the layout and the dtypes of the compiled ops and call them."""
    layout = memory_format_of(x)
    x = x.contiguous(memory_format=layout)
    if residual is not None:
        residual = residual.contiguous(memory_format=layout)
    mean, var = running_mean, running_var
    if x.dtype is torch.float16 or x.dtype is torch.bfloat16:  # the vectors may be 16-bit too
        weight, bias, mean, var = (None if t is None else t.float() for t in (weight, bias, mean, var))
    y = _run(x, residual, weight, bias, shift, mean, var, num_batches_tracked, settings)
    if settings[0]:  # training: copy widened statistics back
        if running_mean is not None and mean is not None and mean is not running_mean:
            running_mean.copy_(mean)
        if running_var is not None and var is not None and var is not running_var:
            running_var.copy_(var)
    return y


def _run(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    settings: Settings,
) -> Tensor:
    """Call the compiled op, recorded for autograd where a gradient is wanted."""
    training, momentum, eps, activation, negative_slope, approximate, group = settings
    if approximate == "tanh" and activation == "gelu":
        activation = "gelu_tanh"
    statistics = (running_mean, running_var, num_batches_tracked)
    numbers = (momentum, eps, activation, negative_slope)
    if group is not None:
        y, count = synchronized(x, residual, weight, bias, shift, *statistics, (training, *numbers), group)
        shift = None if shift is None else shift * (count > 1)  # of nothing, nothing is learnt
    elif torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
        or (shift is not None and shift.requires_grad)
    ):
        apply = _traceable_apply if torch.compiler.is_compiling() else _apply
        options = (training, *numbers)
        y = apply(x, residual, weight, bias, shift, *statistics, options)
    elif training:
        y = torch.ops.deepops.batch_norm_act_train.default(x, residual, weight, bias, *statistics, *numbers)[0]
    else:
        assert running_var is not None
        invstd = inverse_std(running_var, eps)
        y = torch.ops.deepops.batch_norm_act_eval.default(
            x, residual, weight, bias, running_mean, invstd, activation, negative_slope
        )
    if training:
        _after_training(*statistics, shift, momentum)
    return y


def _plain(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    settings: Settings,
) -> Tensor:
    """The same without a kernel."""
    training, momentum, eps, activation, negative_slope, approximate, group = settings
    if group is not None and shift is not None:
        # Added after all: that the whole batch may be empty, and teach nothing, is not known here.
        shifted = x.to(statistics_dtype(x.dtype)) + shift.detach().view([-1] + [1] * (x.dim() - 2))
        vectors = (running_mean, running_var, num_batches_tracked)
        y = _plain(shifted, residual, weight, bias, None, *vectors, settings).to(x.dtype)
        return y + shift[:0].sum().to(y.dtype)
    if training and running_mean is not None and _is_batched(x) and not _is_batched(running_mean):
        raise RuntimeError(  # torch's own condition
            "running_mean: expected a batched tensor, as x is one under torch.vmap, got one for all; give None for the "
            "running statistics, or set track_running_stats=False on the module"
        )
    if training and x.numel() == 0 and group is None:
        # As torch: an empty batch has no statistics, so the running ones stay; weight and bias get zero gradients.
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        empty = x.clone()
        for tensor in (residual, weight, bias, shift):
            if tensor is not None:
                empty = empty + tensor.reshape(-1)[:0].sum().to(x.dtype)
        return empty
    y = reference.batch_norm_act(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        activation=activation,
        negative_slope=negative_slope,
        approximate=approximate,
        residual=residual,
        num_batches_tracked=num_batches_tracked,
        process_group=group,
    )
    if shift is not None:
        if running_mean is not None:
            _shift_running_mean(running_mean, shift, momentum, num_batches_tracked)
        if shift.requires_grad and torch.is_grad_enabled():
            y = y + shift[:0].sum().to(y.dtype)  # a sum of nothing, so that the gradient of shift is 0 and not None
    return y


def _is_batched(tensor: Tensor) -> bool:
    """Whether ``tensor`` stands for several, inside ``torch.vmap``."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(tensor)


def _after_training(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    shift: Tensor | None,
    momentum: float | None,
) -> None:
    """What is left to do once an op has updated the running statistics."""
    if not torch.compiler.is_compiling():
        _count_writes(running_mean, running_var, num_batches_tracked)
    if shift is not None and running_mean is not None:
        _shift_running_mean(running_mean, shift, momentum, num_batches_tracked)


def _count_writes(*written: Tensor | None) -> None:
    """Count the op's in-place writes as torch's own operations do; caches and autograd's checks look at it."""
    torch._C._increment_version([t for t in written if t is not None and not t.is_inference()])


def _shift_running_mean(
    running_mean: Tensor, shift: Tensor, momentum: float | None, num_batches_tracked: Tensor | None
) -> None:
    """Add what ``shift`` contributes to the mean of this batch."""
    shift = shift.detach()
    if momentum is not None:
        running_mean.add_(shift, alpha=momentum)
    elif num_batches_tracked is not None:
        running_mean.add_(shift / num_batches_tracked)


def _warn_once(device: str, cause: str = "") -> None:
    _warned.add(device)
    if _KERNEL_ON["cpu"]:  # else the import has already said why
        cause = cause or (f"_cuda {binaries()['_cuda']}" if device == "cuda" else "")
        message = f"deepops has no kernels for {device!r} tensors and runs them on plain PyTorch"
        message += f": {cause}" if cause else ""
        warnings.warn(message, RuntimeWarning, stacklevel=5)
