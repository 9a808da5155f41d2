"""From checked arguments to the op: which way a call of ``batch_norm_act`` goes, for ``deepops.functional``.

The compiled op where one is registered for the device, plain PyTorch (``deepops.reference``) elsewhere; both leave the
same running statistics behind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepops import reference
from deepops._autograd import ARGUMENTS, BatchNormAct, inverse_std, memory_format_of
from deepops._checks import (
    autocast_enabled,
    check_batch_norm,
    check_residual,
    check_residual_dtype,
    checked_group,
    statistics_dtype,
    transforms_active,
)
from deepops._fallback import warn_once
from deepops._library import gpu_not_covered, has_kernel
from deepops._sync import synchronized

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Looked up once: a dictionary is something torch.compile can trace.
_KERNEL_ON = {device: has_kernel("batch_norm_act_train", device) for device in ("cpu", "cuda")}
# Function.apply first asks whether torch.func is at work. fit has asked already: 4 us less a call.
_apply: Callable[..., Tensor] = super(torch.autograd.Function, BatchNormAct).apply
_traceable_apply: Callable[..., Tensor] = BatchNormAct.apply

# training, momentum, eps, activation, negative_slope, approximate, the group of the processes that share the batch, if
# there are any. No NamedTuple, which takes 0.3 us to make.
Settings = tuple[bool, float | None, float, str, float, str, "ProcessGroup | None"]


def _in_group(
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
    """``dispatch`` in training with a process group; checks everything but ``x`` and the activation."""
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
    return dispatch(x, residual, weight, bias, shift, *vectors, (*settings[:-1], group))


_outside_graph: Callable[..., Tensor] = torch._disable_dynamo(_in_group)  # type: ignore[attr-defined]


def in_group(*arguments: Tensor | Settings | ProcessGroup | None) -> Tensor:
    """``_in_group``, which torch.compile runs between its graphs: what processes exchange is not traced."""
    if torch.compiler.is_compiling():
        return _outside_graph(*arguments)
    return _in_group(*arguments)  # type: ignore[arg-type]


def fit(
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


def dispatch(
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
    run = run_kernel if kernel_applies(x) and (in_group or x.numel() > 0) else run_plain
    return run(x, residual, weight, bias, shift, running_mean, running_var, num_batches_tracked, settings)


def kernel_applies(x: Tensor) -> bool:
    device = x.device.type
    if not _KERNEL_ON.get(device, False):
        warn_once(device)
        return False
    if device == "cuda" and not torch.compiler.is_compiling() and (reason := gpu_not_covered(x.device.index)):
        warn_once(device, reason)
        return False
    return torch.compiler.is_compiling() or not transforms_active()


def run_kernel(
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
    y = run_op(x, residual, weight, bias, shift, mean, var, num_batches_tracked, settings)
    if settings[0]:  # training: copy widened statistics back
        if running_mean is not None and mean is not None and mean is not running_mean:
            running_mean.copy_(mean)
        if running_var is not None and var is not None and var is not running_var:
            running_var.copy_(var)
    return y


def name_in_op(activation: str, approximate: str) -> str:
    """The ops know the two forms of gelu as two activations."""
    return "gelu_tanh" if activation == "gelu" and approximate == "tanh" else activation


def run_op(
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
    activation = name_in_op(activation, approximate)
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
        after_training(*statistics, shift, momentum)
    return y


def run_plain(
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
        y = run_plain(shifted, residual, weight, bias, None, *vectors, settings).to(x.dtype)
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


def after_training(
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
