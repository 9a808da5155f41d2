"""What the optimizers of deepops share: the cached plan of a step, its checks, and the way back to torch's own path.

The life of one ``step()``: every param group's options are read; ``StepTable.collect`` (csrc/optim/table.cpp) takes the
gradients and finds out whether anything moved since the plan was made; gradients in another layout than their parameter
are copied into it; where the step clips or checks them, ``StepTable.norm`` reads all gradients once; what the kernel
does not cover takes torch's path; ``StepTable.run`` updates all the rest, of all groups, in one parallel region, or in
one launch on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from deepops._library import _C
from deepops.optim._coverage import Group, sharing
from deepops.optim._options import StepOptions
from deepops.optim._scaling import Facts, GradNorm, Scaling, TensorFacts, TorchFacts, write_back
from deepops.optim._sharding import (
    NormOverProcesses,
    Shards,
    is_like,
    is_sharded,
    local,
    same_strides,
    uncovered_grad,
    uncovered_param,
    version,
)

# Keys of a parameter's state, in the kernel's order: the step counter (None: it is not in the state), three states
# (None: not used). The master weights come fifth.
StateNames = tuple[str | None, str | None, str | None, str | None]


@dataclass
class _Plan:
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


class FusedStep(torch.optim.Optimizer):
    """Mixin that goes before a ``torch.optim`` class and gives it ``step()`` on the kernels of deepops.

    A subclass names its kernel and says which options the kernel takes; see :class:`deepops.optim.Adam`.
    """

    _kernel: ClassVar[str]  # torch.ops.deepops.<_kernel>
    _step_options: StepOptions = StepOptions()
    _plans: list[_Plan] | None = None
    _planned: tuple[Any, ...] = ()  # options of each group that the plans were made for
    _over_processes: NormOverProcesses | None = None  # made with the plans
    _torch_facts: TorchFacts | None = None  # of what took torch's path at the last step
    grad_scale: Tensor | None  # set and deleted by gradient scalers, as on torch's fused optimizers
    _scaler_checks: bool = False  # set by deepops.amp.GradScaler: the step is to look for infinities itself

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

    def _set_step_options(self, given: dict[str, Any]) -> None:
        """For ``__init__``, before torch's: the options that torch does not know."""
        self._step_options = StepOptions.of(type(self).__name__, given)

    # The step.

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Perform one optimization step.

        Args:
            closure: reevaluates the model and returns the loss, which ``step`` then returns.
        """
        self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            # Seen only where there may be no break: under fullgraph=True, which refuses torch's optimizers too.
            torch._dynamo.graph_break(msg="an optimizer of deepops takes its step between graphs, not within one")
            _update_outside_graph(self)
        else:
            self._update()
        return loss

    def _update(self) -> None:
        scaling = Scaling.of(self)
        options = tuple([self._options(group) for group in self.param_groups])
        if scaling is not None and scaling.skips_already and not self._step_options.diagnostics:
            return
        plans, odd = self._current_plans(options)
        rest: dict[int, list[Tensor]] = {}
        restrided: list[tuple[_Plan, int, Tensor]] = []
        for plan, entries in zip(plans, odd, strict=True):
            if entries:
                self._sort_odd(plan, entries, rest, restrided)
            if plan.masters:
                _refresh_masters(plan)
            if scaling is None:
                plan.norm = None
        for plan, entry, grad in restrided:
            plan.table.set_grad(entry, local(grad))
        others = [p for params in rest.values() for p in params]
        if scaling is not None:
            scaling.measure(plans, others, self._over_processes)
        # First, because it may raise; then nothing else has changed yet.
        self._torch_facts = TorchFacts(others) if self._step_options.diagnostics else None
        if rest:
            with scaling.for_torch(others) if scaling else nullcontext(True) as steps:
                for index, params in rest.items() if steps else ():
                    self._run_torch_update({**self.param_groups[index], "params": params})
            if self._torch_facts:
                self._torch_facts.after(steps)
        self._run_plans(plans, options, scaling)
        if scaling is not None and scaling.write_grads:
            for plan, entry, grad in restrided:
                write_back(plan.params[entry].grad, grad)

    def _run_plans(self, plans: list[_Plan], options: tuple[Any, ...], scaling: Scaling | None) -> None:
        hyper = tuple(
            [() if own[0] else self._hyper(group) for group, own in zip(self.param_groups, options, strict=True)]
        )
        for plan in plans:
            facts = None
            if self._step_options.diagnostics:
                facts = plan.facts = plan.facts or Facts(plan.table, plan.params, plan.device)
            arguments = None if scaling is None else scaling.arguments(plan)
            parts = plan.table.run(hyper, arguments, facts.address if facts else 0)
            changed = plan.shards.wholes(parts) if plan.shards else parts
            if facts:
                facts.measured = changed
            # Autograd and modules that cache what they derive from weights must see that these were written to.
            torch.autograd.graph.increment_version(changed)
            if plan.shards:
                torch.autograd.graph.increment_version([local(p) for p in changed if is_sharded(p)])
            if scaling is not None and scaling.write_grads:
                torch.autograd.graph.increment_version([p.grad for p in changed if p.grad is not None])
            if plan.masters:
                plan.versions = [version(param) for param, _ in plan.masters]

    def _current_plans(self, options: tuple[Any, ...]) -> tuple[list[_Plan], list[list[int]]]:
        """The plans, made anew where anything changed, and for each the entries with gradients it cannot take."""
        if self._plans is not None and self._planned == options:
            odd = self._collect(self._plans)
            if odd is not None:
                return self._plans, odd
        self._plans, self._planned = self._make_plans(), options
        odd = self._collect(self._plans)
        if odd is None:
            self._plans = None
            raise RuntimeError("the optimizer's parameters or state changed while step() was reading them")
        return self._plans, odd

    def _collect(self, plans: list[_Plan]) -> list[list[int]] | None:
        """For each plan the entries with gradients it cannot take; None: something changed since it was made."""
        odd = []
        for plan in plans:
            found = plan.table.collect(self.param_groups, self.state)
            shards = plan.shards.collect(plan.table) if found is not None and plan.shards else []
            if found is None or shards is None:
                return None
            odd.append(sorted(found + shards) if shards else found)
        return odd

    def _options(self, group: Group) -> tuple[str, StateNames, bool]:
        return self._uncovered_options(group), self._state_names(group), group.get("capturable", False)

    def _sort_odd(
        self,
        plan: _Plan,
        odd: list[int],
        rest: dict[int, list[Tensor]],
        restrided: list[tuple[_Plan, int, Tensor]],
    ) -> None:
        """Sort these entries into those for torch's path and those whose gradient only needs the right layout."""
        for entry in odd:
            param, grad = plan.params[entry], plan.params[entry].grad
            if grad is None:
                continue
            if plan.covered[entry] and is_like(grad, param):
                restrided.append((plan, entry, torch.empty_like(param).copy_(grad)))
            else:
                rest.setdefault(plan.group_of[entry], []).append(param)

    def _run_torch_update(self, group: Group) -> None:
        with torch.set_grad_enabled(bool(self.defaults["differentiable"])):
            self._torch_update(group)

    # Clipping and what a step has found.

    def _takes_kernel(self) -> bool:
        """Whether any parameter does; what a changed plan would say counts from the next step on."""
        if self._plans is None:
            return any(not reason for _, _, reason in self._reasons())
        return any(any(plan.covered) for plan in self._plans)

    def _norm(self) -> GradNorm | None:
        """What the last step has found of all gradients; None: they were not looked at."""
        return self._plans[0].norm if self._plans else None

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients at the last step, unscaled and before clipping: a 0-dim float32 tensor.

        None unless ``max_grad_norm`` or :class:`deepops.amp.GradScaler` had it taken.
        """
        found = self._norm()
        return None if found is None else found.norm.clone()

    @property
    def diagnostics(self) -> dict[str, TensorFacts]:
        """What the last step measured of each parameter that had a gradient, by name; with ``diagnostics=True`` only.

        Names are those of ``named_parameters()`` where the optimizer was given that, else ``"group 0, parameter 3"``.
        Reading them waits for the device.
        """
        found: dict[Tensor, TensorFacts] = {}
        for facts in (*[plan.facts for plan in self._plans or []], self._torch_facts):
            if facts is not None:
                found.update(facts.read())
        return {name: found[param] for param, name in self._names().items() if param in found}

    @property
    def first_non_finite(self) -> str | None:
        """Name of the first parameter whose last gradient was not finite; with ``diagnostics=True`` only."""
        return next((name for name, facts in self.diagnostics.items() if facts.non_finite), None)

    def _names(self) -> dict[Tensor, str]:
        names: dict[Tensor, str] = {}
        for index, group in enumerate(self.param_groups):
            given = group.get("param_names") or [f"group {index}, parameter {i}" for i in range(len(group["params"]))]
            names.update(zip(group["params"], given, strict=True))
        return names

    # The plan.

    def _make_plans(self) -> list[_Plan]:
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
            (p, self._state_names(self.param_groups[i]))
            for i, p, why in reasons
            if not why and self._has_state(self.param_groups[i], p)
        ]
        # Parameters that take no kernel go with the first device: one table has to watch for their gradients.
        self._over_processes = NormOverProcesses([p for _, p, _ in reasons])
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
    ) -> _Plan:
        backend = next((self._backend(p) for _, p, why in reasons if not why), "cpu")
        entries: list[tuple[Any, ...]] = []
        masters = []
        shards = Shards()
        for index, param, reason in reasons:
            own = self.state.get(param) or None
            if reason:
                entries.append((param, index, own, None, ()))
                continue
            master = self._step_options.master_of(param)
            names = (*self._state_names(self.param_groups[index]), master[0] if master else None)
            tensors: tuple[Tensor | None, ...] = ()
            if param in counters:
                state = own or {}
                tensors = (counters[param], *(state[name] if name else None for name in names[1:]))
                if master:
                    masters.append((param, state[master[0]]))
            if is_sharded(param):
                part, tensors = shards.add(len(entries), param, own or {}, names, tensors)
                entries.append((part, index, None, (None,) * len(names), tensors))
            else:
                entries.append((param, index, own, names, tensors))
        groups = tuple(list(group["params"]) for group in self.param_groups)
        state = dict(self.state)
        seed = self._step_options.seed
        table = _C.StepTable(self._kernel, backend, Tensor, groups, state, tuple(entries), seed)  # type: ignore[union-attr]
        plan = _Plan(
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
        return plan

    def _adjust_state(self, param: Tensor, names: StateNames) -> None:
        """Give the state that torch has just created the dtypes that were asked for, and the master weights."""
        state = self.state[param]
        dtype = self._step_options.state_dtype_of(param)
        for name in names[1:]:
            if name and state[name].dtype is not dtype:
                state[name] = state[name].to(dtype)
        self._add_master(param)

    def _add_master(self, param: Tensor) -> None:
        master = self._step_options.master_of(param)
        if master and master[0] not in self.state[param]:
            name, dtype = master
            self.state[param][name] = (
                torch.zeros_like(param, dtype=dtype) if name == "master_low" else param.detach().to(dtype, copy=True)
            )

    def _rehome(self, listed: list[tuple[Tensor, StateNames]]) -> dict[Tensor, Tensor]:
        """Move all step counters into one flat buffer that they view, and states into their parameter's strides.

        The counters of parameters on a GPU live there.
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
            master = self._step_options.master_of(param)
            state = self.state.get(param) or {}
            for name in (*names[1:], master[0] if master else None):
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
                or uncovered_param(param, self._kernel, backend)
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

    # Saving and loading.

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's optimizer of the same options has it.

        That is the state itself, except that step counters which torch would keep on the CPU are copied there.
        """
        saved: dict[str, Any] = super().state_dict()
        moved = []
        for group in saved["param_groups"]:
            name = self._state_names(group)[0]
            if name and not (group.get("capturable") or group.get("fused")):
                moved += [(i, name) for i in group["params"] if _is_on_gpu(saved["state"].get(i), name)]
        if moved:
            steps = torch.stack([saved["state"][i][name].reshape(()) for i, name in moved]).cpu().unbind(0)
            for (i, name), step in zip(moved, steps, strict=True):
                saved["state"][i] = {**saved["state"][i], name: step}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of torch's of the same name.

        Torch casts every state to its parameter's dtype; with ``state_dtype`` or ``master_weights`` states are taken
        from ``state_dict`` as they are there, and cast to the dtype that was asked for. Nothing is shared with
        ``state_dict`` afterwards (torch shares step counters).
        """
        final: dict[str, Any] = {}

        def keep(_: object, after_hooks: dict[str, Any]) -> None:  # what all pre-hooks have made of it
            final.update(after_hooks)

        hook = self.register_load_state_dict_pre_hook(keep)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        saved = [i for group in final["param_groups"] for i in group["params"]]
        listed = [(group, p) for group in self.param_groups for p in group["params"]]
        for i, (group, param) in zip(saved, listed, strict=True):
            wanted = dict.fromkeys(
                [name for name in self._state_names(group)[1:] if name], self._step_options.state_dtype_of(param)
            )
            wanted |= dict([master] if (master := self._step_options.master_of(param)) else [])
            given = final["state"].get(i, {})
            for name, dtype in wanted.items():
                value = given.get(name)
                if isinstance(value, Tensor) and dtype is not param.dtype:
                    self.state[param][name] = value.to(param.device, dtype, copy=True)
            for name, value in (self.state.get(param) or {}).items():
                if isinstance(value, Tensor) and value is given.get(name):
                    self.state[param][name] = value.clone()

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and copying."""
        return {**super().__getstate__(), "_step_options": self._step_options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Forget the plan: called by ``load_state_dict``, unpickling and ``copy.deepcopy``."""
        super().__setstate__(state)
        self._plans = None
        self._step_supports_amp_scaling = True

    def _explain(self) -> str:
        """Which path each parameter takes, and why."""
        lines = []
        paths: dict[tuple[int, str, bool], list[Tensor]] = {}
        for index, param, reason in self._reasons():
            reason = reason or uncovered_grad(param)
            paths.setdefault((index, reason, is_sharded(param)), []).append(local(param))
        for (index, reason, sharded), params in paths.items():
            path = f"torch, because {reason}" if reason else f"deepops kernel '{self._kernel}'"
            count = f"{sum(p.numel() for p in params):,} elements{' in the parts of this process' if sharded else ''}"
            lines.append(f"  group {index}: {len(params)} tensors, {count}: {path}")
        gpu = any(not reason and params[0].is_cuda for (_, reason, _), params in paths.items())
        return "\n".join([f"one {'launch' if gpu else 'parallel region'} for all that takes the kernel", *lines])


def _update_outside_graph_impl(optimizer: FusedStep) -> None:
    optimizer._update()


# Under torch.compile the step runs as it is, between two graphs; torch's own does so too.
_update_outside_graph = torch._disable_dynamo(_update_outside_graph_impl)  # type: ignore[attr-defined]


def _is_on_gpu(state: Any, name: str) -> bool:
    step = state.get(name) if isinstance(state, dict) else None
    return isinstance(step, Tensor) and step.is_cuda


def _refresh_masters(plan: _Plan) -> None:
    """Take over what somebody else has written into parameters since the last step: their masters do not know it."""
    for (param, master), after_step in zip(plan.masters, plan.versions, strict=True):
        if version(param) == after_step:
            continue
        if master.dtype is torch.float32:
            master.copy_(torch.where(master.to(param.dtype) == param, master, param.float()))
        elif after_step >= 0:
            master.zero_()
