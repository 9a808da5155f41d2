"""Stochastic rounding of bf16: unbiased, and a function of the seed, the step, the parameter and the place alone."""

import copy
import math
import pickle

import pytest
import torch
from backends import device
from optim_cases import (
    ADAMW,
    SGD_,
    assert_same_bits,
    assert_same_bits_each_time,
    each_kernel,
    each_kind,
    each_option,
    everything,
    flat,
    give_grads,
    make,
    on_every_backend,
    on_every_machine,
    only_on_cpu,
    train,
)

from deepops import testing

pytestmark = on_every_backend

BF16 = torch.bfloat16
DEVIATIONS = 6  # of a mean over random numbers: once in 5e8


def rounded(value, move, count):
    """``count`` parameters at ``value`` after a step of SGD that moves each by ``move``."""
    param = torch.nn.Parameter(torch.full((count,), value, dtype=BF16, device=device()))
    param.grad = torch.full_like(param, -move)
    SGD_.ours([param], lr=1.0, stochastic_rounding=True, seed=1).step()
    return param.detach()


@pytest.mark.parametrize("share", [0.5, 0.25, 0.125, 7 / 8, 1 / 64, 1 / 1024])
@pytest.mark.parametrize("value", [1.0, -1.0, 1.9921875, 2.0**-100, -(2.0**100)])
def test_mean_and_variance(value, share):
    """Up with the probability of the part cut off: a coin of known bias, whose mean and variance are known."""
    ulp = 2 * testing.half_ulp(torch.tensor(value), BF16).item()
    count = 40_000
    got = rounded(value, math.copysign(share * ulp, value), count)
    ups = (got.double() - got.new_tensor(value).double()) / math.copysign(ulp, value)
    assert set(ups.unique().tolist()) <= {0.0, 1.0}, "a neighbour on either side"
    deviation = math.sqrt(share * (1 - share) / count)
    assert abs(ups.mean().item() - share) <= DEVIATIONS * deviation
    # The variance of a sample of coins: its own deviation is that of the fourth moment.
    variance, fourth = share * (1 - share), share * (1 - share) * (1 - 3 * share * (1 - share))
    spread = math.sqrt((fourth - variance**2) / count)
    assert abs(ups.var(unbiased=False).item() - variance) <= DEVIATIONS * spread + DEVIATIONS**2 * deviation**2


def test_neighbours_steps_parameters_and_seeds_draw_independently():
    """Correlation of coins that lie side by side, or at one place in another step, parameter or run."""
    count = 40_000

    def coins(params, seed, steps):
        optimizer = SGD_.ours(params, lr=1.0, stochastic_rounding=True, seed=seed)
        for _ in range(steps):
            for p in params:
                p.detach().fill_(1.0)
                p.grad = torch.full_like(p, -(2.0**-8))  # half an ulp
            optimizer.step()
        return [(p.detach() > 1.0).double() * 2 - 1 for p in params]

    def params():
        return make([(count,), (count,)], BF16)

    first, second = coins(params(), 1, 1)
    later = coins(params(), 1, 2)[0]
    other = coins(params(), 2, 1)[0]
    high_seed = coins(params(), 1 + 2**32, 1)[0]
    pairs = [(first, second), (first, later), (first, other), (first, high_seed)]
    pairs += [(first[lag:], first[:-lag]) for lag in (1, 2, 16, 512, 8192)]
    for x, y in pairs:
        assert abs((x * y).mean().item()) <= DEVIATIONS / math.sqrt(len(x))


def test_a_parameter_and_its_state_draw_independently():
    count, half_ulp = 40_000, 2.0**-8
    param = torch.nn.Parameter(torch.full((count,), -1.0, dtype=BF16, device=device()))
    param.grad = torch.full_like(param, half_ulp)
    optimizer = SGD_.ours([param], lr=half_ulp / (1 + half_ulp), momentum=1.0, stochastic_rounding=True, seed=1)
    optimizer.state[param]["momentum_buffer"] = torch.ones_like(param)  # and so the next step is not the first
    optimizer.step()
    coins = [2 * (t.detach().double().abs() > 1) - 1.0 for t in (param, optimizer.state[param]["momentum_buffer"])]
    assert all(abs(coin.mean().item()) <= DEVIATIONS / math.sqrt(count) for coin in coins)
    assert abs((coins[0] * coins[1]).mean().item()) <= DEVIATIONS / math.sqrt(count)


def test_what_needs_no_rounding_stays():
    values = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1.0, -3.5, 1e-40, 3.3895e38], device=device()).to(BF16)
    for seed in range(50):
        param = torch.nn.Parameter(values.clone())
        param.grad = torch.zeros_like(param)
        SGD_.ours([param], lr=0.0, stochastic_rounding=True, seed=seed).step()
        assert torch.equal(param.detach(), values)
    for special in (math.nan, math.inf, -math.inf):
        param = torch.nn.Parameter(torch.ones(5000, dtype=BF16, device=device()))
        param.grad = torch.full_like(param, special)
        SGD_.ours([param], stochastic_rounding=True, seed=0).step()
        assert torch.all(param.isnan() if math.isnan(special) else param == -special)


@each_kind
def test_small_updates_are_not_lost(kind):
    """300 steps that to nearest leave bf16 standing still: on average they lead to where float32 goes."""
    count, steps = 2000, 300

    def run(dtype, **options):
        param = torch.nn.Parameter(torch.ones(count, dtype=dtype, device=device()))
        optimizer = kind.ours([param], lr=1e-5, **options)
        for _ in range(steps):
            param.grad = torch.ones_like(param)
            optimizer.step()
        return 1 - param.detach().double()

    assert torch.all(run(BF16) == 0)
    drift = run(torch.float32)[0].item()
    ulp = 2.0**-8  # below 1; a step is one with the probability move / ulp, so the variance of a move is move * ulp
    got = run(BF16, stochastic_rounding=True, seed=0)
    assert abs(got.mean().item() - drift) <= DEVIATIONS * math.sqrt(drift * ulp / count)
    assert len(got.unique()) > 1


@each_option(count=2)
def test_equal_seeds_give_equal_runs_and_others_do_not(kind, options):
    runs = []
    for seed in (5, 5, 6, 5 + 2**32):
        params = make(dtype=BF16)
        optimizer = kind.ours(params, stochastic_rounding=True, seed=seed, **options)
        train(optimizer, params)
        assert "torch, because" not in optimizer._explain()
        runs.append(everything(optimizer, params))
    assert_same_bits(runs[0], runs[1])
    assert not torch.equal(flat(runs[0]).float(), flat(runs[2]).float())
    assert not torch.equal(flat(runs[0]).float(), flat(runs[3]).float())


@only_on_cpu
@each_kind
def test_same_bits_on_any_instruction_set_and_threads(kind):
    def run():
        params = make([(5,), (100_001,), (513,)], BF16)
        optimizer = kind.ours(params, stochastic_rounding=True, seed=1, **kind.rich)
        train(optimizer, params, 2)
        return everything(optimizer, params)

    assert_same_bits_each_time(run, *on_every_machine())


@each_kernel
def test_a_place_draws_the_same_however_work_is_divided(kind):
    """A prefix of a tensor draws what the tensor draws there; other tensors beside it change nothing."""
    whole, part = make([(30_000,)], BF16), make([(30_000,)], BF16)
    part = [torch.nn.Parameter(part[0].detach()[:12_345].clone()), *make([(7,), (9000,)], BF16, seed=9)]
    a, b = (kind.ours(params, stochastic_rounding=True, seed=3, **kind.rich) for params in (whole, part))
    for seed in range(3):
        give_grads(whole, seed=seed)
        give_grads(part, seed=seed + 100)
        part[0].grad = whole[0].grad[:12_345].clone()
        a.step()
        b.step()
    assert_same_bits([whole[0][:12_345]], part[:1])


@each_kernel
def test_only_bf16_is_rounded_so(kind):
    """Parameters and states of other dtypes are as without; a bf16 state of a float32 parameter is rounded so."""
    dtypes = [torch.float32, torch.float16, torch.float64]
    ours, plain = ([p for dtype in dtypes for p in make([(300,)], dtype)] for _ in range(2))
    a, b = kind.ours(ours, stochastic_rounding=True, seed=1, **kind.rich), kind.ours(plain, **kind.rich)
    train(a, ours)
    train(b, plain)
    for x, y in zip(everything(a, ours), everything(b, plain), strict=True):
        assert torch.equal(x, y)
    runs = []
    for more in ({}, {"stochastic_rounding": True, "seed": 1}, {"stochastic_rounding": True, "seed": 2}):
        params = make([(3000,)])
        optimizer = kind.ours(params, state_dtype=BF16, **kind.rich, **more)
        train(optimizer, params, 1)
        runs.append([params[0].detach(), optimizer.state[params[0]][kind.states[0]].float()])
    assert torch.equal(runs[0][0], runs[1][0]), "the first step of a float32 parameter does not see its rounded states"
    assert not torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[1][1], runs[2][1])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_draws_the_same(clone):
    params = make(dtype=BF16)
    optimizer = ADAMW.ours(params, stochastic_rounding=True)
    train(optimizer, params, 2)
    others, other = clone((params, optimizer))
    assert other._step_options.seed == optimizer._step_options.seed == torch.initial_seed()
    train(optimizer, params, 2, first=2)
    train(other, others, 2, first=2)
    assert_same_bits(everything(optimizer, params), everything(other, others))


def test_a_resumed_run_draws_the_same():
    """The step counter is part of what is drawn by, so a state_dict and the seed are enough."""
    params = make(dtype=BF16)
    optimizer = ADAMW.ours(params, stochastic_rounding=True, seed=7)
    train(optimizer, params, 2)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = ADAMW.ours(others, stochastic_rounding=True, seed=7)
    other.load_state_dict(optimizer.state_dict())
    train(optimizer, params, 2, first=2)
    train(other, others, 2, first=2)
    assert_same_bits(everything(optimizer, params), everything(other, others))
