"""``batch_norm_act`` of a batch that several processes share, as ``torch.nn.SyncBatchNorm``: on every device.

The op is cut in two where the processes talk: once in the forward, when every process says what its part of the batch
is like, and once in the backward, where they add up two sums per channel. Both are in float64. Every process takes part
in both, whatever its data, an empty part too. Nothing is read back to the host of a GPU.

As in torch, gradients are those of the sum of all processes' losses, and those of ``weight`` and ``bias`` come by way
of the part of this process alone: ``DistributedDataParallel`` averages them over the processes afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepops._autograd import Grad, Options, differentiable_backward, grads_of_arguments, laid_out_as, what_to_keep
from deepops.reference._collectives import gather
from deepops.reference.batch_norm_act import refuse_single_value

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def synchronized(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    options: Options,
    group: ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """The output, and how many values of a channel all processes have (``[1]``, float64).

    Arguments as ``BatchNormAct`` takes them; ``x`` may be empty. Recorded for autograd where a gradient is wanted.
    """
    _, momentum, eps, *_ = options
    with torch.no_grad():
        part = torch.ops.deepops.batch_norm_act_statistics.default(x)
        gathered = gather(part, group)
        refuse_single_value(gathered[:, -1])
        mean, invstd, count = torch.ops.deepops.batch_norm_act_merge.default(
            x, gathered, running_mean, running_var, num_batches_tracked, momentum, eps
        )
    return _apply(x, residual, weight, bias, shift, mean, invstd, count, options, group), count


class SyncBatchNormAct(torch.autograd.Function):
    """``act(batch_norm(x) + residual)`` with the statistics of all processes, which are functions of ``x``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [N, C, ...], dense
        residual: Tensor | None,  # as x
        weight: Tensor | None,  # [C], as the other vectors in statistics_dtype(x.dtype)
        bias: Tensor | None,
        shift: Tensor | None,  # [C], a constant added to x before batch statistics: they remove it, its gradient is 0
        mean: Tensor,
        invstd: Tensor,
        count: Tensor,  # [1]
        options: Options,
        group: ProcessGroup,
    ) -> Tensor:
        *_, activation, negative_slope = options
        y: Tensor = torch.ops.deepops.batch_norm_act_eval.default(
            x, residual, weight, bias, mean, invstd, activation, negative_slope
        )
        kept = what_to_keep(y, residual, activation, negative_slope)
        ctx.save_for_backward(x, kept, weight, bias, mean, invstd, count)
        ctx.options, ctx.group = options, group
        ctx.shift_dtype = None if shift is None else shift.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Grad, ...]:
        saved = ctx.saved_tensors
        x, _, _, _, mean, *_ = saved
        if torch.is_grad_enabled():
            grads = differentiable_backward(ctx, saved, grad_y, ctx.group)
        else:
            grads = _backward(ctx, saved, laid_out_as(grad_y, x))
        return grads_of_arguments(ctx, grads, mean)


_apply: Callable[..., Tensor] = SyncBatchNormAct.apply


def _backward(ctx: Any, saved: Sequence[Any], grad_y: Tensor) -> list[Grad]:
    """Gradients of x, residual, weight and bias by the compiled ops; those that are not needed may be empty.

    Who takes part in the sum over processes is decided by what needs gradients, as in torch, not by anything in the
    data: that is alike in all processes.
    """
    *tensors, count = saved  # x, kept, weight, bias, mean, invstd, count
    *_, activation, negative_slope = ctx.options
    need_x, need_residual, need_weight, need_bias, *_ = ctx.needs_input_grad
    need_affine = need_weight or need_bias
    if not need_x:
        grads: list[Grad] = torch.ops.deepops.batch_norm_act_backward.default(
            grad_y, *tensors, True, activation, negative_slope, False, need_residual, need_affine
        )
        return grads
    sums, grad_weight, grad_bias = torch.ops.deepops.batch_norm_act_reduce.default(
        grad_y, *tensors, activation, negative_slope, need_affine
    )
    dist.all_reduce(sums, group=ctx.group)
    grad_x, grad_residual = torch.ops.deepops.batch_norm_act_input_grad.default(
        grad_y, *tensors, sums, count, activation, negative_slope, need_residual
    )
    return [grad_x, grad_residual, grad_weight, grad_bias]
