"""Argument checks of ``deepops.functional``: each error names the argument, what was given and what is allowed.

They live in Python because the text of an error thrown inside a compiled op may be lost on older torch versions, and
they all run before anything is changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from deepops.reference.batch_norm_act import ACTIVATIONS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Size = int | tuple[int, ...]  # of a convolution: one number, or one for each spatial dimension

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SIXTEEN_BIT = (torch.bfloat16, torch.float16)


# Dtype in which the compiled ops take affine parameters and statistics, by that of the data.
_STATISTICS_DTYPE = {dtype: torch.float64 if dtype is torch.float64 else torch.float32 for dtype in _FLOATING}


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which the compiled ops take affine parameters and statistics for data of ``dtype``."""
    return _STATISTICS_DTYPE[dtype]


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on where ``x`` is; devices without autocast (``meta``) have it off."""
    device = x.device.type
    return (device == "cpu" or torch.amp.is_autocast_available(device)) and torch.is_autocast_enabled(device)


def transforms_active() -> bool:
    """Whether torch.func or forward-mode AD is at work: they do not see into a compiled op."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def check_data(name: str, value: object) -> None:
    """Raise unless ``value`` is a dense floating-point tensor; ``name`` is the argument's."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")
    if value.dtype not in _FLOATING:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {value.dtype}")


def check_activation(activation: str, approximate: str) -> None:
    """Raise unless ``activation`` is known and ``approximate`` is a variant of gelu."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if approximate != "none" and approximate != "tanh":
        raise ValueError(f"approximate: expected 'none' or 'tanh', got {approximate!r}")


def check_per_channel(name: str, value: object, x: Tensor, channels: int) -> None:
    """Raise unless ``value`` is a vector of ``channels`` numbers of a dtype that goes with ``x``, on its device."""
    if (
        isinstance(value, Tensor)
        and value.shape == (channels,)
        and value.dtype is _STATISTICS_DTYPE[x.dtype]
        and value.device == x.device
        and value.layout is torch.strided
    ):
        return  # the usual case, in one look
    check_data(name, value)
    assert isinstance(value, Tensor)
    if value.dim() != 1 or value.size(0) != channels:
        raise ValueError(f"{name}: expected shape [{channels}], one per channel, got {list(value.shape)}")
    allowed = statistics_dtype(x.dtype)
    if value.dtype is not allowed and not (value.dtype is x.dtype and x.dtype in _SIXTEEN_BIT):
        also = f" or {x.dtype}" if x.dtype in _SIXTEEN_BIT else ""
        raise TypeError(f"{name}: expected {allowed}{also} beside x of {x.dtype}, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected device {x.device}, where x is, got {value.device}")


def check_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    num_batches_tracked: Tensor | None,
    alone: bool = True,
) -> None:
    """Check everything but the activation and the residual. ``x`` must have passed ``check_data``.

    ``alone``: the batch is all here; else other processes have more of it.
    """
    if x.dim() < 2:
        raise ValueError(f"x: expected rank 2 or more, [N, C, ...], got shape {list(x.shape)}")
    check_vectors(x, x.size(1), running_mean, running_var, weight, bias)
    check_eps(eps, training)
    if training:
        channels = x.size(1)
        if alone and x.numel() == channels and channels > 0:  # torch's own error, word for word
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
        if num_batches_tracked is not None:
            _check_counter(num_batches_tracked, x)
        elif momentum is None and (running_mean is not None or running_var is not None):
            raise ValueError("num_batches_tracked: expected a tensor with momentum=None (cumulative average), got None")
    elif running_mean is None or running_var is None:
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{missing}: expected a tensor with training=False, got None")


def check_vectors(
    x: Tensor,
    channels: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Check the per-channel tensors of a batch normalization; ``x`` stands for dtype and device alone."""
    vectors = (("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias))
    for name, vector in vectors:
        if vector is not None:
            check_per_channel(name, vector, x, channels)


def check_eps(eps: float, training: bool) -> None:
    """Raise unless ``eps`` is positive; in evaluation it may be 0. In torch's own words."""
    if training and eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if eps < 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")


def check_residual(residual: object, x: Tensor, y_shape: torch.Size) -> None:
    """Raise unless ``residual`` can be added to the normalized ``x``; its dtype is checked by the caller."""
    check_data("residual", residual)
    assert isinstance(residual, Tensor)
    if residual.shape != y_shape:
        raise ValueError(f"residual: expected shape {list(y_shape)}, that of the output, got {list(residual.shape)}")
    if residual.device != x.device:
        raise ValueError(f"residual: expected device {x.device}, where x is, got {residual.device}")


def checked_group(process_group: object) -> ProcessGroup | None:
    """``process_group``, or None where this process is alone in it. Raise unless it is a group one can work with."""
    if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        what = f"got {type(process_group).__name__}"
        if dist.is_available() and process_group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("process_group: expected a group with this process, got one without (NON_GROUP_MEMBER)")
        raise TypeError(f"process_group: expected a torch.distributed.ProcessGroup, {what}")
    try:
        rank = dist.get_rank(process_group)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"process_group: expected a group that exists, got one that is gone: {error}") from error
    if rank < 0:
        raise ValueError("process_group: expected a group with this process, got one without")
    return process_group if process_group.size() > 1 else None


def check_residual_dtype(residual: Tensor, x: Tensor) -> None:
    """Raise unless ``residual`` has the dtype of ``x``: autocast alone may mix them."""
    if residual.dtype is not x.dtype:
        raise TypeError(f"residual: expected {x.dtype}, the dtype of x, got {residual.dtype}")


_SPATIAL = {3: "L", 4: "H, W", 5: "D, H, W"}


def check_convolution(x: Tensor, conv_weight: object, conv_bias: object, groups: int, autocast: bool) -> None:
    """Raise unless the tensors fit a convolution of one to three dimensions. ``x`` must have passed ``check_data``."""
    check_data("conv_weight", conv_weight)
    assert isinstance(conv_weight, Tensor)
    rank = conv_weight.dim()
    if rank not in _SPATIAL:
        wanted = "rank 3, 4 or 5, [K, C / groups, *kernel_size]"
        raise ValueError(f"conv_weight: expected {wanted}, got shape {list(conv_weight.shape)}")
    if x.dim() != rank:
        raise ValueError(f"x: expected rank {rank}, [N, C, {_SPATIAL[rank]}], got shape {list(x.shape)}")
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups: expected a positive integer, got {groups!r}")
    channels = conv_weight.size(1) * groups
    if x.size(1) != channels:
        wanted = f"{channels} channels, conv_weight.size(1) * groups"
        raise ValueError(f"x: expected {wanted}, got shape {list(x.shape)}")
    _check_like_x("conv_weight", conv_weight, x, autocast)
    if conv_bias is not None:
        check_data("conv_bias", conv_bias)
        assert isinstance(conv_bias, Tensor)
        if conv_bias.dim() != 1 or conv_bias.size(0) != conv_weight.size(0):
            shape = f"[{conv_weight.size(0)}], one per output channel"
            raise ValueError(f"conv_bias: expected shape {shape}, got {list(conv_bias.shape)}")
        _check_like_x("conv_bias", conv_bias, x, autocast)


def check_padding(padding: Size | str, stride: Size) -> None:
    """Raise unless a ``padding`` given by name is one that torch knows and that goes with ``stride``."""
    if not isinstance(padding, str):
        return
    if padding not in ("same", "valid"):
        raise ValueError(f"padding: expected 'same', 'valid' or numbers, got {padding!r}")
    steps = (stride,) if isinstance(stride, int) else stride
    if padding == "same" and any(step != 1 for step in steps):
        raise ValueError(f"padding: 'same' needs a stride of 1, got stride {stride}")


def _check_like_x(name: str, value: Tensor, x: Tensor, autocast: bool) -> None:
    if value.dtype is not x.dtype and not autocast:
        raise TypeError(f"{name}: expected {x.dtype}, the dtype of x, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected device {x.device}, where x is, got {value.device}")


def _check_counter(value: object, x: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"num_batches_tracked: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype is not torch.int64 or value.numel() != 1:
        given = f"{value.dtype} of shape {list(value.shape)}"
        raise TypeError(f"num_batches_tracked: expected one int64 number, got {given}")
    if value.device != x.device:
        raise ValueError(f"num_batches_tracked: expected device {x.device}, where x is, got {value.device}")
