"""``batch_norm_act`` and its gradients in 200-bit arithmetic: the oracle of fp64 kernels.

An fp64 oracle errs as much as the fp64 results that it would judge. mpmath comes with torch (through sympy).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import torch
from bn_cases import Case
from mpmath import mp, mpf
from torch import Tensor


def _gelu_tanh(z: Any) -> tuple[Any, Any]:
    root, cubic = mp.sqrt(2 / mp.pi), mpf("0.044715")
    t = mp.tanh(root * (z + cubic * z**3))
    return z * (1 + t) / 2, (1 + t) / 2 + z * (1 - t**2) * root * (1 + 3 * cubic * z**2) / 2


def _gelu(z: Any) -> tuple[Any, Any]:
    return z * mp.ncdf(z), mp.ncdf(z) + z * mp.npdf(z)


def _silu(z: Any) -> tuple[Any, Any]:
    s = 1 / (1 + mp.exp(-z))
    return z * s, s * (1 + z * (1 - s))


def _hardswish(z: Any) -> tuple[Any, Any]:
    if abs(z) >= 3:
        return (z, mpf(1)) if z > 0 else (mpf(0), mpf(0))
    return z * (z + 3) / 6, (2 * z + 3) / 6


def _value_and_slope(case: Case) -> Callable[[Any], tuple[Any, Any]]:
    negative = mpf(case.negative_slope)
    table: dict[str, Callable[[Any], tuple[Any, Any]]] = {
        "identity": lambda z: (z, mpf(1)),
        "relu": lambda z: (z, mpf(1)) if z > 0 else (mpf(0), mpf(0)),
        "leaky_relu": lambda z: (z, mpf(1)) if z > 0 else (negative * z, negative),
        "relu6": lambda z: (mp.mpf(min(max(z, 0), 6)), mpf(int(0 < z < 6))),
        "silu": _silu,
        "gelu": _gelu,
        "gelu_tanh": _gelu_tanh,
        "hardswish": _hardswish,
    }
    return table[case.activation]


def exact_results(case: Case, training: bool) -> dict[str, Tensor]:
    """What ``bn_cases.oracle_results`` returns, correctly rounded to fp64; for small cases with a momentum."""
    with mp.workprec(200):
        return _exact_results(case, training)


def _exact_results(case: Case, training: bool) -> dict[str, Tensor]:
    function = _value_and_slope(case)
    channels = case.x.shape[1]

    def rows(t: Tensor | None) -> Any:  # [C][N * rest] of mpf
        return (
            None if t is None else [[mpf(v) for v in row] for row in t.transpose(0, 1).reshape(channels, -1).tolist()]
        )

    def vector(t: Tensor | None, default: int) -> Any:
        return [mpf(default)] * channels if t is None else [mpf(v) for v in t.tolist()]

    x, grad_y, residual = rows(case.x), rows(case.grad_y), rows(case.residual)
    weight, bias = vector(case.weight, 1), vector(case.bias, 0)
    running_mean, running_var = vector(case.running_mean, 0), vector(case.running_var, 1)
    results: dict[str, list[Any]] = {"y": [], "grad_x": [], "grad_residual": [], "grad_weight": [], "grad_bias": []}
    count, eps, momentum = len(x[0]), mpf(case.eps), mpf(case.momentum)
    for c in range(channels):
        mean, var = running_mean[c], running_var[c]
        if training:
            mean = mpmath.fsum(x[c]) / count
            var = mpmath.fsum((v - mean) ** 2 for v in x[c]) / count
            running_mean[c] = (1 - momentum) * running_mean[c] + momentum * mean
            running_var[c] = (1 - momentum) * running_var[c] + momentum * var * count / (count - 1)
        invstd = 1 / mp.sqrt(var + eps)
        xhat = [(v - mean) * invstd for v in x[c]]
        z = [h * weight[c] + bias[c] + (0 if residual is None else residual[c][i]) for i, h in enumerate(xhat)]
        pairs = [function(v) for v in z]
        dz = [g * slope for g, (_, slope) in zip(grad_y[c], pairs, strict=True)]
        d_bias, d_weight = mpmath.fsum(dz), mpmath.fsum(d * h for d, h in zip(dz, xhat, strict=True))
        batch = (d_bias / count, d_weight / count) if training else (0, 0)
        results["y"].append([y for y, _ in pairs])
        results["grad_x"].append(
            [weight[c] * invstd * (d - batch[0] - h * batch[1]) for d, h in zip(dz, xhat, strict=True)]
        )
        results["grad_residual"].append(dz)
        results["grad_weight"].append(d_weight)
        results["grad_bias"].append(d_bias)
    return _tensors(case, results, {"running_mean": running_mean, "running_var": running_var} if training else {})


def _tensors(case: Case, results: dict[str, list[Any]], statistics: dict[str, list[Any]]) -> dict[str, Tensor]:
    shape = case.x.transpose(0, 1).shape
    out: dict[str, Tensor] = {}
    for name, values in results.items():
        if name == "grad_residual" and case.residual is None:
            continue
        if name in ("grad_weight", "grad_bias") and case.weight is None:
            continue
        flat = [float(v) for row in values for v in (row if isinstance(row, list) else [row])]
        tensor = torch.tensor(flat, dtype=torch.float64)
        out[name] = tensor if isinstance(values[0], mpf) else tensor.view(shape).transpose(0, 1)
    for name, values in statistics.items():
        if getattr(case, name) is not None:
            out[name] = torch.tensor([float(v) for v in values], dtype=torch.float64)
    return out
