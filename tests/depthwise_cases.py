"""Cases of the ``depthwise_bn_act`` op tests, and calls of the two ops; the rest is in ``block_cases.py``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import backends
import torch
import torch.nn.functional as F
from block_cases import BlockCase, BlockPools, named, oracle_results, random_case, results_of
from torch import Tensor

from deepops import reference
from deepops._autograd import memory_format_of

__all__ = [
    "GEOMETRIES",
    "Case",
    "DepthwisePools",
    "backward",
    "make_case",
    "op_results",
    "oracle_results",
    "train",
]

# filter, stride, padding, dilation, height and width
GEOMETRIES: dict[str, dict[str, Any]] = {
    "3x3": {},
    "3x3 stride 2": {"stride": (2, 2)},
    "5x5": {"filter_size": (5, 5), "padding": (2, 2, 2, 2)},
    "5x5 stride 2": {"filter_size": (5, 5), "stride": (2, 2), "padding": (2, 2, 2, 2)},
    "7x7": {"filter_size": (7, 7), "padding": (3, 3, 3, 3)},
    "no padding": {"padding": (0, 0, 0, 0)},
    "asymmetric": {"filter_size": (2, 4), "padding": (0, 1, 1, 2)},
    "uneven": {"filter_size": (3, 2), "stride": (1, 3), "padding": (2, 2, 0, 0)},
    "dilation": {"dilation": (2, 3), "padding": (2, 2, 3, 3)},
    "dilation and stride": {"dilation": (3, 2), "stride": (2, 2), "padding": (3, 3, 1, 1)},
    "1x1": {"filter_size": (1, 1), "padding": (0, 0, 0, 0)},
    "1x1 stride 2": {"filter_size": (1, 1), "stride": (2, 2), "padding": (0, 0, 0, 0)},
    "stride above filter": {"filter_size": (2, 2), "stride": (3, 4), "padding": (0, 0, 0, 0)},
    "wide padding": {"padding": (5, 4, 6, 3)},
}

VECTORS = ("weight", "bias", "running_mean", "running_var")


@dataclass(kw_only=True)
class Case(BlockCase):
    """conv_weight is [C, 1, R, S]."""

    stride: list[int]
    padding: list[int]  # top, bottom, left, right
    dilation: list[int]

    TERMS = [0, 2, 3]  # noqa: RUF012

    @property
    def layout(self) -> torch.memory_format:
        one_pixel = self.x.size(2) * self.x.size(3) == 1  # is in either layout
        return memory_format_of(self.grad_y if one_pixel and self.grad_y is not None else self.x)

    def padded(self, x: Tensor) -> Tensor:
        top, bottom, left, right = self.padding
        return F.pad(x, [left, right, top, bottom])

    def convolution(self, x: Tensor, conv_weight: Tensor) -> Tensor:
        return F.conv2d(x, conv_weight, None, self.stride, 0, self.dilation, x.size(1))

    def reference(self) -> Tensor:
        return reference.depthwise_bn_act(
            self.x, self.conv_weight, self.weight, self.bias, self.stride, self.padding, self.dilation, self.eps,
            self.running_mean, self.running_var, self.num_batches_tracked, self.momentum,
            activation=self.activation, negative_slope=self.negative_slope,
        )  # fmt: skip


def make_case(
    shape: tuple[int, int, int, int],
    filter_size: tuple[int, int] = (3, 3),
    dtype: torch.dtype = torch.float32,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (1, 1, 1, 1),
    dilation: tuple[int, int] = (1, 1),
    **options: Any,
) -> Case:
    """Build a random case; ``options`` are those of ``random_case``."""
    geometry = {"stride": list(stride), "padding": list(padding), "dilation": list(dilation)}
    return random_case(Case, shape, (shape[1], 1, *filter_size), dtype, **geometry, **options)


def train(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Call the op; running statistics are updated in ``case``."""
    return backends.ops().depthwise_bn_act_train(
        case.x, case.conv_weight, case.weight, case.bias, case.running_mean, case.running_var,
        case.num_batches_tracked, case.stride, case.padding, case.dilation, case.momentum, case.eps, case.activation,
        case.negative_slope,
    )  # fmt: skip


def backward(
    case: Case, mean: Tensor, invstd: Tensor, need: tuple[bool, bool, bool] = (True, True, True)
) -> dict[str, Tensor]:
    """Call the op; ``need`` is (x, conv_weight, affine). Unwanted gradients are left out."""
    gradients = backends.ops().depthwise_bn_act_backward(
        case.grad_y, case.x, case.conv_weight, case.weight, case.bias, mean, invstd, case.stride, case.padding,
        case.dilation, case.activation, case.negative_slope, *need,
    )  # fmt: skip
    return named(gradients, need)


def beside_16_bit(case: Case) -> Case:
    """Filter and vectors in float32, as the op takes them beside 16-bit ``x``."""
    wide = {name: t.float() for name in ("conv_weight", *VECTORS) if (t := getattr(case, name)) is not None}
    return replace(case, **wide)


def op_results(case: Case) -> dict[str, Tensor]:
    """What ``oracle_results`` and ``stock_results`` return, from the compiled ops."""
    dtype = case.x.dtype
    case = case.clone() if dtype.itemsize > 2 else beside_16_bit(case.clone())
    y, mean, invstd = train(case)
    assert y.dtype is dtype
    results = results_of(case, y, backward(case, mean, invstd))
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in results.items()}


class DepthwisePools(BlockPools):
    """Over cases of this module."""

    def __init__(self) -> None:
        super().__init__(op_results)
