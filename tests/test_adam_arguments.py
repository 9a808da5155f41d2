"""Adam's arguments: what goes torch's own way, and what is refused as torch refuses it."""

import copy
import inspect
import warnings

import pytest
import torch
from adam_cases import (
    assert_alike,
    assert_same_bits,
    both,
    everything,
    give_grads,
    make,
    needs_kernel,
    step_both,
    train,
)

import deepops
from deepops.optim import Adam

pytestmark = needs_kernel


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


# ---- refused --------------------------------------------------------------------------------------------------------


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
