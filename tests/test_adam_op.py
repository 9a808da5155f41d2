"""The op torch.ops.deepops.adam, which takes lists of tensors: opcheck, the class's bits, and bad lists."""

import copy
import itertools

import pytest
import torch
from adam_cases import DTYPES, OPTIONS, SHAPES, STATES, assert_same_bits, make, not_on_simt, on_every_backend, states
from backends import device, ops

from deepops.optim import Adam

pytestmark = on_every_backend


def op_arguments(shapes=((5,), (2, 3), ()), dtype=torch.float32, amsgrad=True):
    lists = [[p.detach() for p in make(shapes, dtype, seed)] for seed in range(2)]
    lists += [[p.detach().abs() for p in make(shapes, dtype, seed)] for seed in (2, 3, 3)]
    lists[4] = lists[4] if amsgrad else []
    lists.append([torch.tensor(3.0, device=device()) for _ in shapes])
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": amsgrad}
    return lists, {**options, "maximize": False, "decoupled_weight_decay": False}


@not_on_simt
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
    ops().adam(*lists, **options)
    assert_same_bits(ours, lists[0])
    assert_same_bits(states(optimizer, ours, "max_exp_avg_sq"), lists[4])
    assert lists[5] == [4.0] * len(SHAPES)


@pytest.mark.parametrize("given", OPTIONS, ids=str)
def test_op_takes_every_option_as_the_class_does(given):
    """Two steps from zero states."""
    amsgrad = given.get("amsgrad", False)
    lists, options = op_arguments(SHAPES, amsgrad=amsgrad)
    ours = [torch.nn.Parameter(p.clone()) for p in lists[0]]
    optimizer = Adam(ours, **given)
    defaults = optimizer.param_groups[0]
    options["beta1"], options["beta2"] = defaults["betas"]
    options |= {name: defaults[name] for name in options if not name.startswith("beta")}
    for t in itertools.chain.from_iterable(lists[2:]):
        t.zero_()
    for p, grad in zip(ours, lists[1], strict=True):
        p.grad = grad
    for _ in range(2):
        optimizer.step()
        ops().adam(*lists, **options)
    assert_same_bits(ours, lists[0])
    for name, tensors in zip(STATES if amsgrad else STATES[:2], lists[2:], strict=False):
        assert_same_bits(states(optimizer, ours, name), tensors)


@pytest.mark.parametrize("index", range(6))
def test_op_refuses_lists_that_do_not_match(index):
    lists, options = op_arguments()
    before = copy.deepcopy(lists)
    bad = [list(tensors) for tensors in lists]
    bad[index] = bad[index][:-1]
    with pytest.raises(RuntimeError):
        ops().adam(*bad, **options)
    for other in (torch.zeros(7, 2), torch.zeros(2, 3).double(), torch.zeros(3, 2).t(), torch.zeros(2, 3).long()):
        bad = [list(tensors) for tensors in lists]
        bad[index][1] = other.to(device())
        with pytest.raises(RuntimeError):
            ops().adam(*bad, **options)
    for tensors, old in zip(lists, before, strict=True):
        assert_same_bits(tensors, old)


def strided(shape, strides):
    return torch.zeros(20, device=device()).as_strided(shape, strides)


@pytest.mark.parametrize("index", range(1, 5))
@pytest.mark.parametrize("shape", [(6,), (3, 2), (2, 3, 1)], ids=str)
def test_op_refuses_another_shape_of_as_many_elements(index, shape):
    lists, options = op_arguments()
    lists[index][1] = strided(shape, (3, 1, 1)[: len(shape)])  # the strides of the parameter, as far as it has any
    with pytest.raises(RuntimeError, match="tensor 1: the gradient and the states need the strides"):
        ops().adam(*lists, **options)


@pytest.mark.parametrize(
    "layout", [((2, 3), (8, 1)), ((2, 3), (0, 1)), ((2, 3), (2, 1))], ids=["gaps", "expanded", "overlap"]
)
def test_op_refuses_tensors_that_do_not_fill_their_memory(layout):
    lists, options = op_arguments()
    for tensors in lists[:5]:
        tensors[1] = strided(*layout)
    with pytest.raises(RuntimeError, match=r"params\[1\] does not fill its memory"):
        ops().adam(*lists, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64], ids=str)
def test_op_refuses_steps_that_are_not_float32(dtype):
    lists, options = op_arguments()
    lists[5][1] = torch.tensor(3, dtype=dtype, device=device())
    with pytest.raises(RuntimeError, match="state_steps"):
        ops().adam(*lists, **options)


def test_op_refuses_maxima_without_amsgrad():
    lists, options = op_arguments()
    with pytest.raises(RuntimeError, match="lists of different length"):
        ops().adam(*lists, **{**options, "amsgrad": False})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_op_writes_nothing_beyond_the_tensors(dtype):
    """Each tensor lies in the middle of a larger one, whose margins stay what they are."""
    sizes = [*range(34), 63, 64, 65, 8191, 8192, 8193]
    lists, options = op_arguments([(size,) for size in sizes], dtype)
    margin = torch.full((32,), 7.0, dtype=dtype, device=device())
    wide = [[torch.cat([margin, t, margin]) for t in tensors] for tensors in lists[:5]]
    inner = [[t[32:-32] for t in tensors] for tensors in wide]
    ops().adam(*inner, lists[5], **options)
    for tensors in wide:
        for t in tensors:
            assert_same_bits([t[:32], t[-32:]], [margin, margin])
    assert lists[5] == [4.0] * len(sizes)
