"""Scaled losses, clipping and measuring within a step: what Python adds around the passes of the kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deepops.optim._sharding import NormOverProcesses, grad_part, local

if TYPE_CHECKING:
    from deepops.optim._base import FusedStep
    from deepops.optim._plan import Plan


class GradNorm:
    """``struct GradNorm`` of csrc/optim/scaling.h in memory of the device that the gradients are on."""

    def __init__(self, device: torch.device) -> None:
        """Make one that says: no gradients."""
        self._memory = torch.zeros(3, dtype=torch.float64, device=device)
        self.totals = self._memory[:2]  # sum of squares, elements that are not finite
        floats = self._memory.view(torch.float32)
        self.norm, self.found_inf = floats[4], floats[5]  # 0-dim float32
        self.address = self._memory.data_ptr()

    def add(self, totals: Tensor, grad_scale: Tensor | None) -> None:
        """Add what was found elsewhere: sum of squares, elements that are not finite."""
        self.totals.add_(totals.to(self.totals.device))
        norm = self.totals[0].sqrt()
        self.norm.copy_(norm if grad_scale is None else norm / grad_scale.to(norm.device))
        self.found_inf.copy_(self.totals[1] != 0)


@dataclass(frozen=True)
class TensorFacts:
    """What one step measured of one parameter.

    Attributes:
        grad_norm: of the gradient as it came: still scaled where a GradScaler scales.
        param_norm: of the parameter after the step, as it is stored; of its master weights where it has some.
        update_norm: of the difference that the step made to that.
        non_finite: elements of the gradient that are infinite or NaN. Where a scaler then skips the step, the two norms
            above are 0.
    """

    grad_norm: float
    param_norm: float
    update_norm: float
    non_finite: int


class Facts:
    """``struct RowFacts`` of csrc/optim/scaling.h for each row of a table, in memory of its device."""

    def __init__(self, table: Any, params: list[Tensor], device: torch.device) -> None:
        """Room for the rows of ``table``, whose entries are ``params``."""
        self._params = [params[entry] for entry in table.rows]
        self._memory = torch.zeros(len(self._params), 4, dtype=torch.float64, device=device)
        self.address = self._memory.data_ptr() if self._params else 0
        self.measured: list[Tensor] = []  # parameters that had a gradient at the last step

    def read(self) -> dict[Tensor, TensorFacts]:
        """What was measured of each parameter that had a gradient."""
        measured = set(self.measured)
        rows = zip(self._params, self._memory.tolist(), strict=True)
        return {param: _facts(*row) for param, row in rows if param in measured}


class TorchFacts:
    """The same of parameters that take torch's path, in passes of their own."""

    def __init__(self, params: list[Tensor]) -> None:
        """Before the step."""
        self._before = [(p, local(p).detach().clone(), _totals(local(p.grad))) for p in params if p.grad is not None]
        self._measured: dict[Tensor, TensorFacts] = {}

    def after(self, stepped: bool) -> None:
        """After the step, or where it was skipped."""
        for param, before, grad in self._before:
            wide = torch.promote_types(param.dtype, torch.float64)
            after = local(param).detach()
            update = after.to(wide) - before.to(wide)
            squares = [_totals(x)[0].item() if stepped else 0.0 for x in (after, update)]
            self._measured[param] = _facts(*grad.tolist(), *squares)
        self._before.clear()

    def read(self) -> dict[Tensor, TensorFacts]:
        """What was measured of each parameter."""
        return self._measured


def _facts(grad: float, non_finite: float, param: float, update: float) -> TensorFacts:
    """Of sums of squares."""
    grad, param, update = [math.sqrt(squares) if squares >= 0 else math.nan for squares in (grad, param, update)]
    return TensorFacts(grad, param, update, int(non_finite))


@dataclass
class Scaling:
    """What a step has to do with its gradients before it uses them."""

    grad_scale: Tensor | None  # the gradients are this times too large
    found_inf: Tensor | None  # take no step unless it is 0
    max_norm: float  # 0: do not clip
    checks: bool  # take no step if a gradient is not finite
    write_grads: bool  # leave the gradients unscaled
    _kept: list[Tensor] = field(default_factory=list)  # copies on other devices, until the step is over
    _total: list[float] = field(default_factory=lambda: [0.0, 0.0])  # of all gradients, where the host needs it

    @classmethod
    def of(cls, optimizer: FusedStep) -> Scaling | None:
        """What ``optimizer`` was told; None: nothing of the kind."""
        grad_scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        max_norm = optimizer._step_options.max_grad_norm or 0.0
        checks = optimizer._scaler_checks
        if not isinstance(found_inf, Tensor):  # torch's GradScaler says 0 where there are no gradients
            found_inf = None
        if grad_scale is None and found_inf is None and not max_norm and not checks:
            return None
        return cls(grad_scale, found_inf, max_norm, checks, grad_scale is not None and not checks)

    @property
    def measures(self) -> bool:
        """Whether the step needs the norm of the gradients."""
        return bool(self.max_norm or self.checks)

    @property
    def skips_already(self) -> bool:
        """Whether the host knows without waiting that there is no step to take, nor a norm to tell."""
        found_inf = self.found_inf
        return not self.measures and found_inf is not None and found_inf.is_cpu and bool(found_inf != 0)

    def measure(self, plans: list[Plan], others: list[Tensor], over_processes: NormOverProcesses | None) -> None:
        """Read all gradients once: the norm of all of them to every device. others: parameters that no plan takes."""
        by_row = [self._read_gradients(plan, bool(over_processes)) for plan in plans]
        extra = [_totals(grad_part(p)) for p in others]
        norms = [plan.norm for plan in plans if plan.norm]
        if over_processes:
            params = [plan.params[entry] for plan in plans for entry in plan.table.rows] + others
            found = torch.cat([totals.to(plans[0].device).view(-1, 2) for totals in (*by_row, *extra)])
            total = over_processes.total(params, found)
            for norm in norms:
                norm.totals.zero_()
                norm.add(total, self.grad_scale)
        else:
            own = [norm.totals.clone() for norm in norms]
            for i, norm in enumerate(norms):
                elsewhere = [t.to(norm.totals.device) for t in (*own[:i], *own[i + 1 :], *extra)]
                if elsewhere:
                    norm.add(torch.stack(elsewhere).sum(0), self.grad_scale)
        if others and plans[0].norm:
            self._total = plans[0].norm.totals.tolist()

    def _read_gradients(self, plan: Plan, each: bool) -> Tensor:
        """Have ``plan.norm`` found; with ``each`` the totals of every row of the table, too: [rows, 2]."""
        plan.norm = plan.norm or GradNorm(plan.device)
        by_row = torch.zeros(len(plan.table.rows) if each else 0, 2, dtype=torch.float64, device=plan.device)
        grad_scale = self._address(self.grad_scale, plan.device)
        plan.table.norm(plan.norm.address, grad_scale, by_row.data_ptr() if each else 0)
        return by_row

    @contextmanager
    def for_torch(self, params: list[Tensor]) -> Iterator[bool]:
        """Whether parameters on torch's path take a step; their gradients are scaled within. Waits for the device."""
        if (self.found_inf is not None and self.found_inf.item() != 0) or (self.checks and self._total[1] != 0):
            yield False
            return
        factor = 1.0 if self.grad_scale is None else self.grad_scale.double().reciprocal().item()
        if self.max_norm:
            clip = self.max_norm / (math.sqrt(self._total[0]) * factor + 1e-6)
            factor *= 1.0 if clip >= 1 else clip
        scaled = [(p, p.grad, p.grad * factor) for p in params if p.grad is not None] if factor != 1 else []
        try:
            for param, _, grad in scaled:
                param.grad = grad
            yield True
        finally:
            for param, grad, _ in scaled:
                param.grad = grad
        if self.write_grads:
            for _, theirs, grad in scaled:
                write_back(theirs, grad)

    def arguments(self, plan: Plan) -> tuple[int, int, int, float, bool, bool]:
        """For ``StepTable.run``."""
        norm = plan.norm.address if plan.norm else 0
        grad_scale, found_inf = (self._address(t, plan.device) for t in (self.grad_scale, self.found_inf))
        return (grad_scale, found_inf, norm, self.max_norm, self.checks, self.write_grads)

    def _address(self, tensor: Tensor | None, device: torch.device) -> int:
        if tensor is None:
            return 0
        if tensor.device != device or tensor.dtype is not torch.float32:
            tensor = tensor.to(device, torch.float32)
            self._kept.append(tensor)
        return tensor.data_ptr()


def write_back(grad: Tensor | None, used: Tensor) -> None:
    """Write into a gradient what was used in its place; one whose elements share memory stays as it is."""
    if grad is not None and (grad.layout is not torch.strided or 0 not in grad.stride()):
        grad.copy_(used)


def _totals(grad: Tensor) -> Tensor:
    """Sum of squares and number of elements that are not finite, in float64."""
    values = grad.coalesce().values() if grad.is_sparse else grad
    values = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
    return torch.stack([values.double().square().sum(), (~values.isfinite()).sum().double()])
