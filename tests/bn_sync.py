"""A batch in parts, as processes have it: the ops of ``batch_norm_act`` for that, run one part after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import backends
import torch
from bn_cases import Case, kept
from torch import Tensor


def part_of(case: Case, sizes: Sequence[int], rank: int) -> Case:
    """What process ``rank`` has of a batch that is cut into ``sizes``; running statistics of its own."""
    first = sum(sizes[:rank])

    def cut(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[first : first + sizes[rank]].clone()

    parts = {name: cut(getattr(case, name)) for name in ("x", "residual", "grad_y")}
    return replace(case.clone(), **parts)


def join(case: Case, parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Results of all parts as those of the whole ``case``: data one after the other, gradients of vectors added up."""
    joined = dict(parts[0])
    for name, first in parts[0].items():
        if name in ("y", "grad_x", "grad_residual"):
            joined[name] = torch.empty_like(case.x).copy_(torch.cat([part[name] for part in parts]))
        elif name in ("grad_weight", "grad_bias"):
            joined[name] = torch.stack([part[name] for part in parts]).double().sum(0).to(first.dtype)
    return joined


def merge(case: Case, gathered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Call the op; running statistics are updated in ``case``."""
    return backends.ops().batch_norm_act_merge(
        case.x, gathered, case.running_mean, case.running_var, case.num_batches_tracked, case.momentum, case.eps
    )


def reduce(case: Case, y: Tensor, mean: Tensor, invstd: Tensor, need_affine: bool = True) -> tuple[Tensor, ...]:
    return backends.ops().batch_norm_act_reduce(
        case.grad_y, case.x, kept(case, y), case.weight, case.bias, mean, invstd, case.activation, case.negative_slope,
        need_affine,
    )  # fmt: skip


def input_grad(
    case: Case, y: Tensor, mean: Tensor, invstd: Tensor, sums: Tensor, count: Tensor, need_residual: bool
) -> tuple[Tensor, Tensor]:
    return backends.ops().batch_norm_act_input_grad(
        case.grad_y, case.x, kept(case, y), case.weight, case.bias, mean, invstd, sums, count, case.activation,
        case.negative_slope, need_residual,
    )  # fmt: skip


def results_of_parts(case: Case, sizes: Sequence[int]) -> list[dict[str, Tensor]]:
    """What ``bn_cases.op_results`` returns in training, of each of the processes that have a part."""
    ops = backends.ops()
    parts = [part_of(case, sizes, rank) for rank in range(len(sizes))]
    gathered = torch.stack([ops.batch_norm_act_statistics(part.x) for part in parts])
    merged = [merge(part, gathered) for part in parts]
    ys = [
        ops.batch_norm_act_eval(
            part.x, part.residual, part.weight, part.bias, mean, invstd, part.activation, part.negative_slope
        )
        for part, (mean, invstd, _) in zip(parts, merged, strict=True)
    ]
    reduced = [
        reduce(part, y, mean, invstd, case.weight is not None or case.bias is not None)
        for part, y, (mean, invstd, _) in zip(parts, ys, merged, strict=True)
    ]
    sums = torch.stack([sums for sums, _, _ in reduced]).sum(0)
    results = []
    for part, y, (mean, invstd, count), (_, grad_weight, grad_bias) in zip(parts, ys, merged, reduced, strict=True):
        grad_x, grad_residual = input_grad(part, y, mean, invstd, sums, count, case.residual is not None)
        found = {
            "y": y,
            "grad_x": grad_x,
            "grad_residual": grad_residual,
            "grad_weight": grad_weight,
            "grad_bias": grad_bias,
        }
        result = {name: t for name, t in found.items() if name == "y" or getattr(part, name[5:]) is not None}
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            if getattr(part, name) is not None:
                result[name] = getattr(part, name)
        results.append(result)
    return results
