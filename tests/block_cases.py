"""Cases of the ops that are a convolution, batch normalization and activation in one: data, stock PyTorch, the oracle.

``depthwise_cases.py`` and ``pointwise_cases.py`` say which convolution, and call their ops. As in ``bn_cases``,
``grad_y`` is 0 where the pre-activation lies so near a kink that the branch is not sure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import backends
import torch
import torch.nn.functional as F
from bn_cases import KINKS, MARGIN, Pools
from torch import Tensor

from deepops import reference
from deepops._autograd import memory_format_of
from deepops.testing import ErrorPool, to_double, use_threads

GRADIENTS = ("x", "conv_weight", "weight", "bias")
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(kw_only=True)
class BlockCase:
    """Everything a call needs."""

    x: Tensor  # [N, C, H, W]
    conv_weight: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None = 0.1
    eps: float = 1e-5
    activation: str = "relu"
    negative_slope: float = 0.01
    grad_y: Tensor | None = None

    TERMS: ClassVar[list[int]]  # dimensions of x whose values meet in one gradient of conv_weight

    @property
    def layout(self) -> torch.memory_format:
        """What the results must have."""
        return memory_format_of(self.x)

    def padded(self, x: Tensor) -> Tensor:
        return x

    def convolution(self, x: Tensor, conv_weight: Tensor) -> Tensor:
        """Stock's, of what ``padded`` returns."""
        raise NotImplementedError

    def reference(self) -> Tensor:
        """The formulas of ``deepops.reference``."""
        raise NotImplementedError

    def clone(self: C) -> C:
        """Fresh copies of what the op updates in place."""
        return replace(self, **{n: None if (t := getattr(self, n)) is None else t.clone() for n in BUFFERS})


C = TypeVar("C", bound=BlockCase)


@use_threads(1)
def random_case(
    kind: type[C],
    shape: tuple[int, int, int, int],
    filters: tuple[int, int, int, int],
    dtype: torch.dtype,
    layout: torch.memory_format = torch.channels_last,
    *,
    mean: float = 0.0,
    deviation: float = 1.0,
    affine: bool = True,
    **options: Any,
) -> C:
    """Build a random case; its pre-activations reach across all kinks."""
    device = backends.device()

    def stored(values: Tensor) -> Tensor:
        return values.to(dtype).to(device)

    def per_channel(low: float, high: float) -> Tensor:
        return stored(torch.rand(filters[0], dtype=torch.float64) * (high - low) + low)

    case = kind(
        x=stored(torch.randn(shape, dtype=torch.float64) * deviation + mean).contiguous(memory_format=layout),
        conv_weight=stored(torch.randn(filters, dtype=torch.float64)),
        weight=per_channel(-3.0, 3.0) if affine else None,
        bias=per_channel(-1.0, 3.0) if affine else None,
        running_mean=per_channel(-0.5, 0.5),
        running_var=per_channel(0.5, 4.0),
        num_batches_tracked=torch.tensor(3, device=device),
        **options,
    )
    z = replace(to_double_case(case), activation="identity").reference()
    sure = torch.ones(z.shape, dtype=torch.bool, device=device)
    for kink in KINKS.get(case.activation, ()):
        sure &= (z - kink).abs() > MARGIN[dtype] * max(1.0, abs(mean) / deviation / 10)
    grad_y = torch.randn(z.shape, dtype=torch.float64).to(device) * sure
    return replace(case, grad_y=stored(grad_y).contiguous(memory_format=layout))


def to_double_case(case: C) -> C:
    return type(case)(**to_double(vars(case)))


def stock_forward(case: BlockCase) -> Tensor:
    """PyTorch's own layers in sequence, NCHW: its channels_last batch norm is far less accurate."""
    momentum = case.momentum
    if case.num_batches_tracked is not None:
        case.num_batches_tracked.add_(1)
        momentum = 1.0 / float(case.num_batches_tracked) if momentum is None else momentum
    z = case.convolution(case.padded(case.x.contiguous()), case.conv_weight)
    z = F.batch_norm(z, case.running_mean, case.running_var, case.weight, case.bias, True, momentum or 0.0, case.eps)
    return reference.activation(z, case.activation, case.negative_slope)


def differentiate(forward: Callable[[Any], Tensor], case: BlockCase) -> dict[str, Tensor]:
    """``y``, the gradients, and the running statistics after the call, by autograd."""
    case = case.clone()
    leaves = {n: t.detach().clone().requires_grad_() for n in GRADIENTS if (t := getattr(case, n)) is not None}
    case = replace(case, **leaves)
    y = forward(case)
    gradients = torch.autograd.grad(y, list(leaves.values()), case.grad_y)
    results = {"y": y.detach(), **{f"grad_{n}": g for n, g in zip(leaves, gradients, strict=True)}}
    return {**results, **buffers(case)}


def buffers(case: BlockCase) -> dict[str, Tensor]:
    return {n: t for n in BUFFERS if (t := getattr(case, n)) is not None}


def oracle_results(case: BlockCase) -> dict[str, Tensor]:
    return differentiate(lambda case: case.reference(), to_double_case(case))


def stock_results(case: BlockCase) -> dict[str, Tensor]:
    return differentiate(stock_forward, case)


def named(gradients: Sequence[Tensor], need: tuple[bool, bool, bool]) -> dict[str, Tensor]:
    """What a backward op was asked for; ``need`` is (x, conv_weight, affine)."""
    wanted = (*need, need[2])
    for name, gradient, want in zip(GRADIENTS, gradients, wanted, strict=True):
        assert want or gradient.numel() == 0, f"{name} was not asked for, yet has {gradient.numel()} elements"
    return {f"grad_{n}": g for n, g, want in zip(GRADIENTS, gradients, wanted, strict=True) if want}


def results_of(case: BlockCase, y: Tensor, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """In the form of ``oracle_results``, after the ops."""
    given = {n: g for n, g in gradients.items() if getattr(case, n.removeprefix("grad_")) is not None}
    return {"y": y, **given, **buffers(case)}


class BlockPools(Pools):
    """One ``ErrorPool`` per result over all cases of a test."""

    def __init__(self, op_results: Callable[[Any], dict[str, Tensor]]) -> None:
        """``op_results`` runs the ops on a case."""
        super().__init__()
        self._op_results = op_results

    def add(self, case: BlockCase, name: str = "") -> None:  # type: ignore[override]
        """Run the ops on ``case`` and take in all errors."""
        actual = self._op_results(case)
        with use_threads(1):
            oracle, stock = oracle_results(case), stock_results(case)
        assert set(actual) == set(oracle) == set(stock)
        for key, expected in oracle.items():
            if key == "num_batches_tracked":
                assert actual[key].item() == expected.item(), f"{name} {key}"
                continue
            assert actual[key].dtype == case.x.dtype
            if key in ("y", "grad_x"):
                assert actual[key].is_contiguous(memory_format=case.layout), f"{name} {key}"
            scale = gradient_scale(case, key)
            pool = self.pools.setdefault(key, ErrorPool())
            pool.add(actual[key], stock[key], expected, name=f"{name} {key}".strip(), scale=scale)


def gradient_scale(case: BlockCase, key: str) -> float | None:
    """Size to measure errors of a sum against where its terms may cancel: that of what is added up."""
    assert case.grad_y is not None
    size = case.grad_y.double().square().sum([0, 2, 3]).sqrt()
    if key == "grad_conv_weight":
        plain = to_double_case(case)
        x = plain.padded(plain.x)
        slope = (plain.convolution(x, plain.conv_weight).var([0, 2, 3], correction=0) + case.eps).rsqrt()
        size = size * slope * x.square().mean(case.TERMS).sqrt()
        size = size if case.weight is None else size * case.weight.double().abs()
    elif key not in ("grad_weight", "grad_bias"):
        return None
    return size.max().item() or 1.0
