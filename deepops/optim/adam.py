"""Adam whose step updates all tensors of all param groups in one pass of one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam as _torch_adam
from torch.optim.optimizer import ParamsT

from deepops.optim._base import FusedStep, Group

_FLAGS = ("amsgrad", "maximize", "decoupled_weight_decay")
_OPTIONS = ("lr", "weight_decay", "eps", *_FLAGS, "foreach", "capturable", "differentiable", "fused")


class Adam(FusedStep, torch.optim.Adam):
    r"""Drop-in for :class:`torch.optim.Adam`: same arguments, same ``state_dict``, same results, one kernel per step.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \quad
        \theta_t = \theta_{t-1} - \frac{\gamma}{1 - \beta_1^t}
                   \frac{m_t}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon}

    (Kingma and Ba, *Adam: A Method for Stochastic Optimization*, 2015; the order of operations is that of
    ``torch.optim``.) The kernel takes dense parameters of any shape in float32, float64, float16 and bfloat16 on the
    CPU or on one GPU, mixed as one likes; 16-bit ones are computed in float32 and keep their states in their own dtype,
    as with ``fused=True`` in torch. All options of the formula are covered: L2 and decoupled weight decay, ``amsgrad``,
    ``maximize``; on a GPU ``capturable`` too. Results do not depend on the number of threads nor on the machine's
    instruction set, nor on whether the CPU or a GPU computes them.

    Everything else takes torch's path and gives torch's result: complex or sparse tensors, tensor subclasses, other
    devices, a second GPU, ``capturable`` on the CPU, ``differentiable``, betas given as tensors, ``lr`` given as a
    tensor on a GPU. ``deepops.explain(optimizer)`` says which path is taken and why. ``foreach`` and ``fused`` are kept
    and saved; they choose among torch's paths where one is taken.

    Args:
        params: tensors, named tensors or dicts of param groups, as for every ``torch.optim`` optimizer.
        lr: learning rate (default 1e-3); a float or a tensor of one element.
        betas: decay of the two averages (default ``(0.9, 0.999)``).
        eps: added to the denominator (default 1e-8).
        weight_decay: L2 penalty, or decay of the weights themselves with ``decoupled_weight_decay`` (default 0).
        amsgrad: divide by the largest average of squares so far (default False).
        foreach, fused, capturable, differentiable: as in torch; see above.
        maximize: climb instead of descend (default False).
        decoupled_weight_decay: AdamW's weight decay (default False).

    Raises:
        ValueError, TypeError, RuntimeError: torch's own, for the same arguments.

    Notes:
        ``state[p]["step"]`` is a float32 tensor that views one buffer shared by all parameters, on their device; the
        host never waits for it. ``state_dict()`` has it where torch's has it: on the CPU unless ``capturable`` or
        ``fused``. A counter is a whole number: of another one the kernel takes the whole part for the bias correction.
        A step raises the version counters (``Tensor._version``) of the parameters, not those of the states.

        A CUDA graph captures a step with ``capturable=True`` after at least one step before the capture; options that
        are numbers stay what they were at the capture.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = deepops.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)
        >>> model(torch.ones(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    _kernel = "adam"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        """See the class."""
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        # torch sets this for fused=True, and GradScaler would then leave the unscaling to step(); here it unscales.
        self._step_supports_amp_scaling = False

    def _uncovered_options(self, group: Group, backend: str | None = None) -> str:
        if group["differentiable"]:
            return "differentiable=True"
        if group["capturable"] and backend == "cpu":
            return "capturable=True"
        lr = group["lr"]
        if isinstance(lr, Tensor) and (lr.requires_grad or lr.device.type != "cpu"):
            return "lr is a tensor that requires a gradient or is not on the CPU"
        for name in ("eps", "weight_decay"):
            if isinstance(group[name], Tensor):
                return f"{name} is a tensor"
        if any(isinstance(beta, Tensor) for beta in group["betas"]):
            return "betas are tensors"
        return ""

    def _hyper(self, group: Group) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        flags = [group[name] for name in _FLAGS]
        return (float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], *flags)

    def _state_names(self, group: Group) -> tuple[str, ...]:
        names = ("step", "exp_avg", "exp_avg_sq")
        return (*names, "max_exp_avg_sq") if group["amsgrad"] else names

    def _create_state(self, group: Group) -> None:
        self._init_group(group, [], [], [], [], [], [])  # type: ignore[no-untyped-call]

    def _torch_update(self, group: Group) -> None:
        # Torch's step() calls the same two functions; it is not called itself, for it runs all hooks once more.
        lists: Any = ([], [], [], [], [], [])
        options: dict[str, Any] = {name: value for name, value in group.items() if name in _OPTIONS}
        options["has_complex"] = self._init_group(group, *lists)  # type: ignore[no-untyped-call]
        options["beta1"], options["beta2"] = group["betas"]
        for name in ("grad_scale", "found_inf"):
            options[name] = getattr(self, name, None)
        _torch_adam(*lists, **options)
