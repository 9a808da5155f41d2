"""The cached plan of a step: one parallel region, what the plan outlives, and what makes it stale."""

import pytest
import torch
from optim_cases import (
    ADAM,
    DTYPES,
    RMSPROP,
    SGD_,
    assert_alike,
    both,
    channels_last,
    each_kind,
    each_option,
    give_grads,
    make,
    on_every_backend,
    only_on_cpu,
    step_both,
    steps_of,
)

from deepops import testing

pytestmark = on_every_backend


@only_on_cpu
@each_kind
def test_one_parallel_region_for_all_groups_and_dtypes(kind):
    groups = [{"params": make(dtype=dtype), "lr": lr} for lr, dtype in zip((0.1, 0.2, 0.3, 0.4), DTYPES, strict=True)]
    optimizer = kind.ours(groups, **kind.rich)
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


@each_option(count=2)
def test_late_and_lost_gradients(kind, options):
    """Each parameter's first step is its own: its bias correction, and SGD's buffer, which starts with the gradient."""
    ours, stock, a, b = both(kind, options)
    for seed, without in enumerate([(2, 8), (2, 8), (8,), (0, 5), range(len(ours)), (), (2,)]):
        step_both(ours, stock, a, b, seed, without)
    assert_alike(ours, stock, a, b)
    assert steps_of(a, ours)[2] == 3
    assert steps_of(a, ours)[0] == 5


@each_kind
def test_a_missing_gradient_does_not_rebuild_the_plan(kind):
    ours, stock, a, b = both(kind, kind.rich)
    step_both(ours, stock, a, b, 0)
    plan = a._plans
    for seed, without in enumerate([(3,), (), (0, 1)], start=1):
        step_both(ours, stock, a, b, seed, without)
    assert a._plans is plan
    assert_alike(ours, stock, a, b)


@each_kind
def test_schedulers_do_not_rebuild_the_plan(kind):
    ours, stock, a, b = both(kind, kind.rich)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in (a, b)]
    plans = set()
    for seed in range(4):
        step_both(ours, stock, a, b, seed)
        for scheduler in schedulers:
            scheduler.step()
        plans.add(id(a._plans))
    assert len(plans) == 1
    assert a.param_groups[0]["lr"] == b.param_groups[0]["lr"]
    assert_alike(ours, stock, a, b)


@pytest.mark.parametrize(
    ("kind", "options"), [(ADAM, {}), (SGD_, {"momentum": 0.9}), (RMSPROP, {"momentum": 0.9})], ids=str
)
def test_cyclic_momentum_schedule(kind, options):
    ours, stock, a, b = both(kind, options)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5) for optimizer in (a, b)]
    for seed in range(4):
        step_both(ours, stock, a, b, seed)
        for scheduler in schedulers:
            scheduler.step()
    assert_alike(ours, stock, a, b)


@each_kind
def test_added_group_and_changed_lists(kind):
    ours, stock, a, b = both(kind, kind.rich)
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


def of_state(change):
    """The change of one of the states, whatever it is called."""
    return lambda p, state: change(state, next(name for name in state if name != "step"))


STALE = {
    "data": lambda p, state: setattr(p, "data", p.data.clone()),
    "data, other strides": lambda p, state: setattr(p, "data", channels_last(p.data)),
    "data, same memory": lambda p, state: setattr(p, "data", p.data.transpose(2, 3)),
    "state replaced": of_state(lambda state, name: state.update({name: state[name].clone()})),
    "state's data": of_state(lambda state, name: setattr(state[name], "data", state[name].data.clone())),
    "state, other strides": of_state(lambda state, name: state.update({name: channels_last(state[name])})),
    "step replaced": lambda p, state: state.update(step=torch.tensor(7.0)),
    "step in place": lambda p, state: state["step"].fill_(7),
}


@pytest.mark.parametrize("change", STALE)
@each_kind
def test_a_stale_plan_is_noticed(kind, change):
    if change.startswith("step") and kind is SGD_:
        pytest.skip("its state has no step counter")
    ours, stock, a, b = both(kind, kind.rich, [(5,), (2, 3, 4, 4), (9,)])
    for seed in range(2):
        step_both(ours, stock, a, b, seed)
    for params, optimizer in ((ours, a), (stock, b)):
        p = params[1]
        STALE[change](p, optimizer.state[p])
    for seed in range(2, 4):
        step_both(ours, stock, a, b, seed)
    assert_alike(ours, stock, a, b)


@each_kind
def test_whole_state_of_a_parameter_replaced_or_removed(kind):
    ours, stock, a, b = both(kind, kind.rich)
    step_both(ours, stock, a, b, 0)
    for params, optimizer in ((ours, a), (stock, b)):
        optimizer.state[params[2]] = {key: value.clone() for key, value in optimizer.state[params[2]].items()}
        del optimizer.state[params[7]]
    step_both(ours, stock, a, b, 1)
    for optimizer in (a, b):
        optimizer.state.clear()
    step_both(ours, stock, a, b, 2)
    assert_alike(ours, stock, a, b)


SWITCHES = {
    "Adam": (("maximize", True), ("weight_decay", 0.1), ("amsgrad", False), ("betas", (0.5, 0.9))),
    "AdamW": (("maximize", True), ("weight_decay", 0.1), ("amsgrad", False), ("lr", 0.1)),
    "SGD": (("maximize", False), ("momentum", 0.5), ("dampening", 0.0), ("nesterov", True), ("weight_decay", 0.2)),
    "RMSprop": (("maximize", False), ("alpha", 0.5), ("momentum", 0.0), ("centered", False), ("momentum", 0.9)),
}


@each_kind
def test_option_switched_between_steps(kind):
    ours, stock, a, b = both(kind, kind.rich)
    step_both(ours, stock, a, b, 0)
    for seed, (name, value) in enumerate(SWITCHES[str(kind)], start=1):
        for optimizer in (a, b):
            optimizer.param_groups[0][name] = value
        step_both(ours, stock, a, b, seed)
    assert_alike(ours, stock, a, b)


@each_option([SGD_], count=3)
def test_momentum_switched_on_and_off(kind, options):
    """A buffer that comes late starts with its first gradient; one that rests stays as it is, as in torch."""
    ours, stock, a, b = both(kind, {**options, "nesterov": False})
    for seed, momentum in enumerate((0.0, 0.9, 0.9, 0.0, 0.5)):
        for optimizer in (a, b):
            optimizer.param_groups[0]["momentum"] = momentum
        step_both(ours, stock, a, b, seed, without=(seed,))
    assert_alike(ours, stock, a, b)
