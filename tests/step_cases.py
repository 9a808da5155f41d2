"""Steps of the optimizers' kernels, driven by hand: rows of any dtypes, states and master weights, through StepTable.

What the classes of deepops.optim make of a model is tested elsewhere; here is what the kernels promise.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from deepops._library import _C

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
DTYPES = [F32, F64, F16, BF16]
SLOTS = 5  # step counter, three states, master weights


def adam(lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, amsgrad=0, maximize=0, decoupled=0):
    return (lr, beta1, beta2, eps, weight_decay, amsgrad, maximize, decoupled)


def sgd(lr=0.01, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=0, maximize=0):
    return (lr, momentum, dampening, weight_decay, nesterov, maximize)


def rmsprop(lr=0.01, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=0, maximize=0):
    return (lr, alpha, eps, weight_decay, momentum, centered, maximize)


# For every rule: every set of states, every flag on and off, both forms of lerp().
HYPER = {
    "adam": [
        adam(),
        adam(weight_decay=0.1, amsgrad=1, maximize=1, beta1=0.3, beta2=0.5),
        adam(weight_decay=0.1, decoupled=1, beta1=0.3, beta2=0.5),
        adam(weight_decay=0.1, decoupled=1, amsgrad=1),
        adam(weight_decay=0.1, maximize=1),
        adam(amsgrad=1, beta1=0.0, beta2=0.99, eps=1e-3, lr=0.1),
    ],
    "sgd": [
        sgd(),
        sgd(weight_decay=0.1, maximize=1),
        sgd(momentum=0.9),
        sgd(momentum=0.9, dampening=0.3, weight_decay=0.1),
        sgd(momentum=0.9, nesterov=1, weight_decay=0.1, maximize=1),
    ],
    "rmsprop": [
        rmsprop(),
        rmsprop(weight_decay=0.1, maximize=1, alpha=0.3),
        rmsprop(centered=1),
        rmsprop(centered=1, alpha=0.2, weight_decay=0.1),
        rmsprop(momentum=0.9, maximize=1),
        rmsprop(momentum=0.9, centered=1, weight_decay=0.1),
    ],
}
EACH = [(rule, hyper) for rule, all_hyper in HYPER.items() for hyper in all_hyper]
MOST_STATES = [("adam", HYPER["adam"][1]), ("sgd", HYPER["sgd"][4]), ("rmsprop", HYPER["rmsprop"][5])]


def states_of(rule: str, hyper: Sequence[float]) -> list[int]:
    """Which of a row's states the rule uses with these hyper-parameters."""
    if rule == "adam":
        return [0, 1, 2] if hyper[5] else [0, 1]
    if rule == "sgd":
        return [0] if hyper[1] else []
    return [0, *([1] if hyper[5] else []), *([2] if hyper[4] else [])]


@dataclass(frozen=True)
class Spec:
    """One row."""

    shape: tuple[int, ...]
    dtype: torch.dtype = F32
    state_dtype: torch.dtype | None = None  # None: dtype
    master: str = "none"  # "full", "low_half"
    group: int = 0
    step: float = 4.0  # counter
    offset: int = 0  # elements before the tensor in its memory ...
    odd: int | None = None  # ... one more for this one: 0 the parameter, 1 the gradient, 2 the master, 3 ... the states


def mixed_dtypes() -> Iterator[dict]:
    """Every combination of dtypes and master weights, as arguments of Spec."""
    for dtype, state_dtype in itertools.product((F32, F16, BF16), repeat=2):
        for master in ("none", "full", "low_half"):
            if (master == "none") or (master == "full" and dtype != F32) or dtype == BF16:
                yield {"dtype": dtype, "state_dtype": state_dtype, "master": master}
    yield {"dtype": F64, "state_dtype": F64, "master": "none"}


@dataclass
class Options:
    """Of a step, beyond the hyper-parameters."""

    seed: int | None = None
    grad_scale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None
    norm: torch.Tensor | None = None  # norm()'s; see Norm
    max_norm: float = 0.0
    skip_non_finite: bool = False
    write_grads: bool = False
    facts: bool = False

    def scaling(self) -> tuple | None:
        addresses = [0 if t is None else t.data_ptr() for t in (self.grad_scale, self.found_inf, self.norm)]
        return (*addresses, self.max_norm, self.skip_non_finite, self.write_grads)


@dataclass
class Rows:
    """Tensors of some rows, and the table of their steps on one backend. The same arguments, the same numbers."""

    backend: str
    rule: str
    specs: list[Spec]
    hyper: list[tuple[float, ...]]  # by group
    seed: int | None = None
    scale: float = 1.0  # of the gradients
    params: list[torch.nn.Parameter] = field(default_factory=list)
    states: list[torch.Tensor] = field(default_factory=list)
    grads: list[torch.Tensor] = field(default_factory=list)
    facts: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.groups: list[dict] = [{"params": []} for _ in self.hyper]
        entries = tuple(self._entry(index, spec) for index, spec in enumerate(self.specs))
        groups = tuple(group["params"] for group in self.groups)
        self.borrowed = (entries, groups)  # by the table
        self.table = _C.StepTable(self.rule, self.backend, torch.Tensor, groups, {}, entries, self.seed)
        self.facts = torch.full((len(self.specs), 4), -1.0, dtype=F64)

    def _entry(self, index: int, spec: Spec) -> tuple:
        generator = torch.Generator().manual_seed(index)

        def place(which: int, dtype: torch.dtype) -> torch.Tensor:
            """Where the tensor goes: in the middle of memory in which nothing may change around it."""
            before = spec.offset + (spec.odd == which)
            count = torch.Size(spec.shape).numel()
            wide = torch.full((count + before + 9,), 7, dtype=dtype)
            self.states.append(wide)
            return wide[before : before + count].view(spec.shape)

        def noise() -> torch.Tensor:
            return torch.randn(spec.shape, generator=generator)

        param = torch.nn.Parameter(place(0, spec.dtype))
        exact = noise()
        with torch.no_grad():
            param.copy_(exact)
        grad = place(1, spec.dtype)
        self.grads.append(grad)
        tensors: list[torch.Tensor | None] = [None] * SLOTS
        tensors[0] = torch.tensor(spec.step)
        if spec.master == "full":
            tensors[4] = place(2, F32).copy_(exact)
        elif spec.master == "low_half":
            low = torch.randint(0, 1 << 16, spec.shape, generator=generator, dtype=torch.int32)
            tensors[4] = place(2, torch.uint16).copy_(low.to(torch.uint16))
        for k in states_of(self.rule, self.hyper[spec.group]):
            # Second moments are positive, and RMSprop's larger than the square of the first one.
            second = (self.rule, k) in (("adam", 1), ("adam", 2), ("rmsprop", 0))
            value = noise().square() + 0.3 if second else 0.1 * noise()
            tensors[1 + k] = place(3 + k, spec.state_dtype or spec.dtype).copy_(value)
        self.states += [t for t in tensors[:1] if t is not None]
        self.params.append(param)
        self.groups[spec.group]["params"].append(param)
        return (param, spec.group, None, (None,) * SLOTS, tuple(tensors))

    def give_grads(self, seed: int = 0, without: Sequence[int] = ()) -> None:
        for index, (param, grad) in enumerate(zip(self.params, self.grads, strict=True)):
            generator = torch.Generator().manual_seed(1000 * seed + index)
            grad.copy_((torch.randn(param.shape, generator=generator) + 0.5) * self.scale)
            param.grad = None if index in without else grad

    def collect(self) -> None:
        assert self.table.collect(self.groups, {}) == []

    def norm(self, grad_scale: torch.Tensor | None = None, rows: bool = False) -> Norm:
        self.collect()
        found = Norm(torch.full((3,), -1.0, dtype=F64), torch.full((len(self.specs), 2), -1.0, dtype=F64))
        address = 0 if grad_scale is None else grad_scale.data_ptr()
        self.table.norm(found.raw.data_ptr(), address, found.rows.data_ptr() if rows else 0)
        return found

    def step(self, options: Options | None = None) -> None:
        self.collect()
        options = options or Options()
        self.table.run(tuple(self.hyper), options.scaling(), self.facts.data_ptr() if options.facts else 0)

    def everything(self) -> list[torch.Tensor]:
        """All memory that a step could change, copied; integers as they are."""
        return [t.to(torch.int32) if t.dtype == torch.uint16 else t.clone() for t in self.states]


@dataclass
class Norm:
    """A GradNorm, and the sums of the rows."""

    raw: torch.Tensor  # [3] in fp64: squares, non_finite, (norm, found_inf) in fp32
    rows: torch.Tensor  # [rows, 2] in fp64: squares, non_finite

    squares = property(lambda self: float(self.raw[0]))
    non_finite = property(lambda self: float(self.raw[1]))
    norm = property(lambda self: float(self.raw.view(F32)[4]))
    found_inf = property(lambda self: float(self.raw.view(F32)[5]))


def assert_same_bits(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> None:
    """Bit for bit, but that a NaN is a NaN."""
    assert len(a) == len(b)
    for index, (x, y) in enumerate(zip(a, b, strict=True)):
        torch.testing.assert_close(
            x, y, rtol=0, atol=0, equal_nan=True, msg=lambda text, i=index: f"tensor {i}: {text}"
        )
        if x.is_floating_point():
            assert torch.equal(x.signbit() | x.isnan(), y.signbit() | y.isnan()), "0 and -0"
