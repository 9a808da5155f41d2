"""Gradient scalers, torch's and ours, with every optimizer: overflows, schedules, and the order of calls."""

import itertools

import backends
import pytest
import torch
from optim_cases import only_on_cpu
from scaling_cases import (
    CASES,
    assert_same,
    assert_untouched,
    every_case,
    every_scaler,
    give_grads,
    make,
    make_scaler,
    on_every_backend,
    ours,
    snapshot,
    stock,
    through,
)

import deepops
from deepops.testing import ErrorPool, count_parallel_regions

pytestmark = on_every_backend

INF, NAN = float("inf"), float("nan")


def spoil(param, value):
    """One element of the parameter's gradient, the last."""
    param.grad.as_subclass(torch.Tensor).view(-1)[-1] = value


# ---- overflows ------------------------------------------------------------------------------------------------------

# What happens at each step: at the first, in the middle, twice in a row.
HISTORY = [INF, None, None, NAN, -INF, None, NAN, None]


def each_step(history, scaler, a, params, b, alone):
    """Steps of ``a`` through the scaler, and of ``b`` without one wherever the history has nothing bad.

    Both get the same gradients; those of ``params`` are for the caller to spoil with what this yields: number of the
    step, what is bad. A bad step must leave ``a`` as it was, and in the end both must have the same bits.
    """
    for seed, bad in enumerate(history):
        give_grads(params, seed=seed, scale=scaler.get_scale())
        give_grads(alone, seed=seed)
        before = snapshot(a, params)
        yield seed, bad
        scaler.step(a)
        scaler.update()
        if bad is None:
            b.step()
        else:
            assert_untouched(before, snapshot(a, params))
    assert_same(snapshot(a, params), snapshot(b, alone))


@every_scaler
@every_case
@pytest.mark.parametrize(("odd", "targets"), [((), (0, 2, 6)), ((2, 6), (2, 3))], ids=["kernel", "mixed"])
def test_overflow_changes_nothing(case, scaler_class, odd, targets):
    """Whichever tensor overflows; all other steps have the bits of a run without scaler; the schedule is torch's."""
    for target in targets:
        params, alone, judge = make(odd=odd), make(odd=odd), make()
        a, b, c = ours(case, params), ours(case, alone), stock(case, judge)
        scaler = make_scaler(scaler_class, growth_interval=2)
        reference = make_scaler(torch.amp.GradScaler, growth_interval=2)
        for seed, bad in each_step(HISTORY, scaler, a, params, b, alone):
            assert scaler.state_dict() == reference.state_dict()
            give_grads(judge, seed=seed, scale=scaler.get_scale())
            if bad is not None:
                spoil(params[target], bad)
                spoil(judge[target], bad)
            reference.step(c)
            reference.update()


@every_case
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_overflow_of_a_complex_gradient(case, dtype):
    """Of its imaginary part; torch's scaler has no check for complex gradients."""
    params, alone = make([(5,), (3, 3)], dtype), make([(5,), (3, 3)], dtype)
    a, b, scaler = ours(case, params), ours(case, alone), make_scaler(deepops.amp.GradScaler)
    for _, bad in each_step((INF, None, NAN, None), scaler, a, params, b, alone):
        if bad is not None:
            torch.view_as_real(params[1].grad)[2, 2, 1] = bad


@every_scaler
@pytest.mark.parametrize("bad", [INF, NAN])
def test_overflow_of_a_sparse_gradient(scaler_class, bad):
    """Which SGD takes torch's path for."""
    params, alone = make([(4, 3), (5,)]), make([(4, 3), (5,)])
    a, b, scaler = ours("sgd-momentum", params), ours("sgd-momentum", alone), make_scaler(scaler_class)
    for seed, spoils in each_step((bad, None, bad, None), scaler, a, params, b, alone):
        for param, scale in ((params[0], scaler.get_scale()), (alone[0], 1.0)):
            rows = torch.tensor([1.0 + seed, 2.0 if spoils is None else bad], device=param.device)
            rows = rows[:, None].expand(2, 3) * scale
            param.grad = torch.sparse_coo_tensor([[0, 2]], rows, (4, 3), device=param.device, check_invariants=True)


@every_scaler
def test_a_late_parameter_starts_with_its_first_good_gradient(scaler_class):
    """Of SGD's momentum buffer, which torch's fused SGD leaves uninitialised here."""
    params, alone = make([(5,), (6,)]), make([(5,), (6,)])
    a, b, scaler = ours("sgd-momentum", params), ours("sgd-momentum", alone), make_scaler(scaler_class)
    for seed, bad in each_step((None, INF, None, None), scaler, a, params, b, alone):
        if seed == 0:
            params[1].grad = alone[1].grad = None
        if bad is not None:
            spoil(params[1], bad)


# ---- values ---------------------------------------------------------------------------------------------------------


@every_scaler
@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_power_of_two_changes_no_bit(case, scaler_class, dtype):
    """Other dtypes than float32, which is above; gradients of float16 parameters are float16 too."""
    params, alone = make(dtype=dtype), make(dtype=dtype)
    a, b, scaler = ours(case, params), ours(case, alone), make_scaler(scaler_class, 8.0)
    for _, bad in each_step((None, INF, None), scaler, a, params, b, alone):
        if bad is not None:
            spoil(params[3], bad)
    assert scaler.get_scale() == 4.0


@every_scaler
@every_case
def test_other_scales_keep_the_tolerance_rule(case, scaler_class):
    scale = 1000.0
    params, judge, exact = make(odd=(2,)), make(), make(dtype=torch.float64)
    for p, q in zip(exact, judge, strict=True):
        p.data.copy_(q.data)
    a, b, c = ours(case, params), stock(case, judge), stock(case, exact)
    scaler, reference = make_scaler(scaler_class, scale), make_scaler(torch.amp.GradScaler, scale)
    for seed in range(3):
        give_grads(params, judge, seed=seed, scale=scale)
        for p, q in zip(exact, judge, strict=True):
            p.grad = q.grad.double() / scale
        for optimizer, its in ((a, scaler), (b, reference)):
            its.step(optimizer)
            its.update()
        c.step()
    pool, oracle, theirs = ErrorPool(), snapshot(c, exact), snapshot(b, judge)
    for key, value in snapshot(a, params).items():
        if value.is_floating_point():
            pool.add(value, theirs[key], oracle[key].double(), name=str(key))
    pool.check()


@every_case
def test_gradients_afterwards(case):
    """Torch's scaler has them unscaled, in any layout, as with torch's fused optimizers; ours leaves them alone."""
    shapes = [(4, 6), (3, 2, 2, 2), (5,)]
    for scaler_class in (torch.amp.GradScaler, deepops.amp.GradScaler):
        params = make(shapes, odd=(2,))
        optimizer, scaler = ours(case, params), make_scaler(scaler_class)
        for seed in range(2):
            give_grads(params, seed=seed, scale=1024.0)
            params[0].grad = params[0].grad.t().contiguous().t()
            params[1].grad = params[1].grad.contiguous(memory_format=torch.channels_last)
            given = [p.grad for p in params]
            wanted = [g.clone() for g in given]
            versions = [g._version for g in given]
            scaler.step(optimizer)
            if scaler_class is torch.amp.GradScaler:
                assert all(g._version > version for g, version in zip(given, versions, strict=True))
            scaler.update()
            assert all(p.grad is g for p, g in zip(params, given, strict=True))
            for grad, want in zip(given, wanted, strict=True):
                assert torch.equal(grad, want / 1024 if scaler_class is torch.amp.GradScaler else want)


def test_gradients_of_several_parameters_in_one_tensor():
    """Are not unscaled twice: they stay scaled, and every parameter's step is right."""
    for scaler_class in (torch.amp.GradScaler, deepops.amp.GradScaler):
        params, alone = make([(20_000,), (20_000,)]), make([(20_000,), (20_000,)])
        a, b, scaler = ours("adam", params), ours("adam", alone), make_scaler(scaler_class)
        give_grads(params, scale=1024.0)
        give_grads(alone)
        for both in (params, alone):
            both[1].grad = both[0].grad
        scaler.step(a)
        b.step()
        assert_same(snapshot(a, params), snapshot(b, alone))


@every_scaler
@pytest.mark.parametrize("odd", [(), (1,)], ids=["kernel", "mixed"])
def test_grad_scale_set_by_hand_is_one_more_factor(scaler_class, odd):
    params, alone = make([(5,), (6,)], odd=odd), make([(5,), (6,)], odd=odd)
    a, b, scaler = ours("adam", params), ours("adam", alone), make_scaler(scaler_class)
    give_grads(params, scale=4096.0)
    give_grads(alone)
    a.grad_scale = torch.tensor(4.0, device=backends.device())
    scaler.step(a)
    b.step()
    assert_same(snapshot(a, params), snapshot(b, alone))
    assert not hasattr(a, "grad_scale")


@only_on_cpu
@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_attributes_set_by_hand(kind):
    """Of any floating dtype, and an expanded gradient, which cannot be written, keeps its scale."""
    params, alone = make([(5,), (6,)]), make([(5,), (6,)])
    a, b = ours("adam", params), ours("adam", alone)
    give_grads(params, alone)
    for both in (params, alone):
        both[0].grad = both[0].grad[:1].expand(5)
    params[1].grad *= 4
    params[0].grad = (params[0].grad[:1] * 4).expand(5)
    a.grad_scale, a.found_inf = torch.tensor(4.0, dtype=kind), torch.tensor(0.0, dtype=kind)
    a.step()
    b.step()
    assert_same(snapshot(a, params), snapshot(b, alone))
    a.found_inf = torch.tensor(1.0, dtype=kind)
    before = snapshot(a, params)
    a.step()
    assert_same(snapshot(a, params), before)


# ---- the order of calls ---------------------------------------------------------------------------------------------


@every_scaler
@every_case
def test_unscale_and_clip_by_hand(case, scaler_class):
    params, alone = make(odd=(2,)), make(odd=(2,))
    a, b, scaler = ours(case, params), ours(case, alone), make_scaler(scaler_class)
    for seed, bad in enumerate((INF, None, None, NAN)):
        give_grads(params, seed=seed, scale=scaler.get_scale())
        give_grads(alone, seed=seed)
        if bad is not None:
            spoil(params[4], bad)
        before = snapshot(a, params)
        scaler.unscale_(a)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(a)
        scaler.update()
        if bad is None:
            torch.nn.utils.clip_grad_norm_(alone, 1.0)
            b.step()
        else:
            assert_untouched(before, snapshot(a, params))
    assert_same(snapshot(a, params), snapshot(b, alone))
    assert scaler.get_scale() == 256.0


@every_scaler
def test_several_optimizers_of_one_scaler(scaler_class):
    """Each skips by itself, the scale backs off once; one of them may be torch's."""
    models = [make([(5,), (3, 2)]) for _ in range(3)]
    optimizers = [ours("adam", models[0]), ours("sgd-momentum", models[1]), stock("rmsprop", models[2])]
    for bad in range(3):
        scaler = make_scaler(scaler_class)
        for model in models:
            give_grads(model, scale=1024.0)
        spoil(models[bad][0], INF)
        before = [snapshot(*pair) for pair in zip(optimizers, models, strict=True)]
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 512.0
        for i, pair in enumerate(zip(optimizers, models, strict=True)):
            after = snapshot(*pair)
            if i == bad:
                assert_untouched(before[i], after)
            else:
                assert not torch.equal(before[i][0, "param"], after[0, "param"])


def outcome(call):
    """What a call raises, as text."""
    try:
        call()
    except (AssertionError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


def scripts():
    """Calls that a scaler refuses, or that are odd: name, (scaler, optimizer, params) -> None."""

    def before_scale(scaler, optimizer, params):
        type(scaler)(backends.device()).step(optimizer)

    def twice(scaler, optimizer, params):
        scaler.step(optimizer)
        scaler.step(optimizer)

    def closure(scaler, optimizer, params):
        scaler.step(optimizer, closure=lambda: 1.0)

    def update_first(scaler, optimizer, params):
        scaler.update()

    def unscale_twice(scaler, optimizer, params):
        scaler.unscale_(optimizer)
        scaler.unscale_(optimizer)

    def unscale_late(scaler, optimizer, params):
        scaler.step(optimizer)
        scaler.unscale_(optimizer)

    def no_gradients(scaler, optimizer, params):
        for p in params:
            p.grad = None
        scaler.step(optimizer)

    def no_gradients_and_update(scaler, optimizer, params):
        no_gradients(scaler, optimizer, params)
        scaler.update()

    def pickle_within(scaler, optimizer, params):
        scaler.step(optimizer)
        through("pickle", scaler)

    def pickle_after(scaler, optimizer, params):
        scaler.step(optimizer)
        scaler.update()
        assert through("pickle", scaler).state_dict() == scaler.state_dict()

    def new_scale(scaler, optimizer, params):
        scaler.step(optimizer)
        scaler.update(new_scale=3.0)
        assert scaler.get_scale() == 3.0

    return {name: call for name, call in locals().items() if callable(call)}


@every_scaler
@pytest.mark.parametrize("script", scripts())
@pytest.mark.parametrize("odd", [(), (0,), (0, 1)], ids=["kernel", "mixed", "torch"])
def test_errors_are_those_of_torch(script, scaler_class, odd):
    """With torch's scaler and its fused optimizer; a step without gradients is none, but updates no scale."""
    params, judge = make([(5,), (3, 2)], odd=odd), make([(5,), (3, 2)])
    give_grads(params, judge)
    call = scripts()[script]
    a, b = ours("adam", params), stock("adam", judge, fused=True)
    got = outcome(lambda: call(make_scaler(scaler_class), a, params))
    assert got == outcome(lambda: call(make_scaler(torch.amp.GradScaler), b, judge))


@every_scaler
def test_a_closure_given_by_position(scaler_class):
    """Torch does not refuse it: the check is of the gradients there were before."""
    params = make([(5,)])
    optimizer, scaler = ours("adam", params), make_scaler(scaler_class)
    give_grads(params)

    def closure():
        give_grads(params, seed=1, scale=1024.0)
        return 7.0

    assert scaler.step(optimizer, closure) == 7.0
    alone = make([(5,)])
    plain = ours("adam", alone)
    give_grads(alone, seed=1)
    plain.step()
    assert_same(snapshot(optimizer, params), snapshot(plain, alone))


@every_scaler
def test_no_gradients_change_nothing(scaler_class):
    params = make([(5,), (3,)])
    optimizer, scaler = ours("sgd-momentum", params, max_grad_norm=1.0), make_scaler(scaler_class)
    before = snapshot(optimizer, params)
    scaler.step(optimizer)
    assert_same(snapshot(optimizer, params), before)
    assert optimizer.grad_norm.item() == 0


@every_scaler
def test_disabled(scaler_class):
    params, alone = make([(5,)]), make([(5,)])
    a, b = ours("adam", params), ours("adam", alone)
    scaler = scaler_class(backends.device(), enabled=False)
    loss = torch.ones((), device=backends.device())
    assert scaler.scale(loss) is loss
    give_grads(params, alone)
    scaler.unscale_(a)
    assert scaler.step(a, lambda: 3.0) == 3.0
    assert scaler.step(a) is None
    scaler.update()
    b.step()
    b.step()
    assert_same(snapshot(a, params), snapshot(b, alone))
    assert scaler.state_dict() == {}
    assert scaler.get_scale() == 1.0


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_scalers_are_saved_and_copied(how):
    params = make([(5,)])
    optimizer, scaler = ours("adam", params), make_scaler(deepops.amp.GradScaler, growth_interval=3)
    for _ in range(2):
        give_grads(params)
        scaler.step(optimizer)
        scaler.update()
    if how == "state_dict":
        copied = torch.amp.GradScaler(backends.device())
        copied.load_state_dict(scaler.state_dict())
    else:
        copied = through(how, scaler)
        assert type(copied) is deepops.amp.GradScaler
    copied.scale(torch.ones((), device=backends.device()))
    copied.step(optimizer)
    copied.update()
    assert copied.get_scale() == 2048.0


@every_scaler
@pytest.mark.parametrize("odd", [(), (0,), (0, 1)], ids=["kernel", "mixed", "torch"])
def test_hooks_run_once_and_schedulers_see_the_step(scaler_class, odd):
    params = make([(5,), (6,)], odd=odd)
    optimizer, scaler = ours("adam", params), make_scaler(scaler_class)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    for _ in range(2):
        give_grads(params, scale=1024.0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()  # warns where it has not seen the optimizer's step
    assert seen == ["pre", "post"] * 2
    assert optimizer.param_groups[0]["lr"] == 0.00025


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_a_scale_on_another_device_than_the_parameters():
    params, alone = make(), make()
    a, b = ours("adam", params, max_grad_norm=1.0), ours("adam", alone, max_grad_norm=1.0)
    scaler = deepops.amp.GradScaler("cuda", init_scale=1024.0)
    scaler.scale(torch.ones(()))  # on the CPU, and so is the scale
    for seed, bad in enumerate((None, INF, None)):
        give_grads(params, seed=seed, scale=scaler.get_scale())
        give_grads(alone, seed=seed)
        if bad is not None:
            spoil(params[0], bad)
        scaler.step(a)
        scaler.update()
        if bad is None:
            b.step()
    assert_same(snapshot(a, params), snapshot(b, alone))
    assert scaler.get_scale() == 512.0


# ---- errors, passes, state ------------------------------------------------------------------------------------------


@every_scaler
def test_a_step_that_raises_changes_nothing(scaler_class):
    """And the next one is right: no gradient was unscaled, no attribute stayed."""
    params, alone = make([(4, 3), (5,), (6,)], odd=(2,)), make([(4, 3), (5,), (6,)], odd=(2,))
    a, b = ours("adam", params), ours("adam", alone)
    scaler = make_scaler(scaler_class)
    for seed in range(3):
        give_grads(params, seed=seed, scale=1024.0)
        give_grads(alone, seed=seed)
        good = params[0].grad
        if seed > 0:
            before = snapshot(a, params)
            params[0].grad = good.to_sparse()
            with pytest.raises(RuntimeError, match="does not support sparse gradients"):
                scaler.step(a)
            assert_same(snapshot(a, params), before)
            if scaler_class is torch.amp.GradScaler:  # which forgets them itself
                del a.grad_scale, a.found_inf
            params[0].grad = good
        assert not hasattr(a, "grad_scale")
        assert not hasattr(a, "found_inf")
        assert not a._scaler_checks
        scaler.step(a)
        scaler.update()
        b.step()
    assert_same(snapshot(a, params), snapshot(b, alone))


@only_on_cpu
@every_case
def test_passes(case):
    params = make()
    for scaler_class, more, passes in (
        (None, {}, 1),
        (None, {"max_grad_norm": 1.0}, 2),
        (torch.amp.GradScaler, {}, 1),
        (torch.amp.GradScaler, {"max_grad_norm": 1.0}, 2),
        (deepops.amp.GradScaler, {}, 2),
        (deepops.amp.GradScaler, {"max_grad_norm": 1.0}, 2),
        (deepops.amp.GradScaler, {"max_grad_norm": 1.0, "diagnostics": True}, 2),
    ):
        optimizer = ours(case, params, **more)
        scaler = make_scaler(scaler_class) if scaler_class else None
        for seed in range(2):
            give_grads(params, seed=seed)
            with count_parallel_regions() as regions:
                scaler.step(optimizer) if scaler else optimizer.step()
            assert regions.count == passes
            if scaler:
                scaler.update()


@only_on_cpu
def test_passes_of_a_step_that_is_skipped():
    for scaler_class, passes in ((torch.amp.GradScaler, 0), (deepops.amp.GradScaler, 1)):
        params = make()
        optimizer, scaler = ours("adam", params), make_scaler(scaler_class)
        give_grads(params)
        spoil(params[0], NAN)
        with count_parallel_regions() as regions:
            scaler.step(optimizer)
        assert regions.count == passes


@pytest.mark.parametrize("odd", [(), (1,), tuple(range(7))], ids=["kernel", "mixed", "torch"])
def test_the_norm_is_known_after_a_scaled_step(odd):
    """Unscaled; NaN or infinite where the step was skipped; None after a step that took none."""
    params = make(odd=odd)
    optimizer, scaler = ours("adamw", params), make_scaler(deepops.amp.GradScaler)
    assert optimizer.grad_norm is None
    for bad in (None, INF, NAN):
        give_grads(params, scale=scaler.get_scale())
        exact = torch.cat([p.grad.as_subclass(torch.Tensor).flatten() for p in params]).double().norm()
        if bad is not None:
            spoil(params[5], bad)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if len(odd) == len(params):
            assert optimizer.grad_norm is None  # torch's check takes none
        elif bad is None:
            torch.testing.assert_close(optimizer.grad_norm, (exact / scale).float(), rtol=2e-7, atol=0)
        else:
            assert str(optimizer.grad_norm.item()) == str(bad)
    give_grads(params)
    optimizer.step()
    assert optimizer.grad_norm is None


@every_scaler
def test_the_plan_is_kept(scaler_class):
    """Scaled, skipped and plain steps may alternate without anything being made anew."""
    params = make()
    optimizer, scaler = ours("adam", params), make_scaler(scaler_class)
    give_grads(params)
    scaler.step(optimizer)
    scaler.update()
    plans = optimizer._plans
    for seed, bad in itertools.product(range(2), (None, INF)):
        give_grads(params, seed=seed)
        if bad is not None:
            spoil(params[0], bad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.step()
        assert optimizer._plans is plans


def test_cases_cover_every_class():
    assert {name for name, _ in CASES.values()} == {"Adam", "AdamW", "SGD", "RMSprop"}
