"""Training in 16 bits: master weights, whole and split, and the dtype of the moments.

Oracle of master weights: a float32 model with the same gradients, whose bits the masters have.
"""

import copy
import itertools
import pickle

import pytest
import torch
from optim_cases import (
    SGD_,
    SIXTEEN,
    assert_alike,
    assert_same_bits,
    assert_same_bits_each_time,
    each_kernel,
    each_kind,
    each_option,
    everything,
    give_grads,
    make,
    on_every_backend,
    on_every_machine,
    only_on_cpu,
    snapshot,
    states,
    train,
    train_together,
)

pytestmark = on_every_backend

MASTERS = [True, "split"]
each_master = pytest.mark.parametrize("master", MASTERS)
each_sixteen = pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
SHAPES = [(), (0,), (3, 5), (511,), (512,), (513,), (9000,)]


def join(high, low):
    """The float32 numbers of bf16 upper halves and 16-bit lower ones (csrc/optim/scaling_math.h)."""
    bits, low = high.view(torch.int16).int() & 0xFFFF, low.int() & 0xFFFF
    return (((bits - (low >= 0x8000).int()) << 16) | low).view(torch.float32)


def masters(optimizer, params):
    """The float32 weights that stand behind these parameters."""
    own = [optimizer.state[p] for p in params]
    return [
        s["master_param"] if "master_param" in s else join(p.detach(), s["master_low"])
        for p, s in zip(params, own, strict=True)
    ]


def start(kind, dtype, master, options=None, shapes=SHAPES, **more):
    """Our optimizer with master weights and a float32 one, each with its parameters, from the same numbers."""
    options = kind.rich if options is None else options
    params = make(shapes, dtype)
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    a, b = kind.ours(params, master_weights=master, **options, **more), kind.ours(wide, **options, **more)
    return a, params, b, wide


def assert_masters_are(a, params, b, wide):
    """Masters, states and counters have the bits of the float32 run; parameters are it, rounded to nearest even."""
    if params[0].dtype is torch.bfloat16 and "master_low" in a.state[params[0]]:
        # One number in 131072, midway above an even half, is moved to its neighbour.
        assert_same_bits(params, [p.detach().to(params[0].dtype) for p in masters(a, params)])
        for master, p in zip(masters(a, params), wide, strict=True):
            torch.testing.assert_close(master, p.detach(), rtol=2.0**-22, atol=2.0**-22)
    else:
        assert_same_bits(masters(a, params), wide)
        assert_same_bits(params, [p.detach().to(params[0].dtype) for p in wide])
        for p, q in zip(params, wide, strict=True):
            own = {name: t for name, t in a.state[p].items() if not name.startswith("master")}
            other = b.state.get(q) or {}
            assert list(own) == list(other)
            assert_same_bits(list(own.values()), list(other.values()))


@each_sixteen
@each_option()
def test_masters_have_the_bits_of_a_float32_run(kind, options, dtype):
    a, params, b, wide = start(kind, dtype, True, options)
    train_together([(a, params), (b, wide)])
    assert "torch, because" not in a._explain()
    assert_masters_are(a, params, b, wide)
    assert {t.dtype for p in params for t in a.state[p].values()} == {torch.float32}
    assert any(not torch.equal(p.detach().float(), q) for p, q in zip(params, wide, strict=True)), "masters are finer"


@each_option(count=2)
def test_split_masters_have_the_bits_of_a_float32_run_but_for_ties(kind, options):
    """Each step from the numbers that the halves stand for: one float32 step, then split."""
    params = make(SHAPES, torch.bfloat16)
    a = kind.ours(params, master_weights="split", **options)
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    b = kind.ours(wide, **options)
    for step in range(4):
        train_together([(a, params), (b, wide)], 1, first=step)
        joined = masters(a, params)
        for got, p in zip(joined, wide, strict=True):
            bits = p.detach().view(torch.int32)
            tie = (bits & 0x1FFFF) == 0x8000
            assert torch.equal(got.view(torch.int32), torch.where(tie, bits - 1, bits))
        assert_same_bits(params, [t.to(torch.bfloat16) for t in joined])
        with torch.no_grad():
            for p, got in zip(wide, joined, strict=True):
                p.copy_(got)
    assert {a.state[p]["master_low"].dtype for p in params} == {torch.int16}
    assert all("master_param" not in a.state[p] for p in params)


@each_kernel
def test_split_is_for_bf16_and_fp16_has_whole_masters(kind):
    params = [*make([(5,)], torch.float16), *make([(5,)], torch.float32), *make([(5,)], torch.bfloat16)]
    optimizer = kind.ours(params, master_weights="split")
    train(optimizer, params, 1)
    names = [[name for name in optimizer.state.get(p) or {} if name.startswith("master")] for p in params]
    assert names == [["master_param"], [], ["master_low"]]
    assert "torch, because" not in optimizer._explain()


@each_master
@each_sixteen
@each_kind
def test_small_updates_are_not_lost(kind, dtype, master):
    """What masters are for: a parameter of 16 bits alone stands still."""
    params, alone = make([(64,)], dtype), make([(64,)], dtype)
    for p in (*params, *alone):
        p.detach().fill_(1.0)
    a, b = kind.ours(params, lr=1e-5, master_weights=master), kind.ours(alone, lr=1e-5, state_dtype=torch.float32)
    for _ in range(300):
        for p in (*params, *alone):
            p.grad = torch.ones_like(p)
        a.step()
        b.step()
    assert torch.all(masters(a, params)[0] < 1 - 2e-3)
    assert torch.equal(params[0].detach(), masters(a, params)[0].to(dtype))
    if kind is not SGD_:
        assert torch.all(params[0] < 1)
    assert torch.all(alone[0] == 1), "the case shows nothing"


# ---- split and join -------------------------------------------------------------------------------------------------


def split_by_the_kernel(numbers):
    """What a step that changes nothing makes of float32 masters given as halves: joined, then split."""
    high = (numbers.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    low = (numbers.view(torch.int32) & 0xFFFF).to(torch.int16)
    rounded_up = (low.int() & 0xFFFF) >= 0x8000
    high = (high.view(torch.int16) + rounded_up.to(torch.int16)).view(torch.bfloat16)
    param = torch.nn.Parameter(high.clone())
    param.grad = torch.zeros_like(param)
    optimizer = SGD_.ours([param], lr=0.0, master_weights="split", momentum=0.5)
    optimizer.state[param] = {"momentum_buffer": torch.zeros(len(numbers)), "master_low": low.clone()}
    optimizer.step()
    return param.detach(), optimizer.state[param]["master_low"]


def every_number_that_matters():
    """All lower halves under upper ones of every kind; then all upper halves over lower ones of every kind.

    An upper half counts by its parity, by what a carry makes of it and as infinity or NaN; a lower one by where it lies
    to the midpoint.
    """
    exponents, mantissas = torch.tensor([0, 1, 127, 253, 254, 255]), torch.tensor([0, 1, 2, 0x55, 0x7E, 0x7F])
    upper = (exponents.view(-1, 1) << 7 | mantissas).flatten()
    yield (torch.cat([upper, upper | 0x8000]).view(-1, 1) << 16) | torch.arange(1 << 16)
    lower = torch.tensor([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xFFFE, 0xFFFF])
    yield (torch.arange(1 << 16).view(-1, 1) << 16) | lower


@only_on_cpu
def test_split_and_join_of_every_kind_of_number():
    for numbers in every_number_that_matters():
        numbers = numbers.flatten().to(torch.int32).view(torch.float32)
        high, low = split_by_the_kernel(numbers)
        got, bits = join(high, low), numbers.view(torch.int32)
        nan, tie = numbers.isnan(), (bits & 0x1FFFF) == 0x8000
        assert torch.equal(got.view(torch.int32)[~nan], torch.where(tie, bits - 1, bits)[~nan])
        assert got[nan].isnan().all()
        assert high[nan].isnan().all()
        assert torch.equal(high[~nan], got[~nan].to(torch.bfloat16))


def test_infinity_and_nan_stay_with_split_masters():
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.3e38, 1e-40, -0.0, 0.0])
    params = [torch.nn.Parameter(values.bfloat16())]
    optimizer = SGD_.ours(params, lr=0.0, master_weights="split")
    for _ in range(3):
        params[0].grad = torch.zeros_like(params[0])
        optimizer.step()
    assert_same_bits(params, [values.bfloat16()])
    params[0].grad = torch.full_like(params[0], float("nan"))
    optimizer.step()
    assert params[0].isnan().all()
    assert masters(optimizer, params)[0].isnan().all()


# ---- the state ------------------------------------------------------------------------------------------------------


@each_master
@each_sixteen
@each_kind
def test_state_dict_keeps_masters_and_float32_states(kind, dtype, master):
    a, params, *_ = start(kind, dtype, master)
    train(a, params, 3)
    saved, values = copy.deepcopy(a.state_dict()), [p.detach().clone() for p in params]
    others = [torch.nn.Parameter(value) for value in values]
    resumed = kind.ours(others, master_weights=master, **kind.rich)
    resumed.load_state_dict(saved)
    assert_same_bits(everything(a, params), everything(resumed, others))
    train(a, params, 2, first=3)
    train(resumed, others, 2, first=3)
    assert_same_bits(everything(a, params), everything(resumed, others))


@each_master
@each_sixteen
@each_kind
def test_torch_loads_what_was_saved_with_masters_and_the_other_way(kind, dtype, master):
    """Torch takes the states it knows and carries the masters along; without masters they are made of the parameter."""
    a, params, *_ = start(kind, dtype, master)
    train(a, params, 2)
    stock = [torch.nn.Parameter(p.detach().clone()) for p in params]
    b = kind.stock(stock, **kind.rich)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    train(b, stock, 2, first=2)
    assert all(p.isfinite().all() for p in stock)
    again = [torch.nn.Parameter(p.detach().clone()) for p in stock]
    plain = kind.stock(again, **kind.rich)
    train(plain, again, 2)
    saved, values = copy.deepcopy(plain.state_dict()), [p.detach().clone() for p in again]
    others = [torch.nn.Parameter(value) for value in values]
    c = kind.ours(others, master_weights=master, **kind.rich)
    c.load_state_dict(saved)
    train(c, others, 1, first=2)
    assert "torch, because" not in c._explain()
    assert [t.dtype for t in masters(c, others)] == [torch.float32] * len(others)
    assert {t.dtype for name in kind.states for t in states(c, others, name)} == {torch.float32}


@each_master
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@each_kind
def test_deepcopy_and_pickle_with_masters(kind, clone, master):
    a, params, *_ = start(kind, torch.bfloat16, master)
    train(a, params, 2)
    others, b = clone((params, a))
    assert b._step_options == a._step_options
    before = snapshot(b, others)
    train(a, params, 2, first=2)
    assert_same_bits(everything(b, others), before)
    train(b, others, 2, first=2)
    assert_same_bits(everything(a, params), everything(b, others))


@each_master
@each_sixteen
@each_kernel
def test_a_parameter_that_is_written_to_between_steps_is_noticed(kind, dtype, master):
    """What was written counts; where the rounded master was written back, the master's own digits stay."""
    a, params, *_ = start(kind, dtype, master, shapes=[(600,), (40,)])
    train(a, params, 2)
    before = [t.clone() for t in masters(a, params)]
    with torch.no_grad():
        params[0][100:200] = 3.0
    for p in params:
        p.grad = torch.zeros_like(p)
    a.param_groups[0].update(lr=0.0, weight_decay=0.0)
    a.step()
    after = masters(a, params)
    assert torch.all(after[0][100:200] == 3.0)
    assert torch.all(params[0][100:200] == 3.0)
    assert torch.equal(after[1], before[1])
    if master is True or dtype is torch.float16:
        assert torch.equal(after[0][:100], before[0][:100])


@each_master
@each_sixteen
def test_a_model_loaded_after_its_optimizer_was_made(dtype, master):
    a, params, *_ = start(SGD_, dtype, master, {"lr": 0.0}, shapes=[(50,)])
    train(a, params, 1)
    with torch.no_grad():
        params[0].copy_(torch.arange(50))
    train(a, params, 1)
    assert torch.equal(params[0].float(), torch.arange(50.0))
    assert torch.equal(masters(a, params)[0], torch.arange(50.0))


@only_on_cpu
@each_master
@each_sixteen
@each_kind
def test_same_bits_with_masters_on_any_instruction_set_and_threads(kind, dtype, master):
    def run():
        a, params, *_ = start(kind, dtype, master, shapes=[*SHAPES, (100_001,)])
        train(a, params, 2)
        return everything(a, params)

    assert_same_bits_each_time(run, *on_every_machine())


@each_master
@each_kernel
def test_masters_in_any_strides(kind, master):
    """Masters and states follow the parameter's memory format; a gradient may have another."""
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        param = torch.nn.Parameter(make([(2, 3, 5, 7)], torch.bfloat16)[0].detach().to(memory_format=layout))
        optimizer = kind.ours([param], master_weights=master, **kind.rich)
        for seed in range(3):
            param.grad = make([(2, 3, 5, 7)], torch.bfloat16, seed=seed)[0].detach()
            optimizer.step()
        assert {t.stride() for t in optimizer.state[param].values() if t.dim()} == {param.stride()}
        results.append([param, *masters(optimizer, [param])])
    assert_same_bits(*results)


# ---- the dtype of the moments ---------------------------------------------------------------------------------------


STATE_DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
@each_kind
def test_state_dtype_is_kept_on_load(kind, dtype, state_dtype):
    options = {**kind.rich, "eps": 1e-3} if kind is not SGD_ else kind.rich
    params = make(SHAPES, dtype)
    optimizer = kind.ours(params, state_dtype=state_dtype, **options)
    train(optimizer, params, 2)
    assert "torch, because" not in optimizer._explain()
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = kind.ours(others, state_dtype=state_dtype, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for params_, own in ((params, optimizer), (others, resumed)):
        assert {t.dtype for name in kind.states for t in states(own, params_, name)} == {state_dtype}
    train(optimizer, params, 2, first=2)
    train(resumed, others, 2, first=2)
    assert_same_bits(everything(optimizer, params), everything(resumed, others))


@each_sixteen
@each_option(count=2)
def test_float32_states_of_sixteen_bit_parameters_are_computed_from_them_alone(kind, options, dtype):
    """One step from a 16-bit parameter: the states of a float32 run with the same gradients, to the bit."""
    params = make(SHAPES, dtype)
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    a, b = kind.ours(params, state_dtype=torch.float32, **options), kind.ours(wide, **options)
    train_together([(a, params), (b, wide)], 1)
    for name in kind.names(a.param_groups[0]):
        assert_same_bits(states(a, params, name), states(b, wide, name))
    assert_same_bits(params, [p.detach().to(dtype) for p in wide])


@each_kind
def test_state_dtype_leaves_wide_parameters_alone(kind):
    params = [*make([(5,)], torch.float64), *make([(5,)], torch.complex64)]
    stock = [torch.nn.Parameter(p.detach().clone()) for p in params]
    a, b = kind.ours(params, state_dtype=torch.bfloat16, **kind.rich), kind.stock(stock, **kind.rich)
    train_together([(a, params), (b, stock)])
    assert_alike(params, stock, a, b)


@pytest.mark.parametrize("more", [{"master_weights": True}, {"master_weights": "split", "state_dtype": torch.bfloat16}])
@each_kernel
def test_all_dtypes_in_one_optimizer_are_as_if_alone(kind, more):
    """Rows of one dtype and of several, with and without masters, in one step."""
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
    together, alone = ([make([(5,), (3000,)], dtype) for dtype in dtypes] for _ in range(2))
    a = kind.ours(list(itertools.chain(*together)), **kind.rich, **more)
    others = [kind.ours(params, **kind.rich, **more) for params in alone]
    for seed in range(2):
        for params, same, b in zip(together, alone, others, strict=True):
            give_grads(params, same, seed=seed)
            b.step()
        a.step()
    for params, same, b in zip(together, alone, others, strict=True):
        assert_same_bits(everything(a, params), everything(b, same))
