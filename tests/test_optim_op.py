"""The ops torch.ops.deepops.<optimizer>, which take lists of tensors: opcheck, the classes' bits, and bad lists."""

import copy

import pytest
import torch
from backends import device, ops
from optim_cases import (
    ADAM,
    KERNELS,
    RMSPROP,
    SHAPES,
    assert_same_bits,
    each_dtype,
    each_kernel,
    each_option,
    make,
    not_on_simt,
    on_every_backend,
)

pytestmark = on_every_backend


def op_of(kind, namespace=None):
    return getattr(namespace or ops(), kind.kernel)


def op_arguments(kind, options=None, shapes=((5,), (2, 3), ()), dtype=torch.float32):
    """Lists of parameters, gradients, each state and step counters (at 3), and the options of the op."""
    group = kind.stock(make([(1,)]), **(kind.rich if options is None else options)).param_groups[0]
    lists = [[p.detach() for p in make(shapes, dtype, seed)] for seed in range(2)]
    for seed, used in enumerate(kind.used(group), start=2):
        lists.append([p.detach().abs() for p in make(shapes, dtype, seed)] if used else [])
    lists.append([torch.tensor(3.0, device=device()) for _ in shapes])
    return lists, kind.op_arguments(group)


def optimizer_of(kind, options, params, grads, states, steps):
    """Our optimizer with copies of these tensors."""
    ours = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = kind.ours(ours, **options)
    names = kind.names(optimizer.param_groups[0])
    for i, p in enumerate(ours):
        p.grad = grads[i]
        if names:
            optimizer.state[p] = {name: states[kind.states.index(name)][i].clone() for name in names}
        optimizer._set_step_counter(p, steps[i].clone())
    return optimizer, ours


@not_on_simt
@each_dtype
@each_option(KERNELS, count=2)
def test_op_passes_opcheck(kind, options, dtype):
    lists, arguments = op_arguments(kind, options, dtype=dtype)
    torch.library.opcheck(op_of(kind, torch.ops.deepops).default, tuple(lists), arguments)


@each_option(KERNELS)
@pytest.mark.parametrize("fresh", [True, False])
def test_op_has_the_bits_of_the_class(kind, options, fresh):
    """Two steps, from zero states or from where they are after three."""
    lists, arguments = op_arguments(kind, options, SHAPES)
    params, grads, *moments, steps = lists
    if fresh:
        for t in (*(t for tensors in moments for t in tensors), *steps):
            t.zero_()
    optimizer, ours = optimizer_of(kind, options, params, grads, moments, steps)
    for _ in range(2):
        optimizer.step()
        op_of(kind)(*lists, **arguments)
    assert "torch, because" not in optimizer._explain()
    assert_same_bits(ours, params)
    for name, tensors in zip(kind.states, moments, strict=True):
        assert_same_bits([optimizer.state[p][name] for p in ours] if tensors else [], tensors)
    assert steps == [2.0 if fresh else 5.0] * len(SHAPES)


def each_list(states_only=False):
    """Parametrize over the lists of every op: parameters, gradients, states, step counters."""
    cases = [
        (kind, index) for kind in KERNELS for index in range(states_only, 2 + len(kind.states) + (not states_only))
    ]
    return pytest.mark.parametrize(("kind", "index"), cases, ids=str)


@each_list()
def test_op_refuses_lists_that_do_not_match(kind, index):
    lists, options = op_arguments(kind)
    before = copy.deepcopy(lists)
    bad = [list(tensors) for tensors in lists]
    bad[index] = bad[index][:-1]
    with pytest.raises(RuntimeError, match=f"{kind.kernel}: lists of different length"):
        op_of(kind)(*bad, **options)
    for other in (torch.zeros(7, 2), torch.zeros(2, 3).double(), torch.zeros(3, 2).t(), torch.zeros(2, 3).long()):
        bad = [list(tensors) for tensors in lists]
        bad[index][1] = other.to(device())
        with pytest.raises(RuntimeError, match=f"{kind.kernel}:"):
            op_of(kind)(*bad, **options)
    for tensors, old in zip(lists, before, strict=True):
        assert_same_bits(tensors, old)


def strided(shape, strides):
    return torch.zeros(20, device=device()).as_strided(shape, strides)


@each_list(states_only=True)
@pytest.mark.parametrize("shape", [(6,), (3, 2), (2, 3, 1)], ids=str)
def test_op_refuses_another_shape_of_as_many_elements(kind, index, shape):
    lists, options = op_arguments(kind)
    lists[index][1] = strided(shape, (3, 1, 1)[: len(shape)])  # the strides of the parameter, as far as it has any
    with pytest.raises(RuntimeError, match="tensor 1: the gradient and the states need the strides"):
        op_of(kind)(*lists, **options)


@pytest.mark.parametrize(
    "layout", [((2, 3), (8, 1)), ((2, 3), (0, 1)), ((2, 3), (2, 1))], ids=["gaps", "expanded", "overlap"]
)
@each_kernel
def test_op_refuses_tensors_that_do_not_fill_their_memory(kind, layout):
    lists, options = op_arguments(kind)
    for tensors in lists[:-1]:
        tensors[1] = strided(*layout)
    with pytest.raises(RuntimeError, match=r"params\[1\] does not fill its memory"):
        op_of(kind)(*lists, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64], ids=str)
@each_kernel
def test_op_refuses_steps_that_are_not_float32(kind, dtype):
    lists, options = op_arguments(kind)
    lists[-1][1] = torch.tensor(3, dtype=dtype, device=device())
    with pytest.raises(RuntimeError, match="state_steps"):
        op_of(kind)(*lists, **options)


@each_kernel
def test_op_refuses_one_step_counter_for_two_tensors(kind):
    lists, options = op_arguments(kind)
    lists[-1][1] = lists[-1][0]
    with pytest.raises(RuntimeError, match="state_steps: two tensors have the same step counter"):
        op_of(kind)(*lists, **options)


@pytest.mark.parametrize("kind", [ADAM, RMSPROP], ids=str)
def test_op_refuses_states_that_its_options_have_no_use_for(kind):
    lists, options = op_arguments(kind)
    with pytest.raises(RuntimeError, match="lists of different length"):
        op_of(kind)(*lists, **{**options, kind.switch: False})


@each_dtype
@each_kernel
def test_op_writes_nothing_beyond_the_tensors(kind, dtype):
    """Each tensor lies in the middle of a larger one, whose margins stay what they are."""
    sizes = [*range(34), 63, 64, 65, 8191, 8192, 8193]
    lists, options = op_arguments(kind, None, [(size,) for size in sizes], dtype)
    margin = torch.full((32,), 7.0, dtype=dtype, device=device())
    wide = [[torch.cat([margin, t, margin]) for t in tensors] for tensors in lists[:-1]]
    inner = [[t[32:-32] for t in tensors] for tensors in wide]
    op_of(kind)(*inner, lists[-1], **options)
    for tensors in wide:
        for t in tensors:
            assert_same_bits([t[:32], t[-32:]], [margin, margin])
    assert lists[-1] == [4.0] * len(sizes)
