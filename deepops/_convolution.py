"""Two-dimensional convolution: ATen's, but for fp16 on CPUs that lack fp16 arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Size = int | tuple[int, int]

# oneDNN runs fp16 convolutions natively only on CPUs with AMX or AVX512-FP16; its weight gradient never does.
_NATIVE_HALF: bool = torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def pair(value: Size) -> tuple[int, int]:
    """``(value, value)`` unless ``value`` is a pair already."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def convolution(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C / groups, R, S]
    bias: Tensor | None,  # [K]
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
) -> Tensor:
    """``torch.nn.functional.conv2d``; fp16 on a CPU is computed in fp32 where oneDNN would run its reference kernel."""
    if x.device.type == "cpu":
        half = x.dtype is torch.float16
        if torch.is_autocast_enabled("cpu"):
            half = torch.get_autocast_dtype("cpu") is torch.float16 and x.dtype is not torch.float64
        if half:
            return _half_convolution(x, weight, bias, stride, padding, dilation, groups)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _half_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Size, padding: Size | str, dilation: Size, groups: int
) -> Tensor:
    x, weight = x.half(), weight.half()  # what autocast does; else nothing
    bias = None if bias is None else bias.half()
    if isinstance(padding, str):
        x, padding = pad_explicitly(x, weight, padding, dilation)
    apply: Callable[..., Tensor] = HalfConvolution.apply
    return apply(x, weight, bias, pair(stride), pair(padding), pair(dilation), groups)


def pad_explicitly(x: Tensor, weight: Tensor, padding: str, dilation: Size) -> tuple[Tensor, tuple[int, int]]:
    """Turn ``"same"`` or ``"valid"`` into numbers; pads ``x`` itself where the two sides differ."""
    if padding == "valid":
        return x, (0, 0)
    totals = [d * (k - 1) for d, k in zip(pair(dilation), weight.shape[2:], strict=True)]
    if all(total % 2 == 0 for total in totals):
        return x, (totals[0] // 2, totals[1] // 2)
    height, width = totals
    return F.pad(x, [width // 2, width - width // 2, height // 2, height - height // 2]), (0, 0)


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
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_size = None if bias is None else list(bias.shape)
        ctx.options = (stride, padding, dilation, groups)
        with torch.autocast("cpu", enabled=False):
            if _NATIVE_HALF:
                return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
            wide_bias = None if bias is None else bias.float()
            return F.conv2d(x.float(), weight.float(), wide_bias, stride, padding, dilation, groups).half()

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
            [0, 0],
            groups,
            ctx.needs_input_grad[:3],
        )
        halves = (grad if grad is None else grad.half() for grad in grads)
        return *halves, None, None, None, None
