"""What of Adam only a real GPU shows: graphs, where counters live and how they are saved.

Values, plan and state are tested on the same cases as the CPU kernels: the tests with the ``step_backend`` fixture.
"""

import copy

import backends
import pytest
import torch
from optim_cases import assert_same_bits, everything, give_grads, make, needs_kernel, states, train

from deepops.optim import Adam

only_on_cuda = pytest.mark.parametrize("backend", ["cuda"], indirect=True)
pytestmark = [needs_kernel, pytest.mark.usefixtures("step_backend"), only_on_cuda]


def on_cpu(tensors):
    return [t.detach().cpu() for t in tensors]


def make_on_cpu(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(backends, "current", "cpu")
        return make()


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"fused": True}], ids=str)
def test_bits_of_the_cpu_kernel_and_counters_on_the_device(options, monkeypatch):
    params, plain = make(), make_on_cpu(monkeypatch)
    optimizer, other = Adam(params, **options), Adam(plain)
    train(optimizer, params)
    train(other, plain)
    assert "one launch" in optimizer._explain()
    assert "torch, because" not in optimizer._explain()
    assert all(step.is_cuda for step in states(optimizer, params, "step"))
    assert_same_bits(on_cpu(everything(optimizer, params)), everything(other, plain))


def test_a_captured_step_goes_on_counting():
    params, plain = make(), make()
    optimizer, other = Adam(params, capturable=True), Adam(plain, capturable=True)
    give_grads(params, plain)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for p in params:
            p.grad = p.grad * 1  # in the graph's own memory, as a backward pass in the graph has them
        optimizer.step()
    del optimizer._plan
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        other.step()
    assert_same_bits(everything(optimizer, params), everything(other, plain))


def test_the_first_step_is_not_captured():
    params = make([(5,)])
    optimizer = Adam(params, capturable=True)
    give_grads(params)
    with pytest.raises(RuntimeError, match="take a step before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"fused": True}], ids=str)
def test_saved_counters_lie_where_torch_has_them(options):
    params, stock = make(), make()
    optimizer, other = Adam(params, **options), torch.optim.Adam(stock, **options)
    train(optimizer, params, 2)
    train(other, stock, 2)
    saved, expected = optimizer.state_dict(), other.state_dict()
    for index, state in expected["state"].items():
        assert saved["state"][index]["step"].device == state["step"].device
    for source, target in ((saved, other), (expected, optimizer)):
        target.load_state_dict(copy.deepcopy(source))
    train(optimizer, params, 2, first=2)
    train(other, stock, 2, first=2)
    torch.testing.assert_close(params, stock)
    assert states(optimizer, params, "step") == states(other, stock, "step") == [4] * len(params)


def test_lr_on_the_gpu_takes_torchs_path():
    params, stock = make(), make()
    lr = torch.tensor(0.01, device="cuda")
    optimizer = Adam(params, lr=lr, capturable=True)
    other = torch.optim.Adam(stock, lr=lr, capturable=True)
    train(optimizer, params, 2)
    train(other, stock, 2)
    torch.testing.assert_close(params, stock)
    assert "not on the CPU" in optimizer._explain()


def test_parameters_on_another_device_take_torchs_path(monkeypatch):
    params = [*make([(5,), (2, 3)]), *make_on_cpu(monkeypatch)[:3]]
    optimizer = Adam(params)
    train(optimizer, params)
    assert "others that take the kernel are on cuda:0" in optimizer._explain()
    assert states(optimizer, params, "step") == [4] * len(params)
