"""``process_group=``: several processes with a part of the batch each, against one that has all of it."""

from __future__ import annotations

import contextlib
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from bn_cases import Pools, make_case, oracle_results
from bn_sync import join, part_of
from processes import on_ranks, process_pools  # noqa: F401
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from deepops import _batch_norm_act, reference
from deepops._library import has_kernel
from deepops.functional import batch_norm_act, conv_bn_act

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
each_path = pytest.mark.parametrize("path", ["kernel", "reference"])


class Collectives(TorchDispatchMode):
    """Counts what goes over the process groups, by name."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def on_path(path):
    """Within it, the kernels or plain PyTorch."""
    if path == "kernel":
        assert has_kernel("batch_norm_act_statistics", "cpu")
        return contextlib.nullcontext()
    return mock.patch.object(_batch_norm_act, "kernel_applies", return_value=False)


def run(case, group, **options):
    """Results of one process for its part, by name."""
    case = case.clone()
    leaves = {
        n: t.clone().requires_grad_()
        for n in ("x", "weight", "bias", "residual")
        if (t := getattr(case, n)) is not None
    }
    approximate = "tanh" if case.activation == "gelu_tanh" else "none"
    y = batch_norm_act(
        leaves["x"], case.running_mean, case.running_var, leaves.get("weight"), leaves.get("bias"), True, case.momentum,
        case.eps, activation=case.activation.removesuffix("_tanh"), approximate=approximate,
        negative_slope=case.negative_slope, residual=leaves.get("residual"),
        num_batches_tracked=case.num_batches_tracked, process_group=group, **options,
    )  # fmt: skip
    grads = torch.autograd.grad(y, list(leaves.values()), case.grad_y)
    results = {"y": y.detach(), **{f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}}
    results |= {name: getattr(case, name) for name in STATISTICS if getattr(case, name) is not None}
    return results


def from_all(results, group=None):
    """Those of all processes of a group, in every one of them."""
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, results, group=group)
    return found


def world():
    return dist.group.WORLD


def assert_same_bits(results, names):
    for other in results[1:]:
        for name in names:
            assert torch.equal(other[name], results[0][name]), name


@on_ranks(2)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(3, 3), (1, 5), (0, 6), (6, 0)], ids=str)
def test_two_processes_give_what_one_does(sizes, dtype, layout):
    pools = Pools()
    for activation, residual in (("relu", False), ("relu", True), ("silu", True), ("gelu_tanh", False)):
        case = make_case((6, 5, 6, 7), dtype, LAYOUTS[layout], activation=activation, residual=residual, mean=2.0)
        parts = from_all(run(part_of(case, sizes, dist.get_rank()), world()))
        assert_same_bits(parts, STATISTICS)
        pools.add(case, True, f"{activation} {residual}", join(case, parts))
    pools.check()


@on_ranks(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(3, 3), (1, 5), (6, 0)], ids=str)
def test_without_kernels(sizes, dtype):
    pools = Pools()
    for activation, residual in (("relu", True), ("silu", False), ("gelu", True)):
        case = make_case((6, 5, 6, 7), dtype, activation=activation, residual=residual, mean=2.0)
        with on_path("reference"):
            parts = from_all(run(part_of(case, sizes, dist.get_rank()), world()))
        assert_same_bits(parts, STATISTICS)
        pools.add(case, True, f"{activation} {residual}", join(case, parts))
    pools.anchor(make_case((16, 8, 9, 9), dtype, residual=True, activation="silu", mean=2.0), True)
    pools.check()


@on_ranks(2)
@each_path
def test_cumulative_average_over_several_batches(path):
    whole = make_case((5, 3, 4, 4), torch.float64, momentum=None)
    case, expected = part_of(whole, (1, 4), dist.get_rank()), whole.clone()
    for sizes in ((1, 4), (5, 0), (2, 3)):
        batch = make_case((5, 3, 4, 4), torch.float64)
        x = part_of(batch, sizes, dist.get_rank()).x
        with on_path(path):
            batch_norm_act(x, case.running_mean, case.running_var, training=True, momentum=None,
                           num_batches_tracked=case.num_batches_tracked, process_group=world())  # fmt: skip
        reference.batch_norm_act(batch.x, expected.running_mean, expected.running_var, training=True, momentum=None,
                                 num_batches_tracked=expected.num_batches_tracked)  # fmt: skip
    for name in STATISTICS:
        torch.testing.assert_close(getattr(case, name), getattr(expected, name), msg=name)


@on_ranks(3)
def test_a_group_of_two_of_three_processes():
    group, rank = dist.new_group([0, 2]), dist.get_rank()
    case = make_case((4, 3, 5, 5), torch.float64, residual=True)
    if rank == 1:
        before = case.clone()
        with pytest.raises(ValueError, match="process_group: expected a group with this process"):
            run(case, group)
        assert torch.equal(case.running_mean, before.running_mean)
        return
    parts = from_all(run(part_of(case, (3, 1), rank // 2), group), group)
    assert_same_bits(parts, STATISTICS)
    expected = oracle_results(case, True)
    for name, actual in join(case, parts).items():
        torch.testing.assert_close(actual, expected[name], msg=name)


@on_ranks(2)
@each_path
@pytest.mark.parametrize("size", [2, 0])
def test_one_collective_forward_and_one_backward(size, path):
    """For an empty part too, and for its backward alone where the gradient of x is wanted."""
    case = make_case((4, 3, 5, 5), residual=True)
    case = part_of(case, (4 - size, size), dist.get_rank())
    x, weight, residual = (t.clone().requires_grad_() for t in (case.x, case.weight, case.residual))

    def forward(x):
        return batch_norm_act(x, None, None, weight, training=True, residual=residual, process_group=world())

    with on_path(path):
        with Collectives() as collectives:
            y = forward(x)
        assert sum(collectives.names.values()) == 1
        assert any("gather" in name for name in collectives.names)
        for wanted in ([x], [x, weight], [weight, residual]):
            with Collectives() as collectives:
                torch.autograd.grad(forward(x if wanted[0] is x else x.detach()), wanted, case.grad_y)
            assert sum(collectives.names.values()) == 1 + (wanted[0] is x), wanted
            assert collectives.names["allreduce_"] == (wanted[0] is x)
        with Collectives() as collectives, torch.no_grad():
            forward(x)
            assert sum(collectives.names.values()) == 1
            case.running_mean.zero_()
            batch_norm_act(case.x, case.running_mean, case.running_var, process_group=world())
            assert sum(collectives.names.values()) == 1  # none in evaluation
    assert y.shape == x.shape


@on_ranks(2)
@each_path
def test_the_bias_of_a_convolution_cancels(path):
    """It goes to the running mean; its gradient is exactly 0."""
    torch.manual_seed(0)
    x, w, b = torch.randn(5, 3, 6, 6).double(), torch.randn(4, 3, 3, 3).double(), torch.randn(4).double()
    rank, results = dist.get_rank(), []
    for mine, group in (((x[:2], x[2:])[rank], world()), (x, None)):
        weight, bias = w.clone().requires_grad_(), b.clone().requires_grad_()
        mean, var, count = torch.zeros(4).double(), torch.ones(4).double(), torch.tensor(2)
        with on_path(path):
            y = conv_bn_act(mine, weight, bias, mean, var, training=True, momentum=None, padding=1, activation="silu",
                            num_batches_tracked=count, process_group=group)  # fmt: skip
        y.square().sum().backward()
        assert torch.equal(bias.grad, torch.zeros(4).double())
        results.append((y.detach(), weight.grad, mean, var, count))
    (y, grad, *statistics), (whole_y, whole_grad, *whole_statistics) = results
    dist.all_reduce(grad)
    torch.testing.assert_close(y, (whole_y[:2], whole_y[2:])[rank])
    torch.testing.assert_close(grad, whole_grad)
    torch.testing.assert_close(statistics, whole_statistics)


@on_ranks(2)
@each_path
def test_nothing_in_any_process(path):
    """As a batch without anything: it is counted, nothing is learnt, and gradients are zeros."""
    x, w = torch.empty(0, 3, 6, 6, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    bias, gamma = torch.randn(4, requires_grad=True), torch.ones(4, requires_grad=True)
    mean, var, count = torch.randn(4), torch.rand(4), torch.tensor(2)
    before = mean.clone(), var.clone()
    with on_path(path):
        y = conv_bn_act(x, w, bias, mean, var, gamma, training=True, num_batches_tracked=count, process_group=world())
    assert y.shape == (0, 4, 4, 4)
    y.sum().backward()
    for t in (x, w, bias, gamma):
        assert torch.equal(t.grad, torch.zeros_like(t))
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])
    assert count.item() == 3


@on_ranks(2)
@each_path
def test_single_values(path):
    """One in each process is a batch of two; one in all is none, and nothing has changed."""
    rank = dist.get_rank()
    mean, var, count = torch.zeros(1), torch.ones(1), torch.tensor(0)
    statistics = {"running_mean": mean, "running_var": var, "num_batches_tracked": count, "training": True}
    with on_path(path):
        x = torch.tensor([[1.0 - 2 * rank]])
        y = batch_norm_act(x, **statistics, activation="identity", process_group=world())
        torch.testing.assert_close(y, x)
        torch.testing.assert_close(var, torch.tensor([1.1]))  # 0.9 * 1 + 0.1 * 2
        before = mean.clone(), var.clone(), count.clone()
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got 1 in all"):
            batch_norm_act(torch.ones(1, 1)[rank:], **statistics, process_group=world())
    for old, new in zip(before, (mean, var, count), strict=True):
        assert torch.equal(old, new)


@on_ranks(2)
def test_alone_in_a_group():
    """As without one."""
    groups = [dist.new_group([0]), dist.new_group([1])]
    case = make_case((3, 4, 5, 5), residual=True, activation="silu")
    with Collectives() as collectives:
        actual, expected = run(case, groups[dist.get_rank()]), run(case, None)
    assert not collectives.names
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        batch_norm_act(torch.ones(1, 2), None, None, training=True, process_group=groups[dist.get_rank()])


@on_ranks(2)
def test_groups_one_cannot_work_with():
    case = make_case((3, 4, 5, 5))
    before = case.clone()
    gone = dist.new_group([0, 1])
    dist.destroy_process_group(gone)
    for group, error, message in (
        (gone, ValueError, "process_group: expected a group that exists, got one that is gone"),
        (dist.GroupMember.NON_GROUP_MEMBER, ValueError, "process_group: expected a group with this process"),
        ("world", TypeError, "process_group: expected a torch.distributed.ProcessGroup, got str"),
    ):
        with pytest.raises(error, match=message):
            run(case, group)
        with pytest.raises(error, match=message):
            conv_bn_act(torch.ones(1, 4, 5, 5), torch.ones(4, 4, 1, 1), None, case.running_mean, case.running_var,
                        training=True, process_group=group)  # fmt: skip
    with pytest.raises(RuntimeError, match=r"process_group: torch\.func and forward-mode differentiation do not reach"):
        torch.func.grad(lambda x: batch_norm_act(x, None, None, training=True, process_group=world()).sum())(case.x)
    for name in STATISTICS:
        assert torch.equal(getattr(case, name), getattr(before, name))


@on_ranks(2)
@pytest.mark.parametrize("activation", ["relu", "silu", "identity"])
@pytest.mark.parametrize("sizes", [(2, 3), (0, 5)], ids=str)
def test_double_backward(sizes, activation):
    """The sum of squares of the gradients of the sum of all losses, differentiated again."""
    whole = make_case((5, 3, 2, 3), torch.float64, residual=True, activation=activation)
    results = []
    for case, group in ((part_of(whole, sizes, dist.get_rank()), world()), (whole, None)):
        x, weight, residual = (t.clone().requires_grad_() for t in (case.x, case.weight, case.residual))
        y = batch_norm_act(x, None, None, weight, training=True, activation=activation, residual=residual,
                           process_group=group)  # fmt: skip
        grad_x, grad_residual = torch.autograd.grad((y.square() * case.grad_y).sum(), [x, residual], create_graph=True)
        penalty = grad_x.square().sum() + grad_residual.square().sum()
        results.append(torch.autograd.grad(penalty, [x, weight, residual]))
    (x, weight, residual), expected = results
    dist.all_reduce(weight)
    torch.testing.assert_close(weight, expected[1])
    first = sum(sizes[: dist.get_rank()])
    torch.testing.assert_close(x, expected[0][first : first + len(x)])
    torch.testing.assert_close(residual, expected[2][first : first + len(x)])


class Block(nn.Module):
    def __init__(self, group):
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.bn, self.group = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), group
        self.head = nn.Conv2d(6, 2, 1)
        self.double()

    def forward(self, x):
        bn = self.bn
        y = conv_bn_act(
            x, self.conv.weight, None, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training,
            num_batches_tracked=bn.num_batches_tracked, process_group=self.group, activation="silu",
        )  # fmt: skip
        return self.head(y)


@on_ranks(2)
def test_distributed_data_parallel_trains_as_one_process():
    """The mean of the processes' losses over equal parts is the loss of the whole batch."""
    from torch.nn.parallel import DistributedDataParallel

    models = [DistributedDataParallel(Block(world()), broadcast_buffers=False), Block(None)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    for step in range(3):
        batch = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step)).double()
        mine = batch[2 * dist.get_rank() :][:2]
        for model, optimizer, x in zip(models, optimizers, (mine, batch), strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for (name, actual), expected in zip(
        models[0].module.state_dict().items(), models[1].state_dict().values(), strict=True
    ):
        torch.testing.assert_close(actual, expected, msg=name)
    assert_same_bits(from_all(models[0].module.state_dict()), list(models[1].state_dict()))


@on_ranks(2)
def test_autocast_and_a_wider_residual():
    """The sum has the wider dtype, as without a group."""
    whole = make_case((4, 3, 5, 5), torch.bfloat16, residual=True)
    results = []
    for case, group in ((part_of(whole, (1, 3), dist.get_rank()), world()), (whole, None)):
        with torch.autocast("cpu", torch.bfloat16):
            residual = case.residual.float()
            results.append(batch_norm_act(case.x, None, None, training=True, residual=residual, process_group=group))
    assert results[0].dtype is torch.float32
    torch.testing.assert_close(results[0], results[1].split([1, 3])[dist.get_rank()])


@on_ranks(2)
def test_compiling_breaks_the_graph():
    model = Block(world())
    x = torch.randn(2 + dist.get_rank(), 3, 6, 6).double()
    expected = model(x)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    actual = torch.compile(model, backend=backend)(x)
    torch.testing.assert_close(actual, expected)
    assert len(graphs) >= 2
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="_in_group"):
        torch.compile(model, backend=backend, fullgraph=True)(x)
    model.eval()
    torch.compile(model, backend=backend, fullgraph=True)(x)  # evaluation exchanges nothing


def test_without_torch_distributed_a_group_is_no_group():
    with mock.patch.object(dist, "is_available", return_value=False), pytest.raises(TypeError, match="got object"):
        batch_norm_act(torch.ones(2, 2), None, None, training=True, process_group=object())


def test_evaluation_looks_at_no_group():
    x = torch.randn(2, 3)
    mean, var = torch.zeros(3), torch.ones(3)
    assert torch.equal(batch_norm_act(x, mean, var, process_group=object()), batch_norm_act(x, mean, var))
