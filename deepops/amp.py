"""Mixed precision: a gradient scaler that leaves unscaling and checking to the optimizer's own step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from deepops.optim._base import FusedStep

__all__ = ["GradScaler"]


class GradScaler(torch.amp.GradScaler):
    """Drop-in for :class:`torch.amp.GradScaler`: same arguments, methods, schedule of the scale and ``state_dict``.

    With an optimizer of :mod:`deepops.optim`, ``step(optimizer)`` reads the gradients once to look for infinities and
    NaN (and, with ``max_grad_norm``, for their norm), and the update then unscales and clips them on the fly: two
    passes and on a GPU two launches, and the host never waits. PyTorch reads and writes all gradients to check them,
    reads them again for the norm, and reads and writes them to clip. The gradients stay as they are, scaled. An
    overflow leaves parameters, states and step counters untouched, bit for bit; states that the first step creates are
    zero then. Parameters that take torch's path beside others do the same, but the host waits for them.

    Other optimizers, those all of whose parameters take torch's path, and gradients that ``unscale_`` has been called
    for are treated as torch treats them.

    Args:
        device, init_scale, growth_factor, backoff_factor, growth_interval, enabled: as in torch.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = deepops.optim.AdamW(model.parameters(), max_grad_norm=1.0)
        >>> scaler = deepops.amp.GradScaler("cpu")
        >>> scaler.scale(model(torch.ones(8, 4)).square().mean()).backward()
        >>> scaler.step(optimizer)
        >>> scaler.update()
    """

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Take the optimizer's step with unscaled gradients, unless one of them is infinite or NaN.

        Args:
            optimizer: whose gradients come from a loss that :meth:`scale` has scaled.
            args: for ``optimizer.step()``.
            kwargs: for ``optimizer.step()``; a closure is refused, as in torch.
        """
        plain = self.is_enabled() and not args and not kwargs
        if not plain or not isinstance(optimizer, FusedStep) or not optimizer._takes_kernel():
            return super().step(optimizer, *args, **kwargs)
        scale, _ = self._check_scale_growth_tracker("step")
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is not OptState.READY:  # unscaled already; or stepped, which torch refuses
            return super().step(optimizer)
        has_grads = any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
        given: Tensor | None = getattr(optimizer, "grad_scale", None)  # by the user: torch multiplies too
        optimizer.grad_scale = scale if given is None else scale * given
        optimizer._scaler_checks = True
        try:
            result = optimizer.step()
        finally:
            del optimizer.grad_scale
            optimizer._scaler_checks = False
        found = optimizer._norm()
        if found and has_grads:  # else torch records nothing, and update() refuses
            state["found_inf_per_device"] = {found.found_inf.device: found.found_inf.clone()}
        state["stage"] = OptState.STEPPED
        return result
