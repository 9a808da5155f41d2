"""Helpers shared by the tests, ``deepops check`` and the benchmarks; needs nothing but torch.

The tolerance rule, the only one in deepops: a result may differ from the fp64 oracle by ``k`` times what stock PyTorch
in the same dtype differs from it, plus half an ulp of the result's dtype (its own last rounding). ``k = 1`` is wanted,
1.5 allowed: a bare "not worse than stock" fails most correct code, as two orders of summation err differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepops import _library


def devices() -> list[str]:
    """Device types that the tests run on here: ``"cpu"``, and ``"cuda"`` where there is one."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def isas() -> list[str]:
    """Instruction sets of the CPU kernels that this machine can run, weakest first; none without the binaries."""
    return list(_library._C.cpu_isas()) if _library._C is not None else []


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the CPU kernels of instruction set ``name`` (one of ``isas()``) inside the block."""
    if _library._C is None:
        raise RuntimeError(f"isa: no choice of instruction set, {_library.binaries()['_C']}")
    before = _library._C.cpu_isa()
    _library._C.set_cpu_isa(name)
    try:
        yield
    finally:
        _library._C.set_cpu_isa(before)


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Run torch's CPU work on ``count`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class RegionCount:
    """What ``count_parallel_regions`` yields; ``count`` is final once the block has ended."""

    count: int = 0


@contextmanager
def count_parallel_regions() -> Iterator[RegionCount]:
    """Count the parallel regions that deepops' CPU kernels enter inside the block: what tests assert instead of time.

    Example::

        with count_parallel_regions() as regions:
            deepops.functional.batch_norm_act(x, mean, var)
        assert regions.count == 1
    """
    if _library._C is None:
        raise RuntimeError(f"parallel regions are not counted, {_library.binaries()['_C']}")
    before = _library._C.parallel_regions()
    result = RegionCount()
    try:
        yield result
    finally:
        result.count = _library._C.parallel_regions() - before


def saved_storages(function: Callable[[], Any]) -> list[torch.UntypedStorage]:
    """Distinct non-empty storages that autograd saves for backward while ``function()`` runs.

    Views and repeated tensors count once. Inputs and parameters are among them where they are saved; the sum of
    ``nbytes()`` is the memory kept for backward.
    """
    storages: dict[tuple[torch.device, int], torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            storages.setdefault((storage.device, storage.data_ptr()), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # kept alive: a freed storage's address could be given to the next one
    del result
    return list(storages.values())


def to_double(value: Any) -> Any:
    """Deep copy of ``value`` (tensors, and tuples, lists and dicts of them) with floating tensors in detached fp64."""
    if isinstance(value, Tensor):
        copy = value.detach().to(torch.float64, copy=True) if value.is_floating_point() else value.detach().clone()
        return copy.requires_grad_(value.requires_grad)
    if isinstance(value, (tuple, list)):
        return type(value)(to_double(item) for item in value)
    if isinstance(value, dict):
        return {key: to_double(item) for key, item in value.items()}
    return value


def oracle(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function`` on fp64 copies of its arguments; in-place updates stay in the copies."""
    return function(*to_double(args), **to_double(kwargs))


def half_ulp(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbours of ``dtype`` at each ``|t|``, in fp64; what one correct rounding may cost.

    Not less than half the smallest subnormal; 0 where ``t`` is not finite.

    >>> half_ulp(torch.tensor([1.0, 3.0]), torch.bfloat16)
    tensor([0.0039, 0.0078], dtype=torch.float64)
    """
    info = torch.finfo(dtype)
    magnitude = t.detach().to(torch.float64).abs()
    exponent = torch.frexp(magnitude.clamp(min=info.tiny, max=info.max)).exponent  # 2^(e-1) <= |t| < 2^e
    spacing = torch.ldexp(torch.full_like(magnitude, info.eps / 2), exponent)
    return torch.where(torch.isfinite(magnitude), spacing / 2, torch.zeros_like(spacing))


class Errors(NamedTuple):
    """Largest errors against the fp64 oracle, over the finite elements."""

    actual: float  # max |actual - oracle|
    stock: float  # max |stock - oracle|; 0 without stock
    excess: float  # max (|actual - oracle| - half an ulp), at least 0
    ratio: float  # excess / stock; the rule is ratio <= k. Infinite where stock is exact and actual is not
    worst: tuple[int, ...]  # index of the element with that excess; () if there is none


def error_ratio(actual: Tensor, stock: Tensor | None, oracle: Tensor, *, name: str = "") -> Errors:
    """The numbers behind ``assert_close_to_oracle``, for tables.

    Raises:
        AssertionError: dtypes or shapes differ, or NaN or an infinity where the oracle has none (or the other way).
    """
    prefix = f"{name}: " if name else ""
    assert oracle.dtype == torch.float64, f"{prefix}the oracle is {oracle.dtype}, not torch.float64"
    assert actual.shape == oracle.shape, f"{prefix}shape {list(actual.shape)}, the oracle's is {list(oracle.shape)}"
    if stock is not None:
        assert torch.promote_types(stock.dtype, actual.dtype) == stock.dtype, (
            f"{prefix}dtype {actual.dtype}, not stock's"
        )
        assert stock.shape == oracle.shape, f"{prefix}stock's shape {list(stock.shape)}, not {list(oracle.shape)}"
    if not oracle.numel():
        return Errors(0.0, 0.0, 0.0, 0.0, ())
    got, want = actual.detach().cpu().double(), oracle.detach().cpu()
    rounded = want.to(actual.dtype).double()  # overflows where the dtype does
    finite = torch.isfinite(rounded)
    same = torch.where(finite, torch.isfinite(got), (got == rounded) | (got.isnan() & rounded.isnan()))
    if not same.all():
        at = tuple(torch.nonzero(~same)[0].tolist())
        raise AssertionError(
            f"{prefix}{int((~same).sum())} of {same.numel()} elements are NaN or infinite where the oracle is not, or "
            f"the other way; the first is {list(at)}: {got[at].item()}, the oracle has {want[at].item()}"
        )
    zero = torch.zeros_like(want)
    error = torch.where(finite, (got - want).abs(), zero)
    excess = torch.where(finite, error - half_ulp(want, actual.dtype), zero).clamp(min=0)
    most, stock_error = excess.max().item(), 0.0
    if stock is not None:
        other = stock.detach().cpu().double()
        stock_error = torch.where(finite & torch.isfinite(other), (other - want).abs(), zero).max().item()
    ratio = 0.0 if most == 0 else most / stock_error if stock_error else float("inf")
    worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), want.shape)) if want.dim() else ()
    return Errors(error.max().item(), stock_error, most, ratio, worst)


def assert_close_to_oracle(
    actual: Tensor, stock: Tensor | None, oracle: Tensor, *, k: float = 1.5, name: str = ""
) -> None:
    """Assert ``|actual - oracle| <= k * max |stock - oracle| + half_ulp(oracle, actual.dtype)`` for every element.

    Stock's error is the maximum over the tensor; half an ulp is taken at each element. NaN must stand where the oracle
    has it, and infinities, with their sign, where the oracle rounded to ``actual``'s dtype has them. Elements where
    only stock is not finite say nothing about its error and do not count for it.

    Args:
        actual: the result under test.
        stock: stock PyTorch's result from the same input, in the same dtype or (a stricter test) a finer one. None
            leaves half an ulp alone: only for results that must be exact or correctly rounded; say so beside the call.
        oracle: fp64, same shape.
        k: 1.5 is the most that is allowed.
        name: starts the message.

    Raises:
        AssertionError: with the worst element, the errors and the limit.
    """
    pool = ErrorPool(k=k)
    pool.add(actual, stock, oracle, name=name, scale=1.0)
    if oracle.numel():
        pool.check()


@dataclass
class ErrorPool:
    """The rule over several cases of one kind (sizes, seeds) that share stock's largest error.

    On a handful of elements stock is often right by luck, and the bare rule would fail correct code. Errors are taken
    relative to each case's largest oracle value, so that no case hides behind another's magnitude.

    Example::

        pool = ErrorPool()
        for size in sizes:
            pool.add(actual, stock, oracle, name=f"size {size}")
        pool.check()
    """

    k: float = 1.5
    stock_error: float = 0.0
    _cases: list[tuple[str, Errors, float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse a laxer rule."""
        assert 0 <= self.k <= 1.5, f"k={self.k}: the rule allows at most 1.5"

    def add(
        self, actual: Tensor, stock: Tensor | None, oracle: Tensor, *, name: str = "", scale: float | None = None
    ) -> None:
        """Take in one case; NaN, infinity, shape and dtype are asserted at once, the errors by ``check``.

        ``scale`` divides the case's errors; by default the largest finite ``|oracle|``.
        """
        errors = error_ratio(actual, stock, oracle, name=name)
        if not oracle.numel():
            return
        if scale is None:
            scale = oracle.detach().abs().nan_to_num(0.0, 0.0).max().item() or 1.0
        self.stock_error = max(self.stock_error, errors.stock / scale)
        at = errors.worst
        element = f"element {list(at)} is {actual[at].item()!r}, the oracle {oracle[at].item()!r}"
        self._cases.append((f"{name}: {element}" if name else element, errors, scale, str(actual.dtype)))

    @property
    def ratio(self) -> float:
        """Largest excess over stock's largest error; the rule is ``ratio <= k``."""
        most = max((errors.excess / scale for _, errors, scale, _ in self._cases), default=0.0)
        return 0.0 if most == 0 else most / self.stock_error if self.stock_error else float("inf")

    def check(self) -> None:
        """Assert the rule for every case, telling of the worst."""
        assert self._cases, "no case has an element: nothing was compared"
        if self.ratio <= self.k:
            return
        bad = [case for case in self._cases if case[1].excess / case[2] > self.k * self.stock_error]
        text, errors, scale, dtype = max(bad, key=lambda case: case[1].excess / case[2])
        raise AssertionError(
            f"{text}: it is off by {errors.excess:.3e} beyond half an ulp of {dtype}, {self.ratio:.3g} times stock's "
            f"error of {self.stock_error * scale:.3e}; allowed: {self.k} ({len(bad)} of {len(self._cases)} cases fail)"
        )


def make_layouts(t: Tensor) -> dict[str, Tensor]:
    """Tensors of ``t``'s shape in every memory layout that an op must accept, by name.

    ``contiguous``; ``channels_last`` (rank 4 and 5); ``sliced``: every second element of a larger tensor;
    ``offset``: contiguous, but starting one element after an aligned address; ``transposed``: first and last
    dimension swapped in memory; ``expanded``: stride 0 over the batch. All hold the values of ``t``, except that
    ``expanded`` repeats its first sample. Fresh, detached memory each; ``requires_grad`` is the caller's to set.
    """
    t = t.detach()
    layouts = {"contiguous": t.clone(memory_format=torch.contiguous_format)}
    if t.dim() in (4, 5):
        memory_format = torch.channels_last if t.dim() == 4 else torch.channels_last_3d
        layouts["channels_last"] = t.clone(memory_format=memory_format)
    wide = t.new_zeros([*t.shape[:-1], 2 * t.shape[-1]])
    layouts["sliced"] = wide[..., ::2].copy_(t)
    layouts["offset"] = t.new_zeros(t.numel() + 1)[1:].view(t.shape).copy_(t)
    layouts["transposed"] = t.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)
    if t.shape[0]:
        layouts["expanded"] = t[:1].clone().expand(t.shape)
    return layouts


# Where the derivatives of activations jump. Rounding may put a value on either side: an error of order 1 in a gradient
# that nobody is to blame for.
_KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}


def away_from_kinks(grad_y: Tensor, before: Tensor, activation: str, margin: float = 0.1) -> Tensor:
    """``grad_y`` with zeros where ``before``, the activation's input, is within ``margin`` of a jump of its derivative.

    >>> away_from_kinks(torch.ones(3), torch.tensor([-1.0, 0.01, 1.0]), "relu")
    tensor([1., 0., 1.])
    """
    for kink in _KINKS.get(activation, ()):
        grad_y = grad_y.masked_fill((before - kink).abs() < margin, 0)
    return grad_y
