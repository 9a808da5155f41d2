"""The norm of a gradient that lies on several processes: clipping, overflow, skipped steps."""

import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_cases import (
    assert_same_on_all_ranks,
    assert_takes_kernel,
    distribute,
    every_kind,
    everything,
    full,
    give,
    make,
    mesh,
    ours,
    placements_of,
    values,
)
from optim_cases import assert_same_bits, needs_kernel
from processes import on_ranks, process_pools  # noqa: F401

import deepops

pytestmark = needs_kernel


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
