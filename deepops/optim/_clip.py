"""Clipping the norm of all gradients together, as ``torch.nn.utils.clip_grad_norm_`` does, in one read."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from deepops._library import _C
from deepops.optim._coverage import uncovered_tensor
from deepops.optim._scaling import GradNorm


def _backend(grad: Tensor) -> str:
    """Whose kernels take this gradient."""
    return grad.device.type


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""Scale all gradients by :math:`\min(1, \mathrm{max\_norm} / (\|g\| + 10^{-6}))`, as torch's function does.

    The gradients are read once, the sum is taken in float64 and always in the same order; they are written only if they
    are scaled, which on a GPU the device finds out for itself. Norms other than 2, and gradients that are sparse, of a
    tensor subclass, with gaps in their memory, on several devices or on common memory take torch's function.

    Args:
        parameters: one tensor or several; those without a gradient are left out.
        max_norm: largest norm that is left as it is.
        norm_type: order of the norm (default 2).
        error_if_nonfinite: raise if the norm is infinite or NaN, before anything is changed; waits for the device.
        foreach: for torch's function, where that is taken.

    Returns:
        The norm before clipping: a 0-dim tensor, in float32, or in float64 if a gradient is (torch: in the gradients'
        dtype, which a norm of 16-bit gradients can overflow).

    Raises:
        RuntimeError: the norm is not finite and ``error_if_nonfinite``.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> model(torch.ones(8, 4)).square().mean().backward()
        >>> norm = deepops.optim.clip_grad_norm_(model.parameters(), max_norm=1.0)
    """
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    elif isinstance(parameters, types.GeneratorType):
        parameters = list(parameters)
        if not parameters:
            warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3)
    else:
        parameters = list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    table = _covered(grads) if float(norm_type) == 2.0 else None
    if table is None:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    found = GradNorm(grads[0].device)
    table.norm(found.address)
    in_double = any(grad.dtype in (torch.float64, torch.complex128) for grad in grads)
    norm = found.totals[0].sqrt() if in_double else found.norm.clone()
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            "The total norm of order 2.0 for gradients from `parameters` is non-finite, so it cannot be clipped. To "
            "disable this error and scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
        )
    table.clip(found.address, float(max_norm))
    torch.autograd.graph.increment_version(grads)
    return norm


def _covered(grads: list[Tensor]) -> Any:
    """The gradients as the kernels take them; None where they do not."""
    if len({grad.device for grad in grads}) != 1:
        return None
    backend = _backend(grads[0])
    if any(uncovered_tensor(grad, backend) for grad in grads):
        return None
    table = _C.GradList(backend, Tensor, grads)  # type: ignore[union-attr]
    return None if table.overlap else table
