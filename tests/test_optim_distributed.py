"""Optimizers over several processes: DDP, DTensors, FSDP2, ZeroRedundancyOptimizer, the norm of the whole gradient."""

import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from optim_cases import assert_same_bits, needs_kernel
from processes import on_ranks, process_pools  # noqa: F401
from torch import nn
from torch.utils._pytree import tree_map_only

import deepops
from deepops import testing
from deepops.optim import SGD, Adam, AdamW, RMSprop

pytestmark = needs_kernel

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


# DDP.


@on_ranks(2)
@every_kind
def test_ddp_on_half_the_batch_each_equals_one_process(kind):
    from torch.nn.parallel import DistributedDataParallel as DDP

    whole = Network(torch.float64)
    train(whole, torchs(kind, whole.parameters()), batches(dtype=torch.float64))
    half = [x.chunk(2)[dist.get_rank()] for x in batches()]
    models = []
    for make_optimizer in (ours, torchs):
        model = DDP(Network())
        train(model, make_optimizer(kind, model.parameters()), half)
        models.append(model.module)
    pool = testing.ErrorPool()
    for name, want in whole.named_parameters():
        pool.add(*(model.get_parameter(name).detach() for model in models), want.detach(), name=name)
    pool.check()
    assert_same_on_all_ranks(models[0].parameters())


# DTensors.


def assert_equals_torch(kind, over, placements, shapes=SHAPES, steps=3, **options):
    """Values of torch's for-loop on the same DTensors; the bits of our own step on the whole tensors."""
    a, b = (make(distribute(values(0, shapes), over, placements)) for _ in range(2))
    one, oracle = make(values(0, shapes)), make(values(0, shapes, torch.float64))
    optimizers = [make_optimizer(kind, p, **options) for make_optimizer, p in zip(
        (ours, torchs, ours, torchs), (a, b, one, oracle), strict=True)]  # fmt: skip
    for step in range(steps):
        grads = values(100 + step, shapes)
        for params, optimizer in zip((a, b, one, oracle), optimizers, strict=True):
            give(params, [grad.to(params[0].dtype) for grad in grads])
            optimizer.step()
    assert_takes_kernel(optimizers[0])
    results = [everything(o, p) for o, p in zip(optimizers, (a, b, one, oracle), strict=True)]
    assert_same_bits(results[0], results[2])
    for p, q in zip(a, b, strict=True):
        for name, state in optimizers[1].state[q].items():
            assert type(optimizers[0].state[p][name]) is type(state), name
    pool = testing.ErrorPool()
    for i, (got, stock, want) in enumerate(zip(results[0], results[1], results[3], strict=True)):
        pool.add(got, stock, want.double(), name=f"tensor {i}")
    pool.check()


@on_ranks(2)
@every_kind
@pytest.mark.parametrize("layout", ["S0", "R"])
def test_dtensors_equal_torch(kind, layout):
    assert_equals_torch(kind, mesh(2), placements_of(layout))


@on_ranks(2)
@every_kind
def test_dtensors_of_several_placements_beside_plain_tensors(kind):
    from torch.distributed.tensor import Replicate, Shard

    placements = [[Shard(0)], [Replicate()], [Shard(1)], [Shard(1)], [], [Shard(1)]]
    params = make(distribute(values(0), mesh(2), placements))
    one = make(values(0))
    a, b = ours(kind, params), ours(kind, one)
    for step in range(3):
        for p, optimizer in ((params, a), (one, b)):
            give(p, values(step))
            optimizer.step()
    assert_takes_kernel(a)
    assert_same_bits(everything(a, params), everything(b, one))


@on_ranks(4)
@pytest.mark.parametrize("kind", ["Adam", "SGD"])
@pytest.mark.parametrize("layout", ["S0S0", "RS0"])
def test_dtensors_on_a_mesh_of_two_dimensions(kind, layout):
    assert_equals_torch(kind, mesh(2, 2), placements_of(layout))


@on_ranks(2)
@every_kind
def test_parts_in_another_memory_order(kind):
    """A parameter in channels last, its gradients sometimes not."""
    from torch.distributed.tensor import DTensor

    def part(tensor, memory_format):
        mine = tensor.chunk(2)[dist.get_rank()].contiguous(memory_format=memory_format)
        return DTensor.from_local(mine, mesh(2), placements_of("S0"))

    (whole,) = values(0, [(6, 4, 3, 2)])
    params, one = make([part(whole, torch.channels_last)]), make([whole])
    a, b = ours(kind, params), ours(kind, one)
    for step in range(3):
        one[0].grad = values(step, [whole.shape])[0]
        params[0].grad = part(one[0].grad, torch.contiguous_format if step else torch.channels_last)
        a.step()
        b.step()
    assert_takes_kernel(a)
    assert not params[0].to_local().is_contiguous()
    assert_same_bits(everything(a, params), everything(b, one))


@on_ranks(2)
@every_kind
def test_gradients_of_another_placement_as_in_torch(kind):
    """Partial sums are added up, once or by each operation; then shards take the kernel again."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    over = mesh(2)
    placements = [placements_of("S0"), [Replicate()], placements_of("S0")]
    shapes = [(5, 3), (4,), (2, 2)]
    a, b = (make(distribute(values(0, shapes), over, placements)) for _ in range(2))
    optimizers = ours(kind, a), torchs(kind, b)
    for step in range(4):
        for params, optimizer in zip((a, b), optimizers, strict=True):
            grads = values(step, shapes)
            give(params, grads)
            if step in (1, 2):
                share = (grads[0] * (dist.get_rank() + 1), grads[1] * (dist.get_rank() + 1))
                params[0].grad = DTensor.from_local(share[0], over, [Partial()])
                params[1].grad = DTensor.from_local(share[1], over, [Partial()])
            optimizer.step()
        assert ("torch, because its gradient is distributed otherwise" in deepops.explain(optimizers[0])) == (
            step in (1, 2)
        )
    assert_takes_kernel(optimizers[0])
    for got, want in zip(everything(optimizers[0], a), everything(optimizers[1], b), strict=True):
        torch.testing.assert_close(got, want)
    assert_same_on_all_ranks([full(p) for p in a])


@on_ranks(2)
def test_late_gradients_and_what_is_replaced_between_steps():
    over = mesh(2)
    params, one = make(distribute(values(0), over, placements_of("S0"))), make(values(0))
    a, b = ours("Adam", params), ours("Adam", one)
    for step in range(7):
        for p, optimizer in ((params, a), (one, b)):
            give(p, values(step))
            if step < 2:
                p[0].grad = None
            if step == 3:  # a state, the parameter's memory, the value of a state
                optimizer.state[p[1]]["exp_avg"] = optimizer.state[p[1]]["exp_avg"].clone()
                optimizer.state[p[2]]["exp_avg_sq"].mul_(2)
            if step == 4:
                optimizer.state[p[1]]["step"] = torch.tensor(9.0)
        if step == 5:
            params[4]._local_tensor = params[4]._local_tensor.clone()
        if step == 6:
            params[5]._local_tensor.data = params[5]._local_tensor.clone()
        a.step()
        b.step()
    assert_takes_kernel(a)
    assert_same_bits(everything(a, params), everything(b, one))


@on_ranks(2)
def test_states_distributed_otherwise_take_torchs_path():
    params, others = (make(distribute(values(0), mesh(2), placements_of("S0"))) for _ in range(2))
    a, b = ours("AdamW", params), torchs("AdamW", others)
    for step in range(3):
        for p, optimizer in ((params, a), (others, b)):
            give(p, values(step))
            if step == 1:
                state = optimizer.state[p[0]]
                state["exp_avg"] = state["exp_avg"].redistribute(placements=placements_of("R"))
            optimizer.step()
    assert "'exp_avg'" in deepops.explain(a)
    for got, want in zip(everything(a, params), everything(b, others), strict=True):
        torch.testing.assert_close(got, want)


@on_ranks(2)
def test_explain_counts_what_is_here_and_notices_shared_memory():
    (whole,) = make(distribute(values(0, [(5, 3)]), mesh(2), placements_of("S0")))
    plain = nn.Parameter(torch.zeros(2))
    text = deepops.explain(SGD([whole, plain]))
    assert f"1 tensors, {(9, 6)[dist.get_rank()]} elements in the parts of this process: deepops kernel" in text
    assert "1 tensors, 2 elements: deepops kernel" in text
    same = nn.Parameter(whole.detach().to_local()[1:])
    assert deepops.explain(SGD([whole, same])).count("shares memory with another parameter") == 2


@on_ranks(2)
def test_written_dtensors_have_a_new_version():
    params = make(distribute(values(0), mesh(2), placements_of("S0")))
    optimizer = ours("SGD", params)
    give(params, values(1))
    params[0].grad = None
    before = [p._version for p in params]
    optimizer.step()
    assert [p._version > version for p, version in zip(params, before, strict=True)] == [False] + [True] * 5


@on_ranks(2)
@pytest.mark.parametrize("masters", [True, "split"])
def test_master_weights_of_dtensors(masters):
    params = make(distribute(values(0, dtype=torch.bfloat16), mesh(2), placements_of("S0")))
    one = make(values(0, dtype=torch.bfloat16))
    a, b = ours("AdamW", params, master_weights=masters), ours("AdamW", one, master_weights=masters)
    for step in range(5):
        if step == 2:
            for p in (params, one):
                p[0].detach().mul_(2)
        if step == 3:
            params[1]._local_tensor.mul_(2)
            one[1].detach().mul_(2)
        for p, optimizer in ((params, a), (one, b)):
            give(p, values(step, dtype=torch.bfloat16))
            optimizer.step()
    assert_takes_kernel(a)
    assert_same_bits(everything(a, params), everything(b, one))


@on_ranks(2)
def test_diagnostics_are_of_the_parts_of_this_process():
    params = make(distribute(values(0), mesh(2), placements_of("S0")))
    optimizer = SGD([("first", params[0]), ("second", params[1])], lr=0.1, diagnostics=True)
    give(params, values(1))
    optimizer.step()
    for name, p in (("first", params[0]), ("second", params[1])):
        assert optimizer.diagnostics[name].grad_norm == pytest.approx(p.grad.to_local().norm().item())
        assert optimizer.diagnostics[name].param_norm == pytest.approx(p.detach().to_local().norm().item())


@on_ranks(2)
def test_a_mesh_without_this_process():
    over = dist.device_mesh.DeviceMesh("cpu", [1])
    params = make([*distribute(values(0, [(4, 3)]), over, placements_of("S0")), *values(1, [(5,)])])
    optimizer = ours("Adam", params)
    params[1].grad = torch.ones(5)
    if dist.get_rank() == 1:
        give(params[:1], values(2, [(4, 3)]))
    optimizer.step()
    optimizer.step()
    assert ("on a mesh without this process" in deepops.explain(optimizer)) == (dist.get_rank() == 0)


# FSDP2.


def shard(model, over):
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=over)
    return fully_shard(model, mesh=over)


@on_ranks(2)
@every_kind
def test_fsdp2_equals_one_process(kind):
    """To the bit, where all processes have the same batch: the mean of two equal gradients is exact."""
    model, one = shard(Network(), mesh(2)), Network()
    a, b = ours(kind, model.parameters()), ours(kind, one.parameters())
    train(model, a, batches())
    train(one, b, batches())
    assert_takes_kernel(a)
    assert any(p.to_local().numel() == 0 for p in model.parameters()) == (dist.get_rank() == 1)
    assert_same_bits(everything(a, [*model.parameters()]), everything(b, [*one.parameters()]))


@on_ranks(4)
def test_fsdp2_over_replicas():
    model, one = shard(Network(), mesh(2, 2)), Network()
    a, b = (ours("AdamW", m.parameters(), max_grad_norm=1e-3) for m in (model, one))
    train(model, a, batches())
    train(one, b, batches())
    assert_takes_kernel(a)
    assert_same_bits([a.grad_norm], [b.grad_norm])
    assert_same_bits(everything(a, [*model.parameters()]), everything(b, [*one.parameters()]))


@on_ranks(2)
@every_kind
@pytest.mark.parametrize("whole", [False, True])
def test_state_dict_of_fsdp2(kind, whole):
    """Saved half way by torch's optimizer or ours, whole or in shards, and gone on with by either of ours."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    over, options = mesh(2), StateDictOptions(full_state_dict=whole)
    model = shard(Network(), over)
    optimizer = ours(kind, model.parameters())
    train(model, optimizer, batches(2))
    weights = get_model_state_dict(model, options=options)
    # Torch's load_state_dict shares what it is given.
    saved = tree_map_only(torch.Tensor, torch.clone, get_optimizer_state_dict(model, optimizer, options=options))
    results = [(model, optimizer)]
    for make_optimizer in (ours, torchs):
        other = shard(Network(), over)
        set_model_state_dict(other, weights, options=options)
        loaded = make_optimizer(kind, other.parameters())
        set_optimizer_state_dict(other, loaded, saved, options=options)
        results.append((other, loaded))
    for net, o in results:
        train(net, o, batches(2, first=2))
    assert_takes_kernel(results[1][1])
    first, second, stock = ([full(p) for p in net.parameters()] for net, _ in results)
    assert_same_bits(first, second)
    torch.testing.assert_close(first, stock)


# The norm of the whole gradient.


def mixed(over):
    """Placements for SHAPES: shards, replicas and plain tensors; on two dimensions, shards along one or both."""
    from torch.distributed.tensor import Replicate, Shard

    if over.ndim == 1:
        return [[Shard(0)], [Replicate()], [Shard(1)], [Shard(1)], [], [Shard(0)]]
    shard, replica = Shard(0), Replicate()
    return [[shard, shard], [replica, shard], [replica, replica], [shard, replica], [], [shard, replica]]


def check_norm(over, kind="AdamW"):
    params, one = make(distribute(values(0), over, mixed(over))), make(values(0))
    a, b = (ours(kind, p, max_grad_norm=0.5) for p in (params, one))
    assert a.grad_norm is None
    for step in range(3):
        grads = values(step)
        if step == 1:  # nothing to clip
            grads = [grad * 1e-4 for grad in grads]
        for p, optimizer in ((params, a), (one, b)):
            give(p, grads)
            optimizer.step()
        assert_same_bits([a.grad_norm], [b.grad_norm])
    assert_takes_kernel(a)
    for got, want in zip(everything(a, params), everything(b, one), strict=True):
        torch.testing.assert_close(got, want)
    assert_same_on_all_ranks([full(p) for p in params])


@on_ranks(2)
@every_kind
def test_norm_is_of_the_whole_gradient(kind):
    check_norm(mesh(2), kind)


@on_ranks(4)
def test_norm_over_a_mesh_of_two_dimensions():
    check_norm(mesh(2, 2))


@on_ranks(4)
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
def test_norm_over_several_meshes(order):
    """Dimensions of one, one that holds another's processes, an equal one with process groups of its own."""
    over = mesh(2, 2)
    meshes = [over["a"], over["b"], mesh(4), mesh(2, 2)["b"]]
    whole, grads = values(0)[:4], values(1)[:4]
    one = make([whole[i] for i in order])
    params = make([t for i in order for t in distribute([whole[i]], meshes[i], placements_of("S0"))])
    a, b = (ours("SGD", p, max_grad_norm=0.5) for p in (params, one))
    for p, optimizer in ((params, a), (one, b)):
        give(p, [grads[i] for i in order])
        optimizer.step()
    assert_same_bits([a.grad_norm], [b.grad_norm])
    assert_same_on_all_ranks([plan.norm.totals for plan in a._plans])
    assert len({tuple(dist.get_process_group_ranks(m.get_group())) for m in meshes}) == 3


@on_ranks(4)
def test_one_sum_over_processes_for_parameters_on_equal_meshes():
    """Each mesh has process groups of its own."""
    meshes = mesh(2, 2)["b"], mesh(2, 2)["b"]
    params = make([distribute([t], m, placements_of("S0"))[0] for t, m in zip(values(0)[:2], meshes, strict=True)])
    optimizer = ours("SGD", params, max_grad_norm=0.5)
    give(params, values(1)[:2])
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        optimizer.step()
    assert all_reduce.call_count == 1
    assert len({m.get_group().group_name for m in meshes}) == 2


@on_ranks(2)
def test_norm_of_what_takes_torchs_path():
    """Partial sums are added up before they are squared; clipped, the step is torch's after its clip_grad_norm_."""
    from torch.distributed.tensor import DTensor, Partial

    over, shapes = mesh(2), [(5, 3), (4, 2), (3,)]
    placements = [placements_of("S0"), placements_of("S0"), placements_of("R")]
    params, one = make(distribute(values(0, shapes), over, placements)), make(values(0, shapes))
    a, b = (ours("SGD", p, max_grad_norm=0.5) for p in (params, one))
    for step in range(2):
        grads = values(step, shapes)
        for i in (0, 2):
            part = grads[i] * (dist.get_rank() - 0.25)  # together: half of it
            params[i].grad = DTensor.from_local(part, over, [Partial()])
            one[i].grad = grads[i] * 0.5
        give(params[1:2], grads[1:2])
        give(one[1:2], grads[1:2])
        a.step()
        b.step()
        torch.testing.assert_close(a.grad_norm, b.grad_norm)
    for got, want in zip(everything(a, params), everything(b, one), strict=True):
        torch.testing.assert_close(got, want)


@on_ranks(2)
def test_norm_where_one_process_has_no_gradient():
    params = make(distribute(values(0), mesh(2), placements_of("S0")))
    optimizer = ours("SGD", params, max_grad_norm=1.0)
    give(params, values(1))
    whole = math.sqrt(sum(grad.double().square().sum() for grad in values(1)[1:]))
    params[0].grad = None
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(whole, rel=1e-6)
    if dist.get_rank() == 0:
        for p in params:
            p.grad = None
    optimizer.step()
    assert_same_on_all_ranks([optimizer.grad_norm])
    assert optimizer.grad_norm.item() < whole


@on_ranks(4)
@pytest.mark.parametrize("dimensions", [1, 2])
def test_replicated_parameters_stay_equal_beside_uneven_shards(dimensions):
    """Where the sum over a tensor is cut depends on the tensors before it, and so do its last bits."""
    shapes = [(3, 1001), (100_003,), (3, 777), (50_001,), (3, 10_007)]
    placements = [placements_of("S0"), placements_of("R"), placements_of("S0"), [], placements_of("S0")]
    over = mesh(4)
    if dimensions == 2:
        over, (shard, replica) = mesh(2, 2), (*placements_of("S0"), *placements_of("R"))
        placements = [[shard, replica], [replica, replica], [shard, shard], [], [replica, shard]]
    params = make(distribute(values(0, shapes), over, placements))
    optimizer = ours("SGD", params, max_grad_norm=1e-3)
    for step in range(4):
        give(params, values(step, shapes))
        optimizer.step()
        assert_same_on_all_ranks([plan.norm.totals for plan in optimizer._plans])
    assert_same_on_all_ranks([full(p) for p in params])


@on_ranks(2)
@every_kind
@pytest.mark.parametrize("first_step", [True, False])
def test_overflow_on_one_process_skips_the_step_on_all(kind, first_step):
    params = make(distribute(values(0), mesh(2), mixed(mesh(2))))
    optimizer = ours(kind, params, max_grad_norm=1.0)
    scaler = deepops.amp.GradScaler("cpu", init_scale=4.0)

    def step(seed, overflow=None):
        scaler.scale(torch.zeros(()))
        give(params, [grad * 4 for grad in values(seed)])
        if overflow is not None:
            grad = params[overflow].grad
            getattr(grad, "_local_tensor", grad).view(-1)[1] = float("inf")
        scaler.step(optimizer)
        scaler.update()

    if not first_step:
        step(1)
    before = [full(p).clone() for p in params]
    states = [] if first_step else everything(optimizer, params)
    scale = scaler.get_scale()
    for i, index in enumerate((0, 4, 5)):  # shards, and a plain tensor that the others do not find anything in
        step(2, index if dist.get_rank() == 1 else None)
        assert scaler.get_scale() == scale / 2 ** (i + 1)
    assert_same_bits([full(p) for p in params], before)
    if states:
        assert_same_bits(everything(optimizer, params), states)
    step(3)
    assert all((full(p) != b).any() for p, b in zip(params, before, strict=True) if b.numel())
    assert_same_on_all_ranks([full(p) for p in params])


@on_ranks(2)
def test_torchs_grad_scaler():
    params, one = make(distribute(values(0), mesh(2), placements_of("S0"))), make(values(0))
    for p, optimizer in ((params, ours("AdamW", params)), (one, ours("AdamW", one))):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(3):
            scaler.scale(torch.zeros(()))
            give(p, [grad * scaler.get_scale() for grad in values(step)])
            if step == 1 and hasattr(p[0], "placements"):
                if dist.get_rank() == 1:
                    p[0].grad._local_tensor.view(-1)[1] = float("nan")
            elif step == 1:
                p[0].grad.view(-1)[1] = float("nan")
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0
    assert_same_bits([full(p) for p in params], one)


@on_ranks(2)
def test_found_inf_of_one_process_does_not_leave_the_others_waiting():
    params = make(distribute(values(0), mesh(2), placements_of("S0")))
    optimizer = ours("AdamW", params, max_grad_norm=1.0)
    give(params, values(1))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(float(dist.get_rank()))
    optimizer.step()
    assert_same_on_all_ranks([optimizer.grad_norm])


@on_ranks(2)
def test_clip_grad_norm_of_dtensors_is_torchs():
    params, others = (make(distribute(values(0), mesh(2), placements_of("S0"))) for _ in range(2))
    give(params, values(1))
    give(others, values(1))
    norm = deepops.optim.clip_grad_norm_(params, 0.5)
    want = torch.nn.utils.clip_grad_norm_(others, 0.5)
    assert_same_bits([full(norm)], [full(want)])
    assert_same_bits([full(p.grad) for p in params], [full(p.grad) for p in others])


# Other ways of torch.distributed to have optimizers.


@on_ranks(2)
@every_kind
def test_zero_redundancy_optimizer_equals_one_process(kind):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    params, one = make(values(0)), make(values(0))
    a = ZeroRedundancyOptimizer(params, optimizer_class=OURS[kind], lr=0.01, **KINDS[kind])
    b = ours(kind, one)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (a, b)]
    for step in range(4):
        for p, optimizer in ((params, a), (one, b)):
            give(p, values(step))
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        if step == 1:
            a.consolidate_state_dict(to=0)
            saved = [a.state_dict() if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(saved)
            for p, q in zip(saved[0]["state"].values(), b.state_dict()["state"].values(), strict=True):
                assert_same_bits([p[name] for name in sorted(p)], [q[name] for name in sorted(q)])
            a.load_state_dict(saved[0])
    assert_same_bits(params, one)
    assert_same_on_all_ranks(params)


@every_kind
def test_one_optimizer_per_parameter_that_steps_within_backward(kind):
    network, one = Network(), Network()
    optimizers = {p: ours(kind, [p]) for p in network.parameters()}

    def step_now(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in network.parameters():
        p.register_post_accumulate_grad_hook(step_now)
    for x in batches():
        network(x).square().mean().backward()
    train(one, ours(kind, one.parameters()), batches())
    assert_same_bits([*network.parameters()], [*one.parameters()])
    for optimizer in optimizers.values():
        assert_takes_kernel(optimizer)


@every_kind
def test_apply_optimizer_in_backward(kind):
    from torch.distributed.optim import _apply_optimizer_in_backward

    network, one = Network(), Network()
    _apply_optimizer_in_backward(OURS[kind], network.parameters(), {"lr": 0.01, **KINDS[kind]})
    for x in batches():
        network(x).square().mean().backward()
    train(one, ours(kind, one.parameters()), batches())
    assert_same_bits([*network.parameters()], [*one.parameters()])
