"""Cases of the ``pointwise_bn_act`` op tests, and calls of the two ops; the rest is in ``block_cases.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from block_cases import BlockCase, BlockPools, named, oracle_results, random_case, results_of
from torch import Tensor

from deepops import reference

__all__ = ["Case", "PointwisePools", "backward", "make_case", "op_results", "oracle_results", "train"]


@dataclass(kw_only=True)
class Case(BlockCase):
    """conv_weight is [K, C, 1, 1]; x and y are channels_last or contiguous."""

    TERMS = [0, 1, 2, 3]  # noqa: RUF012

    def convolution(self, x: Tensor, conv_weight: Tensor) -> Tensor:
        return F.conv2d(x, conv_weight)

    def reference(self) -> Tensor:
        return reference.pointwise_bn_act(
            self.x, self.conv_weight, self.weight, self.bias, self.eps, self.running_mean, self.running_var,
            self.num_batches_tracked, self.momentum, activation=self.activation, negative_slope=self.negative_slope,
        )  # fmt: skip


def make_case(
    shape: tuple[int, int, int, int], channels: int, dtype: torch.dtype = torch.float32, **options: Any
) -> Case:
    """Build a random case; ``options`` are those of ``random_case``."""
    return random_case(Case, shape, (channels, shape[1], 1, 1), dtype, **options)


Kept = list[Tensor]  # mean, invstd, moments, bits


def train(case: Case, save: bool = True) -> tuple[Tensor, Kept]:
    """Call the op; running statistics are updated in ``case``."""
    y, *kept = torch.ops.deepops.pointwise_bn_act_train(
        case.x, case.conv_weight, case.weight, case.bias, case.running_mean, case.running_var,
        case.num_batches_tracked, case.momentum, case.eps, case.activation, case.negative_slope, save,
    )  # fmt: skip
    return y, kept


def backward(case: Case, kept: Kept, need: tuple[bool, bool, bool] = (True, True, True)) -> dict[str, Tensor]:
    """Call the op; ``need`` is (x, conv_weight, affine). Unwanted gradients are left out."""
    gradients = torch.ops.deepops.pointwise_bn_act_backward(
        case.grad_y, case.x, case.conv_weight, case.weight, case.bias, *kept, case.activation, case.negative_slope,
        *need,
    )  # fmt: skip
    return named(gradients, need)


def op_results(case: Case) -> dict[str, Tensor]:
    """What ``oracle_results`` and ``stock_results`` return, from the compiled ops."""
    case = case.clone()
    y, kept = train(case)
    return results_of(case, y, backward(case, kept))


class PointwisePools(BlockPools):
    """Over cases of this module."""

    def __init__(self) -> None:
        super().__init__(op_results)
