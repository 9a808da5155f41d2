"""``torch.autograd.Function`` around the compiled ops, which know nothing of autograd themselves.

A Function outside the op costs 13 us less a call than ``torch.library.register_autograd``, measured on 2 cores with
torch 2.13; ``torch.compile`` traces through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deepops import reference
from deepops._library import _C, has_kernel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Grad = Tensor | None
# training, momentum, eps, activation, negative_slope: one argument of Function.apply, 0.5 us less a call than five.
Options = tuple[bool, float | None, float, str, float]

# Looks at all tensors of a call at once; None where they have to be looked at in Python.
ARGUMENTS: Any = None
if _C is not None and has_kernel("batch_norm_act_train", "cpu"):
    ARGUMENTS = _C.BatchNormActArguments(Tensor, torch.nn.Parameter)


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The dense layout nearest to that of ``x``: the one the ops run in."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.dim() == 4:
        if x.is_contiguous(memory_format=torch.channels_last) or _channels_innermost(x):
            return torch.channels_last
    elif x.dim() == 5 and (x.is_contiguous(memory_format=torch.channels_last_3d) or _channels_innermost(x)):
        return torch.channels_last_3d
    return torch.contiguous_format


def inverse_std(var: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(var + eps)``, rounded once: every gradient is proportional to it."""
    return torch.rsqrt(var.double() + eps).to(var.dtype)


def _channels_innermost(x: Tensor) -> bool:
    """Whether a sliced or offset ``x`` steps like channels_last: channels closest together, then the last dimension."""
    strides = x.stride()
    return 0 < strides[1] < strides[-1] <= strides[-2]


class BatchNormAct(torch.autograd.Function):
    """``act(batch_norm(x) + residual)``; keeps ``x``, the per-channel vectors and, with a residual, one more tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [N, C, ...], dense
        residual: Tensor | None,  # as x
        weight: Tensor | None,  # [C], as the other vectors in statistics_dtype(x.dtype)
        bias: Tensor | None,
        shift: Tensor | None,  # [C], a constant added to x before batch statistics: they remove it, its gradient is 0
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        options: Options,
    ) -> Tensor:
        training, momentum, eps, activation, negative_slope = options
        if training:
            y, mean, invstd = torch.ops.deepops.batch_norm_act_train.default(
                x,
                residual,
                weight,
                bias,
                running_mean,
                running_var,
                num_batches_tracked,
                momentum,
                eps,
                activation,
                negative_slope,
            )
        else:
            assert running_mean is not None
            assert running_var is not None
            # A copy: a training step between this forward and its backward would change the statistics.
            mean, invstd = running_mean.clone(), inverse_std(running_var, eps)
            y = torch.ops.deepops.batch_norm_act_eval.default(
                x, residual, weight, bias, mean, invstd, activation, negative_slope
            )
        kept = what_to_keep(y, residual, activation, negative_slope)
        ctx.save_for_backward(x, kept, weight, bias, mean, invstd)
        ctx.options = options
        ctx.shift_dtype = None if shift is None else shift.dtype
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Grad, ...]:
        saved = ctx.saved_tensors  # once: checkpointing computes them when asked
        x, kept, weight, bias, mean, invstd = saved
        training, _, _, activation, negative_slope = ctx.options
        need_x, need_residual, need_weight, need_bias, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = differentiable_backward(ctx, saved, grad_y)
        else:
            grad_y = laid_out_as(grad_y, x)
            grads = torch.ops.deepops.batch_norm_act_backward.default(
                grad_y,
                x,
                kept,
                weight,
                bias,
                mean,
                invstd,
                training,
                activation,
                negative_slope,
                need_x,
                need_residual,
                need_weight or need_bias,
            )
        return grads_of_arguments(ctx, grads, mean)


def grads_of_arguments(ctx: Any, grads: Sequence[Grad], mean: Tensor) -> tuple[Grad, ...]:
    """What a backward returns: those of ``grads`` that are wanted, for the first four arguments, 0 for ``shift``.

    The arguments after these five are statistics and options, without gradients.
    """
    first_four = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad[:4], strict=True)]
    shift = torch.zeros_like(mean, dtype=ctx.shift_dtype) if ctx.needs_input_grad[4] else None
    return (*first_four, shift, *(None,) * (len(ctx.needs_input_grad) - 5))


def laid_out_as(grad_y: Tensor, x: Tensor) -> Tensor:
    """``grad_y`` with the strides of ``x``, which is dense."""
    if ARGUMENTS is None or torch.compiler.is_compiling() or not ARGUMENTS.same_layout(grad_y, x):
        return grad_y.contiguous(memory_format=memory_format_of(x))
    return grad_y


def what_to_keep(y: Tensor, residual: Grad, activation: str, negative_slope: float) -> Grad:
    """What the backward needs beside ``x`` where there is a residual: the output or the residual itself."""
    if residual is None or activation == "identity":
        return None
    return y if derivative_from_output(activation, negative_slope) else residual


def derivative_from_output(activation: str, negative_slope: float) -> bool:
    """Whether the activation's derivative is a function of its output: then the output is kept, not the residual."""
    return activation in ("relu", "relu6") or (activation == "leaky_relu" and negative_slope >= 0)


def differentiable_backward(
    ctx: Any, saved: Sequence[Any], grad_y: Tensor, process_group: ProcessGroup | None = None
) -> list[Grad]:
    """The same gradients by differentiable torch operations, for double backward (``create_graph=True``).

    Forward in plain PyTorch on the saved tensors, then ``torch.autograd.grad``. Where the output was kept in place of
    the residual, the activation is a multiplication with its (piecewise constant) derivative.
    """
    x, kept, weight, bias, mean, invstd, *_ = aliases(saved)
    training, _, eps, activation, negative_slope = ctx.options
    from_output = kept is not None and derivative_from_output(activation, negative_slope)
    residual = None if from_output else kept
    variance = torch.zeros_like(mean) if training else invstd.double().pow(-2).to(mean.dtype) - eps
    z = reference.batch_norm_act(
        x,
        None if training else mean,
        None if training else variance,
        weight,
        bias,
        training,
        0.0,
        eps,
        activation="identity" if from_output else activation.removesuffix("_tanh"),
        negative_slope=negative_slope,
        approximate="tanh" if activation == "gelu_tanh" else "none",
        residual=residual,
        process_group=process_group,
    )
    grad_residual = None
    if from_output:
        slope = negative_slope if activation == "leaky_relu" else 0.0
        y = kept.detach()
        derivative = (y > 0).to(z.dtype) * (1 - slope) + slope
        if activation == "relu6":
            derivative = derivative * (y < 6)
        z = z * derivative
        grad_residual = grad_y * derivative
    elif activation == "identity":  # which keeps no residual
        grad_residual = grad_y
    grads = differentiate(ctx, z, [x, residual, weight, bias], grad_y)
    grads[1] = grad_residual if grad_residual is not None else grads[1]
    return grads


def aliases(tensors: Sequence[Any]) -> list[Any]:
    """Other names for the same tensors, None for None.

    To differentiate with respect to: the history of ``x`` (or of a state) may lead to the very ``weight`` of this call,
    where a layer is used twice, and that part of its gradient is for another backward to add.
    """
    return [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]


def differentiate(ctx: Any, y: Tensor, inputs: Sequence[Grad], grad_y: Tensor) -> list[Grad]:
    """Gradients of the first arguments, ``inputs``, where they are wanted, which can be differentiated again."""
    wanted = {i: tensor for i, tensor in enumerate(inputs) if tensor is not None and ctx.needs_input_grad[i]}
    found = torch.autograd.grad(y, list(wanted.values()), grad_y, create_graph=True) if wanted else ()
    grads: list[Grad] = [None] * len(inputs)
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    return grads
