"""The plan of a step: which parameters take the kernel, and the table that watches what it knows of their memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from deepops._library import _C
from deepops.optim._coverage import Group, sharing
from deepops.optim._options import StepOptions
from deepops.optim._scaling import Facts, GradNorm
from deepops.optim._sharding import (
    NormOverProcesses,
    Shards,
    is_like,
    is_sharded,
    local,
    same_strides,
    uncovered_param,
)

# Keys of a parameter's state, in the kernel's order: the step counter (None: it is not in the state), three states
# (None: not used). The master weights come fifth.
StateNames = tuple[str | None, str | None, str | None, str | None]


@dataclass
class Plan:
    """A :class:`StepTable` for the parameters on one device, and all that it borrows."""

    table: Any  # _C.StepTable
    device: torch.device
    params: list[Tensor]  # by entry of the table
    group_of: list[int]  # by entry
    covered: list[bool]  # by entry
    masters: list[tuple[Tensor, Tensor]]  # parameters of 16 bits and what keeps them in float32
    versions: list[int]  # of these parameters after our last step
    borrowed: tuple[Any, ...]
    shards: Shards  # of the entries, those that are DTensors
    norm: GradNorm | None = None
    facts: Facts | None = None


class PlannedStep(torch.optim.Optimizer):
    """What a step needs to know before it starts. A subclass names its kernel and says which options that takes."""

    _kernel: ClassVar[str]  # torch.ops.deepops.<_kernel>
    _step_options: StepOptions = StepOptions()
    _plans: list[Plan] | None = None
    _planned: tuple[Any, ...] = ()  # options of each group that the plans were made for
    _over_processes: NormOverProcesses | None = None  # made with the plans

    # What a subclass provides.

    def _uncovered_options(self, group: Group, backend: str | None = None) -> str:
        """Why the kernel does not take this group's options; empty when it does.

        Without ``backend`` it is asked at every step, with one (``"cpu"``, ``"cuda"``) when a plan is made.
        """
        raise NotImplementedError

    def _hyper(self, group: Group) -> tuple[float, ...]:
        """The group's hyper-parameters as the kernel wants them; called only for covered options."""
        raise NotImplementedError

    def _state_names(self, group: Group) -> StateNames:
        """Where a parameter's state is."""
        raise NotImplementedError

    def _create_state(self, group: Group) -> None:
        """Let torch create the state of those parameters of ``group`` that have a gradient and no state."""
        raise NotImplementedError

    def _torch_update(self, group: Group) -> None:
        """Torch's own step of one group."""
        raise NotImplementedError

    def _has_state(self, group: Group, param: Tensor) -> bool:
        """Whether the parameter has the state that the kernel needs."""
        return bool(self.state.get(param))

    def _step_counter(self, param: Tensor) -> Tensor:
        """The parameter's step counter, which it has."""
        counter: Tensor = self.state[param]["step"]
        return counter

    def _set_step_counter(self, param: Tensor, counter: Tensor) -> None:
        self.state[param]["step"] = counter

    def _backend(self, param: Tensor) -> str:
        """Whose kernels take this parameter."""
        return param.device.type

    def _options(self, group: Group) -> tuple[str, StateNames, bool]:
        return self._uncovered_options(group), self._state_names(group), group.get("capturable", False)

    # The plan.

    def _make_plans(self) -> list[Plan]:
        reasons = list(self._reasons())
        on_gpu = any(not why and self._backend(p) == "cuda" for _, p, why in reasons)
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{type(self).__name__}: take a step before the one that a CUDA graph captures, and leave parameters, "
                "states and options as they are; the step's plan is not made during a capture"
            )
        for index, group in enumerate(self.param_groups):
            fresh = [p for i, p, why in reasons if i == index and not why and p.grad is not None]
            fresh = [p for p in fresh if not self._has_state(group, p)]
            self._create_state({**group, "params": fresh})
            for param in fresh:
                self._adjust_state(param, self._state_names(group))
        with_state = [
            (p, self._all_names(self.param_groups[i], p))
            for i, p, why in reasons
            if not why and self._has_state(self.param_groups[i], p)
        ]
        self._over_processes = NormOverProcesses([p for _, p, _ in reasons])
        # Parameters that take no kernel go with the first device: one table has to watch for their gradients.
        devices = list(dict.fromkeys(p.device for _, p, why in reasons if not why)) or [torch.device("cpu")]
        counters = {
            p: counter
            for device in devices
            for p, counter in self._rehome([(p, names) for p, names in with_state if p.device == device]).items()
        }
        return [
            self._make_plan([r for r in reasons if (devices[0] if r[2] else r[1].device) == device], device, counters)
            for device in devices
        ]

    def _make_plan(
        self, reasons: list[tuple[int, Tensor, str]], device: torch.device, counters: dict[Tensor, Tensor]
    ) -> Plan:
        backend = next((self._backend(p) for _, p, why in reasons if not why), "cpu")
        entries: list[tuple[Any, ...]] = []
        masters = []
        shards = Shards()
        for index, param, reason in reasons:
            own = self.state.get(param) or None
            if reason:
                entries.append((param, index, own, None, ()))
                continue
            names = self._all_names(self.param_groups[index], param)
            tensors: tuple[Tensor | None, ...] = ()
            if param in counters:
                state = own or {}
                tensors = (counters[param], *(state[name] if name else None for name in names[1:]))
                if tensors[-1] is not None:
                    masters.append((param, tensors[-1]))
            if is_sharded(param):
                part, tensors = shards.add(len(entries), param, own or {}, names, tensors)
                entries.append((part, index, None, (None,) * len(names), tensors))
            else:
                entries.append((param, index, own, names, tensors))
        groups = tuple(list(group["params"]) for group in self.param_groups)
        state = dict(self.state)
        seed = self._step_options.seed
        table = _C.StepTable(self._kernel, backend, Tensor, groups, state, tuple(entries), seed)  # type: ignore[union-attr]
        return Plan(
            table,
            device,
            [param for _, param, _ in reasons],
            [index for index, _, _ in reasons],
            [not reason for _, _, reason in reasons],
            masters,
            [-1] * len(masters),
            (groups, state, entries),
            shards,
        )

    def _all_names(self, group: Group, param: Tensor) -> tuple[str | None, ...]:
        """Keys of the parameter's state, with that of its master weights."""
        master = self._step_options.master_of(param)
        return (*self._state_names(group), master[0] if master else None)

    def _adjust_state(self, param: Tensor, names: StateNames) -> None:
        """Give the state that torch has just created the dtypes that were asked for."""
        state = self.state[param]
        dtype = self._step_options.state_dtype_of(param)
        for name in names[1:]:
            if name and state[name].dtype is not dtype:
                state[name] = state[name].to(dtype)

    def _add_master(self, param: Tensor) -> None:
        master = self._step_options.master_of(param)
        if master and master[0] not in self.state[param]:
            name, dtype = master
            self.state[param][name] = (
                torch.zeros_like(param, dtype=dtype) if name == "master_low" else param.detach().to(dtype, copy=True)
            )

    def _rehome(self, listed: list[tuple[Tensor, tuple[str | None, ...]]]) -> dict[Tensor, Tensor]:
        """Move all step counters into one flat buffer that they view, and states into their parameter's strides.

        The counters of parameters on a GPU live there. listed: parameters with the keys of their states.
        """
        if not listed:
            return {}
        device = listed[0][0].device
        old = [self._step_counter(param) for param, _ in listed]
        if all(step.is_cpu for step in old):
            steps = torch.tensor([float(step) for step in old], dtype=torch.float32, device=device)
        else:
            steps = torch.stack([step.reshape(()).to(device, torch.float32) for step in old])
        counters = {}
        for step, (param, names) in zip(steps.unbind(0), listed, strict=True):
            counters[param] = step
            self._set_step_counter(param, step)
            self._add_master(param)
            state = self.state.get(param) or {}
            for name in names[1:]:
                if name and not same_strides(state[name], param):  # e.g. loaded from a model in another memory format
                    state[name] = torch.empty_like(param, dtype=state[name].dtype).copy_(state[name])
        return counters

    def _reasons(self) -> Iterator[tuple[int, Tensor, str]]:
        """``(group, parameter, why it takes torch's path)`` for every parameter; empty: it takes the kernel."""
        listed = [(index, p) for index, group in enumerate(self.param_groups) for p in group["params"]]
        shared = sharing(
            [[local(t) for t in (p, *(self.state.get(p) or {}).values()) if isinstance(t, Tensor)] for _, p in listed]
        )
        per_group = [self._options(group) for group in self.param_groups]
        for entry, (index, param) in enumerate(listed):
            reason, names, _ = per_group[index]
            backend = self._backend(param)
            reason = (
                reason
                or uncovered_param(param, backend)
                or self._uncovered_options(self.param_groups[index], backend)
                or self._uncovered_state(param, names)
                or ("shares memory with another parameter" if entry in shared else "")
            )
            yield index, param, reason

    def _uncovered_state(self, param: Tensor, names: StateNames) -> str:
        """Why the kernel cannot take this parameter's state; empty when it can."""
        state = self.state.get(param)
        if not state:
            return ""
        if names[0]:
            step = state.get(names[0])
            if not isinstance(step, Tensor) or step.numel() != 1:
                return f"its state {names[0]!r} is not a tensor of one element"
        dtype = self._step_options.state_dtype_of(param)
        for name in names[1:]:
            if name is None or (names[0] is None and state.get(name) is None):  # which is created in time
                continue
            value = state.get(name)
            if not isinstance(value, Tensor) or not is_like(value, param, dtype):
                return f"its state {name!r} is not a tensor of {dtype} and its shape and device"
        master = self._step_options.master_of(param)
        if master and master[0] in state and not is_like(state[master[0]], param, master[1]):
            return f"its state {master[0]!r} is not a tensor of {master[1]} and its shape and device"
        return ""
