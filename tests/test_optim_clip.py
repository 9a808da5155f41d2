"""Clipping by the norm of all gradients: within the step (``max_grad_norm``) and by ``clip_grad_norm_``."""

import itertools
import re
import warnings

import backends
import pytest
import torch
from optim_cases import only_on_cpu
from scaling_cases import (
    SHAPES,
    Odd,
    assert_same,
    assert_untouched,
    bits,
    every_case,
    give_grads,
    make,
    make_scaler,
    on_every_backend,
    ours,
    snapshot,
    stock,
)

import deepops
from deepops import optim
from deepops.optim import _clip
from deepops.testing import ErrorPool, assert_close_to_oracle, count_parallel_regions, isas, use_isa, use_threads

pytestmark = on_every_backend

torch_clip = torch.nn.utils.clip_grad_norm_
NARROW = [torch.float32, torch.float16, torch.bfloat16, torch.complex64]  # which float64 is an oracle for
DTYPES = [*NARROW, torch.float64, torch.complex128]
WIDE = {torch.complex64: torch.complex128, torch.complex128: torch.complex128}


@pytest.fixture(autouse=True)
def _backend_of_gradients(step_backend, monkeypatch):
    if step_backend == "simt":
        monkeypatch.setattr(_clip, "_backend", lambda _: "simt")


def exact_copy(params):
    """The same parameters and gradients in float64 or complex128."""
    copies = []
    for p in params:
        wide = WIDE.get(p.dtype, torch.float64)
        copies.append(torch.nn.Parameter(p.detach().as_subclass(torch.Tensor).to(wide, copy=True)))
        copies[-1].grad = None if p.grad is None else p.grad.as_subclass(torch.Tensor).to(wide, copy=True)
    return copies


def exact_norm(params):
    return sum(real(p.grad).square().sum() for p in exact_copy(params) if p.grad is not None).sqrt()


def real(tensor):
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def gradients(params):
    return [None if p.grad is None else bits(p.grad.as_subclass(torch.Tensor).clone()) for p in params]


# ---- in the step ----------------------------------------------------------------------------------------------------


def check_clipped_steps(case, dtypes, odd=(), groups=False, steps=2):
    """Against torch's clip and step, in ours's dtypes and in double."""
    params = [p for dtype in dtypes for p in make(dtype=dtype, odd=odd)]
    judge = [p for dtype in dtypes for p in make(dtype=dtype)]
    exact = exact_copy(judge)
    max_norm = 20.0

    def grouped(listed):
        return [{"params": listed[::2]}, {"params": listed[1::2], "lr": 0.03}] if groups else listed

    fused = {} if case.startswith("rms") or torch.float32 in dtypes or judge[0].is_complex() else {"fused": True}
    a = ours(case, grouped(params), max_grad_norm=max_norm)
    b, c = stock(case, grouped(judge), **fused), stock(case, grouped(exact))
    for seed in range(steps):
        give_grads(params, judge, seed=seed)
        for p, q in zip(exact, judge, strict=True):
            p.grad = q.grad.to(p.dtype, copy=True)
        norm, given = exact_norm(judge), gradients(params)
        assert norm > max_norm
        for listed in (judge, exact):
            torch_clip(listed, max_norm)
        for optimizer in (a, b, c):
            optimizer.step()
        assert_close_to_oracle(a.grad_norm, None, norm)  # a sum in double, rounded once
        assert all(torch.equal(x, y) for x, y in zip(gradients(params), given, strict=True))
    pools, oracle, theirs = {}, snapshot(c, exact), snapshot(b, judge)
    for key, value in snapshot(a, params).items():
        if key[1] != "step":
            pool = pools.setdefault((key[1], value.dtype), ErrorPool())
            pool.add(real(value), real(theirs[key]), real(oracle[key]), name=str(key))
    for pool in pools.values():
        pool.check()


@every_case
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_as_torch_clips_and_steps(case, dtype):
    check_clipped_steps(case, [dtype])


@every_case
def test_with_parameters_on_torchs_path_and_groups(case):
    check_clipped_steps(case, [torch.float32], odd=(0, 4), groups=True)


def test_dtypes_in_one_norm():
    check_clipped_steps("adamw", [torch.float32, torch.bfloat16, torch.complex64])


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_below_the_limit_nothing_changes(case, dtype):
    """Not a bit; at a scaler's step neither."""
    clipped, alone, scaled = make(dtype=dtype), make(dtype=dtype), make(dtype=dtype)
    a, b = ours(case, clipped, max_grad_norm=1e6), ours(case, alone)
    c, scaler = ours(case, scaled, max_grad_norm=1e6), make_scaler(deepops.amp.GradScaler, 8.0)
    for seed in range(2):
        give_grads(clipped, alone, seed=seed)
        give_grads(scaled, seed=seed, scale=8.0)
        a.step()
        b.step()
        scaler.step(c)
        scaler.update()
    assert_same(snapshot(a, clipped), snapshot(b, alone))
    assert_same(snapshot(c, scaled), snapshot(b, alone))
    assert torch.equal(a.grad_norm, c.grad_norm)


@every_case
@pytest.mark.parametrize("scaler_class", [torch.amp.GradScaler, deepops.amp.GradScaler])
@pytest.mark.parametrize("odd", [(), (1, 4)], ids=["kernel", "mixed"])
def test_with_a_scaler(case, scaler_class, odd):
    """The same bits as clipping without; an overflow changes nothing and its norm says so."""
    params, alone = make(odd=odd), make(odd=odd)
    a, b = ours(case, params, max_grad_norm=1.0), ours(case, alone, max_grad_norm=1.0)
    scaler = make_scaler(scaler_class)
    for seed, bad in enumerate((float("inf"), None, None, float("nan"))):
        give_grads(params, seed=seed, scale=scaler.get_scale())
        give_grads(alone, seed=seed)
        before = snapshot(a, params)
        if bad is not None:
            params[4].grad.view(-1)[5] = bad
        scaler.step(a)
        scaler.update()
        if bad is None:
            b.step()
            assert torch.equal(a.grad_norm, b.grad_norm)
        else:
            assert_untouched(before, snapshot(a, params))
            assert str(a.grad_norm.item()) == str(bad)
    assert_same(snapshot(a, params), snapshot(b, alone))


@every_case
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_not_finite_without_a_scaler(case, bad):
    """What torch's clip and step make of it: zeros and NaN."""
    params, judge = make(), make()
    a, b = ours(case, params, max_grad_norm=1.0), stock(case, judge)
    for seed in range(2):
        give_grads(params, judge, seed=seed)
        for listed in (params, judge):
            listed[4].grad.view(-1)[5] = bad
        torch_clip(judge, 1.0)
        a.step()
        b.step()
        assert str(a.grad_norm.item()) == str(bad)
    for p, q in zip(params, judge, strict=True):
        assert torch.equal(p.isnan(), q.isnan())
        if bad != bad:
            assert p.isnan().all()
    if bad == bad:  # the factor is 0: all other elements take a step with a gradient of 0
        pool, exact = ErrorPool(), make(dtype=torch.float64)
        for p, q in zip(exact, make(), strict=True):
            p.data.copy_(q.data)
        c = stock(case, exact)
        for _ in range(2):
            for p in exact:
                p.grad = torch.zeros_like(p)
            c.step()
        for p, q, e in zip(params, judge, exact, strict=True):
            finite = ~p.isnan()
            pool.add(p[finite], q[finite], e.detach()[finite])
        pool.check()


def test_the_norm_is_a_tensor_of_its_own():
    params = make()
    optimizer = ours("adam", params, max_grad_norm=1.0)
    assert optimizer.grad_norm is None
    norms = []
    for seed in range(3):
        give_grads(params, seed=seed, scale=seed + 1.0)
        optimizer.step()
        norms.append((optimizer.grad_norm, exact_norm(params)))
    for norm, exact in norms:
        assert norm.shape == ()
        assert norm.dtype == torch.float32
        assert norm.device.type == backends.device()
        assert not norm._is_view()
        assert_close_to_oracle(norm, None, exact)
    for p in params[1:]:
        p.grad = None
    optimizer.step()
    assert_close_to_oracle(optimizer.grad_norm, None, exact_norm(params[:1]))
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.grad_norm.item() == 0


def test_gradients_in_other_layouts():
    """Of their logical elements: an expanded one counts as often as it is seen."""
    params, alone = make([(4, 6), (5, 3)]), make([(4, 6), (5, 3)])
    a, b = ours("adam", params, max_grad_norm=1.0), ours("adam", alone, max_grad_norm=1.0)
    for seed in range(2):
        give_grads(params, alone, seed=seed)
        params[0].grad = params[0].grad.t().contiguous().t()
        row = params[1].grad[:1].clone()
        params[1].grad, alone[1].grad = row.expand(5, 3), row.repeat(5, 1)
        a.step()
        b.step()
        assert torch.equal(a.grad_norm, b.grad_norm)
    assert_same(snapshot(a, params), snapshot(b, alone))


MORE = [
    *[(dtype, {}) for dtype in DTYPES],
    (torch.bfloat16, {"master_weights": True}),
    (torch.bfloat16, {"master_weights": "split"}),
    (torch.bfloat16, {"stochastic_rounding": True, "seed": 5}),
    (torch.float16, {"master_weights": True, "state_dtype": torch.float16}),
    (torch.float32, {"state_dtype": torch.bfloat16}),
]


@pytest.mark.parametrize(("dtype", "more"), MORE, ids=str)
@every_case
def test_a_factor_of_a_power_of_two_is_exact(case, dtype, more):
    """A norm so large that the 1e-6 beside it rounds away: the bits of a step with a quarter of the gradient."""
    size = 2.0 ** (34 if dtype in (torch.float64, torch.complex128) else 8)
    params, alone = make([(600,), (7,)], dtype), make([(600,), (7,)], dtype)
    a, b = ours(case, params, max_grad_norm=2 * size, **more), ours(case, alone, **more)
    for seed in range(3):
        give_grads(params, seed=seed)
        params[0].grad = torch.where(params[0].grad.real < 0, -size, size).to(dtype)
        params[0].grad[64:] = 0
        params[1].grad.zero_()
        for p, q in zip(params, alone, strict=True):
            q.grad = p.grad / 4
        a.step()
        b.step()
        assert a.grad_norm.item() == 8 * size
    assert_same(snapshot(a, params), snapshot(b, alone))


def test_with_stochastic_rounding():
    """Which a clipped step draws the same numbers for."""
    runs = []
    for scale in (1.0, 2.0):
        params = make(dtype=torch.bfloat16)
        optimizer = ours("sgd", params, max_grad_norm=1e-3, stochastic_rounding=True, seed=5)
        scaler = make_scaler(deepops.amp.GradScaler, scale)
        for seed in range(3):
            give_grads(params, seed=seed, scale=scale)
            scaler.step(optimizer)
            scaler.update()
        runs.append(snapshot(optimizer, params))
    assert_same(*runs)


@pytest.mark.parametrize("bad", [0, -1.0, float("inf"), float("nan"), "1", torch.ones(())], ids=str)
def test_bad_limits(bad):
    with pytest.raises(ValueError, match="max_grad_norm: expected a positive number or None, got"):
        optim.Adam(make(), max_grad_norm=bad)


@only_on_cpu
def test_threads_and_instruction_sets_do_not_matter():
    results = []
    for threads, isa in itertools.product((1, 2), isas()):
        with use_threads(threads), use_isa(isa):
            params = make([(100_000,), (3,), (70_000,)])
            optimizer = ours("adamw", params, max_grad_norm=1.0)
            give_grads(params)
            optimizer.step()
            results.append((snapshot(optimizer, params), optimizer.grad_norm, optim.clip_grad_norm_(params, 1.0)))
    for values, _, _ in results:
        assert_same(values, results[0][0])
    assert len({norm.item() for _, *norms in results for norm in norms}) == 1


# ---- clip_grad_norm_ ------------------------------------------------------------------------------------------------


def check_against_torch(params, judge, max_norm, **options):
    """Norm and gradients under the tolerance rule."""
    exact = exact_copy(judge)
    ours_norm, stock_norm = optim.clip_grad_norm_(params, max_norm, **options), torch_clip(judge, max_norm, **options)
    exact_norm = torch_clip(exact, max_norm, **options)
    assert_close_to_oracle(ours_norm, stock_norm.to(ours_norm.dtype), exact_norm, name="norm")
    pools = {}
    for p, q, e in zip(params, judge, exact, strict=True):
        if p.grad is not None:
            pools.setdefault(p.dtype, ErrorPool()).add(real(p.grad), real(q.grad), real(e.grad))
    for pool in pools.values():
        pool.check()
    return ours_norm


@pytest.mark.parametrize("max_norm", [1, 50.0, 1e4, 0.0, float("inf")])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_clip_grad_norm(dtype, max_norm):
    params, judge = make(dtype=dtype), make(dtype=dtype)
    give_grads(params, judge)
    params[2].grad = judge[2].grad = None
    before = gradients(params)
    norm = check_against_torch(params, judge, max_norm)
    assert norm.shape == ()
    assert norm.dtype == torch.float32
    if max_norm >= 1e4:
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(gradients(params), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_clip_grad_norm_in_double(dtype):
    """To the bit: of whole numbers the sum of squares is exact, and the rest is three operations."""
    params = make(dtype=dtype)
    give_grads(params, scale=10.0)
    for p in params:
        torch.view_as_real(p.grad).round_() if p.is_complex() else p.grad.round_()
    norm = exact_norm(params)
    wanted = [real(p.grad) * (5 / (norm.item() + 1e-6)) for p in params]
    assert torch.equal(optim.clip_grad_norm_(params, 5), norm)
    assert all(torch.equal(real(p.grad), want) for p, want in zip(params, wanted, strict=True))


def test_clip_grad_norm_of_several_dtypes():
    params, judge = [[p for dtype in NARROW for p in make(dtype=dtype)] for _ in range(2)]
    give_grads(params, judge)
    check_against_torch(params, judge, 3.0)


@pytest.mark.parametrize(
    "options", [{"norm_type": float("inf")}, {"norm_type": "inf"}, {"norm_type": 1}, {"foreach": False}]
)
def test_clip_grad_norm_options(options):
    params, judge = make([(3, 5), (600,)]), make([(3, 5), (600,)])
    give_grads(params, judge)
    check_against_torch(params, judge, 0.5, **options)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_clip_grad_norm_does_not_overflow(kind):
    """Where squares do in float16, or their sum in float32; torch's norm is infinite there."""
    large = torch.finfo(kind).max / 2
    params = make([(64,)], kind)
    params[0].grad = torch.full_like(params[0], large)
    norm = optim.clip_grad_norm_(params, 8.0)
    wanted = torch.tensor(8.0 * large, dtype=torch.float64, device=norm.device)
    assert torch.equal(norm, wanted.float())
    assert_close_to_oracle(params[0].grad, None, torch.ones_like(params[0], dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_clip_grad_norm_of_what_is_not_finite(bad):
    params, judge = make(), make()
    give_grads(params, judge)
    for listed in (params, judge):
        listed[3].grad[8000] = bad
    before = gradients(params)
    with pytest.raises(RuntimeError) as error:
        optim.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError) as wanted:
        torch_clip(judge, 1.0, error_if_nonfinite=True)
    assert str(error.value) == str(wanted.value)
    assert all(torch.equal(x, y) for x, y in zip(gradients(params), before, strict=True))
    assert str(optim.clip_grad_norm_(params, 1.0).item()) == str(torch_clip(judge, 1.0).item())
    for p, q in zip(params, judge, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, equal_nan=True)


def test_clip_grad_norm_takes_any_iterable():
    for wrap in (list, tuple, iter, lambda params: (p for p in params), lambda params: dict.fromkeys(params).keys()):
        params, judge = make(), make()
        give_grads(params, judge)
        assert torch.equal(optim.clip_grad_norm_(wrap(params), 1.0), optim.clip_grad_norm_(judge, 1.0))
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(params, judge, strict=True))
    give_grads(params, judge)
    check_against_torch(params[4:5], judge[4:5], 1.0)
    assert torch.equal(optim.clip_grad_norm_(params[3], 1.0), optim.clip_grad_norm_([judge[3]], 1.0))
    assert torch.equal(params[3].grad, judge[3].grad)


def test_clip_grad_norm_without_gradients():
    with pytest.warns(UserWarning, match="empty generator") as caught:
        optim.clip_grad_norm_((p for p in ()), 1.0)
    assert caught[0].filename == __file__
    for params in ([], make()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert optim.clip_grad_norm_(params, 1.0).item() == 0


def test_gradients_that_share_memory_are_as_in_torch():
    """One tensor twice is scaled twice; so is what two views have in common."""
    for share in (lambda g: (g, g), lambda g: (g[:15_000], g[5_000:]), lambda g: (g[:10_000], g[10_000:])):
        results = []
        for clip in (optim.clip_grad_norm_, torch_clip):
            first, second = share(torch.full((20_000,), 3.0, device=backends.device()))
            params = make([first.shape, second.shape])
            params[0].grad, params[1].grad = first, second
            norm = clip(params, 1.0)
            results.append((norm, params[0].grad, params[1].grad))
        torch.testing.assert_close(*results)


def test_gradients_that_torch_takes():
    """Not dense, sparse, subclasses, expanded: torch's result, or its error."""
    params, judge = make([(4, 6), (3,)]), make([(4, 6), (3,)])
    give_grads(params, judge)
    for listed in (params, judge):
        gaps = torch.ones(4, 12, device=backends.device())
        listed[0].grad = gaps[:, ::2]
    check_against_torch(params, judge, 0.5)
    params, judge = make([(4, 6), (3,)], odd=(1,)), make([(4, 6), (3,)])
    give_grads(params, judge)
    check_against_torch(params, judge, 0.5)
    assert type(params[1].grad) is Odd
    for odd in (lambda g: g[:1].expand_as(g), lambda g: g.to_sparse(), lambda g: g.conj()):
        params, judge = make([(4, 6)], torch.complex64), make([(4, 6)], torch.complex64)
        give_grads(params, judge)
        for listed in (params, judge):
            listed[0].grad = odd(listed[0].grad)
        try:
            expected = torch_clip(judge, 0.5)
        except RuntimeError as error:  # which of them it takes depends on its version
            with pytest.raises(RuntimeError, match=re.escape(str(error))):
                optim.clip_grad_norm_(params, 0.5)
        else:
            assert torch.equal(optim.clip_grad_norm_(params, 0.5), expected)
            assert torch.equal(params[0].grad.to_dense(), judge[0].grad.to_dense())


@only_on_cpu
def test_clip_grad_norm_passes():
    """One over the gradients; one more only where it clips, and autograd then knows."""
    for max_norm, passes in ((1e6, 1), (1.0, 2)):
        params = make(SHAPES)
        give_grads(params)
        versions = [p.grad._version for p in params]
        with count_parallel_regions() as regions:
            optim.clip_grad_norm_(params, max_norm)
        assert regions.count == passes
        if passes == 2:
            assert all(p.grad._version > v for p, v in zip(params, versions, strict=True))


def test_no_graph_is_recorded():
    params = make([(3,)])
    give_grads(params)
    params[0].grad.requires_grad_()
    norm = optim.clip_grad_norm_(params, 0.1)
    assert not norm.requires_grad
