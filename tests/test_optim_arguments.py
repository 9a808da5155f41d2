"""The optimizers' arguments: what goes torch's own way, and what is refused as torch refuses it."""

import copy
import inspect
import warnings

import pytest
import torch
from optim_cases import (
    ADAM,
    ADAMW,
    RMSPROP,
    SGD_,
    assert_alike,
    assert_same_bits,
    both,
    each_kind,
    each_option,
    everything,
    give_grads,
    make,
    needs_kernel,
    snapshot,
    step_both,
    train,
)

pytestmark = needs_kernel

POSITIONAL = {
    "Adam": (0.1, (0.8, 0.9), 1e-7, 0.2, True),
    "AdamW": (0.1, (0.8, 0.9), 1e-7, 0.2, True),
    "SGD": (0.1, 0.9, 0.0, 0.2, True),
    "RMSprop": (0.1, 0.9, 1e-7, 0.2, 0.5, True),
}


@each_kind
def test_isinstance_signature_and_repr(kind):
    ours, stock = (
        [(p.name, p.default, p.kind) for p in inspect.signature(cls).parameters.values()]
        for cls in (kind.ours, kind.torchs)
    )
    assert [name for name, *_ in ours[len(stock) :]] == ["step_options"]
    assert ours[: len(stock)] == stock
    optimizer, other = (cls(make(), *POSITIONAL[str(kind)], maximize=True) for cls in (kind.ours, kind.torchs))
    assert isinstance(optimizer, kind.torchs)
    assert repr(optimizer) == repr(other)
    assert optimizer.defaults == other.defaults


# ---- torch's path ---------------------------------------------------------------------------------------------------


class Tagged(torch.nn.Parameter):
    """A parameter of a type that the kernel knows nothing of."""


def odd_parameter(case):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    return {
        "subclass": lambda: Tagged(x.clone()),
        "gaps": lambda: torch.nn.Parameter(x.clone()[:, ::2]),
    }[case]()


@pytest.mark.parametrize("case", ["subclass", "gaps"])
@each_option(count=2)
def test_uncovered_parameter_among_covered_ones(kind, options, case):
    odd, same = odd_parameter(case), odd_parameter(case)
    ours, stock = [*make(), odd], [*make(), same]
    a, b = kind.ours(ours, **options), kind.stock(stock, **options)
    for seed in range(3):
        give_grads(ours, stock, seed=seed)
        a.step()
        b.step()
    assert_alike(ours, stock, a, b)
    assert_same_bits([odd], [same])
    assert "torch, because" in a._explain()
    assert "deepops kernel" in a._explain()


@pytest.mark.parametrize("lr", [torch.tensor(0.01), torch.tensor([0.01])], ids=str)
@each_kind
def test_tensor_lr(kind, lr):
    ours, stock, a, b = both(kind, {**kind.rich, "lr": lr})
    for seed in range(3):
        step_both(ours, stock, a, b, seed)
    assert_alike(ours, stock, a, b)
    assert "deepops kernel" in a._explain()
    assert "torch, because" not in a._explain()


@pytest.mark.parametrize("kind", [ADAM, ADAMW], ids=str)
def test_tensor_betas(kind):
    ours, stock, a, b = both(kind, {"betas": (torch.tensor(0.9), torch.tensor(0.99))})
    for seed in range(3):
        step_both(ours, stock, a, b, seed)
    assert_alike(ours, stock, a, b)
    assert "torch, because" not in a._explain()


@each_kind
def test_a_number_that_requires_a_gradient_takes_torchs_path_before_a_covered_group(kind):
    """Torch's for-loop takes it in a group of its own, beside one for the kernel."""
    ours, stock = make(), make()
    a, b = (
        cls(
            [{"params": p[:5], "lr": torch.tensor(0.01, requires_grad=True)}, {"params": p[5:], **kind.rich}],
            foreach=False,
        )
        for cls, p in ((kind.ours, ours), (kind.torchs, stock))
    )
    for seed in range(3):
        step_both(ours, stock, a, b, seed)
    assert_alike(ours, stock, a, b)
    assert_same_bits(ours[:5], stock[:5])
    assert "lr is a tensor that requires a gradient" in a._explain()


@each_kind
def test_differentiable_takes_torchs_path(kind):
    """Through the step to the gradient and, but for RMSprop, whose loop in torch cannot, to the learning rate."""
    results = []
    for cls in (kind.ours, kind.torchs):
        lr = torch.tensor(0.1, requires_grad=True)
        weight = torch.ones(3, requires_grad=True).clone()
        weight.grad = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        optimizer = cls([weight], lr=0.1 if kind is RMSPROP else lr, differentiable=True)
        optimizer.step()
        wanted = [weight.grad] if kind is RMSPROP else [weight.grad, lr]
        results.append([weight.detach(), *torch.autograd.grad(weight.square().sum(), wanted)])
    assert "differentiable=True" in kind.ours(make(), differentiable=True)._explain()
    assert_same_bits(*results)


@each_kind
def test_parameters_that_share_memory_are_updated_one_after_the_other(kind):
    results = []
    for build in (kind.ours, kind.stock):
        base = make([(50,)])[0].detach()
        params = [torch.nn.Parameter(base[:30]), torch.nn.Parameter(base[20:]), *make([(4,)])]
        optimizer = build(params, **kind.rich)
        for seed in range(3):
            give_grads(params, seed=seed)
            optimizer.step()
        results.append(base)
        if build is kind.ours:
            assert "2 tensors, 60 elements: torch, because shares memory" in optimizer._explain()
    assert_same_bits(results[:1], results[1:])


@each_kind
def test_a_parameter_listed_twice_as_in_torch(kind):
    ours, stock = make([(5,)]), make([(5,)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a, b = kind.ours([ours[0], ours[0]], **kind.rich), kind.stock([stock[0], stock[0]], **kind.rich)
    for seed in range(2):
        step_both(ours, stock, a, b, seed)
    assert_same_bits(ours, stock)
    assert_same_bits(everything(a, ours), everything(b, stock))


SPARSE = [  # options; which of the steps have a sparse gradient. Torch cannot go back from a sparse momentum buffer.
    ({}, (True, False, True)),
    ({"maximize": True}, (False, True, True)),
    ({"momentum": 0.9}, (True, True, True)),
    ({"momentum": 0.9, "dampening": 0.5, "maximize": True}, (False, True, False)),
]


@pytest.mark.parametrize(("options", "sparse"), SPARSE, ids=str)
def test_sparse_gradients_of_sgd_take_torchs_path(options, sparse):
    """Beside dense ones, which take the kernel."""
    ours, stock, a, b = both(SGD_, options, [(6, 3), (5,), (7, 2)])
    for seed, is_sparse in enumerate(sparse):
        give_grads(ours, stock, seed=seed)
        for params in (ours, stock):
            params[0].grad[2:5] = 0
            if is_sparse:
                params[0].grad = params[0].grad.to_sparse(1)
        a.step()
        b.step()
        assert ("1 tensors, 18 elements: torch, because" in a._explain()) == is_sparse
        assert "2 tensors, 19 elements: deepops kernel" in a._explain() or not is_sparse
    torch.testing.assert_close(ours, stock)
    for p, q in zip(ours, stock, strict=True):
        assert (a.state.get(p) or {}).keys() == (b.state.get(q) or {}).keys()
        for x, y in zip((a.state.get(p) or {}).values(), (b.state.get(q) or {}).values(), strict=True):
            torch.testing.assert_close(x.to_dense(), y.to_dense())


# ---- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ADAM, ADAMW, RMSPROP], ids=str)
def test_sparse_gradient_is_refused_and_nothing_changes(kind):
    params = make([(4, 3), (4, 3), (5,)])
    optimizer = kind.ours(params, **kind.rich)
    train(optimizer, params, 2)
    before = snapshot(optimizer, params)
    give_grads(params)
    params[1].grad = params[1].grad.to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert_same_bits(everything(optimizer, params), before)


@pytest.mark.parametrize("kind", [ADAM, ADAMW, RMSPROP], ids=str)
def test_capturable_fails_as_in_torch(kind):
    for cls in (kind.ours, kind.torchs):
        params = make([(3,)])
        optimizer = cls(params, capturable=True, foreach=False)
        give_grads(params)
        with pytest.raises(AssertionError, match="If capturable=True"):
            optimizer.step()


_COMMON = [
    {"lr": -1.0},
    {"weight_decay": -0.1},
    {"lr": torch.tensor([0.1, 0.2])},
    {"lr": torch.tensor(0.1), "foreach": True},
]
_FUSED = [{"fused": True, "foreach": True}, {"fused": True, "differentiable": True}]
_MOMENTUM = [{"momentum": -0.1}, {"nesterov": True}, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}]
_BETAS = [{"betas": (1.0, 0.9)}, {"betas": (0.9, 1.5)}, {"betas": (0.9, torch.tensor(0.9))}, {"momentum": 0.9}]
BAD = {
    "Adam": [*_COMMON, *_FUSED, *_BETAS, {"eps": -1.0}],
    "AdamW": [*_COMMON, *_FUSED, *_BETAS, {"eps": -1.0}],
    "SGD": [*_COMMON, *_FUSED, *_MOMENTUM, {"eps": 1.0}],
    "RMSprop": [*_COMMON, {"eps": -1.0}, {"momentum": -0.1}, {"alpha": -0.1}, {"fused": True}],
}


@pytest.mark.parametrize(
    ("kind", "options"), [(k, o) for k in (ADAM, ADAMW, SGD_, RMSPROP) for o in BAD[str(k)]], ids=str
)
def test_bad_options_fail_as_in_torch(kind, options):
    errors = []
    for cls in (kind.torchs, kind.ours):
        try:
            cls(make([(3,)]), **options)
        except (ValueError, TypeError, RuntimeError) as error:
            errors.append((type(error), str(error)))
        else:
            errors.append(None)
    assert errors[1] == errors[0]
    assert errors[0] or "lr" in options, "torch takes some learning rates that are tensors, and so do we"


@pytest.mark.parametrize("params", [[], [3], torch.ones(3), [{"weights": []}], [torch.ones(3, requires_grad=True) * 2]])
@each_kind
def test_bad_parameters_fail_as_in_torch(kind, params):
    errors = []
    for cls in (kind.ours, kind.torchs):
        with pytest.raises((ValueError, TypeError, KeyError)) as caught:
            cls(copy.copy(params))
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]
