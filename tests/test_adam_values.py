"""Values of deepops.optim.Adam: against the fp64 oracle and torch, the same bits always, in any memory layout."""

import math

import pytest
import torch
from adam_cases import (
    DTYPES,
    OPTIONS,
    SHAPES,
    STATES,
    assert_same_bits,
    channels_last,
    everything,
    flat,
    give_grads,
    make,
    on_every_backend,
    only_on_cpu,
    states,
    train,
)
from backends import device
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deepops
from deepops import testing
from deepops.optim import Adam
from deepops.reference.adam import adam_step

pytestmark = on_every_backend


def oracle_run(params, options, steps):
    """fp64 parameters and states after ``steps``, from what the dtype of ``params`` can hold."""
    names = ("lr", "eps", "weight_decay", "maximize", "decoupled_weight_decay")
    kwargs = {name: options[name] for name in names if name in options}
    if "betas" in options:
        kwargs["beta1"], kwargs["beta2"] = options["betas"]
    doubles = [p.detach().double() for p in params]
    moments = [[torch.zeros_like(p) for p in doubles] for _ in STATES]
    for step in range(steps):
        give_grads(params, seed=step)
        for p, source, m, v, v_max in zip(doubles, params, *moments, strict=True):
            adam_step(p, source.grad.double(), m, v, v_max if options.get("amsgrad") else None, step + 1, **kwargs)
    return doubles, moments


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_against_oracle(options, dtype):
    ours, stock, start = (make(dtype=dtype) for _ in range(3))
    steps = 4
    a, b = Adam(ours, **options), torch.optim.Adam(stock, foreach=False, **options)
    train(a, ours, steps)
    train(b, stock, steps)
    want, moments = oracle_run(start, options, steps)
    testing.assert_close_to_oracle(flat(ours), flat(stock), flat(want), name="param")
    for name, oracle in zip(STATES, moments, strict=True):
        if name in b.state[stock[0]]:
            got, other = flat(states(a, ours, name)), flat(states(b, stock, name))
            testing.assert_close_to_oracle(got, other, flat(oracle), name=name)
    assert states(a, ours, "step") == [steps] * len(ours)
    assert "its" not in deepops.explain(a)
    assert a._explain().count("deepops kernel") == 1


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), 0.0, 1e30, 1e-40])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_special_gradients_as_in_torch(special, amsgrad):
    ours, stock = make([(100,)]), make([(100,)])
    a, b = Adam(ours, amsgrad=amsgrad), torch.optim.Adam(stock, foreach=False, amsgrad=amsgrad)
    for step in range(3):
        give_grads(ours, stock, seed=step)
        if step == 1:
            for p in (ours[0], stock[0]):
                p.grad[3] = special
        a.step()
        b.step()
    for x, y in zip(everything(a, ours), everything(b, stock), strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)  # which elements are special; values: the test above


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=12),
    st.sampled_from(OPTIONS),
    st.data(),
)
def test_any_shapes_and_any_missing_gradients(shapes, options, data):
    ours, stock = make(shapes, torch.float64), make(shapes, torch.float64)
    a, b = Adam(ours, **options), torch.optim.Adam(stock, foreach=False, **options)
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
        assert a.state[p].keys() == b.state[q].keys()
        if b.state[q]:
            assert a.state[p]["step"] == b.state[q]["step"]


def test_many_tiny_tensors():
    ours, stock = make([()] * 21_000), make([()] * 21_000)
    a, b = Adam(ours), torch.optim.Adam(stock, fused=True)
    give_grads(ours, stock)
    a.step()
    b.step()
    torch.testing.assert_close(torch.stack(ours), torch.stack(stock))
    assert states(a, ours, "step") == [1.0] * 21_000


# ---- the same bits, always ------------------------------------------------------------------------------------------


@only_on_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_same_bits_on_every_instruction_set(options, dtype):
    results = []
    for isa in testing.isas():
        params = make(dtype=dtype)
        optimizer = Adam(params, **options)
        with testing.use_isa(isa):
            train(optimizer, params)
        results.append(everything(optimizer, params))
    for other in results[1:]:
        assert_same_bits(results[0], other)


@only_on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("beta2", [0.0, 0.9, 0.999, 1 - 2.0**-20])
def test_division_by_the_bias_correction_is_exact(beta2, dtype):
    """Where there is a fused multiply-add the kernel divides without a division. Baseline x86-64 has none."""
    info = torch.finfo(dtype)
    torch.manual_seed(0)
    # exp_avg_sq: every exponent, mantissas at random and at their ends; then what is not an ordinary number.
    exponents = torch.linspace(math.log2(info.tiny), math.log2(info.max) - 1, 1 << 16, dtype=torch.float64)
    ordinary = (2.0**exponents * (1 + torch.rand(1 << 16, dtype=torch.float64))).to(dtype)
    special = torch.tensor([0.0, info.smallest_normal / 8, info.max, math.inf, math.nan, -1.0], dtype=dtype)
    one_ulp = torch.tensor([1.0, 1 + info.eps, 1 - info.eps / 2, 4 - 2 * info.eps], dtype=dtype)
    exp_avg_sq = torch.cat([ordinary, special, one_ulp])
    exp_avg = exp_avg_sq.sqrt() * (1 + torch.rand_like(exp_avg_sq))
    results = []
    for isa in testing.isas():
        param = torch.zeros_like(exp_avg_sq).requires_grad_()
        param.grad = torch.zeros_like(param)
        optimizer = Adam([param], lr=1.0, betas=(0.5, beta2), eps=1e-30)
        for step in (0.0, 1.0, 7.0):
            state = {"step": torch.tensor(step), "exp_avg": exp_avg.clone(), "exp_avg_sq": exp_avg_sq.clone()}
            optimizer.state[param] = state
            with testing.use_isa(isa):
                optimizer.step()
        results.append(param.detach())
    assert beta2 == 0.0 or len(results[0].unique()) > 1000
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=0, atol=0, equal_nan=True)


@only_on_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_any_number_of_threads_and_twice(dtype):
    results = []
    for threads in (1, 2, 2, 3):
        params = make([*SHAPES, (100_000,)], dtype)
        optimizer = Adam(params, weight_decay=0.1)
        with testing.use_threads(threads):
            train(optimizer, params)
        results.append(everything(optimizer, params))
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_when_a_tensor_is_split_into_many(dtype):
    whole, generator = make([(30_000,)], dtype), torch.Generator().manual_seed(1)
    parts = [torch.nn.Parameter(part.clone()) for part in whole[0].detach().split([1, 7, 8192, 0, 64, 21_736])]
    a, b = Adam(whole), Adam(parts)
    for _ in range(3):
        whole[0].grad = torch.randn(30_000, generator=generator).to(device(), dtype)
        for part, grad in zip(parts, whole[0].grad.split([p.numel() for p in parts]), strict=True):
            part.grad = grad  # views at odd offsets
        a.step()
        b.step()
    assert_same_bits([whole[0]], [flat(parts)])


def test_same_bits_in_any_order_and_grouping():
    ours, other = make(), make()
    a = Adam(ours)
    b = Adam([{"params": other[5:][::-1]}, {"params": other[:5]}])
    for step in range(3):
        give_grads(ours, other, seed=step)
        a.step()
        b.step()
    assert_same_bits(ours, other)


def test_groups_with_other_options_at_the_same_step():
    """As if each group had an optimizer of its own: neither options nor what is derived from them are shared."""
    together, alone = ([make([(5,), (100,)], seed=seed) for seed in range(len(OPTIONS))] for _ in range(2))
    a = Adam([{"params": params, **options} for params, options in zip(together, OPTIONS, strict=True)])
    others = [Adam(params, **options) for params, options in zip(alone, OPTIONS, strict=True)]
    for step in range(3):
        for params, same, b in zip(together, alone, others, strict=True):
            give_grads(params, same, seed=step)
            b.step()
        a.step()
    for params, same, b in zip(together, alone, others, strict=True):
        assert_same_bits(everything(a, params), everything(b, same))


# ---- layouts --------------------------------------------------------------------------------------------------------


LAYOUTS = {
    "channels_last": channels_last,
    "transposed": lambda p: p.transpose(1, 3).contiguous().transpose(1, 3),
    "gaps": lambda p: p.repeat_interleave(2, 1)[:, ::2],
    "offset": lambda p: torch.cat([p.new_zeros(1), p.reshape(-1)])[1:].view(p.shape),
}


@pytest.mark.parametrize("grad_layout", ["contiguous", *LAYOUTS])
@pytest.mark.parametrize("param_layout", ["contiguous", *LAYOUTS])
def test_layouts(param_layout, grad_layout):
    """Whatever the strides of a parameter and its gradient; torch's fused CPU kernel is silently wrong here."""
    start = make([(4, 3, 5, 6)])[0].detach()
    same = torch.nn.Parameter(start.clone())
    ours = torch.nn.Parameter(LAYOUTS.get(param_layout, torch.clone)(start))
    a, b = Adam([ours], weight_decay=0.1), Adam([same], weight_decay=0.1)
    for step in range(3):
        give_grads([same], seed=step)
        ours.grad = LAYOUTS.get(grad_layout, torch.clone)(same.grad)
        a.step()
        b.step()
    if param_layout == "gaps":  # not for the kernel
        torch.testing.assert_close(ours, same)
        assert "gaps" in a._explain()
    else:
        assert_same_bits([ours], [same])
        assert a.state[ours]["exp_avg"].stride() == ours.stride()


def test_expanded_gradient():
    ours, stock = make([(4, 6)]), make([(4, 6)])
    a, b = Adam(ours), torch.optim.Adam(stock, foreach=False)
    for p in (*ours, *stock):
        p.grad = p.new_tensor(2.0).expand(4, 6)
    for _ in range(3):
        a.step()
        b.step()
    torch.testing.assert_close(ours, stock)
    assert ours[0].grad.stride() == (0, 0), "the user's gradient is left as it is"


def test_gradient_that_is_the_parameter_or_lazily_negated():
    ours, stock = make([(40,), (1,)]), make([(40,), (1,)])
    a, b = Adam(ours), torch.optim.Adam(stock, foreach=False)
    for _ in range(3):
        for params in (ours, stock):
            params[0].grad = params[0].detach()
            params[1].grad = torch.tensor([1 + 2j], device=device()).conj().imag
        assert ours[1].grad.is_neg()
        a.step()
        b.step()
    torch.testing.assert_close(ours, stock)


def test_gradients_are_read_only():
    params = make()
    optimizer = Adam(params, weight_decay=0.1, maximize=True)
    give_grads(params)
    before = [p.grad.clone() for p in params]
    optimizer.step()
    assert_same_bits([p.grad for p in params], before)
