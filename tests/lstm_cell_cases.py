"""Cases of the ``lstm_cell`` op tests: data, stock PyTorch, the fp64 oracle, and calls of the ops.

Oracle and stock are ``deepops/reference/lstm.py`` with one step, in fp64 and in the dtype of the case. The gradients of
weights and biases are products of what the backward op returns, here in fp64: nothing but its own errors counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import backends
import torch
import torch.nn.functional as F
from torch import Tensor

from deepops.reference import lstm as formulas
from deepops.testing import ErrorPool, to_double, use_threads

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
TENSORS = ("x", "h", "c", "weight_ih", "weight_hh", "bias", "weight_peephole")


@dataclass
class Case:
    """Everything a call needs, in one dtype; ``bias`` is the sum of both."""

    x: Tensor  # [B, I]
    h: Tensor  # [B, H]
    c: Tensor  # [B, H]
    weight_ih: Tensor  # [4H, I]
    weight_hh: Tensor  # [4H, H]
    bias: Tensor | None = None  # [4H]
    weight_peephole: Tensor | None = None  # [3H]
    cell_clip: float | None = None
    grad_h: Tensor | None = None  # [B, H]
    grad_c: Tensor | None = None  # [B, H]


@use_threads(1)
def make_case(
    batch: int = 3,
    inputs: int = 7,
    hidden: int = 20,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    peephole: bool = False,
    clip: bool = False,  # between two of the values of the cells
    scale: float = 1.0,  # of the sums
) -> Case:
    def uniform(*shape: int, bound: float) -> Tensor:
        values = (torch.rand(shape, dtype=torch.float64) * 2 - 1) * bound
        return values.to(dtype).to(backends.device())

    case = Case(
        x=uniform(batch, inputs, bound=2.0 * scale),
        h=uniform(batch, hidden, bound=1.0),
        c=uniform(batch, hidden, bound=2.0),
        weight_ih=uniform(4 * hidden, inputs, bound=inputs**-0.5),
        weight_hh=uniform(4 * hidden, hidden, bound=hidden**-0.5),
        bias=uniform(4 * hidden, bound=1.0) if bias else None,
        weight_peephole=uniform(3 * hidden, bound=1.0) if peephole else None,
        grad_h=uniform(batch, hidden, bound=1.0),
        grad_c=uniform(batch, hidden, bound=1.0),
    )
    if clip:  # in the widest gap between them: on the limit the gradient jumps
        values = differentiate(to_double_case(case))["new_c"].abs().flatten().sort().values
        values = torch.cat([values.new_zeros(1), values])
        inner = values[values.numel() // 4 : 3 * values.numel() // 4 + 2]
        widest = int((inner[1:] - inner[:-1]).argmax())
        case.cell_clip = inner[widest : widest + 2].mean().item()
    return case


def to_double_case(case: Case) -> Case:
    return Case(**to_double(vars(case)))


def differentiate(case: Case) -> dict[str, Tensor]:
    """The new state by the reference, in the dtype of the case, and all gradients by autograd."""
    leaves = {n: t.detach().clone().requires_grad_() for n in TENSORS if (t := getattr(case, n)) is not None}
    t = replace(case, **leaves)
    gates = F.linear(t.x, t.weight_ih, t.bias)
    _, _, h, c = formulas.lstm_sequence(
        gates[None], t.h, t.c, t.weight_hh, weight_peephole=t.weight_peephole, cell_clip=t.cell_clip
    )
    given = [(state, grad) for state, grad in ((h, case.grad_h), (c, case.grad_c)) if grad is not None]
    grads = torch.autograd.grad(
        [state for state, _ in given], [gates, *leaves.values()], [grad for _, grad in given], materialize_grads=True
    )
    names = ("gates", *leaves)
    results = {"new_h": h.detach(), "new_c": c.detach()}
    return results | {f"grad_{name}": grad for name, grad in zip(names, grads, strict=True)}


def stock_results(case: Case) -> dict[str, Tensor]:
    """The reference in the dtype of the case. In fp64, the oracle's own, with other roundings.

    There units and inputs come in reverse order, and sigmoid and tanh are made of exp and expm1: within 3 ulp.
    """
    if case.h.dtype != torch.float64:
        return differentiate(case)

    def turned(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if name == "gates":
            return value.view(-1, 4, case.h.size(1)).flip(2).view(value.shape)
        if name in ("bias", "weight_ih", "weight_hh", "weight_peephole"):
            value = value.view(-1, case.h.size(1), *value.shape[1:]).flip(1).reshape(value.shape)
        return value.flip(1) if value.dim() > 1 else value

    def tanh(x: Tensor) -> Tensor:
        less_one = torch.expm1(2 * x.clamp(-40, 40))
        return less_one / (less_one + 2)

    with mock.patch("torch.sigmoid", lambda x: 1 / (1 + torch.exp(-x))), mock.patch("torch.tanh", tanh):
        results = differentiate(Case(**{name: turned(name, value) for name, value in vars(case).items()}))
    return {name: turned(name.removeprefix("grad_"), value) for name, value in results.items()}


def sums(tensor: Tensor | None) -> Tensor | None:
    """In the type that the op takes a bias in."""
    if tensor is None or tensor.dtype == torch.float64 or backends.current != "cpu":
        return tensor
    return tensor.float()


def pack(case: Case) -> Tensor:
    packed: Tensor = backends.ops().lstm_pack(case.weight_ih, case.weight_hh)
    return packed


def forward(case: Case, packed: Tensor, *, save: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Call the op: h, c, gates."""
    result: tuple[Tensor, Tensor, Tensor] = backends.ops().lstm_cell(
        case.x, case.h, case.c, packed, sums(case.bias), case.weight_peephole, case.cell_clip, save
    )
    return result


def backward(
    case: Case, packed: Tensor, gates: Tensor, *, need_x: bool = True, need_h: bool = True
) -> tuple[Tensor, ...]:
    """Call the op: grad_gates, grad_x, grad_h, grad_c, grad_weight_peephole."""
    result: tuple[Tensor, ...] = backends.ops().lstm_cell_backward(
        case.grad_h, case.grad_c, gates, case.c, packed, case.weight_peephole, case.cell_clip, case.x.size(1), need_x,
        need_h,
    )  # fmt: skip
    return result


def op_results(case: Case) -> dict[str, Tensor]:
    """What ``differentiate`` returns, from the compiled ops, in the dtype of the data."""
    packed = pack(case)
    h, c, gates = forward(case, packed)
    grad_gates, grad_x, grad_h, grad_c, grad_peephole = backward(case, packed, gates)
    rows = grad_gates.double()
    results = {
        "new_h": h,
        "new_c": c,
        "grad_gates": grad_gates,
        "grad_x": grad_x,
        "grad_h": grad_h,
        "grad_c": grad_c,
        "grad_weight_ih": rows.T @ case.x.double(),
        "grad_weight_hh": rows.T @ case.h.double(),
    }
    if case.bias is not None:
        results["grad_bias"] = rows.sum(0)
    if case.weight_peephole is not None:
        results["grad_weight_peephole"] = grad_peephole
    else:
        assert grad_peephole.numel() == 0
    return {name: result.to(case.h.dtype) for name, result in results.items()}


class Expected(NamedTuple):
    """What the results of a case are judged by."""

    oracle: dict[str, Tensor]
    stock: dict[str, Tensor]


@use_threads(1)
def expected_of(case: Case) -> Expected:
    return Expected(differentiate(to_double_case(case)), stock_results(case))


class CellPools:
    """One ``ErrorPool`` per result over all cases of a test."""

    def __init__(self) -> None:
        self.pools: dict[str, ErrorPool] = {}

    def add(self, case: Case, name: str = "", expected: Expected | None = None) -> None:
        """Run the ops on ``case`` and take in all errors; ``expected`` spares computing it again."""
        actual = op_results(case)
        oracle, stock = expected or expected_of(case)
        assert set(actual) == set(oracle) == set(stock)
        for key, exact in oracle.items():
            pool = self.pools.setdefault(f"{case.h.dtype} {key}", ErrorPool())
            # Gates, states and gradients are numbers around 1: what is smaller is left over from sums of such.
            scale = max(1.0, exact.abs().nan_to_num().max().item()) if exact.numel() else None
            pool.add(actual[key], stock[key], exact, name=f"{name} {key}".strip(), scale=scale)

    def check(self) -> None:
        for pool in self.pools.values():
            pool.check()
