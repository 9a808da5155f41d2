"""``deepops.explain``: which path an object takes, and why."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from deepops._library import binaries, has_kernel


def explain(obj: object) -> str:
    """Say, line by line, which deepops layers of ``obj`` (or which optimizer) run on a kernel, and why others do not.

    Of a convolution block on an NVIDIA GPU also each shape that it has seen, with the way it goes and the times of both
    ways (see ``deepops.backends``).

    Args:
        obj: a module or an optimizer. Modules are walked with all their children.

    >>> import torch, deepops
    >>> model = torch.nn.Sequential(deepops.nn.ConvBNReLU2d(3, 8, 3), torch.nn.Flatten())
    >>> print(deepops.explain(model))  # doctest: +ELLIPSIS
    0 (ConvBNReLU2d): fused...
    """
    own = getattr(obj, "_explain", None)
    if own is not None:
        return f"{type(obj).__name__}: {own()}"
    lines = []
    if isinstance(obj, nn.Module):
        for name, module in obj.named_modules():
            own = getattr(module, "_explain", None)
            if own is not None:
                lines.append(f"{name} ({type(module).__name__}): {own()}")
    return "\n".join(lines) or f"{type(obj).__name__}: nothing of deepops in it, plain PyTorch"


def kernel_note(op: str, device: str) -> str:
    """Where ``op`` runs for tensors on ``device``, and why not on a kernel."""
    if has_kernel(op, device):
        return f"compiled kernel on {device}"
    name = "_cuda" if device == "cuda" else "_ops"
    status = binaries()[name]
    cause = f"{name} has none for {device}" if Path(status).exists() else f"{name} {status}"
    return f"plain PyTorch on {device}, for want of a kernel: {cause}"
