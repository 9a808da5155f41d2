"""Adam and AdamW, whose step updates all tensors of all param groups in one pass of one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam as _torch_adam
from torch.optim.optimizer import ParamsT

from deepops.optim._base import FusedStep
from deepops.optim._coverage import Group, uncovered_number
from deepops.optim._plan import StateNames

_FLAGS = ("amsgrad", "maximize", "decoupled_weight_decay")
_OPTIONS = ("lr", "weight_decay", "eps", *_FLAGS, "foreach", "capturable", "differentiable", "fused")


class _AdamStep(FusedStep):
    """The step of :class:`Adam` and :class:`AdamW`."""

    _kernel = "adam"

    def _uncovered_options(self, group: Group, backend: str | None = None) -> str:
        if group["differentiable"]:
            return "differentiable=True"
        if group["capturable"] and backend == "cpu":
            return "capturable=True"
        return uncovered_number(group, ("lr", "betas", "eps", "weight_decay"))

    def _hyper(self, group: Group) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        amsgrad, maximize, decoupled = [group[name] for name in _FLAGS]
        return (group["lr"], beta1, beta2, group["eps"], group["weight_decay"], amsgrad, maximize, decoupled)

    def _state_names(self, group: Group) -> StateNames:
        return ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq" if group["amsgrad"] else None)

    def _create_state(self, group: Group) -> None:
        self._init_group(group, [], [], [], [], [], [])  # type: ignore[attr-defined]

    def _torch_update(self, group: Group) -> None:
        # Torch's step() calls the same two functions; it is not called itself, for it runs all hooks once more.
        lists: Any = ([], [], [], [], [], [])
        options: dict[str, Any] = {name: value for name, value in group.items() if name in _OPTIONS}
        options["has_complex"] = self._init_group(group, *lists)  # type: ignore[attr-defined]
        options["beta1"], options["beta2"] = group["betas"]
        _torch_adam(*lists, **{**options, "grad_scale": None, "found_inf": None})


class Adam(_AdamStep, torch.optim.Adam):
    r"""Drop-in for :class:`torch.optim.Adam`: same arguments, same ``state_dict``, same results, one kernel per step.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \quad
        \theta_t = \theta_{t-1} - \frac{\gamma}{1 - \beta_1^t}
                   \frac{m_t}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon}

    (Kingma and Ba, *Adam: A Method for Stochastic Optimization*, 2015; the order of operations is that of
    ``torch.optim``.) The kernel takes dense parameters of any shape in float32, float64, float16, bfloat16 and complex
    dtypes on the CPU or on GPUs, mixed as one likes; 16-bit ones are computed in float32 and keep their states in their
    own dtype, as with ``fused=True`` in torch, unless ``state_dtype`` or ``master_weights`` says otherwise. All options
    of the formula are covered: L2 and decoupled weight decay, ``amsgrad``, ``maximize``; on a GPU ``capturable`` too.
    Results do not depend on the number of threads nor on the machine's instruction set, nor on whether the CPU or a GPU
    computes them.

    Everything else takes torch's path and gives torch's result: sparse tensors, tensor subclasses other than DTensor,
    other devices, ``capturable`` on the CPU, ``differentiable``, numbers given as tensors on a GPU.
    ``deepops.explain(optimizer)`` says which path is taken and why. ``foreach`` and ``fused`` are kept and saved; they
    choose among torch's paths where one is taken.

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
        step_options: ``max_grad_norm``, ``master_weights``, ``stochastic_rounding``, ``seed``, ``state_dtype``,
            ``diagnostics``: see :class:`deepops.optim.StepOptions`.

    Raises:
        ValueError, TypeError, RuntimeError: torch's own, for the same arguments.

    Notes:
        ``state[p]["step"]`` is a float32 tensor that views one buffer shared by all parameters, on their device; the
        host never waits for it. ``state_dict()`` has it where torch's has it: on the CPU unless ``capturable`` or
        ``fused``. A counter is a whole number: of another one the kernel takes the whole part for the bias correction.
        A step raises the version counters (``Tensor._version``) of the parameters, not those of the states.

        Of a DTensor, as FSDP2 and tensor parallelism make them, each process updates its own part, if states and
        gradient are distributed alike; a gradient of partial sums takes torch's path. ``max_grad_norm`` and
        :class:`deepops.amp.GradScaler` look at the whole gradient, on all processes: see
        :class:`deepops.optim.StepOptions`.

        ``torch.amp.GradScaler`` hands its scale and its check to the step, as to torch's fused optimizers: the host
        does not wait, and an overflow changes nothing.

        A CUDA graph captures a step with ``capturable=True`` after at least one step before the capture; options that
        are numbers stay what they were at the capture.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = deepops.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)
        >>> model(torch.ones(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

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
        **step_options: Any,
    ) -> None:
        """See the class."""
        self._set_step_options(step_options)
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


class AdamW(_AdamStep, torch.optim.AdamW):
    r"""Drop-in for :class:`torch.optim.AdamW`: :class:`Adam` whose weight decay shrinks the weights themselves.

    .. math::
        \theta_t = (1 - \gamma \lambda) \theta_{t-1} - \frac{\gamma}{1 - \beta_1^t}
                   \frac{m_t}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon}

    (Loshchilov and Hutter, *Decoupled Weight Decay Regularization*, 2019.) Everything that :class:`Adam` says of
    coverage, states, scaling and CUDA graphs holds here.

    Args:
        params: tensors, named tensors or dicts of param groups, as for every ``torch.optim`` optimizer.
        lr: learning rate (default 1e-3); a float or a tensor of one element.
        betas: decay of the two averages (default ``(0.9, 0.999)``).
        eps: added to the denominator (default 1e-8).
        weight_decay: how much of a weight decays per step, times ``lr`` (default 1e-2).
        amsgrad: divide by the largest average of squares so far (default False).
        maximize: climb instead of descend (default False).
        foreach, fused, capturable, differentiable: as in torch.
        step_options: see :class:`deepops.optim.StepOptions`.

    Raises:
        ValueError, TypeError, RuntimeError: torch's own, for the same arguments.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = deepops.optim.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
        >>> model(torch.ones(8, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.grad_norm.shape
        torch.Size([])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **step_options: Any,
    ) -> None:
        """See the class."""
        self._set_step_options(step_options)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
