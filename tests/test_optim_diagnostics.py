"""What a step measures of each parameter: ``optimizer.diagnostics`` and ``optimizer.first_non_finite``."""

import math

import pytest
import torch
from optim_cases import only_on_cpu
from scaling_cases import (
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
)

import deepops
from deepops.optim import TensorFacts
from deepops.testing import count_parallel_regions, use_threads

pytestmark = on_every_backend

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
INF, NAN = float("inf"), float("nan")


def norm(tensor):
    """In double."""
    tensor = tensor.detach().as_subclass(torch.Tensor).cpu()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64)).abs().norm().item()


def assert_facts(facts, grad, before, after):
    """As double arithmetic has them: two orders of summing n squares differ by n roundings at most."""
    wide = torch.promote_types(before.dtype, torch.float64)
    bound = 1 + before.numel() * torch.finfo(torch.float64).eps
    wanted = {"grad_norm": norm(grad), "param_norm": norm(after), "update_norm": norm(after.to(wide) - before.to(wide))}
    for name, value in wanted.items():
        found = getattr(facts, name)
        assert math.isnan(found) if math.isnan(value) else value / bound <= found <= value * bound, name
    assert facts.non_finite == 0


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("odd", [(), (1, 4)], ids=["kernel", "mixed"])
def test_values(case, dtype, odd):
    """Of what is stored: 16-bit parameters as they were rounded. Nothing of the step's result changes."""
    params, alone = make(dtype=dtype, odd=odd), make(dtype=dtype, odd=odd)
    a, b = ours(case, params, diagnostics=True), ours(case, alone)
    assert a.diagnostics == {}
    assert a.first_non_finite is None
    for seed in range(2):
        give_grads(params, alone, seed=seed)
        grads, before = [p.grad.clone() for p in params], [p.detach().clone() for p in params]
        a.step()
        b.step()
        a.zero_grad()  # which what was measured outlives
        found = a.diagnostics
        assert list(found) == [f"group 0, parameter {i}" for i in range(len(params))]
        for facts, grad, old, param in zip(found.values(), grads, before, params, strict=True):
            assert_facts(facts, grad, old, param.detach())
        assert a.first_non_finite is None
    assert_same(snapshot(a, params), snapshot(b, alone))


@every_case
@pytest.mark.parametrize("more", [{"master_weights": True}, {"master_weights": "split"}], ids=str)
def test_master_weights(case, more):
    """What changes are the masters: an update that the 16-bit parameter does not see counts too."""
    params, alone = make(dtype=torch.bfloat16), make(dtype=torch.bfloat16)
    a, b = ours(case, params, diagnostics=True, **more), ours(case, alone, **more)
    for optimizer in (a, b):
        optimizer.param_groups[0]["lr"] = 1e-6
    for seed in range(3):
        give_grads(params, alone, seed=seed)
        a.step()
        b.step()
    assert_same(snapshot(a, params), snapshot(b, alone))
    for param, facts in zip(params, a.diagnostics.values(), strict=True):
        if param.numel():
            assert facts.update_norm > 0
        if more["master_weights"] is True:
            master = a.state[param]["master_param"]
            bound = 1 + master.numel() * torch.finfo(torch.float64).eps
            assert norm(master) / bound <= facts.param_norm <= norm(master) * bound


def test_names_and_missing_gradients():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(make()[0].device)
    optimizer = ours("adam", model.named_parameters(), diagnostics=True)
    give_grads(list(model.parameters()))
    model[0].bias.grad = None
    optimizer.step()
    assert list(optimizer.diagnostics) == ["0.weight", "1.weight", "1.bias"]
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.diagnostics == {}
    give_grads(list(model.parameters()))
    optimizer.step()
    assert list(optimizer.diagnostics) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_names_of_several_groups():
    params = make()
    optimizer = ours("sgd", [{"params": params[:2]}, {"params": params[2:]}], diagnostics=True)
    give_grads(params)
    optimizer.step()
    assert list(optimizer.diagnostics)[1:3] == ["group 0, parameter 1", "group 1, parameter 0"]
    optimizer.add_param_group({"params": make([(4,)])})
    give_grads([p for group in optimizer.param_groups for p in group["params"]])
    optimizer.step()
    assert list(optimizer.diagnostics)[-1] == "group 2, parameter 0"


@every_case
@every_scaler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("odd", [(), (2, 6)], ids=["kernel", "mixed"])
def test_first_non_finite(case, scaler_class, dtype, odd):
    """Also where the step was skipped, and of parameters on torch's path; how many elements of each."""
    params = make(dtype=dtype, odd=odd)
    optimizer, scaler = ours(case, params, diagnostics=True), make_scaler(scaler_class, 8.0)
    for seed, bad in enumerate(({}, {6: [INF]}, {2: [NAN], 4: [INF, NAN, -INF]}, {}, {3: [NAN]})):
        give_grads(params, seed=seed, scale=scaler.get_scale())
        for index, values in bad.items():
            for place, value in enumerate(values):
                params[index].grad.view(-1)[-1 - place] = value
        before = snapshot(optimizer, params)
        scaler.step(optimizer)
        scaler.update()
        names = [f"group 0, parameter {index}" for index in bad]
        assert optimizer.first_non_finite == (names[0] if bad else None)
        found = optimizer.diagnostics
        assert {name: facts.non_finite for name, facts in found.items() if facts.non_finite} == {
            name: len(values) for name, values in zip(names, bad.values(), strict=True)
        }
        if bad:
            assert_untouched(before, snapshot(optimizer, params))
            assert all(facts.param_norm == facts.update_norm == 0 for facts in found.values())
            assert not any(math.isfinite(found[name].grad_norm) for name in names)
            assert all(math.isfinite(facts.grad_norm) for name, facts in found.items() if name not in names)


def test_gradients_are_measured_as_they_came():
    """Still scaled, not clipped; torch's scaler unscales them afterwards."""
    for scaler_class in (torch.amp.GradScaler, deepops.amp.GradScaler):
        params = make([(8193,), (5,)], odd=(1,))
        optimizer = ours("adam", params, diagnostics=True, max_grad_norm=1.0)
        scaler = make_scaler(scaler_class)
        give_grads(params, scale=1024.0)
        wanted = [norm(p.grad) for p in params]
        scaler.step(optimizer)
        found = [facts.grad_norm for facts in optimizer.diagnostics.values()]
        assert found == pytest.approx(wanted, rel=8193 * torch.finfo(torch.float64).eps)
        total = math.sqrt(sum(square**2 for square in found)) / 1024
        assert optimizer.grad_norm.item() == pytest.approx(total, rel=torch.finfo(torch.float32).eps)


def test_without_a_scaler_what_is_not_finite_is_told():
    params = make([(5,), (6,)])
    optimizer = ours("adam", params, diagnostics=True)
    give_grads(params)
    params[1].grad[2] = NAN
    optimizer.step()
    assert optimizer.first_non_finite == "group 0, parameter 1"
    assert math.isnan(optimizer.diagnostics["group 0, parameter 1"].update_norm)


def test_off_by_default():
    params = make()
    optimizer = ours("adam", params)
    give_grads(params)
    params[0].grad[0] = NAN
    optimizer.step()
    assert optimizer.diagnostics == {}
    assert optimizer.first_non_finite is None


def test_facts_are_plain_values():
    assert TensorFacts(1.0, 2.0, 3.0, 4) == TensorFacts(grad_norm=1.0, param_norm=2.0, update_norm=3.0, non_finite=4)


@pytest.mark.parametrize("how", ["load_state_dict", "late parameter"])
def test_a_new_plan(how):
    """What was measured belongs to the last step, whatever the plan."""
    params = make([(5,), (6,), (7,)])
    optimizer = ours("sgd-momentum", params, diagnostics=True)
    give_grads(params)
    params[0].grad = None
    optimizer.step()
    assert len(optimizer.diagnostics) == 2
    give_grads(params)
    if how == "load_state_dict":
        optimizer.load_state_dict(optimizer.state_dict())
        params[0].grad = None
    before = [p.detach().clone() for p in params]
    optimizer.step()
    found = optimizer.diagnostics
    assert len(found) == (2 if how == "load_state_dict" else 3)
    for index, param in enumerate(params):
        if param.grad is not None:
            assert_facts(found[f"group 0, parameter {index}"], param.grad, before[index], param.detach())


@only_on_cpu
@every_case
def test_passes_and_threads(case):
    """In the pass that updates; the same numbers on any number of threads."""
    found = []
    for threads in (1, 2):
        params = make([(70_000,), (3,), (40_000,)])
        optimizer = ours(case, params, diagnostics=True)
        give_grads(params)
        with use_threads(threads), count_parallel_regions() as regions:
            optimizer.step()
        assert regions.count == 1
        found.append(optimizer.diagnostics)
    assert found[0] == found[1]
