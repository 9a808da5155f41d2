"""Cases of the Adam tests: shapes and options, parameters and gradients from a seed, ours and torch's side by side."""

import itertools

import backends
import pytest
import simt
import torch

from deepops._library import _C, has_kernel
from deepops.optim import Adam

needs_kernel = pytest.mark.skipif(not has_kernel("adam", "cpu"), reason="the kernels were not built")
on_every_backend = [needs_kernel, pytest.mark.usefixtures("step_backend")]
only_on_cpu = pytest.mark.parametrize("backend", ["cpu"], indirect=True)
not_on_simt = pytest.mark.parametrize("backend", ["cpu", "cuda"], indirect=True)

STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
SHAPES = [(), (1,), (3, 5), (0,), (63,), (64,), (65,), (8191,), (8192,), (8193,), (2, 0, 3), (2, 3, 4, 5), (20_000,)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Every pair of values of (weight_decay, decoupled, amsgrad, maximize, betas) is in one of these.
OPTIONS = [
    {},
    {"weight_decay": 0.1, "amsgrad": True, "maximize": True, "betas": (0.3, 0.5)},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "betas": (0.3, 0.5)},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "amsgrad": True},
    {"weight_decay": 0.1, "maximize": True},
    {"decoupled_weight_decay": True, "maximize": True},
    {"amsgrad": True, "betas": (0.0, 0.99), "eps": 1e-3, "lr": 0.1},
    {"weight_decay": 0.01, "betas": (0.9, 0.9), "lr": 1.0, "eps": 0.0},
]


class SimtAdam(Adam):
    """Adam whose CPU tensors take the GPU kernel, on the SIMT executor."""

    def _backend(self, param):
        return "simt"


def attach_simt():
    """Have the steps of the backend "simt" taken by the executor."""
    _C.attach(simt.load()._name, "simt")


def make(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(backends.device(), dtype)) for shape in shapes
    ]


def give_grads(*models, seed=0):
    """The same gradients to the parameters of each model, in each one's own dtype."""
    for index, params in enumerate(zip(*models, strict=True)):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        grad = torch.randn(params[0].shape, generator=generator) + 0.5
        for p in params:
            p.grad = grad.to(p.device, p.dtype, copy=True)


def train(optimizer, params, steps=4, first=0):
    for step in range(first, first + steps):
        give_grads(params, seed=step)
        optimizer.step()


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def assert_same_bits(a, b):
    """Equal, a NaN to a NaN."""
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        x, y = x.detach(), y.detach()
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        if not x.is_complex():
            assert torch.equal(x.signbit() | x.isnan(), y.signbit() | y.isnan()), "0 and -0"


def states(optimizer, params, name):
    return [optimizer.state[p][name] for p in params]


def everything(optimizer, params):
    names = ["step", *(name for name in STATES if name in optimizer.state[params[0]])]
    return [*params, *itertools.chain.from_iterable(states(optimizer, params, name) for name in names)]


def channels_last(p):
    return p.to(memory_format=torch.channels_last)


def both(options=None, shapes=SHAPES):
    ours, stock = make(shapes), make(shapes)
    options = options or {}
    return ours, stock, Adam(ours, **options), torch.optim.Adam(stock, foreach=False, **options)


def step_both(ours, stock, a, b, seed, without=()):
    give_grads(ours, stock, seed=seed)
    for index in without:
        ours[index].grad = stock[index].grad = None
    a.step()
    b.step()


def assert_alike(ours, stock, a, b):
    torch.testing.assert_close(ours, stock)
    for p, q in zip(ours, stock, strict=True):
        assert a.state[p].keys() == b.state[q].keys()
        torch.testing.assert_close(list(a.state[p].values()), list(b.state[q].values()))
