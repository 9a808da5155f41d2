"""Optimizers over several processes: parameters and gradients in parts, and what must be the same everywhere."""

import pytest
import torch
import torch.distributed as dist
from optim_cases import assert_same_bits
from processes import on_ranks, process_pools  # noqa: F401
from torch import nn

import deepops
from deepops.optim import SGD, Adam, AdamW, RMSprop

KINDS = {
    "Adam": {"weight_decay": 0.1, "amsgrad": True},
    "AdamW": {},
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "RMSprop": {"momentum": 0.9, "centered": True},
}
OURS = {"Adam": Adam, "AdamW": AdamW, "SGD": SGD, "RMSprop": RMSprop}
every_kind = pytest.mark.parametrize("kind", KINDS)

# Of two shards: even, uneven, empty on the last process, empty on all, of many elements; the first dimension counts.
SHAPES = [(6, 5), (5,), (1, 3), (0, 4), (3, 2, 2), (701, 33)]


def ours(kind, params, **options):
    return OURS[kind](params, **{"lr": 0.01, **KINDS[kind], **options})


def torchs(kind, params, **options):
    return getattr(torch.optim, kind)(params, **{"lr": 0.01, "foreach": False, **KINDS[kind], **options})


def values(seed, shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).add(0.5).to(dtype) for shape in shapes]


def mesh(*sizes):
    return dist.device_mesh.init_device_mesh("cpu", sizes, mesh_dim_names=tuple("abc"[: len(sizes)]))


def distribute(tensors, over, placements):
    """DTensors of these values; ``placements`` for all of them or a list of them for each."""
    from torch.distributed.tensor import distribute_tensor

    each = placements if isinstance(placements[0], list) else [placements] * len(tensors)
    return [distribute_tensor(t, over, p) if p else t for t, p in zip(tensors, each, strict=True)]


def make(tensors):
    return [nn.Parameter(t) for t in tensors]


def full(tensor):
    """The whole of a DTensor, detached; any other tensor itself."""
    tensor = tensor.detach()
    if not hasattr(tensor, "full_tensor"):
        return tensor
    return tensor.int().full_tensor().short() if tensor.dtype is torch.int16 else tensor.full_tensor()  # as gloo can


def everything(optimizer, params):
    """Whole parameters and states."""
    states = [t for p in params for _, t in sorted(optimizer.state[p].items()) if t is not None]
    return [full(t).clone() for t in (*params, *states)]


def give(params, grads):
    """Gradients distributed as their parameters are."""
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.clone()
        if hasattr(p, "placements"):
            (p.grad,) = distribute([p.grad], p.device_mesh, list(p.placements))


def assert_same_on_all_ranks(tensors):
    for tensor in tensors:
        tensor = tensor.detach()
        found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(found, tensor)
        assert_same_bits([tensor] * len(found), found)


def assert_takes_kernel(optimizer):
    assert "torch, because" not in deepops.explain(optimizer)


def placements_of(name):
    from torch.distributed.tensor import Replicate, Shard

    return {"S0": [Shard(0)], "R": [Replicate()], "S0S0": [Shard(0), Shard(0)], "RS0": [Replicate(), Shard(0)]}[name]


class Network(nn.Module):
    """Without ReLU, whose mask may flip between two orders of a sum."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 3)).to(dtype)

    def forward(self, x):
        return self.layers(x)


def train(model, optimizer, batches):
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def batches(steps=4, size=8, dtype=torch.float32, first=0):
    return values(7, [(first + steps, size, 7)], dtype)[0][first:].unbind(0)
