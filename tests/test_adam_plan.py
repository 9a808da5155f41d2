"""The cached plan of an Adam step: one parallel region, what the plan outlives, and what makes it stale."""

import pytest
import torch
from adam_cases import (
    DTYPES,
    assert_alike,
    both,
    channels_last,
    give_grads,
    make,
    on_every_backend,
    only_on_cpu,
    step_both,
)

from deepops import testing
from deepops.optim import Adam

pytestmark = on_every_backend


@only_on_cpu
def test_one_parallel_region_for_all_groups_and_dtypes():
    groups = [{"params": make(dtype=dtype), "lr": lr} for lr, dtype in zip((0.1, 0.2, 0.3, 0.4), DTYPES, strict=True)]
    optimizer = Adam(groups)
    params = [p for group in groups for p in group["params"]]
    give_grads(params)
    optimizer.step()
    with testing.count_parallel_regions() as regions:
        optimizer.step()
    assert regions.count == 1
    optimizer.zero_grad()
    with testing.count_parallel_regions() as regions:
        optimizer.step()
    assert regions.count == 0, "nothing to do"


def test_late_and_lost_gradients():
    ours, stock, a, b = both()
    for seed, without in enumerate([(2, 8), (2, 8), (8,), (0, 5), range(len(ours)), (), (2,)]):
        step_both(ours, stock, a, b, seed, without)
    assert_alike(ours, stock, a, b)
    assert a.state[ours[2]]["step"] == 3
    assert a.state[ours[0]]["step"] == 5


def test_a_missing_gradient_does_not_rebuild_the_plan():
    ours, stock, a, b = both()
    step_both(ours, stock, a, b, 0)
    plan = a._plan
    for seed, without in enumerate([(3,), (), (0, 1)], start=1):
        step_both(ours, stock, a, b, seed, without)
    assert a._plan is plan
    assert_alike(ours, stock, a, b)


def test_schedulers_do_not_rebuild_the_plan():
    ours, stock, a, b = both()
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in (a, b)]
    plans = set()
    for seed in range(4):
        step_both(ours, stock, a, b, seed)
        for scheduler in schedulers:
            scheduler.step()
        plans.add(id(a._plan))
    assert len(plans) == 1
    assert a.param_groups[0]["lr"] == 1e-3 / 16
    assert_alike(ours, stock, a, b)


def test_cyclic_momentum_schedule():
    ours, stock, a, b = both()
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5) for optimizer in (a, b)]
    for seed in range(4):
        step_both(ours, stock, a, b, seed)
        for scheduler in schedulers:
            scheduler.step()
    assert_alike(ours, stock, a, b)


def test_added_group_and_changed_lists():
    ours, stock, a, b = both()
    step_both(ours, stock, a, b, 0)
    more, same = make([(70,), (3, 3)], seed=5), make([(70,), (3, 3)], seed=5)
    a.add_param_group({"params": more, "lr": 0.5, "weight_decay": 0.1})
    b.add_param_group({"params": same, "lr": 0.5, "weight_decay": 0.1})
    step_both(ours + more, stock + same, a, b, 1)
    last, other = make([(9,)], seed=6), make([(9,)], seed=6)
    a.param_groups[0]["params"].extend(last)
    b.param_groups[0]["params"].extend(other)
    step_both(ours + more + last, stock + same + other, a, b, 2)
    del a.param_groups[0]["params"][0], b.param_groups[0]["params"][0]
    step_both(ours + more + last, stock + same + other, a, b, 3)
    assert_alike(ours + more + last, stock + same + other, a, b)


STALE = {
    "data": lambda p, state: setattr(p, "data", p.data.clone()),
    "data, other strides": lambda p, state: setattr(p, "data", channels_last(p.data)),
    "data, same memory": lambda p, state: setattr(p, "data", p.data.transpose(2, 3)),
    "state replaced": lambda p, state: state.update(exp_avg=state["exp_avg"].clone()),
    "state's data": lambda p, state: setattr(state["exp_avg_sq"], "data", state["exp_avg_sq"].data.clone()),
    "state, other strides": lambda p, state: state.update(exp_avg=channels_last(state["exp_avg"])),
    "step replaced": lambda p, state: state.update(step=torch.tensor(7.0)),
    "step in place": lambda p, state: state["step"].fill_(7),
}


@pytest.mark.parametrize("change", STALE)
def test_a_stale_plan_is_noticed(change):
    ours, stock, a, b = both(shapes=[(5,), (2, 3, 4, 4), (9,)])
    for seed in range(2):
        step_both(ours, stock, a, b, seed)
    for params, optimizer in ((ours, a), (stock, b)):
        p = params[1]
        STALE[change](p, optimizer.state[p])
    for seed in range(2, 4):
        step_both(ours, stock, a, b, seed)
    assert_alike(ours, stock, a, b)


def test_whole_state_of_a_parameter_replaced_or_removed():
    ours, stock, a, b = both()
    step_both(ours, stock, a, b, 0)
    for params, optimizer in ((ours, a), (stock, b)):
        optimizer.state[params[2]] = {key: value.clone() for key, value in optimizer.state[params[2]].items()}
        del optimizer.state[params[7]]
    step_both(ours, stock, a, b, 1)
    for optimizer in (a, b):
        optimizer.state.clear()
    step_both(ours, stock, a, b, 2)
    assert_alike(ours, stock, a, b)


def test_option_switched_between_steps():
    ours, stock, a, b = both({"amsgrad": True})
    step_both(ours, stock, a, b, 0)
    for name, value in (("maximize", True), ("weight_decay", 0.1), ("amsgrad", False), ("betas", (0.5, 0.9))):
        for optimizer in (a, b):
            optimizer.param_groups[0][name] = value
        step_both(ours, stock, a, b, 1)
    assert_alike(ours, stock, a, b)
