"""Cases of the tests of scaling, clipping and diagnostics: every optimizer, ours and torch's, on the same gradients."""

import copy
import pickle

import backends
import pytest
import torch
from optim_cases import needs_kernel

import deepops
from deepops import optim

on_every_backend = [needs_kernel, pytest.mark.usefixtures("step_backend")]

# Class, options: every state that a kernel has, and every form of its formula that treats gradients differently.
CASES = {
    "adam": ("Adam", {"weight_decay": 0.1, "amsgrad": True}),
    "adamw": ("AdamW", {"lr": 0.01}),
    "sgd": ("SGD", {"lr": 0.1, "weight_decay": 0.1}),
    "sgd-momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "maximize": True}),
    "sgd-nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "rmsprop": ("RMSprop", {"eps": 1e-3}),
    "rmsprop-centered": ("RMSprop", {"eps": 1e-3, "momentum": 0.9, "centered": True}),
}
every_case = pytest.mark.parametrize("case", CASES)
SCALERS = {"torch": torch.amp.GradScaler, "deepops": deepops.amp.GradScaler}
every_scaler = pytest.mark.parametrize("scaler_class", SCALERS.values(), ids=SCALERS)

SHAPES = [(3, 5), (0,), (1,), (8193,), (2, 3, 4, 5), (600,), (7,)]


class Odd(torch.Tensor):
    """A tensor subclass, which takes torch's path."""


def ours(case, params, **more):
    name, options = CASES[case]
    return getattr(optim, name)(params, **options, **more)


def stock(case, params, **more):
    """Torch's, as a loop over tensors unless `more` says otherwise."""
    name, options = CASES[case]
    return getattr(torch.optim, name)(
        params, **{**options, **({} if more.get("fused") else {"foreach": False}), **more}
    )


def make(shapes=SHAPES, dtype=torch.float32, odd=()):
    """Parameters; those whose number is in ``odd`` take torch's path."""
    params = []
    for index, shape in enumerate(shapes):
        generator = torch.Generator().manual_seed(index)
        values = torch.randn(shape, generator=generator, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)
        values = values.to(backends.device())
        params.append(torch.nn.Parameter(values.as_subclass(Odd) if index in odd else values))
    return params


def give_grads(*models, seed=0, scale=1.0):
    """Gradients of one seed to the parameters of each model, in each one's dtype, times ``scale``."""
    for index, params in enumerate(zip(*models, strict=True)):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        values = torch.randn(
            params[0].shape, generator=generator, dtype=torch.promote_types(params[0].dtype, torch.float32)
        )
        for p in params:
            p.grad = (values + 0.25).to(p.dtype).to(p.device).mul_(scale).as_subclass(type(p.data))


def make_scaler(scaler_class, scale=1024.0, **options):
    """A scaler that has scaled a loss."""
    scaler = scaler_class(backends.device(), init_scale=scale, **options)
    scaler.scale(torch.ones((), device=backends.device()))
    return scaler


def plain(tensor):
    """A copy that nothing else changes, of no subclass and dense."""
    tensor = tensor.detach()
    return tensor.to_dense() if tensor.is_sparse else tensor.clone().as_subclass(torch.Tensor)


def snapshot(optimizer, params):
    """Parameters and what state_dict() has of each, by number and name."""
    values = {(i, "param"): plain(p) for i, p in enumerate(params)}
    for i, state in optimizer.state_dict()["state"].items():
        values.update({(i, name): plain(t) for name, t in state.items() if isinstance(t, torch.Tensor)})
    return values


def bits(tensor):
    """The tensor's memory, as numbers of which a NaN equals itself."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


def assert_same(a, b):
    """Two snapshots, bit for bit."""
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(bits(a[key]), bits(b[key])), key


def assert_untouched(before, after):
    """Bit for bit, except that a parameter without state may have got one of zeros, as torch's fused optimizers do."""
    assert before.keys() <= after.keys()
    assert_same(before, {key: after[key] for key in before})
    for key in after.keys() - before.keys():
        assert not after[key].any(), key


def through(how, value):
    """A copy of an object by copy.deepcopy or by pickle."""
    return copy.deepcopy(value) if how == "deepcopy" else pickle.loads(pickle.dumps(value))
