"""SGD whose step updates all tensors of all param groups in one pass of one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd as _torch_sgd

from deepops.optim._base import FusedStep
from deepops.optim._coverage import Group, uncovered_number
from deepops.optim._plan import StateNames

_NUMBERS = ("lr", "momentum", "dampening", "weight_decay")
_FLAGS = ("nesterov", "maximize")


class SGD(FusedStep, torch.optim.SGD):
    r"""Drop-in for :class:`torch.optim.SGD`: same arguments, same ``state_dict``, same results, one kernel per step.

    .. math::
        b_t = \mu b_{t-1} + (1 - \tau) g_t \;(b_1 = g_1), \quad
        \theta_t = \theta_{t-1} - \gamma \, (b_t \text{ or, with Nesterov's momentum, } g_t + \mu b_t)

    with :math:`g_t` the gradient plus ``weight_decay`` times the parameter (Sutskever et al., *On the importance of
    initialization and momentum in deep learning*, 2013, in the form of ``torch.optim``). Dense parameters of any shape
    in float32, float64, float16, bfloat16 and complex dtypes, on the CPU or on GPUs, take the kernel, DTensors as in
    :class:`Adam`; sparse gradients, other tensor subclasses, ``differentiable`` and numbers given as tensors on a GPU
    take torch's path and give torch's result.

    Args:
        params: tensors, named tensors or dicts of param groups, as for every ``torch.optim`` optimizer.
        lr: learning rate (default 1e-3); a float or a tensor of one element.
        momentum: decay of the momentum buffer (default 0: there is none).
        dampening: reduces what a gradient adds to the buffer, but not at a parameter's first step (default 0).
        weight_decay: L2 penalty (default 0).
        nesterov: look ahead along the buffer (default False); needs momentum and no dampening.
        maximize: climb instead of descend (default False).
        foreach, fused, differentiable: as in torch.
        step_options: see :class:`deepops.optim.StepOptions`.

    Raises:
        ValueError, TypeError, RuntimeError: torch's own, for the same arguments.

    Notes:
        The first step of every parameter counts by itself: one that gets its first gradient late, or whose first steps
        a scaler skips, starts its buffer with the first gradient that is used.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = deepops.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> model(torch.ones(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    _kernel = "sgd"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **step_options: Any,
    ) -> None:
        """See the class."""
        self._set_step_options(step_options)
        self._steps: dict[Tensor, Tensor] = {}  # taken by each parameter; torch's state has none
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )

    def _uncovered_options(self, group: Group, backend: str | None = None) -> str:
        if group["differentiable"]:
            return "differentiable=True"
        return uncovered_number(group, _NUMBERS)

    def _hyper(self, group: Group) -> tuple[float, ...]:
        lr, momentum, dampening, weight_decay = [group[name] for name in _NUMBERS]
        return (lr, momentum, dampening, weight_decay, group["nesterov"], group["maximize"])

    def _state_names(self, group: Group) -> StateNames:
        return (None, "momentum_buffer" if group["momentum"] != 0 else None, None, None)

    def _has_state(self, group: Group, param: Tensor) -> bool:
        return group["momentum"] == 0 or (self.state.get(param) or {}).get("momentum_buffer") is not None

    def _create_state(self, group: Group) -> None:
        for param in group["params"]:
            self.state[param]["momentum_buffer"] = torch.zeros_like(param)
            self._steps[param] = torch.zeros(())

    def _step_counter(self, param: Tensor) -> Tensor:
        """A buffer that somebody else has filled is not at its first step."""
        known = self._steps.get(param)
        return known if known is not None else torch.tensor(float("momentum_buffer" in (self.state.get(param) or {})))

    def _set_step_counter(self, param: Tensor, counter: Tensor) -> None:
        self._steps[param] = counter

    def _torch_update(self, group: Group) -> None:
        self._forget_unused_buffers(group["params"])
        params: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Tensor | None] = []
        has_sparse_grad = self._init_group(group, params, grads, buffers)  # type: ignore[no-untyped-call]
        options: dict[str, Any] = {name: group[name] for name in (*_NUMBERS, *_FLAGS, "foreach", "fused")}
        _torch_sgd(params, grads, buffers, has_sparse_grad=has_sparse_grad, grad_scale=None, found_inf=None, **options)
        if group["momentum"] != 0:
            for param, buffer in zip(params, buffers, strict=True):
                self.state[param]["momentum_buffer"] = buffer
                self._steps.pop(param, None)

    def _forget_unused_buffers(self, params: list[Tensor]) -> None:
        """Drop momentum buffers that no step has filled yet: torch knows a first step by there being none."""
        for param in params:
            steps, state = self._steps.get(param), self.state.get(param)
            if steps is not None and state and "momentum_buffer" in state and steps.item() == 0:
                del state["momentum_buffer"], self._steps[param]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's SGD has it: no buffer where every step so far was skipped."""
        saved = super().state_dict()
        listed = [p for group in self.param_groups for p in group["params"]]
        numbers = [i for group in saved["param_groups"] for i in group["params"]]
        for i, param in zip(numbers, listed, strict=True):
            steps = self._steps.get(param)
            if "momentum_buffer" in saved["state"].get(i, {}) and steps is not None and steps.item() == 0:
                del saved["state"][i]
        return saved

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and copying."""
        self._forget_unused_buffers(list(self._steps))
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Forget the plan and the counters: called by ``load_state_dict``, unpickling and ``copy.deepcopy``."""
        self._steps = {}
        super().__setstate__(state)
