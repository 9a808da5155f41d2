"""Values of the optimizers' steps: against the fp64 oracle and torch; special numbers, any shapes, late gradients."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optim_cases import (
    DTYPES,
    KINDS,
    SGD_,
    SHAPES,
    assert_alike,
    assert_within_the_rule,
    both,
    each_dtype,
    each_kernel,
    each_kind,
    each_option,
    everything,
    flat,
    give_grads,
    make,
    on_every_backend,
    oracle_run,
    states,
    step_both,
    steps_of,
    train,
)

import deepops
from deepops import testing

pytestmark = on_every_backend


def assert_close_to_oracle(kind, options, dtype, shapes, steps):
    """Parameters and each state, all tensors as one. Returns our optimizer and parameters."""
    other = torch.float32 if dtype is torch.float64 else dtype
    ours, stock = make(shapes, dtype), make(shapes, other)
    a, b = kind.ours(ours, **options), kind.stock(stock, **options)
    train(a, ours, steps)
    train(b, stock, steps)
    group = b.param_groups[0]
    want, moments = oracle_run(kind, make(shapes, dtype), group, steps)
    assert list(moments) == kind.names(group)
    results = [("param", ours, stock, want)]
    results += [(name, states(a, ours, name), states(b, stock, name), oracle) for name, oracle in moments.items()]
    for name, got, stocks, oracle in results:
        assert_within_the_rule(name, flat(got), flat(stocks), flat(oracle))
    return a, ours


@each_dtype
@each_option()
def test_values_against_oracle(kind, options, dtype):
    a, ours = assert_close_to_oracle(kind, options, dtype, SHAPES, steps=4)
    assert steps_of(a, ours) == [4] * len(ours)
    assert "its" not in deepops.explain(a)
    assert a._explain().count("deepops kernel") == 1
    assert "torch, because" not in a._explain()


@pytest.mark.parametrize("steps", [1, 100])
@each_dtype
@each_option(count=2)
def test_values_after_one_and_after_a_hundred_steps(kind, options, dtype, steps):
    assert_close_to_oracle(kind, options, dtype, [(), (3, 5), (500,)], steps)


ROUNDINGS = 12  # of the update, its factors included


@each_kernel
def test_first_step_in_ulps(kind):
    """A parameter is off by its own rounding and by those of its update; a state by those of (1 - beta) * g * g."""
    ours, start = make([(10_000,)]), make([(10_000,)])
    a = kind.ours(ours)
    train(a, ours, 1)
    want, moments = oracle_run(kind, start, a.param_groups[0], 1)
    update = want[0] - start[0].detach().double()
    unit = torch.finfo(torch.float32).eps / 2
    error = (ours[0].detach().double() - want[0]).abs()
    assert torch.all(error <= testing.half_ulp(want[0], torch.float32) + ROUNDINGS * unit * update.abs())
    for name, oracle in moments.items():
        error = (a.state[ours[0]][name].double() - oracle[0]).abs()
        assert torch.all(error <= 3 * unit * oracle[0].abs() + testing.half_ulp(oracle[0], torch.float32)), name


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), 0.0, 1e30, 1e-40])
@each_option(count=2)
def test_special_gradients_as_in_torch(kind, options, special):
    if special == 1e30 and options.get("centered"):
        pytest.skip("whether v - a * a is inf or inf - inf depends on whether torch's build fuses it")
    ours, stock, a, b = both(kind, options, [(100,)])
    for step in range(3):
        give_grads(ours, stock, seed=step)
        if step == 1:
            for p in (ours[0], stock[0]):
                p.grad[3] = special
        a.step()
        b.step()
    for x, y in zip(everything(a, ours), everything(b, stock), strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)  # which elements are special; values: the tests above


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=12),
    st.sampled_from([(kind, options) for kind in KINDS for options in kind.options]),
    st.data(),
)
def test_any_shapes_and_any_missing_gradients(shapes, case, data):
    kind, options = case
    ours, stock, a, b = both(kind, options, shapes, torch.float64)
    for step in range(3):
        give_grads(ours, stock, seed=step)
        for p, q in zip(ours, stock, strict=True):
            if data.draw(st.booleans()):
                p.grad = q.grad = None
        a.step()
        b.step()
    assert set(map(id, a.state)) <= set(map(id, ours))
    for p, q in zip(ours, stock, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
        own, other = a.state.get(p) or {}, b.state.get(q) or {}
        assert own.keys() == other.keys()
        assert own.get("step") == other.get("step")


def test_a_late_first_gradient_starts_the_momentum():
    early, late = make([(5,)]), make([(5,)])
    optimizer = SGD_.ours([*early, *late], lr=0.1, momentum=0.9, dampening=0.5)
    train(optimizer, early, 2)
    late[0].grad = torch.ones_like(late[0])
    optimizer.step()
    assert torch.equal(optimizer.state[late[0]]["momentum_buffer"], torch.ones_like(late[0])), (
        "neither zeros nor damped"
    )


@each_kernel
def test_many_tiny_tensors(kind):
    count = 21_000
    ours, one = make([()] * count), make([(count,)])
    with torch.no_grad():
        one[0].copy_(torch.stack(ours))
    a, b = kind.ours(ours, **kind.rich), kind.ours(one, **kind.rich)
    one[0].grad = torch.randn(count).to(one[0].device)
    for p, grad in zip(ours, one[0].grad.unbind(), strict=True):
        p.grad = grad
    for _ in range(2):
        a.step()
        b.step()
    assert torch.equal(torch.stack(ours), one[0])
    assert steps_of(a, ours) == [2.0] * count


@each_kind
def test_an_empty_tensor_last_drops_nothing(kind):
    ours, stock, a, b = both(kind, kind.rich, [(0,), (5,), (), (0,), (3, 0)])
    for seed in range(3):
        step_both(ours, stock, a, b, seed)
    assert_alike(ours, stock, a, b)
    assert not torch.equal(ours[2], make([(0,), (5,), ()])[2])


@each_option(count=2)
def test_all_dtypes_in_one_group_are_as_if_alone(kind, options):
    dtypes = [*DTYPES, torch.complex64]
    together = [make([(5,), (300,)], dtype) for dtype in dtypes]
    alone = [make([(5,), (300,)], dtype) for dtype in dtypes]
    a = kind.ours([p for params in together for p in params], **options)
    others = [kind.ours(params, **options) for params in alone]
    for seed in range(3):
        for params, same, b in zip(together, alone, others, strict=True):
            give_grads(params, same, seed=seed)
            b.step()
        a.step()
    for params, same, b in zip(together, alone, others, strict=True):
        for x, y in zip(everything(a, params), everything(b, same), strict=True):
            assert torch.equal(x, y)


@each_option(count=2)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_numbers_are_two_real_ones(kind, options, dtype):
    ours, a = make(dtype=dtype), None
    reals = [torch.nn.Parameter(torch.view_as_real(p.detach().clone())) for p in ours]
    a, b = kind.ours(ours, **options), kind.ours(reals, **options)
    stock = make(dtype=dtype)
    c = kind.stock(stock, **options)
    for seed in range(3):
        give_grads(ours, stock, seed=seed)
        for p, real in zip(ours, reals, strict=True):
            real.grad = torch.view_as_real(p.grad).clone()
        for optimizer in (a, b, c):
            optimizer.step()
    assert "torch, because" not in a._explain()
    for p, real in zip(ours, reals, strict=True):
        assert torch.equal(torch.view_as_real(p.detach()), real)
    assert_alike(ours, stock, a, c)
