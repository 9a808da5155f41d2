"""What the optimizers of deepops share: the cached plan of a step, its checks, and the way back to torch's own path.

The life of one ``step()``: every param group's options are read; ``StepTable.collect`` (csrc/optim/table.cpp) takes the
gradients and finds out whether anything moved since the plan was made; gradients in another layout than their parameter
are copied into it; where the step clips or checks them, ``StepTable.norm`` reads all gradients once; what the kernel
does not cover takes torch's path; ``StepTable.run`` updates all the rest, of all groups, in one parallel region, or in
one launch on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from deepops.optim._coverage import Group
from deepops.optim._options import StepOptions
from deepops.optim._plan import Plan, PlannedStep
from deepops.optim._scaling import Facts, GradNorm, Scaling, TensorFacts, TorchFacts, write_back
from deepops.optim._sharding import is_like, is_sharded, local, uncovered_grad, version


class FusedStep(PlannedStep):
    """Mixin that goes before a ``torch.optim`` class and gives it ``step()`` on the kernels of deepops.

    A subclass names its kernel and says which options the kernel takes; see :class:`deepops.optim.Adam`.
    """

    grad_scale: Tensor | None  # set and deleted by gradient scalers, as on torch's fused optimizers
    _step_supports_amp_scaling = True  # says so to torch.amp.GradScaler
    _scaler_checks: bool = False  # set by deepops.amp.GradScaler: the step is to look for infinities itself
    _torch_facts: TorchFacts | None = None  # of what took torch's path at the last step

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
        restrided: list[tuple[Plan, int, Tensor]] = []
        for plan, entries in zip(plans, odd, strict=True):
            if entries:
                self._sort_odd(plan, entries, rest, restrided)
            if plan.masters:
                _refresh_masters(plan)
            if scaling is None or not scaling.measures:
                plan.norm = None
        for plan, entry, grad in restrided:
            plan.table.set_grad(entry, local(grad))
        others = [p for params in rest.values() for p in params]
        if scaling is not None and scaling.measures:
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

    def _run_plans(self, plans: list[Plan], options: tuple[Any, ...], scaling: Scaling | None) -> None:
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

    def _current_plans(self, options: tuple[Any, ...]) -> tuple[list[Plan], list[list[int]]]:
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

    def _collect(self, plans: list[Plan]) -> list[list[int]] | None:
        """For each plan the entries with gradients it cannot take; None: something changed since it was made."""
        odd = []
        for plan in plans:
            found = plan.table.collect(self.param_groups, self.state)
            shards = plan.shards.collect(plan.table) if found is not None and plan.shards else []
            if found is None or shards is None:
                return None
            odd.append(sorted(found + shards) if shards else found)
        return odd

    def _sort_odd(
        self,
        plan: Plan,
        odd: list[int],
        rest: dict[int, list[Tensor]],
        restrided: list[tuple[Plan, int, Tensor]],
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


def _refresh_masters(plan: Plan) -> None:
    """Take over what somebody else has written into parameters since the last step: their masters do not know it."""
    for (param, master), after_step in zip(plan.masters, plan.versions, strict=True):
        if version(param) == after_step:
            continue
        if master.dtype is torch.float32:
            master.copy_(torch.where(master.to(param.dtype) == param, master, param.float()))
        elif after_step >= 0:
            master.zero_()
