"""What processes do together, as functions that autograd differentiates any number of times.

A loss here is the sum of those of all processes: each takes ``backward`` of its own, all of them at the same place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def gather(part: Tensor, group: ProcessGroup) -> Tensor:
    """The tensors of all processes of ``group``, of equal shapes, stacked in the order of their ranks."""
    parts = part.new_empty(group.size(), *part.shape)
    # torch 2.13 renamed it. gloo wants a dimension of processes in both.
    into = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    into(parts, part.contiguous().unsqueeze(0), group)
    return parts


class AllReduce(torch.autograd.Function):
    """The sum over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.group), None


class AllGather(torch.autograd.Function):
    """``gather``; the gradient of a part is the sum of what all processes have for it."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return gather(part, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.group)[ctx.group.rank()], None


all_reduce: Callable[[Tensor, ProcessGroup], Tensor] = AllReduce.apply
all_gather: Callable[[Tensor, ProcessGroup], Tensor] = AllGather.apply
