"""What the layers need to know of PyTorch's own tools: who is recording, recomputing or replacing them."""

from __future__ import annotations

import sys
from typing import NoReturn

import torch
from torch.fx import Proxy


def is_recorded(x: object) -> bool:
    """Whether torch's own operations are being recorded, for use without deepops; ``x`` is a layer's input.

    By ``torch.jit.trace``, ONNX export, ``torch.export`` or ``torch.fx``. Then the layers do what stock ones do.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._is_tracing() or isinstance(x, Proxy)


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward: ``torch.utils.checkpoint`` makes again what was not kept.

    Stock batch normalization updates its running statistics a second time there (pytorch#96136).
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class RefusesSyncConversion:
    """A class attribute ``qconfig``, which ``convert_sync_batchnorm`` asks for when it replaces a batch normalization.

    That function puts a ``SyncBatchNorm`` in the place of every subclass of torch's batch normalization, and the
    activation would be lost without a word. Nothing else of it can be met: it offers no hook. For everybody else there
    is no such attribute, until quantization sets one.
    """

    def __get__(self, layer: torch.nn.Module | None, owner: type) -> NoReturn:
        """Raise, as for any missing attribute, or saying why the layer can not be converted."""
        if layer is not None and sys._getframe(1).f_code.co_name == "convert_sync_batchnorm":
            raise TypeError(
                f"SyncBatchNorm.convert_sync_batchnorm would drop the activation of {owner.__name__}: put the modules "
                "of its to_modules() in its place before"
            )
        raise AttributeError(f"{owner.__name__!r} object has no attribute 'qconfig'")
