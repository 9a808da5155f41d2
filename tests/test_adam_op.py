"""The op torch.ops.deepops.adam, which takes lists of tensors: opcheck, the class's bits, and bad lists."""

import copy

import pytest
import torch
from adam_cases import DTYPES, SHAPES, STATES, assert_same_bits, make, needs_kernel, states

from deepops.optim import Adam

pytestmark = needs_kernel


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
