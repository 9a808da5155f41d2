"""Cases of the ``lstm_sequence`` op tests: data, stock PyTorch, the fp64 oracle, and calls of the two ops.

The gradients of ``weight_hh`` and ``weight_hr`` are products of what the backward op returns, as in
``deepops.functional``: here in fp64, so that nothing but the op's own errors counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import backends
import torch
from torch import Tensor

from deepops.reference import lstm as formulas
from deepops.testing import ErrorPool, to_double, use_threads

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
OUTPUTS = ("h", "c", "h_n", "c_n")
SMALL = ("weight_peephole", "weight_ln_hh", "weight_ln_c", "bias_ln_c")  # their gradients come from the op
TENSORS = ("gates_x", "h0", "c0", "weight_hh", "weight_hr", *SMALL)  # what has a gradient, in the order of the schema

# Every option of a step on its own; what `make_case` takes.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reverse": {"reverse": True},
    "projection": {"projection": True},
    "peephole": {"peephole": True},
    "layer norm": {"layer_norm": True},
    "hidden mask": {"hidden_dropout": 0.3},
    "clip": {"clip": True},
    "zoneout h": {"zoneout_h": 0.3},
    "zoneout c": {"zoneout_c": 0.2},
    "recurrent dropout": {"recurrent_dropout": 0.25},
    "lengths": {"lengths": True},
    "lengths in reverse": {"lengths": True, "reverse": True},
    "evaluation": {"zoneout_h": 0.1, "zoneout_c": 0.4, "recurrent_dropout": 0.5, "training": False},
    "everything happens": {"zoneout_h": 1.0, "recurrent_dropout": 1.0},
    "later step": {"zoneout_h": 0.5, "first_step": 1000},
}

# For pairwise.pairwise().
FACTORS: dict[str, tuple[Any, ...]] = {
    "dtype": DTYPES,
    "hidden": (5, 16, 20, 33),
    "projection": (False, True),
    "peephole": (False, True),
    "layer_norm": (False, True),
    "hidden_dropout": (0.0, 0.3),
    "lengths": (False, True),
    "training": (False, True),
    "reverse": (False, True),
    "clip": (False, True),
    "zoneout_h": (0.0, 0.3),
    "zoneout_c": (0.0, 0.2),
    "recurrent_dropout": (0.0, 0.25),
    "first_step": (0, 7),
}


@dataclass
class Case:
    """Everything a call needs. ``gates_x`` is in the type the op takes, with values that ``h0``'s dtype can hold."""

    gates_x: Tensor  # [T, B, 4H]
    h0: Tensor  # [B, R]
    c0: Tensor  # [B, H]
    weight_hh: Tensor  # [4H, R]
    weight_hr: Tensor | None = None  # [P, H]
    weight_peephole: Tensor | None = None  # [3H]
    weight_ln_hh: Tensor | None = None  # [4H]
    weight_ln_c: Tensor | None = None  # [H]
    bias_ln_c: Tensor | None = None  # [H]
    hidden_mask: Tensor | None = None  # [B, R]
    lengths: Tensor | None = None  # [B]
    seed: Tensor | None = None  # [1]
    reverse: bool = False
    cell_clip: float | None = None
    layer_norm_eps: float = 1e-5
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    recurrent_dropout: float = 0.0
    first_step: int = 0
    grad_h: Tensor | None = None  # [T, B, R]
    grad_c: Tensor | None = None  # [T, B, H]
    grad_h_n: Tensor | None = None  # [B, R]
    grad_c_n: Tensor | None = None  # [B, H]

    def options(self) -> dict[str, Any]:
        """The keyword arguments of the reference."""
        names = ("reverse", "cell_clip", "layer_norm_eps", "zoneout_h", "zoneout_c", "recurrent_dropout", "first_step")
        return {name: getattr(self, name) for name in names}


def gates_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of ``gates_x`` and ``grad_gates``: what the backend computes with (CPU) or the type of the data."""
    if backends.current == "cpu" and dtype != torch.float64:
        return torch.float32
    return dtype


@use_threads(1)
def make_case(
    steps: int = 5,
    batch: int = 3,
    hidden: int = 20,
    dtype: torch.dtype = torch.float32,
    *,
    projection: bool = False,  # to 2/3 of hidden
    peephole: bool = False,
    layer_norm: bool = False,
    hidden_dropout: float = 0.0,
    lengths: bool = False,
    training: bool = True,
    clip: bool = False,  # somewhere among the values of the cells
    scale: float = 1.0,  # of gates_x
    **options: Any,
) -> Case:
    """Build a random case with gradients for all outputs."""
    state = max(1, 2 * hidden // 3) if projection else hidden
    if clip and dtype.itemsize == 2:  # among few cells there is a limit that rounding carries none across
        steps, batch = min(steps, 2), min(batch, 2)
    if hidden < 16:  # the variance of a few cells may be next to nothing, which blows up every rounding
        options.setdefault("layer_norm_eps", 0.1)

    def stored(values: Tensor) -> Tensor:
        return values.to(dtype).to(backends.device())

    def normal(*shape: int) -> Tensor:
        return stored(torch.randn(shape, dtype=torch.float64))

    def uniform(*shape: int, bound: float) -> Tensor:
        return stored((torch.rand(shape, dtype=torch.float64) * 2 - 1) * bound)

    case = Case(
        gates_x=(normal(steps, batch, 4 * hidden) * scale).to(gates_dtype(dtype)),
        h0=uniform(batch, state, bound=1.0),
        c0=normal(batch, hidden),
        weight_hh=uniform(4 * hidden, state, bound=state**-0.5),
        weight_hr=uniform(state, hidden, bound=(3 / hidden) ** 0.5) if projection else None,
        weight_peephole=uniform(3 * hidden, bound=0.3) if peephole else None,
        **options,
    )
    if layer_norm:
        # Small enough that what rounding changes fades away.
        case.weight_ln_hh, case.weight_ln_c = uniform(4 * hidden, bound=0.8), 1 + uniform(hidden, bound=0.5)
        case.bias_ln_c = normal(hidden)
    if hidden_dropout:
        kept = torch.rand(batch, state, device=backends.device()) >= hidden_dropout
        case.hidden_mask = stored(kept / (1 - hidden_dropout))
    if lengths:
        case.lengths = torch.randint(0, steps + 1, (batch,), device=backends.device())
        case.lengths[:1] = steps
    if training:
        case.seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=backends.device())
    if clip:
        case.cell_clip = between_cells(case)
    case.grad_h, case.grad_c = normal(steps, batch, state), normal(steps, batch, hidden)
    case.grad_h_n, case.grad_c_n = normal(batch, state), normal(batch, hidden)
    return case


def to_double_case(case: Case) -> Case:
    return Case(**to_double(vars(case)))


def between_cells(case: Case) -> float:
    """A limit for ``cell_clip`` that a part of the cells passes, and none comes near: on it the gradient jumps.

    The best of 40, or the first that no cell comes so near that fp32's rounding could carry it across.
    """
    best, widest = 1.0, -1.0
    enough = 1e-4 if case.h0.dtype.itemsize > 2 else math.inf
    candidates = torch.linspace(0.3, 1.2, 40).tolist()
    for candidate in (candidates[7 * i % 40] for i in range(40)):
        with cells_before_clipping() as seen:
            reference_forward(replace(to_double_case(case), cell_clip=candidate))
        cells = torch.cat([cell.flatten() for cell in seen]).abs() if seen else torch.zeros(1)
        distance = (cells - candidate).abs().min().item() if cells.numel() else 1.0
        if distance > widest:
            best, widest = candidate, distance
        if distance > enough:
            break
    return best


@contextmanager
def cells_before_clipping() -> Iterator[list[Tensor]]:
    """What the reference clamps inside the block."""
    seen: list[Tensor] = []
    clamp = Tensor.clamp

    def spy(tensor: Tensor, *limits: float) -> Tensor:
        seen.append(tensor.detach())
        return clamp(tensor, *limits)

    with mock.patch.object(Tensor, "clamp", spy):
        yield seen


def reference_forward(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return formulas.lstm_sequence(
        case.gates_x, case.h0, case.c0, case.weight_hh, case.weight_hr, case.weight_peephole, case.weight_ln_hh,
        case.weight_ln_c, case.bias_ln_c, case.hidden_mask, case.lengths, case.seed, **case.options(),
    )  # fmt: skip


def differentiate(case: Case) -> dict[str, Tensor]:
    """Outputs of the reference, in the dtype of the case, and the gradients by autograd."""
    leaves = {n: t.detach().clone().requires_grad_() for n in TENSORS if (t := getattr(case, n)) is not None}
    outputs = reference_forward(replace(case, **leaves))
    given = {name: getattr(case, f"grad_{name}") for name in OUTPUTS}
    pairs = [
        (out, given[n]) for n, out in zip(OUTPUTS, outputs, strict=True) if given[n] is not None and out.requires_grad
    ]
    gradients = torch.autograd.grad(
        [out for out, _ in pairs], list(leaves.values()), [grad for _, grad in pairs], materialize_grads=True
    )
    results = {name: out.detach() for name, out in zip(OUTPUTS, outputs, strict=True)}
    return {**results, **{f"grad_{name}": grad for name, grad in zip(leaves, gradients, strict=True)}}


def oracle_results(case: Case) -> dict[str, Tensor]:
    return differentiate(to_double_case(case))


def stock_results(case: Case) -> dict[str, Tensor]:
    return differentiate(replace(case, gates_x=case.gates_x.to(case.h0.dtype)))


def forward(case: Case, *, save: bool = True, all_c: bool = True) -> tuple[Tensor, ...]:
    """Call the op: h, c, h_n, c_n, gates, out, r, stats."""
    return backends.ops().lstm_sequence(
        case.gates_x, case.h0, case.c0, case.weight_hh, case.weight_hr, case.weight_peephole, case.weight_ln_hh,
        case.weight_ln_c, case.bias_ln_c, case.hidden_mask, case.lengths, case.seed, case.reverse, case.cell_clip,
        case.layer_norm_eps, case.zoneout_h, case.zoneout_c, case.recurrent_dropout, case.first_step, save, all_c,
    )  # fmt: skip


def backward(case: Case, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Call the op on what ``forward`` returned: grad_gates, grad_r, grad_out, grad_h0, grad_c0, those of ``SMALL``."""
    _, c, _, _, gates, _, r, stats = saved
    return backends.ops().lstm_sequence_backward(
        case.grad_h, case.grad_c, case.grad_h_n, case.grad_c_n, gates, c, r, stats, case.c0, case.weight_hh,
        case.weight_hr, case.weight_peephole, case.weight_ln_hh, case.weight_ln_c, case.bias_ln_c, case.hidden_mask,
        case.lengths, case.seed, case.reverse, case.cell_clip, case.layer_norm_eps, case.zoneout_h, case.zoneout_c,
        case.recurrent_dropout, case.first_step,
    )  # fmt: skip


def states_before(case: Case, h: Tensor) -> Tensor:
    """[T, B, R]: what each step multiplied with ``weight_hh``."""
    if not h.size(0):
        return h
    first = case.h0[None]
    before = torch.cat((h[1:], first)) if case.reverse else torch.cat((first, h[:-1]))
    if case.lengths is not None and case.reverse:
        last = torch.arange(h.size(0), device=h.device)[:, None] == case.lengths - 1
        before = torch.where(last[:, :, None], first, before)
    return before if case.hidden_mask is None else before * case.hidden_mask


def op_results(case: Case) -> dict[str, Tensor]:
    """What ``oracle_results`` and ``stock_results`` return, from the compiled ops, in the dtype of the data."""
    saved = forward(case)
    h, out = saved[0], saved[5]
    grad_gates, grad_r, grad_out, grad_h0, grad_c0, *small = backward(case, saved)
    grad_r = grad_r if case.weight_ln_hh is not None else grad_gates
    results = {**dict(zip(OUTPUTS, saved, strict=False)), "grad_gates_x": grad_gates}
    results |= {"grad_h0": grad_h0, "grad_c0": grad_c0}
    rows = grad_r.double().flatten(0, 1)
    results["grad_weight_hh"] = rows.T @ states_before(case, h).double().flatten(0, 1)
    if case.weight_hr is not None:
        results["grad_weight_hr"] = grad_out.double().flatten(0, 1).T @ out.double().flatten(0, 1)
    for name, gradient in zip(SMALL, small, strict=True):
        assert (getattr(case, name) is None) == (gradient.numel() == 0 and case.c0.size(1) > 0), name
        if getattr(case, name) is not None:
            results[f"grad_{name}"] = gradient
    return {name: result.to(case.h0.dtype) for name, result in results.items()}


class Expected(NamedTuple):
    """What the results of a case are judged by."""

    oracle: dict[str, Tensor]
    stock: dict[str, Tensor]


@use_threads(1)
def expected_of(case: Case) -> Expected:
    return Expected(oracle_results(case), stock_results(case))


class LstmPools:
    """One ``ErrorPool`` per result over all cases of a test."""

    def __init__(self) -> None:
        self.pools: dict[str, ErrorPool] = {}

    def add(self, case: Case, name: str = "", expected: Expected | None = None) -> None:
        """Run the ops on ``case`` and take in all errors; ``expected`` spares computing it again."""
        case = replace(case, gates_x=case.gates_x.to(gates_dtype(case.h0.dtype)))  # it may be another backend's
        actual = op_results(case)
        oracle, stock = expected or expected_of(case)
        assert set(actual) == set(oracle) == set(stock)
        for key, exact in oracle.items():
            if case.h0.dtype == torch.float64:  # has nothing finer to be compared with
                torch.testing.assert_close(actual[key], exact, rtol=1e-10, atol=1e-10, msg=f"{name} {key}")
                continue
            pool = self.pools.setdefault(f"{case.h0.dtype} {key}", ErrorPool())
            is_sum = key.startswith("grad_weight") or key == "grad_bias_ln_c"
            scale = max(sum_scale(oracle), exact.abs().max().item()) if is_sum else None
            pool.add(actual[key], stock[key], exact, name=f"{name} {key}".strip(), scale=scale)

    def check(self) -> None:
        for pool in self.pools.values():
            if pool._cases:
                pool.check()


def sum_scale(oracle: dict[str, Tensor]) -> float:
    """Size to measure errors of a weight's gradient against, whose terms may cancel: that of what is added up."""
    gates = oracle["grad_gates_x"]
    size = gates.square().sum((0, 1)).sqrt().max().item() if gates.numel() else 0.0
    return size or 1.0
