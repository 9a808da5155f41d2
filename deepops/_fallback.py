"""One warning for each kind of device that deepops has no kernels for: its layers run on plain PyTorch there."""

from __future__ import annotations

import warnings

from deepops._library import binaries, has_kernel

_LOADED = has_kernel("batch_norm_act_train", "cpu")  # without it, the import has already said why
_warned: set[str] = set()


def warn_once(device: str, cause: str = "") -> None:
    """Warn the caller of the function that asked a function that asked: four frames up.

    Nothing for ``meta``, where nothing runs.
    """
    if device in _warned or device == "meta":
        return
    _warned.add(device)
    if _LOADED:
        cause = cause or (f"_cuda {binaries()['_cuda']}" if device == "cuda" else "")
        message = f"deepops has no kernels for {device!r} tensors and runs them on plain PyTorch"
        message += f": {cause}" if cause else ""
        warnings.warn(message, RuntimeWarning, stacklevel=5)
