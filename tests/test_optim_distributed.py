"""Optimizers over several processes: DDP, DTensors, FSDP2, ZeroRedundancyOptimizer."""

import pytest
import torch
import torch.distributed as dist
from distributed_cases import (
    KINDS,
    OURS,
    SHAPES,
    Network,
    assert_same_on_all_ranks,
    assert_takes_kernel,
    batches,
    distribute,
    every_kind,
    everything,
    full,
    give,
    make,
    mesh,
    ours,
    placements_of,
    torchs,
    train,
    values,
)
from optim_cases import assert_same_bits, needs_kernel
from processes import on_ranks, process_pools  # noqa: F401
from torch import nn
from torch.utils._pytree import tree_map_only

import deepops
from deepops import testing
from deepops.optim import SGD

pytestmark = needs_kernel


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
