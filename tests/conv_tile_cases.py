"""Cases of the two ops that convolve on the GPU, ``conv_bn_act_eval`` and ``conv_bn_act_statistics``: data, stock
PyTorch, the fp64 oracle, and calls of the ops.

Two kinds of data. Of small integers every sum is exact in fp32: the result must be the oracle's, rounded once, and a
single wrong index shows. Random values are for the tolerance rule.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import backends
import torch
import torch.nn.functional as F
from pairwise import pairwise
from torch import Tensor

from deepops import reference
from deepops.testing import ErrorPool, to_double, use_threads

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
ACTIVATIONS = ["relu", "leaky_relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish", "identity"]
EXACT_ACTIVATIONS = ["identity", "relu", "leaky_relu", "relu6"]  # with a slope of 1 / 4

# filter, stride (y, x), padding (top, bottom, left, right), dilation (y, x); the defaults of make_case() else
GEOMETRIES: dict[str, dict[str, Any]] = {
    "1x1": {"filter_size": (1, 1), "padding": (0, 0, 0, 0)},
    "1x1 stride 2": {"filter_size": (1, 1), "padding": (0, 0, 0, 0), "stride": (2, 2)},
    "1x1 padded": {"filter_size": (1, 1), "padding": (1, 0, 2, 0)},
    "3x3": {},
    "3x3 stride 2": {"stride": (2, 2)},
    "3x3 bare": {"padding": (0, 0, 0, 0)},
    "5x3 uneven": {"filter_size": (5, 3), "stride": (2, 1), "padding": (2, 0, 1, 3)},
    "7x7 stride 2": {"filter_size": (7, 7), "stride": (2, 2), "padding": (3, 3, 3, 3)},
    "dilation": {"dilation": (2, 3), "padding": (2, 2, 3, 3)},
    "dilation and stride": {"dilation": (3, 2), "stride": (2, 3), "padding": (3, 2, 4, 1)},
    "stride above filter": {"filter_size": (2, 1), "stride": (3, 4), "padding": (0, 1, 0, 0)},
    "wide padding": {"filter_size": (2, 2), "padding": (5, 4, 6, 3)},
}
IMAGES = [(1, 7, 9), (3, 9, 20), (2, 19, 8)]  # N, H, W: parts of tiles, several tiles, tiles across images
# Whole packs and none, whole tiles and tails: K of every kernel.
OUT_CHANNELS = [1, 5, 8, 20, 32, 40, 67, 136]
CHANNELS = {"direct": [1, 2, 3, 4], "gemm": [8, 16, 40, 72]}  # C
DTYPES = {"direct": [F32, F16, BF16], "gemm": [F16, BF16]}


@dataclass
class Case:
    """Everything that calls of both ops need."""

    x: Tensor  # [N, C, H, W], channels_last, as the next two
    conv_weight: Tensor  # [K, C, R, S]
    residual: Tensor | None  # [N, K, P, Q]
    scale: Tensor  # [K], float32, as what follows
    shift: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    momentum: float | None = 0.1
    eps: float = 1e-5
    activation: str = "relu"
    negative_slope: float = 0.25

    def clone(self) -> Case:
        """Fresh copies of what an op updates in place."""
        return replace(self, **{n: None if (t := getattr(self, n)) is None else t.clone() for n in BUFFERS})

    def on_cpu(self) -> Case:
        return replace(self.clone(), **{n: t.cpu() for n, t in vars(self.clone()).items() if isinstance(t, Tensor)})

    def in_double(self) -> Case:
        return Case(**to_double(vars(self.on_cpu())))

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        return self.stride, self.padding, self.dilation


def channels_last(values: Tensor, dtype: torch.dtype) -> Tensor:
    """On the backend's device. The strides of channels_last also where torch sees no difference, at sizes of 1."""
    n, c, h, w = values.shape
    out = torch.empty_strided((n, c, h, w), (h * w * c, 1, w * c, c), dtype=dtype, device=backends.device())
    return out.copy_(values)


@use_threads(1)
def make_case(
    image: tuple[int, int, int],
    channels: int,
    out_channels: int,
    dtype: torch.dtype = F32,
    *,
    filter_size: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (1, 1, 1, 1),
    dilation: tuple[int, int] = (1, 1),
    residual: bool = False,
    integers: bool = False,
    mean: float = 0.0,
    **options: Any,
) -> Case:
    """Build a case, of ``integers`` or at random. image: N, H, W. mean: of x."""
    n, h, w = image
    device = backends.device()

    def data(*shape: int, most: int = 3) -> Tensor:
        if integers:
            return torch.randint(-most, most + 1, shape).to(torch.float64)
        return torch.randn(shape, dtype=torch.float64)

    def per_channel(low: float, high: float) -> Tensor:
        return (torch.rand(out_channels, dtype=torch.float64) * (high - low) + low).to(F32).to(device)

    x = channels_last(data(n, channels, h, w) + mean, dtype)
    conv_weight = channels_last(data(out_channels, channels, *filter_size), dtype)
    case = Case(
        x=x,
        conv_weight=conv_weight,
        residual=None,
        scale=(2.0 ** torch.randint(-3, 2, (out_channels,))).to(device) if integers else per_channel(-2.0, 2.0),
        shift=torch.randint(-8, 9, (out_channels,)).to(F32).to(device) if integers else per_channel(-1.0, 2.0),
        running_mean=per_channel(-0.5, 0.5),
        running_var=per_channel(0.5, 4.0),
        num_batches_tracked=torch.tensor(3, device=device),
        stride=list(stride),
        padding=list(padding),
        dilation=list(dilation),
        **options,
    )
    if not residual:
        return case
    shape = output_shape(case)
    return replace(case, residual=channels_last(data(*shape, most=9), dtype))


def output_shape(case: Case) -> tuple[int, ...]:
    top, bottom, left, right = case.padding
    meta = F.pad(case.x.to("meta"), [left, right, top, bottom])
    return F.conv2d(meta, case.conv_weight.to("meta"), None, case.stride, 0, case.dilation).shape


def cover(kernel: str, activations: list[str]) -> list[dict[str, Any]]:
    """Arguments of make_case() (geometry by name) that hold every pair of options of a kernel."""
    factors = {
        "geometry": list(GEOMETRIES),
        "image": IMAGES,
        "channels": CHANNELS[kernel],
        "out_channels": OUT_CHANNELS,
        "dtype": DTYPES[kernel],
        "activation": activations,
        "residual": [False, True],
        "momentum": [0.1, None],
    }
    return pairwise(factors, lambda case: True)


def case_of(options: dict[str, Any], **more: Any) -> Case:
    rest = {name: value for name, value in options.items() if name != "geometry"}
    return make_case(**rest, **GEOMETRIES[options["geometry"]], **more)


# ---- oracle and stock -----------------------------------------------------------------------------------------------


def evaluate_reference(case: Case) -> Tensor:
    return reference.conv_bn_act_eval(
        case.x, case.conv_weight, case.residual, case.scale, case.shift, *case.geometry,
        activation=case.activation, negative_slope=case.negative_slope,
    )  # fmt: skip


def statistics_reference(case: Case) -> dict[str, Tensor]:
    z, mean, invstd = reference.conv_bn_act_statistics(
        case.x, case.conv_weight, case.running_mean, case.running_var, case.num_batches_tracked, *case.geometry,
        case.momentum, case.eps,
    )  # fmt: skip
    return with_buffers(case, z, mean, invstd)


def with_buffers(case: Case, z: Tensor, mean: Tensor, invstd: Tensor) -> dict[str, Tensor]:
    buffers = {n: t for n in BUFFERS if (t := getattr(case, n)) is not None}
    return {"z": z, "mean": mean, "invstd": invstd, **buffers}


def oracle_results(case: Case) -> dict[str, Tensor]:
    """Of both ops; running statistics after the call."""
    case = case.in_double()
    return {"y": evaluate_reference(case), **statistics_reference(case)}


def stock_results(case: Case) -> dict[str, Tensor]:
    """PyTorch's own layers in the dtype of x, but NCHW: its channels_last batch norm is far less accurate."""
    case = case.on_cpu()
    top, bottom, left, right = case.padding
    x = F.pad(case.x.contiguous(), [left, right, top, bottom])
    z = F.conv2d(x, case.conv_weight.contiguous(), None, case.stride, 0, case.dilation)
    count, momentum = case.num_batches_tracked, case.momentum
    if count is not None:
        count.add_(1)
        momentum = 1.0 / float(count) if momentum is None else momentum
    none = torch.zeros_like(case.scale)
    y = F.batch_norm(z, none, torch.ones_like(none), case.scale, case.shift, False, 0.0, 0.0)
    y = y if case.residual is None else y + case.residual
    y = reference.activation(y, case.activation, case.negative_slope)
    mean, invstd = stock_statistics(z, case.running_mean, case.running_var, momentum, case.eps)
    return {"y": y, **with_buffers(case, z, mean, invstd)}


def stock_statistics(
    z: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Mean and invstd by PyTorch's batch norm in training, of fp32."""
    z = z.float().contiguous()
    _, mean, invstd = torch.native_batch_norm(z, None, None, running_mean, running_var, True, momentum or 0.0, eps)
    return mean, invstd


# ---- the ops --------------------------------------------------------------------------------------------------------


def evaluate(case: Case) -> Tensor:
    return backends.ops().conv_bn_act_eval(
        case.x, case.conv_weight, case.residual, case.scale, case.shift, *case.geometry, case.activation,
        case.negative_slope,
    )  # fmt: skip


def statistics(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Call the op; running statistics are updated in ``case``."""
    return backends.ops().conv_bn_act_statistics(
        case.x, case.conv_weight, case.running_mean, case.running_var, case.num_batches_tracked, *case.geometry,
        case.momentum, case.eps,
    )  # fmt: skip


def op_results(case: Case) -> dict[str, Tensor]:
    """What ``oracle_results`` and ``stock_results`` return, from the ops."""
    case = case.clone()
    y = evaluate(case)
    return {"y": y, **with_buffers(case, *statistics(case))}


class ConvPools:
    """One ``ErrorPool`` per result and dtype over all cases of a test."""

    def __init__(self) -> None:
        self.pools: dict[tuple[str, torch.dtype], ErrorPool] = {}

    def add(self, case: Case, name: str = "") -> None:
        """Run both ops on ``case`` and take in all errors."""
        actual = op_results(case)
        with use_threads(1):
            oracle, stock = oracle_results(case), stock_results(case)
        assert set(actual) == set(oracle) == set(stock)
        sizes = statistic_scales(oracle)
        for key, expected in oracle.items():
            if key == "num_batches_tracked":
                assert actual[key].item() == expected.item() == stock[key].item(), f"{name} {key}"
                continue
            if expected.dim() == 4:
                assert actual[key].dtype == case.x.dtype, f"{name} {key}: {actual[key].dtype}"
                assert actual[key].is_contiguous(memory_format=torch.channels_last), f"{name} {key}"
            else:
                assert actual[key].dtype == F32, f"{name} {key}: {actual[key].dtype}"
            pool = self.pools.setdefault((key, case.x.dtype), ErrorPool())
            pool.add(actual[key], stock[key], expected, name=f"{name} {key}".strip(), scale=sizes.get(key))

    def check(self) -> None:
        for pool in self.pools.values():
            pool.check()


def statistic_scales(oracle: dict[str, Tensor]) -> dict[str, float]:
    """Sizes to measure the errors of means against: of what is added up, as the sums may cancel."""
    size = oracle["z"].square().mean([0, 2, 3]).sqrt().max().item() or 1.0
    return {"mean": size, "running_mean": size}
