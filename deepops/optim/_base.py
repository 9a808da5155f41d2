"""What the optimizers of deepops share: the cached plan of a step, its checks, and the way back to torch's own path.

The life of one ``step()``: every param group's options are read; ``StepTable.collect`` (csrc/optim/table.cpp) takes the
gradients and finds out whether anything moved since the plan was made; gradients in another layout than their parameter
are copied into it; what the kernel does not cover takes torch's path; ``StepTable.run`` updates all the rest, of all
groups, in one parallel region, or in one launch on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from deepops._library import _C, gpu_not_covered

Group = dict[str, Any]

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_TYPES = (Tensor, torch.nn.Parameter)  # a subclass may mean anything by its memory


@dataclass(frozen=True)
class _Plan:
    """One :class:`StepTable` and all that it borrows."""

    table: Any  # _C.StepTable
    options: tuple[Any, ...]  # options() of each group; another value needs another plan
    params: list[Tensor]  # by entry of the table
    group_of: list[int]  # by entry
    covered: list[bool]  # by entry
    borrowed: tuple[Any, ...]


class FusedStep(torch.optim.Optimizer):
    """Mixin that goes before a ``torch.optim`` class and gives it ``step()`` on the kernels of deepops.

    A subclass names its kernel and says which options the kernel takes; see :class:`deepops.optim.Adam`.
    """

    _kernel: ClassVar[str]  # torch.ops.deepops.<_kernel>
    _plan: _Plan | None = None

    # What a subclass provides.

    def _uncovered_options(self, group: Group, backend: str | None = None) -> str:
        """Why the kernel does not take this group's options; empty when it does.

        Without ``backend`` it is asked at every step, with one (``"cpu"``, ``"cuda"``) when a plan is made.
        """
        raise NotImplementedError

    def _hyper(self, group: Group) -> tuple[float, ...]:
        """The group's hyper-parameters as the kernel wants them; called only for covered options."""
        raise NotImplementedError

    def _state_names(self, group: Group) -> tuple[str, ...]:
        """Keys of a parameter's state: the step counter, then tensors like the parameter, in the kernel's order."""
        raise NotImplementedError

    def _create_state(self, group: Group) -> None:
        """Let torch create the state of those parameters of ``group`` that have a gradient and no state."""
        raise NotImplementedError

    def _torch_update(self, group: Group) -> None:
        """Torch's own step of one group."""
        raise NotImplementedError

    def _backend(self, param: Tensor) -> str:
        """Whose kernels take this parameter."""
        return param.device.type

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
            _update_outside_graph(self)
        else:
            self._update()
        return loss

    def _update(self) -> None:
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            for group in self.param_groups:  # set by hand: torch's fused path alone knows what they mean
                self._run_torch_update(group)
            return
        options = tuple([self._options(group) for group in self.param_groups])
        plan = self._plan
        odd = None
        if plan is not None and plan.options == options:
            odd = plan.table.collect(self.param_groups, self.state)
        if odd is None:
            plan = self._plan = self._make_plan(options)
            odd = plan.table.collect(self.param_groups, self.state)
        assert plan is not None
        if odd is None:
            raise RuntimeError("the optimizer's parameters or state changed while step() was reading them")
        if odd:
            self._update_odd(plan, odd)
        covered = [
            () if reason else self._hyper(group) for group, (reason, *_) in zip(self.param_groups, options, strict=True)
        ]
        changed = plan.table.run(tuple(covered))
        # Autograd and modules that cache what they derive from weights must see that these were written to.
        torch.autograd.graph.increment_version(changed)

    def _options(self, group: Group) -> tuple[str, tuple[str, ...], bool]:
        return self._uncovered_options(group), self._state_names(group), group["capturable"]

    def _update_odd(self, plan: _Plan, odd: list[int]) -> None:
        """Take torch's path for these entries, or bring their gradients into the parameter's layout."""
        rest: dict[int, list[Tensor]] = {}
        restrided: list[tuple[int, Tensor]] = []
        for entry in odd:
            param, grad = plan.params[entry], plan.params[entry].grad
            if grad is None:
                continue
            if plan.covered[entry] and _is_like(grad, param):
                restrided.append((entry, torch.empty_like(param).copy_(grad)))
            else:
                rest.setdefault(plan.group_of[entry], []).append(param)
        # First, because it may raise; then nothing else has changed yet.
        for index, params in rest.items():
            self._run_torch_update({**self.param_groups[index], "params": params})
        for entry, grad in restrided:
            plan.table.set_grad(entry, grad)

    def _run_torch_update(self, group: Group) -> None:
        with torch.set_grad_enabled(bool(self.defaults["differentiable"])):
            self._torch_update(group)

    # The plan.

    def _make_plan(self, options: tuple[Any, ...]) -> _Plan:
        reasons = list(self._reasons())
        backend = next((self._backend(p) for _, p, why in reasons if not why), "cpu")
        if backend == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{type(self).__name__}: take a step before the one that a CUDA graph captures, and leave parameters, "
                "states and options as they are; the step's plan is not made during a capture"
            )
        for index, group in enumerate(self.param_groups):
            fresh = [p for i, p, reason in reasons if i == index and not reason and p.grad is not None]
            self._create_state({**group, "params": [p for p in fresh if not self.state.get(p)]})
        with_state = [
            (p, self._state_names(self.param_groups[i])) for i, p, why in reasons if not why and self.state.get(p)
        ]
        self._rehome([(p, self.state[p], names) for p, names in with_state])
        entries = []
        for index, param, reason in reasons:
            own = self.state.get(param) or None
            names = None if reason else self._state_names(self.param_groups[index])
            tensors = tuple(own[name] for name in names) if own and names else ()
            entries.append((param, index, own, names, tensors))
        groups = tuple(list(group["params"]) for group in self.param_groups)
        state = dict(self.state)
        table = _C.StepTable(self._kernel, backend, Tensor, groups, state, tuple(entries))  # type: ignore[union-attr]
        return _Plan(
            table,
            options,
            [param for _, param, _ in reasons],
            [index for index, _, _ in reasons],
            [not reason for _, _, reason in reasons],
            (groups, state, entries),
        )

    @staticmethod
    def _rehome(states: list[tuple[Tensor, Group, tuple[str, ...]]]) -> None:
        """Move all step counters into one flat buffer that they view, and states into their parameter's strides.

        The counters of parameters on a GPU live there.
        """
        if not states:
            return
        device = states[0][0].device
        old = [state[names[0]] for _, state, names in states]
        if all(step.is_cpu for step in old):
            steps = torch.tensor([float(step) for step in old], dtype=torch.float32, device=device)
        else:
            steps = torch.stack([step.reshape(()).to(device, torch.float32) for step in old])
        for step, (param, state, names) in zip(steps.unbind(0), states, strict=True):
            state[names[0]] = step
            for name in names[1:]:
                if not _same_strides(state[name], param):  # e.g. loaded from a model in another memory format
                    state[name] = torch.empty_like(param).copy_(state[name])

    def _reasons(self) -> Iterator[tuple[int, Tensor, str]]:
        """``(group, parameter, why it takes torch's path)`` for every parameter; empty: it takes the kernel."""
        listed = [(index, p) for index, group in enumerate(self.param_groups) for p in group["params"]]
        shared = _sharing([[p, *_tensors(self.state.get(p))] for _, p in listed])
        per_group = [self._options(group) for group in self.param_groups]
        first: torch.device | None = None  # of what takes the kernel
        for entry, (index, param) in enumerate(listed):
            reason, names, _ = per_group[index]
            backend = self._backend(param)
            reason = (
                reason
                or _uncovered(param, self._kernel, backend)
                or self._uncovered_options(self.param_groups[index], backend)
                or _uncovered_state(param, self.state.get(param), names)
                or ("shares memory with another parameter" if entry in shared else "")
            )
            if not reason:
                first = first or param.device
                if param.device != first:
                    reason = f"it is on {param.device}, and others that take the kernel are on {first}"
            yield index, param, reason

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's optimizer of the same options has it.

        That is the state itself, except that step counters which torch would keep on the CPU are copied there.
        """
        saved: dict[str, Any] = super().state_dict()
        moved = []
        for group in saved["param_groups"]:
            if not (group["capturable"] or group["fused"]):
                name = self._state_names(group)[0]
                moved += [(i, name) for i in group["params"] if _is_on_gpu(saved["state"].get(i), name)]
        if moved:
            steps = torch.stack([saved["state"][i][name].reshape(()) for i, name in moved]).cpu().unbind(0)
            for (i, name), step in zip(moved, steps, strict=True):
                saved["state"][i] = {**saved["state"][i], name: step}
        return saved

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Forget the plan: called by ``load_state_dict``, unpickling and ``copy.deepcopy``."""
        super().__setstate__(state)
        self._plan = None

    def _explain(self) -> str:
        """Which path each parameter takes, and why."""
        lines = []
        paths: dict[tuple[int, str], list[Tensor]] = {}
        for index, param, reason in self._reasons():
            paths.setdefault((index, reason), []).append(param)
        for (index, reason), params in paths.items():
            path = f"torch, because {reason}" if reason else f"deepops kernel '{self._kernel}'"
            lines.append(f"  group {index}: {len(params)} tensors, {sum(p.numel() for p in params):,} elements: {path}")
        gpu = any(not reason and params[0].is_cuda for (_, reason), params in paths.items())
        return "\n".join([f"one {'launch' if gpu else 'parallel region'} for all that takes the kernel", *lines])


def _update_outside_graph_impl(optimizer: FusedStep) -> None:
    optimizer._update()


# Under torch.compile the step runs as it is, between two graphs; torch's own does so too.
_update_outside_graph = torch._disable_dynamo(_update_outside_graph_impl)  # type: ignore[attr-defined]


def _tensors(state: Group | None) -> list[Tensor]:
    return [value for value in (state or {}).values() if isinstance(value, Tensor)]


def _is_on_gpu(state: Any, name: str) -> bool:
    step = state.get(name) if isinstance(state, dict) else None
    return isinstance(step, Tensor) and step.is_cuda


def _same_strides(a: Tensor, b: Tensor) -> bool:
    return all(size <= 1 or i == j for size, i, j in zip(a.shape, a.stride(), b.stride(), strict=True))


def _is_like(a: Tensor, b: Tensor) -> bool:
    """Whether ``a`` differs from ``b`` in its strides at most."""
    return (
        type(a) in _TYPES and a.layout is torch.strided and (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
    )


def _uncovered(param: Tensor, kernel: str, backend: str) -> str:
    """Why the kernel cannot take this parameter; empty when it can."""
    if type(param) not in _TYPES:
        return f"it is a {type(param).__name__}"
    if param.layout is not torch.strided:
        return f"its layout is {param.layout}"
    if param.dtype not in _DTYPES:
        return f"its dtype is {param.dtype}"
    if _C is None or not _C.has_step(kernel, backend):
        return f"there is no kernel for {backend}"
    if param.device.type == "cuda" and (reason := gpu_not_covered(param.device.index)):
        return reason
    if not _C.is_dense(param.shape, param.stride()):
        return "its memory has gaps or overlaps"
    if param.is_neg() or param.is_inference() or (param.numel() > 0 and param.data_ptr() == 0):
        return "its values are not plain memory of its own"
    return ""


def _uncovered_state(param: Tensor, state: Group | None, names: tuple[str, ...]) -> str:
    """Why the kernel cannot take this parameter's state; empty when it can."""
    if not state:
        return ""
    step, *others = [state.get(name) for name in names]
    if not isinstance(step, Tensor) or step.numel() != 1:
        return f"its state {names[0]!r} is not a tensor of one element"
    for name, value in zip(names[1:], others, strict=True):
        if not isinstance(value, Tensor) or not _is_like(value, param):
            return f"its state {name!r} is not a tensor of its dtype, shape and device"
    return ""


def _sharing(tensors: list[list[Tensor]]) -> set[int]:
    """Indices of those lists that have memory in common with another list, or twice the same within."""
    spans = sorted(
        (start, start + t.numel() * t.element_size(), index)
        for index, group in enumerate(tensors)
        for t in group
        if type(t) in _TYPES and t.layout is torch.strided and (start := t.data_ptr())
    )
    shared: set[int] = set()
    reach, owner = 0, -1
    for start, end, index in spans:
        if start < reach and end > start:
            shared |= {index, owner}
        if end > reach:
            reach, owner = end, index
    return shared
