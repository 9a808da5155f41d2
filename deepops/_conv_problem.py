"""Which convolutions deepops' own GPU kernels cover (``csrc/conv_bn_act``), and a call as they take it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepops import backends
from deepops._checks import Size, autocast_enabled, check_residual, check_residual_dtype
from deepops._convolution import output_sizes, padding_of, per_dimension
from deepops._library import binaries, gpu_not_covered, has_kernel

# Namespace of ops for CPU tensors: the SIMT executor's, which tests put here.
executor: Any = None

# stride, padding, dilation, groups, as torch.nn.functional.conv2d takes them
Geometry = tuple[Size, Size | str, Size, int]
# stride (y, x), padding (top, bottom, left, right), dilation (y, x)
Sizes = tuple[list[int], list[int], list[int]]

COVERED = (
    "two spatial dimensions, one group, data in channels_last, a multiple of 8 channels in float16 or bfloat16 or up "
    "to 4 in these or float32, no process group, NVIDIA GPUs of compute capability 8.0 and newer"
)
PLAIN = (Tensor, torch.nn.Parameter)  # subclasses may mean anything by their memory
_LEAST_CAPABILITY = (8, 0)
_DIRECT_CHANNELS, _PACK = 4, 8  # as in csrc/conv_bn_act/conv_bn_act.h
_MOST_PIXELS, _MOST_PER_SIDE = 2**31 - 1 - 4096, 2**24  # as in csrc/conv_bn_act/host.h


class Problem(NamedTuple):
    """A call that the kernels cover; tensors are plain, of one dtype and in channels_last."""

    x: Tensor  # [N, C, H, W]
    conv_weight: Tensor  # [K, C, R, S]
    residual: Tensor | None  # [N, K, P, Q]
    sizes: Sizes
    pixels: int  # N * P * Q


def ops() -> Any:
    """Where the kernels are."""
    return torch.ops.deepops if executor is None else executor


def problem_of(
    x: Tensor, conv_weight: Tensor, residual: Tensor | None, geometry: Geometry, in_group: bool = False
) -> Problem | None:
    """A checked call of ``conv_bn_act`` as the kernels take it.

    None where torch's convolution is to have it, be it only to say what is wrong with it.

    Raises:
        ValueError: ``deepops.backends.conv`` is ``"fused"``, which does not cover the call.
    """
    if x.numel() == 0:
        return None
    autocast = autocast_enabled(x)
    if autocast and x.dtype is not torch.float64:  # as torch's convolution does
        dtype = torch.get_autocast_dtype(x.device.type)
        x, conv_weight = x.to(dtype), conv_weight.to(dtype)
    reason = not_covered(x, conv_weight, geometry[3], in_group)
    if not reason and autocast and residual is not None and residual.dtype is not x.dtype:
        reason = f"a residual of {residual.dtype} for a result of {x.dtype}"
    if reason:
        if backends.conv == "fused":
            raise ValueError(f"deepops.backends.conv: 'fused' covers {COVERED}; got {reason}")
        return None
    sizes = stride, padding, dilation = sizes_of(conv_weight, *geometry[:3])
    if min(*stride, *dilation, *conv_weight.shape) < 1 or min(padding) < 0:
        return None
    spatial = output_sizes(x, conv_weight, stride, padding, dilation)
    pixels = x.size(0) * spatial[0] * spatial[1]
    most = max(*x.shape, *conv_weight.shape, *stride, *padding, *dilation)
    if min(spatial) < 1 or pixels > _MOST_PIXELS or most > _MOST_PER_SIDE:
        return None
    if residual is not None:
        check_residual(residual, x, torch.Size([x.size(0), conv_weight.size(0), *spatial]))
        check_residual_dtype(residual, x)
        residual = _laid_out(residual)
    return Problem(x, _laid_out(conv_weight), residual, sizes, pixels)


def not_covered(x: Tensor, conv_weight: Tensor, groups: int, in_group: bool) -> str:
    """What of a call the kernels do not cover; empty where they do."""
    for tensor in (x, conv_weight):
        if type(tensor) not in PLAIN:
            return f"a tensor of class {type(tensor).__name__}"
    channels = x.size(1)
    if conv_weight.dim() != 4:
        return f"conv_weight of shape {list(conv_weight.shape)}"
    if groups != 1:
        return f"groups={groups}"
    if x.dtype is torch.float64 or x.dtype is not conv_weight.dtype:
        return f"x of {x.dtype}"
    if channels > _DIRECT_CHANNELS and (x.dtype is torch.float32 or channels % _PACK):
        return f"{channels} channels of {x.dtype}"
    if not _is_channels_last(x, conv_weight):
        return f"x of strides {x.stride()}"
    if in_group:
        return "a process group"
    if channels > _DIRECT_CHANNELS and x.data_ptr() % 16:
        return "x that begins between 16-byte boundaries"
    return gpu_reason(x.device)


def gpu_reason(device: torch.device) -> str:
    """Why the kernels cannot run on ``device``, a GPU; empty where they can."""
    if executor is not None:
        return ""
    if not has_kernel("conv_bn_act_eval", "cuda"):
        return f"a build without these kernels (_cuda {binaries()['_cuda']})"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return f"a GPU of compute capability {'.'.join(map(str, capability))}"
    return gpu_not_covered(device.index)


def _is_channels_last(x: Tensor, conv_weight: Tensor) -> bool:
    """Whether ``x`` is, and torch's convolution would give a result that is.

    Data of one channel has both layouts; as in torch, the strides of ``x`` or of the weights tell which is meant.
    """
    if not x.is_contiguous(memory_format=torch.channels_last):
        return False
    if not x.is_contiguous():
        return True
    return any(
        t.is_contiguous(memory_format=torch.channels_last) and (not t.is_contiguous() or t.stride(1) == t.size(1) == 1)
        for t in (x, conv_weight)
    )


def sizes_of(conv_weight: Tensor, stride: Size, padding: Size | str, dilation: Size) -> Sizes:
    """Numbers for each dimension, padding for each side."""
    strides, dilations = [list(per_dimension(value, conv_weight)) for value in (stride, dilation)]
    if isinstance(padding, str):
        return strides, padding_of(padding, conv_weight, dilation), dilations
    return strides, [side for side in per_dimension(padding, conv_weight) for _ in range(2)], dilations


def _laid_out(tensor: Tensor) -> Tensor:
    """In channels_last, on a 16-byte boundary."""
    tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor.clone() if tensor.data_ptr() % 16 else tensor
