"""RMSprop whose step updates all tensors of all param groups in one pass of one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.rmsprop import rmsprop as _torch_rmsprop

from deepops.optim._base import FusedStep
from deepops.optim._coverage import Group, uncovered_number
from deepops.optim._plan import StateNames

_NUMBERS = ("lr", "alpha", "eps", "weight_decay", "momentum")
_FLAGS = ("centered", "maximize")
_OPTIONS = (*_NUMBERS, *_FLAGS, "foreach", "capturable", "differentiable")


class RMSprop(FusedStep, torch.optim.RMSprop):
    r"""Drop-in for :class:`torch.optim.RMSprop`: same arguments, ``state_dict`` and results, one kernel per step.

    .. math::
        v_t = \alpha v_{t-1} + (1 - \alpha) g_t^2, \quad
        b_t = \mu b_{t-1} + \frac{g_t}{\sqrt{v_t} + \epsilon}, \quad
        \theta_t = \theta_{t-1} - \gamma b_t

    (Tieleman and Hinton, *Lecture 6.5 - RMSProp*, 2012.) Centered, :math:`v_t - a_t^2` stands in place of :math:`v_t`
    under the root, :math:`a_t` being the average of gradients (Graves, *Generating Sequences with Recurrent Neural
    Networks*, 2013). Dense parameters of any shape in float32, float64, float16, bfloat16 and complex dtypes, on the
    CPU or on GPUs, take the kernel, DTensors as in :class:`Adam`; other tensor subclasses, ``differentiable``,
    ``capturable`` on the CPU and numbers given as tensors on a GPU take torch's path and give torch's result. PyTorch
    itself has no fused RMSprop.

    Args:
        params: tensors, named tensors or dicts of param groups, as for every ``torch.optim`` optimizer.
        lr: learning rate (default 1e-2); a float or a tensor of one element.
        alpha: decay of the averages (default 0.99).
        eps: added to the denominator (default 1e-8).
        weight_decay: L2 penalty (default 0).
        momentum: decay of the momentum buffer (default 0: there is none).
        centered: divide by an estimate of the gradient's standard deviation (default False).
        maximize: climb instead of descend (default False).
        capturable, foreach, differentiable: as in torch.
        step_options: see :class:`deepops.optim.StepOptions`.

    Raises:
        ValueError, TypeError, RuntimeError: torch's own, for the same arguments.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = deepops.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.9, centered=True)
        >>> model(torch.ones(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    _kernel = "rmsprop"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **step_options: Any,
    ) -> None:
        """See the class."""
        self._set_step_options(step_options)
        super().__init__(
            params, lr, alpha, eps, weight_decay, momentum, centered, capturable, foreach, maximize, differentiable
        )

    def _uncovered_options(self, group: Group, backend: str | None = None) -> str:
        if group["differentiable"]:
            return "differentiable=True"
        if group["capturable"] and backend == "cpu":
            return "capturable=True"
        return uncovered_number(group, _NUMBERS)

    def _hyper(self, group: Group) -> tuple[float, ...]:
        lr, alpha, eps, weight_decay, momentum = [group[name] for name in _NUMBERS]
        return (lr, alpha, eps, weight_decay, momentum, group["centered"], group["maximize"])

    def _state_names(self, group: Group) -> StateNames:
        grad_avg = "grad_avg" if group["centered"] else None
        return ("step", "square_avg", grad_avg, "momentum_buffer" if group["momentum"] > 0 else None)

    def _create_state(self, group: Group) -> None:
        self._init_group(group, [], [], [], [], [], [])  # type: ignore[no-untyped-call]

    def _torch_update(self, group: Group) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        square_avgs: list[Tensor] = []
        grad_avgs: list[Tensor] = []
        buffers: list[Tensor] = []
        steps: list[Tensor] = []
        has_complex = self._init_group(group, params, grads, square_avgs, buffers, grad_avgs, steps)  # type: ignore[no-untyped-call]
        options: dict[str, Any] = {name: group[name] for name in _OPTIONS}
        _torch_rmsprop(params, grads, square_avgs, grad_avgs, buffers, steps, has_complex=has_complex, **options)
