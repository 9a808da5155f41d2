"""Parameters that are distributed over processes: DTensors, as FSDP2 and tensor parallelism make them.

An update is elementwise. Where a parameter, its states and its gradient are distributed alike, every process updates
its own parts of them, and the kernel sees plain tensors. Only the norm of all gradients concerns all processes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepops.optim import _coverage


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor; does not import what defines them, which takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return type(tensor) not in _coverage.TYPES and module is not None and type(tensor) is module.DTensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor; any other tensor itself."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def version(tensor: Tensor) -> int:
    """Changes when the tensor is written to, a DTensor or its local part."""
    return tensor._version + local(tensor)._version if is_sharded(tensor) else tensor._version


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether elements of two tensors that are alike lie in the same order."""
    return _coverage.same_strides(local(a), local(b))


def is_like(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether ``a`` has the shape and device of ``b``, its dtype or ``dtype``, and is distributed like it."""
    return _distributed_alike(a, b) and _coverage.is_like(local(a), local(b), dtype)


def _distributed_alike(a: Any, b: Any) -> bool:
    if not is_sharded(a) or not is_sharded(b):
        return not is_sharded(a) and not is_sharded(b)
    return bool(a.placements == b.placements and a.device_mesh == b.device_mesh and a.shape == b.shape)


def uncovered_param(param: Tensor, backend: str) -> str:
    """Why the kernel cannot take this parameter, or this process's part of it; empty when it can."""
    if is_sharded(param):
        placements, mesh = param.placements, param.device_mesh  # type: ignore[attr-defined]
        if any(placement.is_partial() for placement in placements):
            return "it is a DTensor of partial sums"
        if mesh.get_coordinate() is None:
            return "it is a DTensor on a mesh without this process"
        if local(param).grad_fn is not None or local(param).grad is not None:
            return "it is a DTensor whose local tensor has a gradient of its own"
    return _coverage.uncovered_tensor(local(param), backend)


def uncovered_grad(param: Tensor) -> str:
    """Why the kernel cannot take the gradient that this parameter has now; empty when it can, or there is none."""
    if is_sharded(param) and param.grad is not None:
        return "" if _distributed_alike(param.grad, param) else "its gradient is distributed otherwise"
    return _coverage.uncovered_grad(param)


@dataclass
class _Shard:
    """A DTensor for the kernel, and all that must stay the same from one step to the next."""

    entry: int  # of the table
    param: Any  # the DTensor
    part: Tensor  # its local tensor; what becomes of that is for the table to notice
    spec: Any
    own: dict[str, Any]
    states: list[tuple[str, Tensor, Tensor]]  # key in `own`, the tensor, its local part
    waits: bool  # for its first gradient

    def is_same(self) -> bool:
        if self.param._local_tensor is not self.part or self.param._spec is not self.spec:
            return False
        if self.part.grad is not None:
            return False
        return all(self.own.get(name) is state and local(state) is part for name, state, part in self.states)


class Shards:
    """The DTensors in a ``StepTable``, which knows of them their local parts only: no gradient, no dictionary."""

    def __init__(self) -> None:
        """None yet."""
        self._shards: list[_Shard] = []

    def __len__(self) -> int:
        return len(self._shards)

    def add(
        self, entry: int, param: Tensor, own: dict[str, Any], names: Sequence[str | None], tensors: tuple[Any, ...]
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Watch a DTensor and the states ``names`` in ``own``; return what the table is to have in their place."""
        states = [(name, t, local(t)) for name, t in zip(names, tensors, strict=False) if name]
        shard = _Shard(entry, param, local(param), param._spec, own, states, not tensors)  # type: ignore[attr-defined]
        self._shards.append(shard)
        return shard.part, tuple([None if t is None else local(t) for t in tensors])

    def collect(self, table: Any) -> list[int] | None:
        """Hand over this step's gradients. As ``StepTable.collect``: the entries that it cannot take; None: changed."""
        odd: list[int] = []
        for shard in self._shards:
            grad = shard.param.grad
            if not shard.is_same() or (shard.waits and grad is not None):
                return None
            if grad is None:
                continue
            if not _distributed_alike(grad, shard.param):
                odd.append(shard.entry)
                continue
            try:
                table.set_grad(shard.entry, local(grad))
            except ValueError:  # another layout
                odd.append(shard.entry)
        return odd

    def wholes(self, params: list[Tensor]) -> list[Tensor]:
        """Parameters of the table, DTensors in place of their local parts."""
        of = {shard.part: shard.param for shard in self._shards}
        return [of.get(param, param) for param in params]


Ranks = tuple[int, ...]  # of a process group


class NormOverProcesses:
    """How sums of squares of local parts become those of whole gradients, the same bits on every process.

    Shards are summed over the dimensions of their mesh that shard them. What is replicated, and plain tensors, of which
    every process is taken to have the same, count once.
    """

    def __init__(self, params: list[Tensor]) -> None:
        """For these parameters, of which every process gives its own in the same order, with a gradient or without."""
        self._groups: dict[Ranks, tuple[Any, torch.device]] = {}  # and a device whose tensors they take
        self._over = {param: self._sharded_over(param) for param in params}
        self._kinds = list(dict.fromkeys(self._over.values()))
        self._known: tuple[list[int], Tensor, Tensor] | None = None  # ids of parameters and the masks for them

    def _sharded_over(self, param: Any) -> frozenset[Ranks]:
        if not is_sharded(param) or param.device_mesh.get_coordinate() is None:
            return frozenset()
        found = set()
        for dim, placement in enumerate(param.placements):
            if _sums(placement) and param.device_mesh.size(dim) > 1:
                group = param.device_mesh.get_group(dim)
                ranks = tuple(torch.distributed.get_process_group_ranks(group))  # equal meshes have groups of their own
                self._groups.setdefault(ranks, (group, param.device))
                found.add(ranks)
        return frozenset(found)

    def __bool__(self) -> bool:
        """Whether there is anything to sum."""
        return bool(self._groups)

    def total(self, params: list[Tensor], found: Tensor) -> Tensor:
        """Sum of squares of everything, and more than 0 where any process has an element that is not finite.

        found: [len(params), 2], float64: what is in the local part of each one's gradient.
        """
        rows, summed = self._masks(params, found.device)
        squares = found[:, 0].where(rows, 0.0).sum(1)  # [kinds]
        non_finite = found[:, 1].sum()
        last = len(self._groups) - 1
        for index, ranks in enumerate(self._groups):
            reduced, non_finite = self._reduce(ranks, squares, non_finite, summed[index])
            squares = reduced if index == last else reduced.where(summed[index], squares)
        total = squares.sum()[None]
        # Now the processes of the last group have the same bits, the others perhaps not.
        for ranks in list(self._groups)[:last]:
            total, non_finite = self._reduce(ranks, total, non_finite, torch.zeros_like(total, dtype=torch.bool))
        return torch.cat([total, non_finite[None]])

    def _reduce(self, ranks: Ranks, values: Tensor, non_finite: Tensor, summed: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over these processes; of values that are not ``summed``, which are equal, take those of the first one.

        They are equal to rounding: beside uneven shards a tensor may have been summed up in another order.
        """
        group, device = self._groups[ranks]
        if torch.distributed.get_rank(group) != 0:
            values = values.where(summed, 0.0)
        message = torch.cat([values, non_finite[None]]).to(device)
        torch.distributed.all_reduce(message, group=group)
        message = message.to(values.device)
        return message[:-1], message[-1]

    def _masks(self, params: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """Which parameters are of each kind, [kinds, len(params)]; which kinds each group sums, [groups, kinds]."""
        ids = [id(param) for param in params]
        if self._known is None or self._known[0] != ids:
            rows = [[self._over[param] == kind for param in params] for kind in self._kinds]
            summed = [[ranks in kind for kind in self._kinds] for ranks in self._groups]
            self._known = (ids, torch.tensor(rows, device=device), torch.tensor(summed, device=device))
        return self._known[1:]


def _sums(placement: Any) -> bool:
    """Whether processes along this dimension have different elements; partial sums are added up before."""
    return not placement.is_replicate() and not placement.is_partial()


def grad_part(param: Any) -> Tensor:
    """This process's part of the gradient of a parameter, which is added up first where it is a partial sum."""
    grad = param.grad
    if not is_sharded(grad):
        return grad  # type: ignore[no-any-return]
    from torch.distributed.tensor import Replicate

    whole = [Replicate() if placement.is_partial() else placement for placement in param.placements]
    return local(grad.redistribute(param.device_mesh, whole))
