"""The same bits always: on any instruction set and number of threads, however tensors are split, ordered, grouped."""

import math

import pytest
import torch
from backends import device
from optim_cases import (
    SHAPES,
    assert_same_bits,
    assert_same_bits_each_time,
    each_dtype,
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
from deepops.optim import Adam

pytestmark = on_every_backend


@only_on_cpu
@each_dtype
@each_option(count=4)
def test_same_bits_on_every_instruction_set(kind, options, dtype):
    def run():
        params = make(dtype=dtype)
        optimizer = kind.ours(params, **options)
        train(optimizer, params)
        return everything(optimizer, params)

    assert_same_bits_each_time(run, *on_every_machine())


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
@each_dtype
@each_kernel
def test_same_bits_on_any_number_of_threads_and_twice(kind, dtype):
    def run():
        params = make([*SHAPES, (100_000,)], dtype)
        optimizer = kind.ours(params, **kind.rich)
        train(optimizer, params)
        return everything(optimizer, params)

    assert_same_bits_each_time(run, *((testing.isas()[-1], threads) for threads in (1, 2, 2, 3)))


@each_dtype
@each_kind
def test_same_bits_when_a_tensor_is_split_into_many(kind, dtype):
    whole, generator = make([(30_000,)], dtype), torch.Generator().manual_seed(1)
    parts = [torch.nn.Parameter(part.clone()) for part in whole[0].detach().split([1, 7, 8192, 0, 64, 21_736])]
    a, b = kind.ours(whole, **kind.rich), kind.ours(parts, **kind.rich)
    for _ in range(3):
        whole[0].grad = torch.randn(30_000, generator=generator).to(device(), dtype)
        for part, grad in zip(parts, whole[0].grad.split([p.numel() for p in parts]), strict=True):
            part.grad = grad  # views at odd offsets
        a.step()
        b.step()
    assert_same_bits([whole[0]], [flat(parts)])


@each_kind
def test_same_bits_in_any_order_and_grouping(kind):
    ours, other = make(), make()
    a = kind.ours(ours, **kind.rich)
    b = kind.ours([{"params": other[5:][::-1]}, {"params": other[:5]}], **kind.rich)
    for step in range(3):
        give_grads(ours, other, seed=step)
        a.step()
        b.step()
    assert_same_bits(ours, other)


@each_kind
def test_groups_with_other_options_at_the_same_step(kind):
    """As if each group had an optimizer of its own: neither options nor what is derived from them are shared."""
    together, alone = ([make([(5,), (100,)], seed=seed) for seed in range(len(kind.options))] for _ in range(2))
    a = kind.ours([{"params": params, **options} for params, options in zip(together, kind.options, strict=True)])
    others = [kind.ours(params, **options) for params, options in zip(alone, kind.options, strict=True)]
    for step in range(3):
        for params, same, b in zip(together, alone, others, strict=True):
            give_grads(params, same, seed=step)
            b.step()
        a.step()
    for params, same, b in zip(together, alone, others, strict=True):
        assert_same_bits(everything(a, params), everything(b, same))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("exponent", [-3, 16])
@each_kind
def test_same_bits_with_gradients_scaled_by_a_power_of_two(kind, dtype, exponent):
    ours, plain = make(dtype=dtype), make(dtype=dtype)
    a, b = kind.ours(ours, **kind.rich), kind.ours(plain, **kind.rich)
    a.grad_scale = torch.tensor(2.0**exponent, device=device())
    for step in range(3):
        give_grads(ours, plain, seed=step)
        for p in ours:
            p.grad *= 2.0**exponent
        a.step()
        b.step()
        assert_same_bits([p.grad for p in ours], [p.grad for p in plain])
    assert_same_bits(everything(a, ours), everything(b, plain))
