"""What the layers need to know of PyTorch's own tools: who is recording, recomputing or replacing them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.distributed as dist
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def is_recorded(x: object) -> bool:
    """Whether torch's own operations are being recorded, for use without deepops; ``x`` is a layer's input.

    By ``torch.jit.trace``, ONNX export, ``torch.export`` or ``torch.fx``. Then the layers do what stock ones do.
    """
    if torch.compiler.is_compiling():
        return torch.compiler._is_exporting_flag  # the compiler of torch 2.11 takes is_exporting() for true
    return torch._C._is_tracing() or isinstance(x, Proxy)


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward: ``torch.utils.checkpoint`` makes again what was not kept.

    Stock batch normalization updates its running statistics a second time there (pytorch#96136).
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def shared_with(bn: _BatchNorm) -> ProcessGroup | None:
    """The processes that share the batch of ``bn`` in training; None: it has all of it. By the rules of SyncBatchNorm.

    They are those of its ``process_group``. ``torch.nn.SyncBatchNorm`` without one means all processes there are.
    """
    if not bn.training or not dist.is_available() or not dist.is_initialized():
        return None
    group: ProcessGroup | None = getattr(bn, "process_group", None)
    return dist.group.WORLD if group is None and isinstance(bn, torch.nn.SyncBatchNorm) else group


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
                f"SyncBatchNorm.convert_sync_batchnorm would drop the activation of {owner.__name__}: give it a "
                "process_group instead, or put the modules of its to_modules() in its place before"
            )
        raise AttributeError(f"{owner.__name__!r} object has no attribute 'qconfig'")
