"""What torch's optimizers do around a step, and ours too: closures, hooks, zero_grad, autograd, scaler, compiler."""

import backends
import pytest
import torch
from optim_cases import (
    KINDS,
    assert_alike,
    assert_same_bits,
    both,
    each_kind,
    everything,
    give_grads,
    make,
    on_every_backend,
    step_both,
)

pytestmark = on_every_backend


@each_kind
def test_closure_hooks_and_profiler(kind):
    params = make([(4,)])
    optimizer = kind.ours(params)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))

    def closure():
        assert torch.is_grad_enabled()
        seen.append("closure")
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    kind.torchs(make())  # torch patches the step of the class of the first instance of each
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss = optimizer.step(closure)
    assert seen == ["pre", "closure", "post"]
    assert loss.requires_grad
    assert f"Optimizer.step#{kind}.step" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("set_to_none", [True, False])
@each_kind
def test_zero_grad(kind, set_to_none):
    ours, stock, a, b = both(kind, kind.rich)
    for seed in range(3):
        for optimizer in (a, b):
            optimizer.zero_grad(set_to_none=set_to_none)
        step_both(ours, stock, a, b, seed)
        for optimizer in (a, b):
            optimizer.zero_grad(set_to_none=set_to_none)
            optimizer.step()
    assert_alike(ours, stock, a, b)


@each_kind
def test_written_parameters_have_a_new_version(kind):
    params = make()
    optimizer = kind.ours(params)
    give_grads(params)
    params[0].grad = None
    before = [p._version for p in params]
    optimizer.step()
    changed = [p._version > version for p, version in zip(params, before, strict=True)]
    assert changed == [False] + [True] * (len(params) - 1)


@each_kind
def test_autograd_notices_a_step_between_forward_and_backward(kind):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = kind.ours([weight])
    weight.grad = torch.ones(3)
    loss = (weight * weight).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_kind
def test_grad_scaler(kind):
    """An overflow skips the step; otherwise scaling by a power of two changes nothing."""
    ours, plain = make(), make()
    a, b = kind.ours(ours, **kind.rich), kind.ours(plain, **kind.rich)
    scaler = torch.amp.GradScaler(backends.device(), init_scale=1024.0, growth_interval=100)
    for seed in range(5):
        give_grads(ours, plain, seed=seed)
        scaler.scale(torch.ones((), device=backends.device()))
        scale = scaler.get_scale()
        for p in ours:
            p.grad *= scale
        if seed in (0, 3):
            ours[4].grad[0] = float("inf")
        else:
            b.step()
        scaler.step(a)
        scaler.update()
    assert scaler.get_scale() == 256.0
    assert_same_bits(everything(a, ours), everything(b, plain))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.fused], ids=str)
def test_grad_scale_set_by_hand_as_in_torch(kind):
    """Gradients are left unscaled, as torch's fused optimizers leave them."""
    ours, stock = make(), make()
    a, b = kind.ours(ours, fused=True, **kind.rich), kind.torchs(stock, fused=True, **kind.rich)
    for seed in range(3):
        give_grads(ours, stock, seed=seed)
        for optimizer in (a, b):
            optimizer.grad_scale = torch.tensor(4.0, device=backends.device()) if seed == 1 else None
            optimizer.found_inf = torch.tensor(0.0, device=backends.device()) if seed == 1 else None
            optimizer.step()
        torch.testing.assert_close([p.grad for p in ours], [p.grad for p in stock])
    assert_alike(ours, stock, a, b)


@each_kind
def test_training_under_compile(kind):
    ours, plain = make([(5,), (2, 3)]), make([(5,), (2, 3)])
    a, b = kind.ours(ours), kind.ours(plain)
    give_grads(ours, plain)
    step = torch.compile(lambda: a.step(), backend="eager")
    for _ in range(3):
        step()
        b.step()
    assert_same_bits(ours, plain)
