"""Parameters and gradients in any memory layout, together and apart; gradients are read and never written."""

import pytest
import torch
from backends import device
from optim_cases import (
    assert_same_bits,
    both,
    channels_last,
    each_kernel,
    each_kind,
    give_grads,
    make,
    on_every_backend,
)

pytestmark = on_every_backend

LAYOUTS = {
    "channels_last": channels_last,
    "transposed": lambda p: p.transpose(1, 3).contiguous().transpose(1, 3),
    "gaps": lambda p: p.repeat_interleave(2, 1)[:, ::2],
    "offset": lambda p: torch.cat([p.new_zeros(1), p.reshape(-1)])[1:].view(p.shape),
}


@pytest.mark.parametrize("grad_layout", ["contiguous", *LAYOUTS])
@pytest.mark.parametrize("param_layout", ["contiguous", *LAYOUTS])
@each_kernel
def test_layouts(kind, param_layout, grad_layout):
    """Whatever the strides of a parameter and its gradient; torch's fused CPU kernel is silently wrong here."""
    start = make([(4, 3, 5, 6)])[0].detach()
    same = torch.nn.Parameter(start.clone())
    ours = torch.nn.Parameter(LAYOUTS.get(param_layout, torch.clone)(start))
    a, b = kind.ours([ours], **kind.rich), kind.ours([same], **kind.rich)
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
        assert {t.stride() for name, t in a.state[ours].items() if name != "step"} == {ours.stride()}


@each_kind
def test_expanded_gradient(kind):
    ours, stock, a, b = both(kind, shapes=[(4, 6)])
    for p in (*ours, *stock):
        p.grad = p.new_tensor(2.0).expand(4, 6)
    for _ in range(3):
        a.step()
        b.step()
    torch.testing.assert_close(ours, stock)
    assert ours[0].grad.stride() == (0, 0), "the user's gradient is left as it is"


@each_kind
def test_gradient_that_is_the_parameter_or_lazily_negated(kind):
    ours, stock, a, b = both(kind, shapes=[(40,), (1,)])
    for _ in range(3):
        for params in (ours, stock):
            params[0].grad = params[0].detach()
            params[1].grad = torch.tensor([1 + 2j], device=device()).conj().imag
        assert ours[1].grad.is_neg()
        a.step()
        b.step()
    torch.testing.assert_close(ours, stock)


@each_kind
def test_gradients_are_read_only(kind):
    params = make()
    optimizer = kind.ours(params, **kind.rich)
    give_grads(params)
    before = [p.grad.clone() for p in params]
    optimizer.step()
    assert_same_bits([p.grad for p in params], before)
