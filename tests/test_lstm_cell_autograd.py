"""``deepops._lstm_cell``: what autograd, threads and processes do with loops over a cell."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
import torch.distributed as dist
from lstm_cell_loops import (
    SIZES,
    Cell,
    State,
    compare,
    gradients,
    inputs_for,
    loop,
    loss_of,
    same_weights,
    train,
)
from processes import on_ranks, process_pools  # noqa: F401
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from deepops._library import has_kernel
from deepops.testing import ErrorPool, use_threads

pytestmark = pytest.mark.usefixtures("one_thread")
if not has_kernel("lstm_cell", "cpu"):
    pytest.skip("no compiled kernels", allow_module_level=True)


def test_retained_graph():
    """Twice over the same steps: twice the gradients. A third time, without the graph, is refused as torch does."""
    cell = Cell()
    xs = inputs_for(cell)[0]

    def run(cell: nn.LSTMCell, xs: Tensor) -> dict[str, Tensor]:
        loss = loss_of(loop(cell, xs))
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        return gradients(cell)

    compare(run, cell, xs)


def test_two_loops():
    """With one cell, in one backward or in two, in any order; interleaved."""

    def one_backward(cell: nn.LSTMCell, xs: Tensor, ys: Tensor) -> dict[str, Tensor]:
        (loss_of(loop(cell, xs)) + 2 * loss_of(loop(cell, ys))).backward()
        return gradients(cell)

    def two_backwards(cell: nn.LSTMCell, xs: Tensor, ys: Tensor) -> dict[str, Tensor]:
        first, second = loss_of(loop(cell, xs)), loss_of(loop(cell, ys))
        second.backward()
        first.backward()
        return gradients(cell)

    def accumulated(cell: nn.LSTMCell, xs: Tensor, ys: Tensor) -> dict[str, Tensor]:
        loss_of(loop(cell, xs)).backward()
        loss_of(loop(cell, ys)).backward()
        return gradients(cell)

    def interleaved(cell: nn.LSTMCell, xs: Tensor, ys: Tensor) -> dict[str, Tensor]:
        a = b = None
        for x, y in zip(xs, ys, strict=True):
            a, b = cell(x, a), cell(y, b)
        assert a is not None
        assert b is not None
        loss_of([*a, *b]).backward()
        return gradients(cell)

    pool = ErrorPool()
    for scenario in (one_backward, two_backwards, accumulated, interleaved) * 2:
        cell = Cell()
        compare(scenario, cell, inputs_for(cell)[0], inputs_for(cell)[0], pool=pool)
    pool.check()


def test_parts_of_a_graph():
    """Losses of some steps, gradients of some inputs."""

    def early_steps(cell: nn.LSTMCell, xs: Tensor) -> dict[str, Tensor]:
        hs = loop(cell, xs)
        loss_of(hs[:2]).backward(retain_graph=True)
        loss_of(hs[1:3]).backward()
        return gradients(cell)

    def one_weight(cell: nn.LSTMCell, xs: Tensor) -> dict[str, Tensor]:
        loss = loss_of(loop(cell, xs))
        hh = torch.autograd.grad(loss, [cell.weight_hh], retain_graph=True)
        return {"hh": hh[0], "bias": torch.autograd.grad(loss, [cell.bias_hh, cell.weight_ih])[0]}

    def only_c(cell: nn.LSTMCell, xs: Tensor) -> dict[str, Tensor]:
        loop(cell, xs)[-1].sum().backward()
        return gradients(cell)

    def through_a_weight_as_well(cell: nn.LSTMCell, xs: Tensor) -> dict[str, Tensor]:
        (loss_of(loop(cell, xs)) + cell.weight_hh.square().sum()).backward()
        return gradients(cell)

    def backward_to_some(cell: nn.LSTMCell, xs: Tensor) -> dict[str, Tensor]:
        loss_of(loop(cell, xs)).backward(inputs=[cell.weight_ih, cell.bias_ih])
        return gradients(cell)

    pool = ErrorPool()
    for scenario in (early_steps, one_weight, only_c, through_a_weight_as_well, backward_to_some) * 2:
        cell = Cell()
        compare(scenario, cell, inputs_for(cell)[0], pool=pool)
    pool.check()


def test_hooks():
    """On parameters: called once, with the whole gradient."""
    cell = Cell()
    calls: list[str] = []
    for name, p in cell.named_parameters():
        p.register_hook(lambda grad, name=name: (calls.append(name), grad * 2)[1])
        p.register_post_accumulate_grad_hook(lambda p, name=name: calls.append(f"{name} done"))
    xs = inputs_for(cell)[0]
    loss_of(loop(cell, xs)).backward()
    assert sorted(calls) == sorted(n + s for n, _ in cell.named_parameters() for s in ("", " done"))
    doubled = gradients(cell)
    plain = Cell()
    plain.load_state_dict(cell.state_dict())
    loss_of(loop(plain, xs)).backward()
    for name, grad in gradients(plain).items():
        assert torch.equal(grad * 2, doubled[name])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant):
    """Parts of the loop computed again in the backward."""

    def run(cell: nn.LSTMCell, xs: Tensor, h: Tensor, c: Tensor) -> dict[str, Tensor]:
        leaf = xs.detach().clone().requires_grad_()
        state = (h.detach().clone().requires_grad_(), c)

        def part(xs: Tensor, h: Tensor, c: Tensor) -> State:
            outputs = loop(cell, xs, (h, c))
            return outputs[-2], outputs[-1]

        for begin in (0, 2, 4):
            state = checkpoint(part, leaf[begin : begin + 2], *state, use_reentrant=use_reentrant)
        loss_of([*state]).backward()
        return {"leaf": leaf.grad, **gradients(cell)}

    cell = Cell()
    compare(run, cell, *inputs_for(cell, 6))


def test_threads():
    """Several forwards and backwards of one cell at a time."""
    cell = Cell()
    parameters = list(cell.parameters())
    xs = [inputs_for(cell)[0] for _ in range(4)]
    found: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def work(i: int) -> None:
        for n in range(10):
            found[i, n] = torch.autograd.grad(loss_of(loop(cell, xs[i])), parameters)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stock, wide = same_weights(cell), same_weights(cell).double()
    pool = ErrorPool()
    for (i, n), grads in found.items():
        others = torch.autograd.grad(loss_of(loop(stock, xs[i])), list(stock.parameters()))
        expected = torch.autograd.grad(loss_of(loop(wide, xs[i].double())), list(wide.parameters()))
        for j, values in enumerate(zip(grads, others, expected, strict=True)):
            pool.add(*values, name=f"thread {i}, turn {n}, gradient {j}")
    assert len(found) == 40
    pool.check()


def test_the_same_bits_with_any_number_of_threads():
    cell = Cell(100, 130)
    inputs = inputs_for(cell, 4, 40)
    results = []
    for threads in (1, 2, 2):
        cell.zero_grad()
        with use_threads(threads):
            results.append(train(cell, *inputs))
    for name in ("state 0", "state 4", "xs", "h", "c"):  # those of weights are torch's products
        assert torch.equal(results[0][name], results[1][name])
    for name, value in results[1].items():
        assert torch.equal(value, results[2][name])


def test_nothing_is_left_after_an_error():
    """A backward that fails half way leaves nothing for the next one."""
    cell = Cell()
    xs = inputs_for(cell)[0]
    hs = loop(cell, xs)
    fail = True

    def hook(grad: Tensor) -> None:
        if fail:
            raise ValueError("half way")

    hs[2].register_hook(hook)
    weights = cell.cache._weights
    assert weights is not None
    with pytest.raises(ValueError, match="half way"):
        loss_of(hs).backward(retain_graph=True)
    gc.collect()
    assert not weights.running
    assert not gradients(cell)
    fail = False
    loss_of(hs).backward()
    expected = gradients(cell)
    plain = Cell()
    plain.load_state_dict(cell.state_dict())
    loss_of(loop(plain, xs)).backward()
    for name, grad in gradients(plain).items():
        assert torch.equal(grad, expected[name])


class Loop(nn.Module):
    """The loss of a loop over a cell."""

    def __init__(self, cell: nn.LSTMCell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, xs: Tensor) -> Tensor:
        return loss_of(loop(self.cell, xs))


@on_ranks(2)
def test_ddp():
    """Each process has half of the batch; gradients are those of the whole."""
    torch.manual_seed(0)
    cell = Cell()
    xs = torch.randn(5, 4, SIZES[0])
    mine = xs[:, dist.get_rank() * 2 :][:, :2]
    ddp = DistributedDataParallel(Loop(cell))
    for _ in range(2):
        cell.zero_grad()
        ddp(mine).backward()
    whole = Cell()
    whole.load_state_dict(cell.state_dict())
    (sum(Loop(whole)(xs[:, 2 * rank :][:, :2]) for rank in range(2)) / 2).backward()
    for name, grad in gradients(whole).items():
        torch.testing.assert_close(gradients(cell)[name], grad)
