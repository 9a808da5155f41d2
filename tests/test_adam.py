"""deepops.optim.Adam: values against the fp64 oracle, then everything in which it must be torch.optim.Adam."""

import copy
import inspect
import io
import itertools
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepops
from deepops import testing
from deepops._library import has_kernel
from deepops.optim import Adam
from deepops.reference.adam import adam_step

pytestmark = pytest.mark.skipif(not has_kernel("adam", "cpu"), reason="the kernels were not built")

STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
SHAPES = [(), (1,), (3, 5), (0,), (63,), (64,), (65,), (8191,), (8192,), (8193,), (2, 0, 3), (2, 3, 4, 5), (20_000,)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Every pair of values of (weight_decay, decoupled, amsgrad, maximize, betas) is in one of these.
OPTIONS = [
    {},
    {"weight_decay": 0.1, "amsgrad": True, "maximize": True, "betas": (0.3, 0.5)},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "betas": (0.3, 0.5)},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "amsgrad": True},
    {"weight_decay": 0.1, "maximize": True},
    {"decoupled_weight_decay": True, "maximize": True},
    {"amsgrad": True, "betas": (0.0, 0.99), "eps": 1e-3, "lr": 0.1},
    {"weight_decay": 0.01, "betas": (0.9, 0.9), "lr": 1.0, "eps": 0.0},
]


def make(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_grads(*models, seed=0):
    """The same gradients to the parameters of each model, in each one's own dtype."""
    for index, params in enumerate(zip(*models, strict=True)):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        grad = torch.randn(params[0].shape, generator=generator) + 0.5
        for p in params:
            p.grad = grad.to(p.dtype, copy=True)


def train(optimizer, params, steps=4, first=0):
    for step in range(first, first + steps):
        give_grads(params, seed=step)
        optimizer.step()


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def assert_same_bits(a, b):
    """Equal, a NaN to a NaN."""
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.detach(), y.detach(), rtol=0, atol=0, equal_nan=True)


def states(optimizer, params, name):
    return [optimizer.state[p][name] for p in params]


def everything(optimizer, params):
    names = ["step", *(name for name in STATES if name in optimizer.state[params[0]])]
    return [*params, *itertools.chain.from_iterable(states(optimizer, params, name) for name in names)]


# ---- values ---------------------------------------------------------------------------------------------------------


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


@settings(max_examples=25, deadline=None)
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


# ---- the same bits, always ------------------------------------------------------------------------------------------


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
        whole[0].grad = torch.randn(30_000, generator=generator).to(dtype)
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


def test_many_tiny_tensors():
    ours, stock = make([()] * 21_000), make([()] * 21_000)
    a, b = Adam(ours), torch.optim.Adam(stock, fused=True)
    give_grads(ours, stock)
    a.step()
    b.step()
    torch.testing.assert_close(torch.stack(ours), torch.stack(stock))
    assert states(a, ours, "step") == [1.0] * 21_000


# ---- layouts --------------------------------------------------------------------------------------------------------


def channels_last(p):
    return p.to(memory_format=torch.channels_last)


LAYOUTS = {
    "channels_last": channels_last,
    "transposed": lambda p: p.transpose(1, 3).contiguous().transpose(1, 3),
    "gaps": lambda p: p.repeat_interleave(2, 1)[:, ::2],
    "offset": lambda p: torch.cat([torch.zeros(1), p.reshape(-1)])[1:].view(p.shape),
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
        p.grad = torch.tensor(2.0).expand(4, 6)
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
            params[1].grad = torch.tensor([1 + 2j]).conj().imag
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


# ---- parameters come and go -----------------------------------------------------------------------------------------


def both(options=None, shapes=SHAPES):
    ours, stock = make(shapes), make(shapes)
    options = options or {}
    return ours, stock, Adam(ours, **options), torch.optim.Adam(stock, foreach=False, **options)


def step_both(ours, stock, a, b, seed, without=()):
    give_grads(ours, stock, seed=seed)
    for index in without:
        ours[index].grad = stock[index].grad = None
    a.step()
    b.step()


def assert_alike(ours, stock, a, b):
    torch.testing.assert_close(ours, stock)
    for p, q in zip(ours, stock, strict=True):
        assert a.state[p].keys() == b.state[q].keys()
        torch.testing.assert_close(list(a.state[p].values()), list(b.state[q].values()))


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


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("to_torch", [True, False])
def test_state_dict_both_ways_in_mid_training(to_torch, options):
    ours, stock, a, b = both(options)
    for seed in range(3):
        step_both(ours, stock, a, b, seed)
    source, target = (a, b) if to_torch else (b, a)
    saved = copy.deepcopy(source.state_dict())
    target.load_state_dict(saved)
    with torch.no_grad():
        for p, q in zip(ours, stock, strict=True):
            (q if to_torch else p).copy_(p if to_torch else q)
    for seed in range(3, 5):
        step_both(ours, stock, a, b, seed)
    assert_alike(ours, stock, a, b)
    assert a.state_dict().keys() == b.state_dict().keys()
    assert a.state_dict()["param_groups"][0].keys() == b.state_dict()["param_groups"][0].keys()
    assert list(a.state_dict()["state"][0]) == list(b.state_dict()["state"][0])


def test_resumed_run_has_the_same_bits():
    params = make()
    optimizer = Adam(params, amsgrad=True)
    train(optimizer, params, 3)
    checkpoint = copy.deepcopy((params, optimizer.state_dict()))
    train(optimizer, params, 3, first=3)
    again, state = checkpoint
    resumed = Adam(again, amsgrad=True)
    resumed.load_state_dict(state)
    train(resumed, again, 3, first=3)
    assert_same_bits(everything(optimizer, params), everything(resumed, again))


def test_saved_file_is_not_larger_and_loads_with_weights_only():
    ours, stock, a, b = both(shapes=[(7,)] * 300)
    step_both(ours, stock, a, b, 0)
    sizes = []
    for optimizer in (a, b):
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        sizes.append(file.tell())
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        fresh = torch.optim.Adam(make([(7,)] * 300))
        fresh.load_state_dict(loaded)
        assert fresh.state_dict()["state"][299]["step"] == 1
    assert sizes[0] <= sizes[1]


def test_state_loaded_from_another_memory_format():
    ours = [torch.nn.Parameter(channels_last(make([(2, 3, 4, 5)])[0].detach()))]
    stock = make([(2, 3, 4, 5)])
    a, b = Adam(ours), torch.optim.Adam(stock, foreach=False)
    step_both(ours, stock, a, b, 0)
    a.load_state_dict(copy.deepcopy(b.state_dict()))
    step_both(ours, stock, a, b, 1)
    torch.testing.assert_close(ours, stock)
    assert "kernel" in a._explain()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_deepcopy_and_pickle(clone):
    params = make()
    optimizer = Adam(params, weight_decay=0.1)
    train(optimizer, params, 2)
    others, other = clone((params, optimizer))
    assert type(other) is Adam
    train(optimizer, params, 2, first=2)
    assert other.state[others[0]]["step"] == 2, "nothing is shared"
    train(other, others, 2, first=2)
    assert_same_bits(everything(optimizer, params), everything(other, others))


# ---- what torch's optimizers do around a step -----------------------------------------------------------------------


def test_isinstance_signature_and_repr():
    arguments = [
        [(p.name, p.default, p.kind) for p in inspect.signature(cls).parameters.values()]
        for cls in (Adam, torch.optim.Adam)
    ]
    assert arguments[0] == arguments[1]
    optimizer = Adam(make(), 0.1, (0.8, 0.9), 1e-7, 0.2, True, maximize=True)
    assert isinstance(optimizer, torch.optim.Adam)
    assert repr(optimizer) == repr(torch.optim.Adam(make(), 0.1, (0.8, 0.9), 1e-7, 0.2, True, maximize=True))
    assert deepops.optim.Adam is Adam


def test_closure_hooks_and_profiler():
    params = make([(4,)])
    optimizer = Adam(params)
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

    torch.optim.Adam(make())  # torch patches the step of the class of the first instance of each
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss = optimizer.step(closure)
    assert seen == ["pre", "closure", "post"]
    assert loss.requires_grad
    assert "Optimizer.step#Adam.step" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    ours, stock, a, b = both()
    for seed in range(3):
        for optimizer in (a, b):
            optimizer.zero_grad(set_to_none=set_to_none)
        step_both(ours, stock, a, b, seed)
        for optimizer in (a, b):
            optimizer.zero_grad(set_to_none=set_to_none)
            optimizer.step()
    assert_alike(ours, stock, a, b)


def test_written_parameters_have_a_new_version():
    params = make()
    optimizer = Adam(params)
    give_grads(params)
    params[0].grad = None
    before = [p._version for p in params]
    optimizer.step()
    changed = [p._version > version for p, version in zip(params, before, strict=True)]
    assert changed == [False] + [True] * (len(params) - 1)


def test_autograd_notices_a_step_between_forward_and_backward():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = Adam([weight])
    weight.grad = torch.ones(3)
    loss = (weight * weight).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler(fused):
    """An overflow skips the step; otherwise scaling by a power of two changes nothing."""
    ours, plain = make(), make()
    a, b = Adam(ours, fused=fused), Adam(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for seed in range(5):
        give_grads(ours, plain, seed=seed)
        scaler.scale(torch.ones(()))
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


def test_grad_scale_set_by_hand_as_in_torch():
    ours, stock = make(), make()
    a, b = Adam(ours, fused=True), torch.optim.Adam(stock, fused=True)
    for seed in range(3):
        give_grads(ours, stock, seed=seed)
        for optimizer in (a, b):
            optimizer.grad_scale = torch.tensor(4.0) if seed == 1 else None
            optimizer.found_inf = torch.tensor(0.0) if seed == 1 else None
            optimizer.step()
    assert_alike(ours, stock, a, b)


def test_training_under_compile():
    ours, plain = make([(5,), (2, 3)]), make([(5,), (2, 3)])
    a, b = Adam(ours), Adam(plain)
    give_grads(ours, plain)
    step = torch.compile(lambda: a.step(), backend="eager")
    for _ in range(3):
        step()
        b.step()
    assert_same_bits(ours, plain)


# ---- torch's path ---------------------------------------------------------------------------------------------------


class Tagged(torch.nn.Parameter):
    """A parameter of a type that the kernel knows nothing of."""


def uncovered_cases():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    return {
        "complex": lambda: torch.nn.Parameter(torch.complex(x, x + 1)),
        "subclass": lambda: Tagged(x.clone()),
        "gaps": lambda: torch.nn.Parameter(x.clone()[:, ::2]),
    }


@pytest.mark.parametrize("case", ["complex", "subclass", "gaps"])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "weight_decay": 0.1}], ids=str)
def test_uncovered_parameter_among_covered_ones(case, options):
    odd, same = uncovered_cases()[case](), uncovered_cases()[case]()
    ours, stock = [*make(), odd], [*make(), same]
    a, b = Adam(ours, **options), torch.optim.Adam(stock, foreach=False, **options)
    for seed in range(3):
        give_grads(ours, stock, seed=seed)
        a.step()
        b.step()
    assert_alike(ours, stock, a, b)
    assert_same_bits([odd], [same])
    assert "torch, because" in a._explain()
    assert "deepops kernel" in a._explain()


@pytest.mark.parametrize("options", [{"lr": torch.tensor(0.01)}, {"lr": torch.tensor([0.01])}], ids=str)
def test_tensor_lr(options):
    ours, stock, a, b = both(options)
    for seed in range(3):
        step_both(ours, stock, a, b, seed)
    assert_alike(ours, stock, a, b)
    assert "deepops kernel" in a._explain()


def test_tensor_betas_take_torchs_path():
    ours, stock, a, b = both({"betas": (torch.tensor(0.9), torch.tensor(0.99))})
    for seed in range(3):
        step_both(ours, stock, a, b, seed)
    assert_same_bits(ours, stock)
    assert "betas are tensors" in a._explain()


def test_uncovered_group_before_a_covered_one():
    betas = {"betas": (torch.tensor(0.9), torch.tensor(0.99))}
    ours, stock = make(), make()
    a, b = (
        cls([{"params": p[:5], **betas}, {"params": p[5:], "lr": 0.1, "weight_decay": 0.1}], foreach=False)
        for cls, p in ((Adam, ours), (torch.optim.Adam, stock))
    )
    for seed in range(3):
        step_both(ours, stock, a, b, seed)
    assert_alike(ours, stock, a, b)
    assert_same_bits(ours[:5], stock[:5])


def test_differentiable_takes_torchs_path():
    lrs = [torch.tensor(0.1, requires_grad=True) for _ in range(2)]
    for cls, lr in zip((Adam, torch.optim.Adam), lrs, strict=True):
        weight = torch.ones(3, requires_grad=True).clone()
        weight.grad = torch.tensor([1.0, 2.0, 3.0])
        cls([weight], lr=lr, differentiable=True).step()
        weight.square().sum().backward()
    assert lrs[0].grad is not None
    assert lrs[0].grad == lrs[1].grad


def test_parameters_that_share_memory_are_updated_one_after_the_other():
    results = []
    for cls, options in ((Adam, {}), (torch.optim.Adam, {"foreach": False})):
        base = make([(50,)])[0].detach()
        params = [torch.nn.Parameter(base[:30]), torch.nn.Parameter(base[20:]), *make([(4,)])]
        optimizer = cls(params, **options)
        for seed in range(3):
            give_grads(params, seed=seed)
            optimizer.step()
        results.append(base)
        if cls is Adam:
            assert "2 tensors, 60 elements: torch, because shares memory" in optimizer._explain()
    assert_same_bits(results[:1], results[1:])


def test_a_parameter_listed_twice_as_in_torch():
    ours, stock = make([(5,)]), make([(5,)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a, b = Adam([ours[0], ours[0]]), torch.optim.Adam([stock[0], stock[0]], foreach=False)
    give_grads(ours, stock)
    a.step()
    b.step()
    assert_same_bits(ours, stock)
    assert a.state[ours[0]]["step"] == b.state[stock[0]]["step"] == 2


def test_sparse_gradient_is_refused_and_nothing_changes():
    params = make([(4, 3), (4, 3), (5,)])
    optimizer = Adam(params)
    train(optimizer, params, 2)
    before = copy.deepcopy(everything(optimizer, params))
    give_grads(params)
    params[1].grad = params[1].grad.to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert_same_bits(everything(optimizer, params), before)


def test_capturable_fails_as_in_torch():
    for cls in (Adam, torch.optim.Adam):
        params = make([(3,)])
        optimizer = cls(params, capturable=True, foreach=False)
        give_grads(params)
        with pytest.raises(AssertionError, match="If capturable=True"):
            optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"eps": -1.0},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, 1.5)},
        {"betas": (0.9, torch.tensor(0.9))},
        {"weight_decay": -0.1},
        {"lr": torch.tensor([0.1, 0.2])},
        {"lr": torch.tensor(0.1), "foreach": True},
        {"fused": True, "foreach": True},
        {"fused": True, "differentiable": True},
        {"momentum": 0.9},
    ],
    ids=str,
)
def test_bad_options_fail_as_in_torch(options):
    errors = []
    for cls in (Adam, torch.optim.Adam):
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            cls(make([(3,)]), **options)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("params", [[], [3], torch.ones(3), [{"weights": []}], [torch.ones(3, requires_grad=True) * 2]])
def test_bad_parameters_fail_as_in_torch(params):
    errors = []
    for cls in (Adam, torch.optim.Adam):
        with pytest.raises((ValueError, TypeError, KeyError)) as caught:
            cls(copy.copy(params))
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


def test_bad_state_dict_fails_as_in_torch():
    params = make()
    optimizer = Adam(params)
    train(optimizer, params, 1)
    before = copy.deepcopy(everything(optimizer, params))
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert_same_bits(everything(optimizer, params), before)


# ---- the op ---------------------------------------------------------------------------------------------------------


def op_arguments(shapes=((5,), (2, 3), ()), dtype=torch.float32, amsgrad=True):
    lists = [[p.detach() for p in make(shapes, dtype, seed)] for seed in range(2)]
    lists += [[p.detach().abs() for p in make(shapes, dtype, seed)] for seed in (2, 3, 3)]
    lists[4] = lists[4] if amsgrad else []
    lists.append([torch.tensor(3.0) for _ in shapes])
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": amsgrad}
    return lists, {**options, "maximize": False, "decoupled_weight_decay": False}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_op_passes_opcheck(dtype, amsgrad):
    lists, options = op_arguments(dtype=dtype, amsgrad=amsgrad)
    torch.library.opcheck(torch.ops.deepops.adam.default, tuple(lists), options)


def test_op_has_the_bits_of_the_class():
    lists, options = op_arguments(SHAPES)
    params, grads, *moments, steps = copy.deepcopy(lists)
    ours = [torch.nn.Parameter(p) for p in params]
    optimizer = Adam(ours, 0.1, (0.9, 0.99), weight_decay=0.1, amsgrad=True)
    for p, grad, *state in zip(ours, grads, *moments, steps, strict=True):
        p.grad = grad
        optimizer.state[p] = dict(zip((*STATES, "step"), state, strict=True))
    optimizer.step()
    torch.ops.deepops.adam(*lists, **options)
    assert_same_bits(ours, lists[0])
    assert_same_bits(states(optimizer, ours, "max_exp_avg_sq"), lists[4])
    assert lists[5] == [4.0] * len(SHAPES)


@pytest.mark.parametrize("index", range(6))
def test_op_refuses_lists_that_do_not_match(index):
    lists, options = op_arguments()
    before = copy.deepcopy(lists)
    bad = [list(tensors) for tensors in lists]
    bad[index] = bad[index][:-1]
    with pytest.raises(RuntimeError):
        torch.ops.deepops.adam(*bad, **options)
    for other in (torch.zeros(7, 2), torch.zeros(2, 3).double(), torch.zeros(3, 2).t(), torch.zeros(2, 3).long()):
        bad = [list(tensors) for tensors in lists]
        bad[index][1] = other
        with pytest.raises(RuntimeError):
            torch.ops.deepops.adam(*bad, **options)
    for tensors, old in zip(lists, before, strict=True):
        assert_same_bits(tensors, old)
