"""Cases of the ``batch_norm_act`` op tests: data, stock PyTorch, the fp64 oracle, and calls of the three ops.

ReLU, leaky ReLU, ReLU6 and hardswish have kinks: where the pre-activation lies within rounding of one, two correct
programs may take different branches. ``Case.grad_y`` is 0 at such elements, so that either branch gives the same
gradients, the sums over a channel included. Which branch is taken there has its own test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import backends
import torch
import torch.nn.functional as F
from torch import Tensor

from deepops import reference
from deepops.testing import ErrorPool, to_double, use_threads

ACTIVATIONS = ["relu", "leaky_relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish", "identity"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}
# How far from a kink the branch is sure. A kept output of 16 bits may itself have been rounded onto the kink at 6.
MARGIN = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}
FORMATS = {
    "NC": (2, torch.contiguous_format),
    "NCL": (3, torch.contiguous_format),
    "NCHW": (4, torch.contiguous_format),
    "NHWC": (4, torch.channels_last),
    "NCDHW": (5, torch.contiguous_format),
    "NDHWC": (5, torch.channels_last_3d),
}
GRADIENTS = ("grad_x", "grad_residual", "grad_weight", "grad_bias")


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class Case:
    """Everything one call needs; tensors of rank 1 are in the statistics' dtype."""

    x: Tensor
    residual: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    momentum: float | None = 0.1
    eps: float = 1e-5
    activation: str = "relu"
    negative_slope: float = 0.01
    grad_y: Tensor = field(default_factory=lambda: torch.empty(0))

    def clone(self) -> Case:
        """Fresh copies of what an op updates in place."""
        names = ("running_mean", "running_var", "num_batches_tracked")
        return replace(self, **{n: None if (t := getattr(self, n)) is None else t.clone() for n in names})

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and 1/sqrt(var + eps) of the running statistics, as evaluation hands them to the op."""
        assert self.running_mean is not None
        assert self.running_var is not None
        return self.running_mean, (self.running_var.double() + self.eps).rsqrt().to(self.running_var.dtype)


@use_threads(1)
def make_case(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
    residual: bool = False,
    affine: bool = True,
    mean: float = 0.5,
    training: bool = True,
    **options: Any,
) -> Case:
    """Build a random case; its pre-activations reach across all kinks."""
    channels, stats, device = shape[1], statistics_dtype(dtype), backends.device()

    def stored(values: Tensor) -> Tensor:
        return values.to(dtype).to(device).contiguous(memory_format=memory_format)

    def data() -> Tensor:
        return stored(torch.randn(shape, dtype=torch.float64))

    def per_channel(low: float, high: float) -> Tensor:
        return (torch.rand(channels, dtype=torch.float64) * (high - low) + low).to(stats).to(device)

    case = Case(
        x=stored(spread(shape) + mean),
        residual=data() if residual else None,
        weight=per_channel(-3.0, 3.0) if affine else None,
        bias=per_channel(-1.0, 3.0) if affine else None,
        running_mean=per_channel(-0.5, 0.5) + (0 if training else mean),
        running_var=per_channel(0.5, 4.0),
        num_batches_tracked=torch.tensor(3, device=device),
        activation=activation,
        negative_slope=negative_slope,
        **options,
    )
    sure = torch.ones(shape, dtype=torch.bool, device=device)
    z = reference_forward(replace(to_double_case(case), activation="identity"), training) if case.x.numel() else case.x
    for kink in KINKS.get(activation, ()):
        sure &= (z.double() - kink).abs() > MARGIN[dtype] * max(1.0, abs(mean) / 10)
    return replace(case, grad_y=stored(data() * sure))


def spread(shape: tuple[int, ...]) -> Tensor:
    """Normal quantiles in random order, shifted and scaled per channel.

    Two random values may lie so close that 1/sigma magnifies every rounding; these never do.
    """
    channels, count = shape[1], math.prod(shape) // max(shape[1], 1)
    quantiles = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / max(count, 1))
    values = quantiles[torch.rand(channels, count).argsort(1)]
    values = values * (torch.rand(channels, 1, dtype=torch.float64) * 2 + 1)
    values = values + torch.rand(channels, 1, dtype=torch.float64) * 2 - 1
    return values.view(channels, shape[0], *shape[2:]).transpose(0, 1)


def to_double_case(case: Case) -> Case:
    return Case(**to_double(vars(case)))


def reference_forward(case: Case, training: bool) -> Tensor:
    return reference.batch_norm_act(
        case.x, case.running_mean, case.running_var, case.weight, case.bias, training, case.momentum, case.eps,
        activation=case.activation, negative_slope=case.negative_slope, residual=case.residual,
        num_batches_tracked=case.num_batches_tracked,
    )  # fmt: skip


def stock_forward(case: Case, training: bool) -> Tensor:
    """PyTorch's own layers in sequence: batch norm, addition, activation."""
    momentum = case.momentum
    if training and case.num_batches_tracked is not None:
        case.num_batches_tracked.add_(1)
        momentum = 1.0 / float(case.num_batches_tracked) if momentum is None else momentum
    z = F.batch_norm(
        case.x, case.running_mean, case.running_var, case.weight, case.bias, training,
        0.0 if momentum is None else momentum, case.eps,
    )  # fmt: skip
    return reference.activation(z if case.residual is None else z + case.residual, case.activation, case.negative_slope)


def finer(case: Case) -> Case:
    """The case that stock is given: NCHW, and 16-bit data widened to fp32.

    Both make the rule stricter. Stock's channels_last kernel is 1000 times less accurate than its NCHW one, and with
    16-bit data it rounds after every layer, which a fused op must not.
    """
    stats = statistics_dtype(case.x.dtype)
    wide = {n: t.to(stats) for n, t in vars(case).items() if isinstance(t, Tensor) and t.is_floating_point()}
    return replace(case.clone(), **{n: t.clone(memory_format=torch.contiguous_format) for n, t in wide.items()})


def differentiate(forward: Any, case: Case, training: bool) -> dict[str, Tensor]:
    """``y``, the gradients, and the running statistics after the call, by autograd."""
    case = case.clone()
    names = [n for n in ("x", "residual", "weight", "bias") if getattr(case, n) is not None]
    leaves = {n: getattr(case, n).detach().clone().requires_grad_() for n in names}
    case = replace(case, **leaves)
    y = forward(case, training)
    gradients = torch.autograd.grad(y, list(leaves.values()), case.grad_y)
    results = {"y": y.detach(), **{f"grad_{n}": g for n, g in zip(leaves, gradients, strict=True)}}
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        if training and getattr(case, name) is not None:
            results[name] = getattr(case, name)
    return results


def oracle_results(case: Case, training: bool) -> dict[str, Tensor]:
    return differentiate(reference_forward, to_double_case(case), training)


def stock_results(case: Case, training: bool) -> dict[str, Tensor]:
    return differentiate(stock_forward, finer(case), training)


def train(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Call the op; running statistics are updated in ``case``."""
    return backends.ops().batch_norm_act_train(
        case.x, case.residual, case.weight, case.bias, case.running_mean, case.running_var, case.num_batches_tracked,
        case.momentum, case.eps, case.activation, case.negative_slope,
    )  # fmt: skip


def evaluate(case: Case) -> Tensor:
    mean, invstd = case.statistics()
    return backends.ops().batch_norm_act_eval(
        case.x, case.residual, case.weight, case.bias, mean, invstd, case.activation, case.negative_slope
    )


def kept(case: Case, y: Tensor) -> Tensor | None:
    """What the backward needs beside x when there was a residual."""
    if case.residual is None or case.activation == "identity":
        return None
    from_output = case.activation in ("relu", "relu6") or (case.activation == "leaky_relu" and case.negative_slope >= 0)
    return y if from_output else case.residual


def backward(
    case: Case, y: Tensor, mean: Tensor, invstd: Tensor, training: bool, need: tuple[bool, bool, bool] | None = None
) -> dict[str, Tensor]:
    """Call the op; ``need`` is (x, residual, affine), by default all that exist. Unwanted gradients are left out."""
    if need is None:
        need = (True, case.residual is not None, case.weight is not None or case.bias is not None)
    gradients = backends.ops().batch_norm_act_backward(
        case.grad_y, case.x, kept(case, y), case.weight, case.bias, mean, invstd, training, case.activation,
        case.negative_slope, *need,
    )  # fmt: skip
    wanted = (need[0], need[1], need[2], need[2])
    for name, gradient, want in zip(GRADIENTS, gradients, wanted, strict=True):
        assert want or gradient.numel() == 0, f"{name} was not asked for, yet has {gradient.numel()} elements"
    return {name: g for name, g, want in zip(GRADIENTS, gradients, wanted, strict=True) if want}


def op_results(case: Case, training: bool) -> dict[str, Tensor]:
    """What ``oracle_results`` and ``stock_results`` return, from the compiled ops."""
    case = case.clone()
    y, mean, invstd = train(case) if training else (evaluate(case), *case.statistics())
    gradients = backward(case, y, mean, invstd, training)
    results = {"y": y, **{n: g for n, g in gradients.items() if getattr(case, n.removeprefix("grad_")) is not None}}
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        if training and getattr(case, name) is not None:
            results[name] = getattr(case, name)
    return results


class Pools:
    """One ``ErrorPool`` per result (y, each gradient, each statistic) over all cases of a test."""

    def __init__(self) -> None:
        self.pools: dict[str, ErrorPool] = {}

    def add(self, case: Case, training: bool, name: str = "", actual: dict[str, Tensor] | None = None) -> None:
        """Run the ops on ``case``, unless ``actual`` has their results, and take in all errors."""
        actual = op_results(case, training) if actual is None else actual
        with use_threads(1):  # small tensors: stock's threads would only wait for one another
            self._add(case, training, name, actual)

    def _add(self, case: Case, training: bool, name: str, actual: dict[str, Tensor]) -> None:
        oracle, stock = oracle_results(case, training), stock_results(case, training)
        assert set(actual) == set(oracle) == set(stock)
        stats, scales = statistics_dtype(case.x.dtype), gradient_scales(case, training)
        for key, expected in oracle.items():
            if key == "num_batches_tracked":
                assert actual[key].item() == expected.item() == stock[key].item(), f"{name} {key}"
                continue
            per_channel = expected.dim() == 1
            assert actual[key].dtype == (stats if per_channel else case.x.dtype), f"{name} {key}: {actual[key].dtype}"
            assert per_channel or actual[key].stride() == case.x.stride(), f"{name} {key}: {actual[key].stride()}"
            pool = self.pools.setdefault(key, ErrorPool())
            pool.add(actual[key], stock[key], expected, name=f"{name} {key}".strip(), scale=scales.get(key))

    def anchor(self, case: Case, training: bool) -> None:
        """Let stock's errors on ``case`` count, a case big enough that they are no accident."""
        with use_threads(1):
            oracle, stock, scales = (
                oracle_results(case, training),
                stock_results(case, training),
                gradient_scales(case, training),
            )
            for key, expected in oracle.items():
                if expected.is_floating_point():
                    pool = self.pools.setdefault(key, ErrorPool())
                    pool.add(stock[key], stock[key], expected, name=f"anchor {key}", scale=scales.get(key))

    def check(self) -> None:
        for pool in self.pools.values():
            pool.check()


def gradient_scales(case: Case, training: bool) -> dict[str, float]:
    """Sizes to measure the errors of the gradients against: of what is added up, as the sums themselves may cancel."""
    if not case.x.numel():
        return {}
    dims, per_channel = [0, *range(2, case.x.dim())], [1, -1] + [1] * (case.x.dim() - 2)
    x, grad_y = case.x.double(), case.grad_y.double()
    mean, var = (x.mean(dims), x.var(dims, correction=0)) if training else (case.running_mean, case.running_var)
    assert mean is not None
    assert var is not None
    invstd = (var.double() + case.eps).rsqrt()
    slope = invstd * (1.0 if case.weight is None else case.weight.double().abs())
    xhat = (x - mean.double().view(per_channel)) * invstd.view(per_channel)
    sizes = {
        "grad_x": grad_y.abs().amax(dims) * slope,
        "grad_weight": (grad_y * xhat).square().sum(dims).sqrt(),
        "grad_bias": grad_y.square().sum(dims).sqrt(),
    }
    return {name: size.max().item() or 1.0 for name, size in sizes.items()}
