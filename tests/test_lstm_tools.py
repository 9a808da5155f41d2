"""PyTorch's own tools on ``LSTM`` and ``LSTMCell``: compiled, exported, traced, parametrized, hooked, averaged."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import processes
import pytest
import torch
from lstm_layers import CELLS, LAYERS, STOCK, disturb, initial_states, loop, make
from processes import on_ranks, process_pools  # noqa: F401
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence

import deepops
from deepops import _fallback, _lstm
from deepops.nn import LSTM, LSTMCell
from deepops.testing import assert_close_to_oracle

pytestmark = pytest.mark.usefixtures("one_thread")

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def step(module: nn.Module, x: Tensor, *arguments: Any, **options: Any) -> list[Tensor]:
    """Results and gradients."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    y, (h, c) = module(x, *arguments, **options)
    (y.square().sum() + h.sum() + c.sin().sum()).backward()
    return [y, h, c, x.grad, *(parameter.grad for parameter in module.parameters())]


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two layers", "layer norm", "zoneout", "variational", "recurrent dropout", "clip"])
def test_compile_fullgraph(name: str) -> None:
    lstm, x = make(4, 3, 5, 7, DOUBLE, **LAYERS[name])
    other, hx = copy.deepcopy(lstm), initial_states(lstm, 3)
    other.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(other, x, hx, seed=torch.tensor(5)), step(lstm, x, hx, seed=5))
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(x), lstm.eval()(x))


def test_the_graph_holds_one_op_per_layer_and_direction() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    lstm, x = make(20, 3, 5, 7, torch.float32, num_layers=2, bidirectional=True)
    torch.compile(lstm, fullgraph=True, backend=torch._dynamo.backends.common.aot_autograd(fw_compiler=backend))(x)
    (graph,) = graphs
    names = [str(node.target) for node in graph.graph.nodes]
    assert names.count("deepops.lstm_sequence.default") == 4
    assert len(names) < 150


@pytest.mark.parametrize("name", ["projection", "layer norm", "zoneout"])
def test_no_compilation_per_length_or_batch(name: str) -> None:
    lstm, _ = make(1, 1, 5, 7, DOUBLE, **LAYERS[name])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lstm, fullgraph=True, backend=counter)
    for steps, batch in ((4, 3), (5, 4), (9, 7), (30, 2), (6, 5)):
        x, seed = torch.randn(steps, batch, 5, dtype=DOUBLE), torch.tensor(steps)
        torch.testing.assert_close(compiled(x, seed=seed), lstm(x, seed=seed))
        compiled(x, seed=seed)[0].sum().backward()
    assert counter.frame_count <= 2  # for one size, and for any


def test_compile_with_lengths() -> None:
    lstm, x = make(6, 3, 5, 7, DOUBLE, bidirectional=True)
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    for lengths in ([6, 2, 4], [1, 1, 6]):
        number = torch.tensor(lengths)
        torch.testing.assert_close(compiled(x, lengths=number), lstm(x, lengths=number))


def test_compile_with_inductor() -> None:
    lstm, x = make(4, 3, 5, 7, torch.float32, layer_norm=True, peephole=True)
    compiled = torch.compile(lstm, fullgraph=True)
    torch.testing.assert_close(step(compiled, x), step(lstm, x))


@pytest.mark.parametrize("name", ["plain", "layer norm", "zoneout"])
def test_compile_the_cell(name: str) -> None:
    cell, x = LSTMCell(5, 7, dtype=DOUBLE, **CELLS[name]), torch.randn(3, 4, 5, dtype=DOUBLE)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    results = []
    for module in (compiled, cell):
        state, parameters = None, list(cell.parameters())
        for t in range(3):
            state = module(x[t], state, seed=torch.tensor(3), step=t)
        results.append((state, torch.autograd.grad(state[0].sum(), parameters)))
    torch.testing.assert_close(*results)


def test_compiled_random_masks_follow_torchs_seed() -> None:
    lstm, x = make(4, 3, 5, 7, torch.float32, zoneout=0.5)
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(compiled(x)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


# ---- recorded for use without deepops --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "two layers"])
def test_export_holds_nothing_but_torchs_operations(name: str) -> None:
    lstm, x = make(4, 3, 5, 7, torch.float32, **LAYERS[name])
    program = torch.export.export(lstm.eval(), (x,))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in called if "deepops" in name]
    torch.testing.assert_close(program.module()(x), lstm(x))


def test_export_of_a_variant_holds_nothing_but_torchs_operations() -> None:
    lstm, x = make(4, 3, 5, 7, torch.float32, layer_norm=True, peephole=True, zoneout=0.1)
    program = torch.export.export(lstm.eval(), (x,))
    assert not [node for node in program.graph.nodes if "deepops" in str(node.target)]
    torch.testing.assert_close(program.module()(x), lstm(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", [LSTM, LSTMCell], ids=lambda kind: kind.__name__)
def test_trace(kind: Any) -> None:
    module, x = kind(5, 7), torch.randn(3, 5)
    traced = torch.jit.trace(module, (x,))
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    theirs = torch.jit.trace(module.to_module(), (x,))
    assert kinds == [node.kind() for node in theirs.inlined_graph.nodes()]
    torch.testing.assert_close(traced(x), module(x))


def test_onnx() -> None:
    pytest.importorskip("onnxscript", reason="the ONNX exporter needs onnx and onnxscript")
    lstm = LSTM(5, 7).eval()
    program: Any = torch.onnx.export(lstm, (torch.randn(4, 3, 5),), dynamo=True, verbose=False)
    assert {node.domain for node in program.model.graph} == {""}


def test_fake_tensors() -> None:
    with FakeTensorMode():
        lstm = LSTM(5, 7, 2, layer_norm=True, proj_size=3, zoneout=0.5)
        y, (h, c) = lstm(torch.randn(4, 3, 5), lengths=torch.tensor([4, 1, 2]))
        assert (y.shape, h.shape, c.shape) == ((4, 3, 3), (2, 3, 3), (2, 3, 7))
        y.sum().backward()
        assert lstm.weight_ln_hh_l1.grad.shape == (28,)


# ---- torch.func ------------------------------------------------------------------------------------------------------


def test_vmap() -> None:
    lstm = LSTM(5, 7, 2, bidirectional=True, dtype=DOUBLE)
    many = torch.randn(6, 4, 3, 5, dtype=DOUBLE)
    torch.testing.assert_close(torch.func.vmap(lambda x: lstm(x)[0])(many), torch.stack([lstm(x)[0] for x in many]))
    cell = LSTMCell(5, 7, layer_norm=True, dtype=DOUBLE)
    found = torch.func.vmap(lambda x: cell(x)[0])(many[0])
    torch.testing.assert_close(found, torch.stack([cell(x)[0] for x in many[0]]))


def test_gradients_per_sample() -> None:
    lstm, x = make(4, 3, 5, 7, DOUBLE, peephole=True)
    parameters = {name: parameter.detach() for name, parameter in lstm.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(lstm, parameters, (x,))[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(parameters, x)
    for i in range(3):
        lstm.zero_grad()
        lstm(x[:, i])[0].square().sum().backward()
        for name, parameter in lstm.named_parameters():
            torch.testing.assert_close(found[name][i], parameter.grad)


def test_forward_mode() -> None:
    lstm, x = make(4, 3, 5, 7, DOUBLE)
    tangent = torch.randn_like(x)
    _, found = torch.func.jvp(lambda x: lstm(x)[0].sum(), (x,), (tangent,))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(lstm(x)[0].sum(), x)
    torch.testing.assert_close(found, (gradient * tangent).sum())


# ---- weights that are not plain parameters ---------------------------------------------------------------------------


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(module: nn.Module) -> None:
    parametrize.register_parametrization(module, name_of(module, "weight_hh"), Double())


def weight_norm(module: nn.Module) -> None:
    parametrizations.weight_norm(module, name_of(module, "weight_hh"))


def old_weight_norm(module: nn.Module) -> None:
    torch.nn.utils.weight_norm(module, name_of(module, "weight_ih"))


def spectral_norm(module: nn.Module) -> None:
    parametrizations.spectral_norm(module, name_of(module, "weight_ih"))


def pruned(module: nn.Module) -> None:
    prune.l1_unstructured(module, name_of(module, "weight_hh"), 0.5)


def name_of(module: nn.Module, kind: str) -> str:
    return f"{kind}_l0" if isinstance(module, nn.RNNBase) else kind


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.LSTMCell], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("change", [parametrized, weight_norm, old_weight_norm, spectral_norm, pruned])
def test_weights_made_by_other_modules(change: Any, kind: Any) -> None:
    stock = kind(5, 7, dtype=DOUBLE).eval()
    ours = {nn.LSTM: LSTM, nn.LSTMCell: LSTMCell}[kind].from_module(stock)
    modules, x = (ours, copy.deepcopy(stock)), torch.randn(4, 3, 5, dtype=DOUBLE)
    for module in modules:
        torch.manual_seed(2)
        change(module)
    for _ in range(2):
        results = []
        for module in modules:
            y = module(x)[0] if kind is nn.LSTM else loop(module, x)[0]
            module.zero_grad()
            y.square().sum().backward()
            results.append([y, *(parameter.grad for parameter in module.parameters())])
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(parameter.grad, alpha=-0.1)
        torch.testing.assert_close(*results)


def test_hooks() -> None:
    lstm, x = make(4, 3, 5, 7, torch.float32)
    calls: list[str] = []
    lstm.register_forward_pre_hook(lambda *_: calls.append("before"))
    lstm.register_forward_hook(lambda *_: calls.append("after"))
    lstm.register_full_backward_hook(lambda *_: calls.append("backward"))
    lstm.weight_hh_l0.register_hook(lambda grad: calls.append("weight"))
    lstm(x.requires_grad_())[0].sum().backward()
    assert sorted(calls) == ["after", "backward", "before", "weight"]


def test_averaging_and_clipping() -> None:
    lstm, x = make(4, 3, 5, 7, torch.float32)
    averaged = torch.optim.swa_utils.AveragedModel(lstm)
    averaged.update_parameters(lstm)
    assert torch.equal(averaged(x)[0], lstm(x)[0])
    lstm(x)[0].sum().backward()
    stock = lstm.to_module()
    assert torch.nn.utils.clip_grad_norm_(lstm.parameters(), 0.1) > 0.1
    vector = torch.nn.utils.parameters_to_vector(stock.parameters())
    torch.nn.utils.vector_to_parameters(2 * vector, lstm.parameters())
    torch.testing.assert_close(lstm(x)[0], stock(x)[0])  # they share the parameters' objects


# ---- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("name", STOCK)
def test_dtypes_under_autocast_are_stocks(name: str, form: str) -> None:
    """And the values are those of a layer of such weights, or, where stock's states stay wide, of this one."""
    lstm, x = make(4, 3, 5, 7, torch.float32, **STOCK[name])

    def run(module: nn.Module, x: Tensor) -> list[Tensor]:
        y, (h, c) = module(x if form == "padded" else pack_padded_sequence(x, torch.tensor([4, 3, 1])))
        return [y if form == "padded" else y.data, h, c]

    results = []
    for module in (lstm, lstm.to_module()):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            results.append(run(module, x))
        results[-1][0].float().sum().backward()
        results[-1] += [parameter.grad.clone() for parameter in module.parameters()]
    assert [result.dtype for result in results[0]] == [result.dtype for result in results[1]]
    wide = form == "packed" or lstm.proj_size > 0
    expected = run(lstm, x) if wide else run(copy.deepcopy(lstm).bfloat16(), x.bfloat16())
    for actual, value in zip(results[0], expected, strict=False):
        assert torch.equal(actual, value.to(actual.dtype))


def test_autocast_in_fp16() -> None:
    """Where stock on a CPU has no kernel, or has fp32 results."""
    lstm, x = make(4, 3, 5, 7, torch.float32, layer_norm=True)
    with torch.autocast("cpu", torch.float16):
        y, (h, c) = lstm(x)
    assert {y.dtype, h.dtype, c.dtype} == {torch.float16}
    y.float().sum().backward()
    assert lstm.weight_ln_c_l0.grad.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cell_under_autocast(dtype: torch.dtype) -> None:
    cell, x = LSTMCell(5, 7), torch.randn(4, 3, 5)
    stock = cell.to_module()
    exact = copy.deepcopy(cell).double()
    with torch.autocast("cpu", dtype):
        ours, theirs = loop(cell, x), loop(stock, x)
        again = cell(x[0].to(dtype), (ours[1], ours[2]))
    assert {t.dtype for t in (*ours, *theirs, *again)} == {torch.float32}
    for actual, expected, oracle in zip(ours, theirs, loop(exact, x.double()), strict=True):
        assert_close_to_oracle(actual, expected, oracle.detach())
    ours[0].sum().backward()
    assert cell.weight_hh.grad.dtype is torch.float32


def test_backward_under_autocast_does_not_lose_bits() -> None:
    lstm, x = make(4, 3, 5, 7, torch.float32)
    expected = step(lstm, x)
    y, (h, c) = lstm(x)
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(y.square().sum() + h.sum() + c.sin().sum(), list(lstm.parameters()))
    for ours, theirs in zip(grads, expected[4:], strict=True):
        assert torch.equal(ours, theirs)


# ---- which path ------------------------------------------------------------------------------------------------------


def test_explain() -> None:
    model = nn.ModuleDict({"lstm": LSTM(3, 4), "cell": LSTMCell(3, 4, layer_norm=True)})
    text = deepops.explain(model)
    assert "lstm (LSTM): fused: one op per layer and direction: compiled kernel on cpu" in text
    assert "cell (LSTMCell): fused: one op" in text
    assert "not fused, torch's own LSTM: there is no kernel for meta" in deepops.explain(LSTM(3, 4, device="meta"))
    assert "not fused, step by step in plain PyTorch" in deepops.explain(LSTM(3, 4, device="meta", peephole=True))


@pytest.mark.parametrize("name", LAYERS)
def test_without_a_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own LSTM where it has it, else the formulas step by step; the results are the same."""
    lstm, x = make(4, 3, 5, 7, DOUBLE, **LAYERS[name])
    expected = step(lstm, x, seed=3)
    monkeypatch.setattr(_lstm, "_KERNEL_ON", {})
    monkeypatch.setattr(_fallback, "_warned", set())
    seen = []
    monkeypatch.setattr(_lstm, "_plain", lambda *a, plain=_lstm._plain: seen.append(1) or plain(*a))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(2):
            seen.clear()
            torch.testing.assert_close(step(lstm, x, seed=3), expected)
    missing = [str(warning.message) for warning in warned if "has no kernels for 'cpu'" in str(warning.message)]
    assert len(missing) == (name not in STOCK)  # once, where it costs something
    assert len(seen) == (0 if name in STOCK else lstm.num_layers * (1 + lstm.bidirectional))


@pytest.mark.parametrize("name", CELLS)
def test_cell_without_a_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, x = LSTMCell(5, 7, dtype=DOUBLE, **CELLS[name]), torch.randn(4, 3, 5, dtype=DOUBLE)
    disturb(cell)
    expected = loop(cell, x, seed=3)
    monkeypatch.setattr(_fallback, "_warned", {"cpu"})
    monkeypatch.setattr(_lstm, "_KERNEL_ON", {})
    monkeypatch.setattr("deepops.nn.lstm_cell._KERNEL_ON", {})
    monkeypatch.setattr("deepops.nn.lstm_cell._ON", (False, False))
    torch.testing.assert_close(loop(cell, x, seed=3), expected)


# ---- several processes -----------------------------------------------------------------------------------------------

needs_processes = pytest.mark.skipif(bool(processes.missing()), reason=processes.missing() or "no gloo")


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.cell = LSTM(5, 7, 2, layer_norm=True, bidirectional=True), LSTMCell(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        return loop(self.cell, self.lstm(x)[0])[1]


@needs_processes
@on_ranks(2)
def test_ddp() -> None:
    torch.manual_seed(0)
    model = Head()
    single = copy.deepcopy(model)
    shared = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        x = torch.randn(4, 6, 5)  # the same in both processes
        rank = torch.distributed.get_rank()
        for module, data in ((shared, x[:, 3 * rank : 3 * rank + 3]), (single, x)):
            module.zero_grad()
            module(data).square().mean().backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(parameter.grad, alpha=-0.1)
    for (name, ours), theirs in zip(model.state_dict().items(), single.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")
