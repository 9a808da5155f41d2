"""Functions behind ``deepops.nn``: the argument order mirrors ``torch.nn.functional.batch_norm``.

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

import torch
from torch import Tensor
from torch.autograd import forward_ad

from deepops import _fake, reference
from deepops._autograd import ARGUMENTS, BatchNormAct, inverse_std, memory_format_of
from deepops._checks import (
    autocast_enabled,
    check_activation,
    check_batch_norm,
    check_convolution,
    check_data,
    check_residual,
)
from deepops._convolution import convolution
from deepops._depthwise import depthwise_bn_act, geometry_of
from deepops._library import binaries, gpu_not_covered, has_kernel

__all__ = ["batch_norm_act", "conv_bn_act"]

if hasattr(torch.ops.deepops, "batch_norm_act_train"):
    _fake.register()

# Looked up once: a dictionary is something torch.compile can trace.
_KERNEL_ON = {device: has_kernel("batch_norm_act_train", device) for device in ("cpu", "cuda")}
_warned: set[str] = set()
# Function.apply first asks whether torch.func is at work. _sees_all has asked already: 4 us less a call.
_apply: Callable[..., Tensor] = super(torch.autograd.Function, BatchNormAct).apply
_traceable_apply: Callable[..., Tensor] = BatchNormAct.apply

# training, momentum, eps, activation, negative_slope, approximate. No NamedTuple, which takes 0.3 us to make.
Settings = tuple[bool, float | None, float, str, float, str]


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

    Returns:
        Tensor of the shape of ``x``. The backward keeps ``x`` and per-channel vectors, nothing of the size of the
        output; with a residual one more: the output for the ReLU family, the residual for the smooth activations.

    Raises:
        TypeError: a non-tensor, a sparse or integer tensor, dtypes that do not go together.
        ValueError: wrong shape, device or option; one value per channel in training.
    """
    check_activation(activation, approximate)
    settings = (training, momentum, eps, activation, negative_slope, approximate)
    if _fit(x, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum):
        return _run(x, residual, weight, bias, None, running_mean, running_var, num_batches_tracked, settings)
    check_data("x", x)
    check_batch_norm(x, running_mean, running_var, weight, bias, training, momentum, num_batches_tracked)
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
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str = "relu",
    negative_slope: float = 0.01,
    approximate: str = "none",
    residual: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """``batch_norm_act`` of a two-dimensional convolution; for the other arguments see there.

    The convolution is PyTorch's own and takes part in autocast like ``torch.nn.functional.conv2d``. The backward keeps
    ``x``, the weights and one tensor of the size of the output (stock modules keep two). Batch statistics remove
    ``conv_bias`` again, so with ``training`` it is never added: the running mean gets it and its gradient is exactly 0.

    In training, a depthwise convolution (``groups`` = C = K) of 16 channels or more, of channels_last fp32 or fp64 data
    on the CPU, without residual, autocast, compilation or ``torch.func``, is one op with the rest. It computes the
    convolution again wherever it needs it: the backward then keeps nothing of the size of the output.

    Args:
        x: ``[N, C, H, W]``.
        conv_weight: ``[K, C / groups, R, S]``, dtype of ``x``.
        conv_bias: ``[K]`` or None.
        running_mean, running_var, weight, bias: ``[K]``.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``.
        residual: shape of the output, ``[N, K, H', W']``.

    >>> x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    >>> conv_bn_act(x, w, None, None, None, training=True, padding=1).shape
    torch.Size([2, 4, 8, 8])
    """
    check_data("x", x)
    check_activation(activation, approximate)
    check_convolution(x, conv_weight, conv_bias, groups, autocast_enabled(x))
    settings = (training, momentum, eps, activation, negative_slope, approximate)
    shift = conv_bias if training else None
    geometry = geometry_of(x, conv_weight, stride, padding, dilation, groups) if training and residual is None else None
    if geometry and _fit(x, None, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum):
        statistics = (running_mean, running_var, num_batches_tracked)
        name = "gelu_tanh" if activation == "gelu" and approximate == "tanh" else activation
        options = (geometry, momentum, eps, name, negative_slope)
        y = depthwise_bn_act(x, conv_weight, shift, weight, bias, statistics, options)
        _after_training(*statistics, shift, momentum)
        return y
    y = convolution(x, conv_weight, None if training else conv_bias, stride, padding, dilation, groups)
    if _fit(y, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum):
        return _run(y, residual, weight, bias, shift, running_mean, running_var, num_batches_tracked, settings)
    check_batch_norm(y, running_mean, running_var, weight, bias, training, momentum, num_batches_tracked)
    if residual is not None:
        check_residual(residual, x, y.shape)
    return _batch_norm_act(y, residual, weight, bias, shift, running_mean, running_var, num_batches_tracked, settings)


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
) -> bool:
    """Whether the compiled ops can take these very tensors: the usual case. False says nothing: look closer."""
    if ARGUMENTS is None or torch.compiler.is_compiling() or not _sees_all():
        return False
    if momentum is None and num_batches_tracked is None:
        return False
    fit: bool = ARGUMENTS.fit(x, residual, weight, bias, running_mean, running_var, num_batches_tracked, training)
    return fit


def _sees_all() -> bool:
    """Whether a compiled op computes all that is asked for: torch.func and forward-mode AD do not see into one."""
    return forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active()


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
            raise TypeError(f"residual: expected {x.dtype}, the dtype of x, got {residual.dtype}")
        # Under autocast the sum has the wider dtype, as with torch's own modules.
        wide = torch.promote_types(residual.dtype, x.dtype)
        x, residual = x.to(wide), residual.to(wide)
    run = _kernel if _kernel_applies(x, residual, weight, bias) else _plain
    return run(x, residual, weight, bias, shift, running_mean, running_var, num_batches_tracked, settings)


def _kernel_applies(x: Tensor, *others: Tensor | None) -> bool:
    device = x.device.type
    if not _KERNEL_ON.get(device, False):
        if device not in _warned and device != "meta":
            _warn_once(device)
        return False
    if device == "cuda" and not torch.compiler.is_compiling() and (reason := gpu_not_covered(x.device.index)):
        if device not in _warned:
            _warn_once(device, reason)
        return False
    return x.numel() > 0 and (torch.compiler.is_compiling() or _sees_all())


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
    training, momentum, eps, activation, negative_slope, approximate = settings
    if approximate == "tanh" and activation == "gelu":
        activation = "gelu_tanh"
    statistics = (running_mean, running_var, num_batches_tracked)
    numbers = (momentum, eps, activation, negative_slope)
    if torch.is_grad_enabled() and (
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
    training, momentum, eps, activation, negative_slope, approximate = settings
    if training and x.numel() == 0:
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
    )
    if shift is not None:
        if running_mean is not None:
            _shift_running_mean(running_mean, shift, momentum, num_batches_tracked)
        if shift.requires_grad and torch.is_grad_enabled():
            y = y + shift[:0].sum().to(y.dtype)  # a sum of nothing, so that the gradient of shift is 0 and not None
    return y


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
