"""The optimizers' state: exchanged with torch.optim in mid-training, saved, resumed, copied and pickled."""

import copy
import io
import pickle

import pytest
import torch
from optim_cases import (
    SGD_,
    assert_alike,
    assert_same_bits,
    both,
    channels_last,
    each_kind,
    each_option,
    everything,
    make,
    on_every_backend,
    snapshot,
    step_both,
    steps_of,
    train,
)

pytestmark = on_every_backend


@each_option(count=2)
@pytest.mark.parametrize("to_torch", [True, False])
def test_state_dict_both_ways_in_mid_training(to_torch, kind, options):
    ours, stock, a, b = both(kind, options)
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
    numbered, others = a.state_dict()["state"], b.state_dict()["state"]
    assert {i: list(state) for i, state in numbered.items()} == {i: list(state) for i, state in others.items()}


@each_kind
def test_resumed_run_has_the_same_bits(kind):
    params = make()
    optimizer = kind.ours(params, **kind.rich)
    train(optimizer, params, 3)
    checkpoint = copy.deepcopy((params, optimizer.state_dict()))
    train(optimizer, params, 3, first=3)
    again, state = checkpoint
    resumed = kind.ours(again, **kind.rich)
    resumed.load_state_dict(state)
    train(resumed, again, 3, first=3)
    assert_same_bits(everything(optimizer, params), everything(resumed, again))


@each_kind
def test_saved_file_is_not_larger_and_loads_with_weights_only(kind):
    ours, stock, a, b = both(kind, kind.rich, [(7,)] * 300)
    step_both(ours, stock, a, b, 0)
    sizes = []
    for optimizer in (a, b):
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        sizes.append(file.tell())
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        fresh = kind.torchs(make([(7,)] * 300))
        fresh.load_state_dict(loaded)
        assert fresh.state_dict()["state"][299].keys() == b.state_dict()["state"][299].keys()
    assert sizes[0] <= sizes[1]


@each_kind
def test_state_loaded_from_another_memory_format(kind):
    ours = [torch.nn.Parameter(channels_last(make([(2, 3, 4, 5)])[0].detach()))]
    stock = make([(2, 3, 4, 5)])
    a, b = kind.ours(ours, **kind.rich), kind.stock(stock, **kind.rich)
    step_both(ours, stock, a, b, 0)
    a.load_state_dict(copy.deepcopy(b.state_dict()))
    step_both(ours, stock, a, b, 1)
    torch.testing.assert_close(ours, stock)
    assert "kernel" in a._explain()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@each_kind
def test_deepcopy_and_pickle(kind, clone):
    params = make()
    optimizer = kind.ours(params, **kind.rich)
    train(optimizer, params, 2)
    others, other = clone((params, optimizer))
    assert type(other) is kind.ours
    before = snapshot(other, others)
    train(optimizer, params, 2, first=2)
    assert_same_bits(before, everything(other, others))
    train(other, others, 2, first=2)
    assert_same_bits(everything(optimizer, params), everything(other, others))


@each_kind
def test_nothing_is_shared_with_a_state_dict_that_was_loaded(kind):
    params, others = make(), make()
    optimizer, other = kind.ours(params, **kind.rich), kind.ours(others, **kind.rich)
    train(optimizer, params, 2)
    other.load_state_dict(optimizer.state_dict())
    before = snapshot(optimizer, params)
    train(other, others, 2)
    assert_same_bits(before, everything(optimizer, params))


def test_a_loaded_momentum_buffer_is_not_at_its_first_step():
    """Torch's state of SGD has no step counter: that there is a buffer says it."""
    ours, stock, a, b = both(SGD_, {"momentum": 0.9, "dampening": 0.5, "lr": 0.1})
    step_both(ours, stock, a, b, 0, without=(3, 4))
    a.load_state_dict(copy.deepcopy(b.state_dict()))
    assert steps_of(a, ours)[:5] == [1, 1, 1, 0, 0]
    for seed in range(1, 3):
        step_both(ours, stock, a, b, seed)
    assert_alike(ours, stock, a, b)


@each_kind
def test_bad_state_dict_fails_as_in_torch(kind):
    params = make()
    optimizer = kind.ours(params, **kind.rich)
    train(optimizer, params, 1)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert_same_bits(everything(optimizer, params), before)
