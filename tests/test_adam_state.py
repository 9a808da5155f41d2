"""Adam's state: exchanged with torch.optim.Adam in mid-training, saved, resumed, copied and pickled."""

import copy
import io
import pickle

import pytest
import torch
from adam_cases import (
    assert_alike,
    assert_same_bits,
    both,
    channels_last,
    everything,
    make,
    on_every_backend,
    step_both,
    train,
)

from deepops.optim import Adam

pytestmark = on_every_backend


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


def test_bad_state_dict_fails_as_in_torch():
    params = make()
    optimizer = Adam(params)
    train(optimizer, params, 1)
    before = copy.deepcopy(everything(optimizer, params))
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert_same_bits(everything(optimizer, params), before)
