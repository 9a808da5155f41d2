"""Convolutions of one to three dimensions: ATen's, but for fp16 on CPUs that lack fp16 arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepops._checks import Size, transforms_active

# oneDNN runs fp16 convolutions natively only on CPUs with AMX or AVX512-FP16; its weight gradient never does.
_NATIVE_HALF: bool = torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_fp16_supported()

_BY_RANK: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def per_dimension(value: Size, weight: Tensor) -> tuple[int, ...]:
    """``value`` for each spatial dimension of ``weight`` (``[K, C / groups, ...]``)."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * (weight.dim() - 2) if len(values) == 1 else values


def padding_of(padding: str, weight: Tensor, dilation: Size) -> list[int]:
    """Zeros before and after each spatial dimension for ``"same"`` and ``"valid"``; an odd one more comes after."""
    totals = [d * (k - 1) for d, k in zip(per_dimension(dilation, weight), weight.shape[2:], strict=True)]
    return [side if padding == "same" else 0 for total in totals for side in (total // 2, total - total // 2)]


def output_sizes(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Spatial sizes of a convolution's result. ``padding``: before and after each dimension."""
    rooms = (
        size + before + after - d * (k - 1)
        for size, before, after, d, k in zip(
            x.shape[2:], padding[::2], padding[1::2], dilation, weight.shape[2:], strict=True
        )
    )
    return [(room - 1) // step + 1 for room, step in zip(rooms, stride, strict=True)]


def convolution(
    x: Tensor,  # [N, C, ...], one to three spatial dimensions
    weight: Tensor,  # [K, C / groups, ...]
    bias: Tensor | None,  # [K]
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
) -> Tensor:
    """``torch.nn.functional.conv2d``, ``conv1d`` or ``conv3d``, by the rank of ``weight``.

    fp16 on a CPU is computed in fp32 where oneDNN would run its reference kernel.
    """
    if x.device.type == "cpu":
        half = x.dtype is torch.float16
        if torch.is_autocast_enabled("cpu"):
            half = torch.get_autocast_dtype("cpu") is torch.float16 and x.dtype is not torch.float64
        if half and (torch.compiler.is_compiling() or not transforms_active()):
            return _half_convolution(x, weight, bias, stride, padding, dilation, groups)
    return _BY_RANK[weight.dim()](x, weight, bias, stride, padding, dilation, groups)


def _half_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Size, padding: Size | str, dilation: Size, groups: int
) -> Tensor:
    x, weight = x.half(), weight.half()  # what autocast does; else nothing
    bias = None if bias is None else bias.half()
    if isinstance(padding, str):
        x, padding = pad_explicitly(x, weight, padding, dilation)
    apply: Callable[..., Tensor] = HalfConvolution.apply
    sizes = (per_dimension(value, weight) for value in (stride, padding, dilation))
    return apply(x, weight, bias, *sizes, groups)


def pad_explicitly(x: Tensor, weight: Tensor, padding: str, dilation: Size) -> tuple[Tensor, tuple[int, ...]]:
    """Turn ``"same"`` or ``"valid"`` into numbers; pads ``x`` itself where the two sides differ."""
    sides = padding_of(padding, weight, dilation)
    before, after = tuple(sides[::2]), tuple(sides[1::2])
    if before == after:
        return x, before
    # F.pad takes the last dimension first.
    last_first = [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair]
    return F.pad(x, last_first), (0,) * len(before)


class HalfConvolution(torch.autograd.Function):
    """fp16 convolution in fp32 arithmetic; keeps the fp16 tensors.

    oneDNN's fp16 kernels on such CPUs are reference code: 32 x 64 x 14 x 14 with 3 x 3 weights took 275 ms for the
    weight gradient, against 10 ms in fp32 (2 cores, torch 2.13).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_size = None if bias is None else list(bias.shape)
        ctx.options = (stride, padding, dilation, groups)
        with torch.autocast("cpu", enabled=False):
            convolve = _BY_RANK[weight.dim()]
            if _NATIVE_HALF:
                return convolve(x, weight, bias, stride, padding, dilation, groups)
            wide_bias = None if bias is None else bias.float()
            return convolve(x.float(), weight.float(), wide_bias, stride, padding, dilation, groups).half()

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        grads = torch.ops.aten.convolution_backward(
            grad_y.float(),
            x.float(),
            weight.float(),
            ctx.bias_size,
            stride,
            padding,
            dilation,
            False,
            [0] * len(stride),
            groups,
            ctx.needs_input_grad[:3],
        )
        halves = (grad if grad is None else grad.half() for grad in grads)
        return *halves, None, None, None, None
