"""Cases of the optimizer tests: the optimizers with their options, parameters and gradients from a seed, ours and
torch's side by side."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import backends
import pytest
import simt
import torch

from deepops import testing
from deepops._library import _C, has_kernel
from deepops.optim import SGD, Adam, AdamW, RMSprop
from deepops.reference.adam import adam_step
from deepops.reference.rmsprop import rmsprop_step
from deepops.reference.sgd import sgd_step

needs_kernel = pytest.mark.skipif(not has_kernel("adam", "cpu"), reason="the kernels were not built")
on_every_backend = [needs_kernel, pytest.mark.usefixtures("step_backend")]
only_on_cpu = pytest.mark.parametrize("backend", ["cpu"], indirect=True)
not_on_simt = pytest.mark.parametrize("backend", ["cpu", "cuda"], indirect=True)

SHAPES = [(), (1,), (3, 5), (0,), (63,), (64,), (65,), (8191,), (8192,), (8193,), (2, 0, 3), (2, 3, 4, 5), (20_000,)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SIXTEEN = [torch.float16, torch.bfloat16]


# ---- the optimizers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One of the optimizers, and what its tests need to know of it."""

    name: str
    ours: Callable[..., Any]
    torchs: Callable[..., Any]
    kernel: str  # in torch.ops.deepops
    states: tuple[str, ...]  # in the order of the op
    options: list[dict[str, Any]]  # the defaults, then one with all states; together they have every pair of values
    used: Callable[[dict[str, Any]], tuple[bool, ...]]  # which states a param group of these options has
    arguments: Callable[[dict[str, Any]], dict[str, Any]]  # the op's, of a param group, but for the switch
    switch: str | None  # the op's flag for the state that is optional
    reference: Callable[..., None]  # (param, grad, states, step, **arguments)

    def __str__(self) -> str:
        return self.name

    @property
    def fused(self) -> bool:
        """Whether torch has a fused form of it."""
        return self.kernel != "rmsprop"

    @property
    def rich(self) -> dict[str, Any]:
        """Options under which it has all its states."""
        return self.options[1]

    def stock(self, params, **options):
        """Torch's for-loop."""
        return self.torchs(params, foreach=False, **options)

    def names(self, group):
        """The states that a param group has."""
        return [name for name, used in zip(self.states, self.used(group), strict=True) if used]

    def op_arguments(self, group):
        """Keyword arguments of the op."""
        switch = {self.switch: group[self.switch]} if self.switch else {}
        return {**self.arguments(group), **switch}


def _pick(*names):
    return lambda group: {name: group[name] for name in names}


def _adam_arguments(group):
    names = ("lr", "weight_decay", "eps", "maximize", "decoupled_weight_decay")
    return dict(zip(("beta1", "beta2"), group["betas"], strict=True), **_pick(*names)(group))


_ADAM = {
    "kernel": "adam",
    "states": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "used": lambda group: (True, True, group["amsgrad"]),
    "arguments": _adam_arguments,
    "switch": "amsgrad",
    "reference": lambda p, g, states, step, **kwargs: adam_step(p, g, *states, step, **kwargs),
}
ADAM = Kind(
    "Adam",
    Adam,
    torch.optim.Adam,
    options=[
        {},
        {"weight_decay": 0.1, "amsgrad": True, "maximize": True, "betas": (0.3, 0.5)},
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "betas": (0.3, 0.5)},
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "amsgrad": True},
        {"weight_decay": 0.1, "maximize": True},
        {"decoupled_weight_decay": True, "maximize": True},
        {"amsgrad": True, "betas": (0.0, 0.99), "eps": 1e-3, "lr": 0.1},
        {"weight_decay": 0.01, "betas": (0.9, 0.9), "lr": 1.0, "eps": 0.0},
    ],
    **_ADAM,
)
ADAMW = Kind(
    "AdamW", AdamW, torch.optim.AdamW, options=[{}, {"amsgrad": True, "maximize": True, "weight_decay": 0.1}], **_ADAM
)
SGD_ = Kind(
    "SGD",
    SGD,
    torch.optim.SGD,
    "sgd",
    ("momentum_buffer",),
    [
        {},
        {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "maximize": True, "lr": 0.1},
        {"momentum": 0.9, "nesterov": True, "lr": 0.1},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "lr": 0.1},
        {"momentum": 0.9, "weight_decay": 0.01, "lr": 1.0},
        {"momentum": 0.5, "dampening": 0.9, "lr": 0.1},
        {"maximize": True, "lr": 0.1},
    ],
    lambda group: (group["momentum"] != 0,),
    _pick("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"),
    None,
    lambda p, g, states, step, **kwargs: sgd_step(p, g, *states, step, **kwargs),
)
# Where decay cancels a gradient, and where states are new, a small eps blows up what rounding leaves: 1e-2 there.
RMSPROP = Kind(
    "RMSprop",
    RMSprop,
    torch.optim.RMSprop,
    "rmsprop",
    ("square_avg", "grad_avg", "momentum_buffer"),
    [
        {},
        {"momentum": 0.9, "centered": True, "weight_decay": 0.1, "maximize": True, "eps": 1e-2},
        {"momentum": 0.9, "alpha": 0.5, "lr": 0.1},
        {"centered": True, "alpha": 0.5, "weight_decay": 0.1},
        {"weight_decay": 0.1, "momentum": 0.5, "eps": 1e-3},
        {"maximize": True, "alpha": 0.5},
        {"weight_decay": 0.1, "lr": 0.1, "eps": 1e-2},
        {"centered": True, "lr": 0.1},
    ],
    lambda group: (True, group["centered"], group["momentum"] > 0),
    _pick("lr", "alpha", "eps", "weight_decay", "momentum", "maximize"),
    "centered",
    lambda p, g, states, step, **kwargs: rmsprop_step(p, g, *states, **kwargs),
)
KINDS = [ADAM, ADAMW, SGD_, RMSPROP]
KERNELS = [ADAM, SGD_, RMSPROP]  # one of each kernel
OPTIONS, STATES = ADAM.options, ADAM.states

each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
each_kernel = pytest.mark.parametrize("kind", KERNELS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def each_option(kinds=KINDS, count=None):
    """Parametrize over kinds and the first ``count`` of their options."""
    cases = [(kind, options) for kind in kinds for options in kind.options[:count]]
    return pytest.mark.parametrize(("kind", "options"), cases, ids=str)


class SimtAdam(Adam):
    """Adam whose CPU tensors take the GPU kernel, on the SIMT executor."""

    def _backend(self, param):
        return "simt"


def attach_simt():
    """Have the steps of the backend "simt" taken by the executor."""
    _C.attach(simt.load()._name, "simt")


# ---- parameters, gradients, steps -----------------------------------------------------------------------------------


def make(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(_random(shape, dtype, generator).to(backends.device(), dtype)) for shape in shapes]


def _random(shape, dtype, generator):
    return torch.randn(shape, generator=generator, dtype=torch.complex64 if dtype.is_complex else None)


def give_grads(*models, seed=0):
    """The same gradients to the parameters of each model, in each one's own dtype."""
    for index, params in enumerate(zip(*models, strict=True)):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        grad = _random(params[0].shape, params[0].dtype, generator) + 0.5
        for p in params:
            p.grad = grad.to(p.device, p.dtype, copy=True)


def train(optimizer, params, steps=4, first=0):
    for step in range(first, first + steps):
        give_grads(params, seed=step)
        optimizer.step()


def train_together(pairs, steps=4, first=0):
    """``(optimizer, parameters)`` pairs with the gradients of the first one's parameters, rounded to each dtype."""
    for step in range(first, first + steps):
        give_grads(pairs[0][1], seed=step)
        for optimizer, params in pairs:
            for p, source in zip(params, pairs[0][1], strict=True):
                p.grad = source.grad.to(p.dtype, copy=True)
            optimizer.step()


def both(kind=ADAM, options=None, shapes=SHAPES, dtype=torch.float32):
    """Our parameters, torch's, our optimizer, torch's."""
    ours, stock = make(shapes, dtype), make(shapes, dtype)
    options = options or {}
    return ours, stock, kind.ours(ours, **options), kind.stock(stock, **options)


def step_both(ours, stock, a, b, seed, without=()):
    give_grads(ours, stock, seed=seed)
    for index in without:
        ours[index].grad = stock[index].grad = None
    a.step()
    b.step()


def channels_last(p):
    return p.to(memory_format=torch.channels_last)


# ---- results --------------------------------------------------------------------------------------------------------


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def states(optimizer, params, name):
    return [optimizer.state[p][name] for p in params]


def steps_of(optimizer, params):
    """How many steps each parameter has taken."""
    return [float(optimizer._step_counter(p)) for p in params]


def everything(optimizer, params):
    """Parameters, then the step counter (where torch's state has one) and the states of each."""
    own = [optimizer.state.get(p) or {} for p in params]
    return [*params, *itertools.chain.from_iterable([state[name] for name in sorted(state)] for state in own)]


def snapshot(optimizer, params):
    """A copy of ``everything``."""
    return copy.deepcopy([t.detach() for t in everything(optimizer, params)])


def assert_same_bits(a, b):
    """Equal, a NaN to a NaN."""
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        x, y = x.detach(), y.detach()
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        if not x.is_complex():
            assert torch.equal(x.signbit() | x.isnan(), y.signbit() | y.isnan()), "0 and -0"


def assert_same_bits_each_time(run, *settings):
    """run() gives the same bits under each of these settings, (instruction set, threads)."""
    results = []
    for isa, threads in settings:
        with testing.use_isa(isa), testing.use_threads(threads):
            results.append(run())
    for other in results[1:]:
        assert_same_bits(results[0], other)


def on_every_machine():
    """Settings for that: every instruction set that this machine has, and the last one on three threads."""
    return [*((isa, 1) for isa in testing.isas()), (testing.isas()[-1], 3)]


def assert_alike(ours, stock, a, b):
    """Parameters and states as torch has them, within torch's own tolerances."""
    torch.testing.assert_close(ours, stock)
    for p, q in zip(ours, stock, strict=True):
        assert (a.state.get(p) or {}).keys() == (b.state.get(q) or {}).keys()
        torch.testing.assert_close(list((a.state.get(p) or {}).values()), list((b.state.get(q) or {}).values()))


def assert_within_the_rule(name, got, stock, oracle):
    """The tolerance rule, for complex numbers on their parts.

    There is no finer oracle for float64: there ``stock`` is float32's, whose error is scaled to the finer spacing, and
    the oracle's own rounding comes on top.
    """
    if got.is_complex():
        got, stock, oracle = [torch.view_as_real(t) for t in (got, stock, oracle)]
    if got.dtype is torch.float64:
        finer = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        stock = oracle + (stock.double() - oracle).abs() * finer + 2 * testing.half_ulp(oracle, torch.float64)
    testing.assert_close_to_oracle(got, stock, oracle, name=name)


def oracle_run(kind, params, group, steps):
    """fp64 parameters and states after ``steps`` of a param group like this one, from what ``params`` can hold."""
    used = kind.used(group)
    doubles = [p.detach().double() for p in params]
    own = [[torch.zeros_like(p) if use else None for use in used] for p in doubles]
    for step in range(steps):
        give_grads(params, seed=step)
        for p, source, tensors in zip(doubles, params, own, strict=True):
            kind.reference(p, source.grad.double(), tensors, step + 1, **kind.arguments(group))
    return doubles, {name: [t[i] for t in own] for i, name in enumerate(kind.states) if used[i]}
