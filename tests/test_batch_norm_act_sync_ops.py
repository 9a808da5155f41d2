"""The ops of ``batch_norm_act`` for a batch in parts: values, bits, counts, edges, bad calls. No processes are needed.

What processes do with them: ``test_batch_norm_act_sync.py``.
"""

from __future__ import annotations

import math
from dataclasses import replace

import backends
import pytest
import torch
from bn_cases import ACTIVATIONS, DTYPES, FORMATS, Pools, make_case, op_results, train
from bn_sync import input_grad, join, merge, reduce, results_of_parts

from deepops import functional, testing
from deepops.testing import assert_close_to_oracle

pytestmark = pytest.mark.usefixtures("backend")
assert functional  # which registers the fakes

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Whole vectors and tails, several work items to a channel, few and many channels.
SHAPES = [(5, 3, 5, 7), (4, 33, 3, 3), (6, 16, 14, 14), (3, 2, 90, 91), (40, 17, 1, 1)]


def cuts(count: int) -> list[tuple[int, ...]]:
    """Ways to cut a batch: evenly or not, with empty parts first, last and in between."""
    return [(count // 2, count - count // 2), (1, count - 1), (count, 0), (0, 1, 0, count - 1)]


@each_layout
@each_dtype
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_parts_give_what_the_whole_batch_gives(residual, dtype, layout):
    pools = Pools()
    for shape in SHAPES[:4]:
        for i, activation in enumerate(ACTIVATIONS if shape == SHAPES[1] else ("silu",)):
            if backends.current == "simt" and (i + DTYPES.index(dtype)) % 2 and shape == SHAPES[1]:
                continue  # each in two of the dtypes
            case = make_case(shape, dtype, LAYOUTS[layout], activation=activation, residual=residual, mean=2.0)
            for sizes in cuts(shape[0]) if shape == SHAPES[0] else cuts(shape[0])[1:2]:
                actual = join(case, results_of_parts(case, sizes))
                pools.add(case, True, f"{activation} {list(shape)} {sizes}", actual)
    pools.check()


@pytest.mark.parametrize("name", FORMATS)
@each_dtype
def test_one_part_has_the_bits_of_the_whole_op(dtype, name):
    """An empty part beside it changes none. On the executor the shapes take turns in dtypes and formats."""
    dims, memory_format = FORMATS[name]
    for i, shape in enumerate(SHAPES):
        if backends.current == "simt" and (i + DTYPES.index(dtype) + [*FORMATS].index(name)) % 2:
            continue
        shape = (*shape, 2)[:dims]
        residual, activation = i % 2 == 0, ACTIVATIONS[i]
        momentum = None if i == 1 else 0.1
        case = make_case(shape, dtype, memory_format, residual=residual, activation=activation, momentum=momentum)
        expected = op_results(case, True)
        for sizes in ((shape[0],), (0, shape[0]), (shape[0], 0)):
            actual = join(case, results_of_parts(case, sizes))
            assert actual.keys() == expected.keys()
            for key in expected:
                assert torch.equal(actual[key], expected[key]), f"{key} {shape} {sizes}"


@each_layout
@each_dtype
def test_same_bits_on_every_instruction_set_and_any_number_of_threads(dtype, layout, backend):
    if backend != "cpu":
        pytest.skip("of the CPU kernels")
    for shape in [*SHAPES, (2, 64, 57, 63)]:
        case = make_case(shape, dtype, LAYOUTS[layout], activation="silu", residual=shape[0] % 2 == 0, mean=3.0)
        found = {}
        for isa in testing.isas():
            for threads in (1, 2):
                with testing.use_isa(isa), testing.use_threads(threads):
                    found[isa, threads] = results_of_parts(case, (1, shape[0] - 1))
        first, *others = found
        for other in others:
            for a, b in zip(found[first], found[other], strict=True):
                for key in a:
                    assert torch.equal(a[key], b[key]), f"{key} {shape} {other}"


def test_every_part_learns_the_same_bits():
    case = make_case((7, 19, 6, 5), residual=True, mean=3.0)
    first, *others = results_of_parts(case, (2, 0, 4, 1))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        for other in others:
            assert torch.equal(other[name], first[name]), name


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("tracked", ["both", "mean", "var", "neither", "no counter"])
def test_what_is_tracked(tracked, momentum):
    case = make_case((5, 4, 3, 3), momentum=momentum)
    dropped = {"both": [], "mean": ["running_var"], "var": ["running_mean"], "no counter": ["num_batches_tracked"]}
    names = dropped.get(tracked, ["running_mean", "running_var"])
    case = replace(case, **dict.fromkeys(names))
    expected, (actual, _) = op_results(case, True), results_of_parts(case, (2, 3))
    assert actual.keys() == expected.keys()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        if name in expected:
            torch.testing.assert_close(actual[name], expected[name], msg=name)
            assert (
                (name, tracked, momentum) == ("running_mean", "no counter", None)
                or tracked == "no counter"
                or bool((actual[name] != getattr(case, name)).any())
            )


@pytest.mark.parametrize("far", [0.0, 1e6])
def test_merge_far_from_zero(far):
    """Means of 1e6 beside variances of 1, counts of 1 to 1e5: no sum of squares would do."""
    torch.manual_seed(0)
    pieces = [torch.randn(n, 6, dtype=torch.float64) + far + i for i, n in enumerate((1, 70, 100_003, 3))]
    rows = [torch.cat([p.mean(0), p.var(0, correction=0), torch.tensor([float(len(p))])]) for p in pieces]
    whole = torch.cat(pieces)
    case = make_case((2, 6, 2), torch.float64, momentum=1.0, eps=0.0)
    mean, invstd, count = (t.cpu() for t in merge(case, torch.stack(rows).to(case.x.device)))
    assert count.item() == len(whole)
    centered = whole - far
    for name, actual, expected in (
        ("mean", mean - far, centered.mean(0)),
        ("invstd", invstd, centered.var(0, correction=0).rsqrt()),
        ("running_var", case.running_var.cpu(), centered.var(0)),
    ):
        # An ulp of 1e6, in which the means are given, is 1e-10.
        torch.testing.assert_close(actual, expected, rtol=1e-12 if far == 0 else 1e-9, atol=0, msg=name)


@pytest.mark.parametrize("values", [0, 1])
def test_nothing_is_learnt_from_fewer_than_two_values(values):
    case = make_case((3, 4, 2, 2))
    before = case.clone()
    x = case.x[:values, :, :1, :1].contiguous()
    part = backends.ops().batch_norm_act_statistics(x)
    assert part.tolist() == ([0.0] * 9 if values == 0 else [*x.flatten().tolist(), *[0.0] * 4, 1.0])
    mean, invstd, count = merge(case, torch.stack([torch.zeros_like(part), part]))
    assert torch.equal(case.running_mean, before.running_mean)
    assert torch.equal(case.running_var, before.running_var)
    assert case.num_batches_tracked.item() == 4
    assert count.item() == values
    assert torch.equal(mean, part[:4].to(mean.dtype))
    expected = torch.full((4,), case.eps**-0.5 if values else 0.0, dtype=torch.float64)
    assert_close_to_oracle(invstd, None, expected)  # rounded once


@each_layout
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_special_value_spoils_its_channel_in_all_parts_and_no_other(value, layout):
    case = make_case((4, 5, 3, 7), memory_format=LAYOUTS[layout], activation="silu")
    x = case.x.clone()
    x[3, 2, 1, 4] = value
    clean = join(case, results_of_parts(case, (1, 3)))
    spoilt = join(case, results_of_parts(replace(case, x=x), (1, 3)))
    others = [0, 1, 3, 4]
    for name in ("y", "grad_x"):
        assert spoilt[name][:, 2].isnan().all(), name
        assert torch.equal(spoilt[name][:, others], clean[name][:, others]), name
    for name in ("running_mean", "running_var", "grad_weight", "grad_bias"):
        assert torch.equal(spoilt[name][others], clean[name][others]), name
    assert not spoilt["running_mean"][2].isfinite()
    assert spoilt["running_var"][2].isnan()


def test_large_values_of_one_part():
    """Whose squares overflow single precision."""
    case = make_case((4, 3, 5, 5), activation="identity")
    case = replace(case, x=case.x * 1e30)
    results = join(case, results_of_parts(case, (3, 1)))
    expected = op_results(case, True)
    for name in ("y", "running_mean"):
        torch.testing.assert_close(results[name], expected[name], msg=name)


@each_layout
def test_parallel_regions(layout, backend):
    if backend != "cpu":
        pytest.skip("of the CPU kernels")
    case = make_case((4, 8, 9, 9), memory_format=LAYOUTS[layout], residual=True)
    y, mean, invstd = train(case.clone())
    regions = []
    for call in (
        lambda: torch.ops.deepops.batch_norm_act_statistics(case.x),
        lambda: merge(case.clone(), torch.ops.deepops.batch_norm_act_statistics(case.x)[None]),
        lambda: reduce(case, y, mean, invstd),
        lambda: input_grad(case, y, mean, invstd, torch.zeros(16).double(), torch.ones(1).double(), True),
    ):
        with testing.count_parallel_regions() as counted:
            call()
        regions.append(counted.count)
    assert regions == [1, 2, 1, 1]


def test_what_is_not_wanted_is_empty():
    case = make_case((4, 8, 3, 3))
    y, mean, invstd = train(case.clone())
    sums, grad_weight, grad_bias = reduce(case, y, mean, invstd, need_affine=False)
    assert sums.shape == (16,)
    assert grad_weight.numel() == grad_bias.numel() == 0
    count = torch.full((1,), 36.0, dtype=torch.float64, device=sums.device)
    grad_x, grad_residual = input_grad(case, y, mean, invstd, sums, count, False)
    assert grad_x.shape == case.x.shape
    assert grad_residual.numel() == 0


@pytest.mark.parametrize("batch", [0, 3])
@each_layout
def test_opcheck(layout, batch, backend):
    if backend == "simt":
        pytest.skip("fakes are of torch.ops.deepops")
    case = make_case((4, 5, 3, 3), memory_format=LAYOUTS[layout], residual=True)
    y, mean, invstd = train(case.clone())
    ops = torch.ops.deepops
    gathered = ops.batch_norm_act_statistics(case.x)[None]
    x, grad_y, kept = (t[:batch].clone() for t in (case.x, case.grad_y, y))
    fixed = (grad_y, x, kept, case.weight, case.bias, mean, invstd)
    sums, count = torch.zeros(10).to(gathered), torch.ones(1).to(gathered)
    running = (case.running_mean, case.running_var, case.num_batches_tracked)
    for op, arguments in (
        (ops.batch_norm_act_statistics, (x,)),
        (
            ops.batch_norm_act_merge,
            (x, gathered, *running, 0.1, 1e-5),
        ),
        (ops.batch_norm_act_merge, (x, gathered, None, None, None, None, 1e-5)),
        (ops.batch_norm_act_reduce, (*fixed, "relu", 0.0, True)),
        (ops.batch_norm_act_reduce, (*fixed, "relu", 0.0, False)),
        (ops.batch_norm_act_input_grad, (*fixed, sums, count, "relu", 0.0, True)),
        (ops.batch_norm_act_input_grad, (*fixed, sums, count, "relu", 0.0, False)),
    ):
        torch.library.opcheck(op.default, arguments)


def test_direct_calls_with_tensors_that_do_not_fit():
    case = make_case((4, 5, 3, 3))
    y, mean, invstd = train(case.clone())
    part = backends.ops().batch_norm_act_statistics(case.x)
    sums, count = torch.zeros(10).to(part), torch.ones(1).to(part)
    before = case.clone()
    for call in (
        lambda: merge(case, part),
        lambda: merge(case, part[None, 1:].contiguous()),
        lambda: merge(case, part[None].float()),
        lambda: merge(case, torch.stack([part, part], 1).t()),
        lambda: merge(replace(case, num_batches_tracked=torch.tensor(1.0)), part[None]),
        lambda: merge(replace(case, running_mean=torch.zeros(4)), part[None]),
        lambda: reduce(case, y, mean[1:], invstd),
        lambda: reduce(replace(case, grad_y=case.grad_y.double()), y, mean, invstd),
        lambda: input_grad(case, y, mean, invstd, sums[1:], count, False),
        lambda: input_grad(case, y, mean, invstd, sums.float(), count, False),
        lambda: input_grad(case, y, mean, invstd, sums, count.expand(2), False),
        lambda: backends.ops().batch_norm_act_statistics(case.x.long()),
        lambda: backends.ops().batch_norm_act_statistics(case.x[:, :, ::2]),
    ):
        with pytest.raises(RuntimeError):
            call()
    assert torch.equal(case.running_mean, before.running_mean)
    assert torch.equal(case.num_batches_tracked, before.num_batches_tracked)
