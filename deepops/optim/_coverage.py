"""What the kernels take: why a parameter, its state or a number of its group has to go torch's own way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepops._library import _C, gpu_not_covered

Group = dict[str, Any]

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)
TYPES = (Tensor, torch.nn.Parameter)  # a subclass may mean anything by its memory


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether elements of two tensors of one shape lie in the same order."""
    return all(size <= 1 or i == j for size, i, j in zip(a.shape, a.stride(), b.stride(), strict=True))


def is_like(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether ``a`` is a plain tensor of the shape and device of ``b``, of its dtype or ``dtype``, in any strides."""
    wanted = (dtype or b.dtype, b.shape, b.device)
    return type(a) in TYPES and a.layout is torch.strided and (a.dtype, a.shape, a.device) == wanted


def uncovered_number(group: Group, names: tuple[str, ...]) -> str:
    """Why the kernel cannot take these hyper-parameters of the group; empty when it can."""
    for name in names:
        value = group[name]
        for number in value if isinstance(value, tuple | list) else (value,):
            if isinstance(number, Tensor) and (number.requires_grad or number.device.type != "cpu"):
                return f"{name} is a tensor that requires a gradient or is not on the CPU"
    return ""


def uncovered_tensor(tensor: Tensor, backend: str) -> str:
    """Why the kernels cannot take this parameter or gradient; empty when they can."""
    if type(tensor) not in TYPES:
        return f"it is a {type(tensor).__name__}"
    if tensor.layout is not torch.strided:
        return f"its layout is {tensor.layout}"
    if tensor.dtype not in _DTYPES:
        return f"its dtype is {tensor.dtype}"
    if _C is None or not _C.has_backend(backend):
        return f"there is no kernel for {backend}"
    if tensor.device.type == "cuda" and (reason := gpu_not_covered(tensor.device.index)):
        return reason
    if not _C.is_dense(tensor.shape, tensor.stride()):
        return "its memory has gaps or overlaps"
    if tensor.is_neg() or tensor.is_conj() or tensor.is_inference() or (tensor.numel() > 0 and tensor.data_ptr() == 0):
        return "its values are not plain memory of its own"
    return ""


def uncovered_grad(param: Tensor) -> str:
    """Why the kernel cannot take the gradient that the parameter has now; empty when it can, or where there is none."""
    grad = param.grad
    if grad is None or is_like(grad, param):
        return ""
    if type(grad) not in TYPES:
        return f"its gradient is a {type(grad).__name__}"
    return f"its gradient is {grad.dtype} of layout {grad.layout}"


def sharing(tensors: list[list[Tensor]]) -> set[int]:
    """Indices of those lists that have memory in common with another list, or twice the same within."""
    spans = sorted(
        (start, start + t.numel() * t.element_size(), index)
        for index, group in enumerate(tensors)
        for t in group
        if type(t) in TYPES and t.layout is torch.strided and (start := t.data_ptr())
    )
    shared: set[int] = set()
    reach, owner = 0, -1
    for start, end, index in spans:
        if start < reach and end > start:
            shared |= {index, owner}
        if end > reach:
            reach, owner = end, index
    return shared
