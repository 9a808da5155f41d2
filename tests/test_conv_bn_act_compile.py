"""The layers of ``deepops.nn`` compiled, exported, traced, on tensors without memory and under ``torch.func``.

``test_functional.py`` compiles with inductor; here the tracing matters.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conv_cases import BLOCKS, MODES, Stock, make_block, make_input, run, set_mode
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from deepops.nn import BatchNormAct2d

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def model_of(block: nn.Module) -> nn.Module:
    return nn.Sequential(block, BatchNormAct2d(8, activation="silu"))


@pytest.mark.parametrize(("mode", "dims"), [("train", 1), ("train", 3), *((mode, 2) for mode in MODES)])
def test_compile_fullgraph(mode: str, dims: int) -> None:
    block = make_block(4, 8, 3, dims=dims, padding=1, bias=True, activation="relu6")
    other, x = copy.deepcopy(block), make_input(dims)
    residual = torch.randn(4, 8, *x.shape[2:])
    other.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(other, x, residual, mode), run(block, x, residual, mode))
    with torch.no_grad():
        torch.testing.assert_close(other(x), block(x))


@pytest.mark.parametrize("mode", MODES)
def test_no_compilation_per_batch_size(mode: str) -> None:
    model = model_of(make_block(4, 8, 3, bias=True))
    set_mode(model[0], mode)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 5, 8):
        x = torch.randn(batch, 4, 6, 6)
        if batch == 5:  # the second size made the batch dynamic: from here on nothing may be compiled
            torch.compiler.set_stance("fail_on_recompile")
        try:
            y = compiled(x)
        finally:
            if batch == 8:
                torch.compiler.set_stance("default")
        torch.testing.assert_close(y, model(x))
        y.sum().backward()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_export_holds_nothing_but_torchs_operations(mode: str, strict: bool) -> None:
    model = model_of(make_block(4, 8, 3, bias=True))
    set_mode(model.train(mode != "eval")[0], mode)
    x = torch.randn(4, 4, 6, 6)
    batch = {"input": {0: torch.export.Dim("batch", min=2)}}
    program = torch.export.export(copy.deepcopy(model), (x,), dynamic_shapes=batch, strict=strict)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called - {"aten.add_.Tensor"} == {
        f"aten.{name}.default" for name in ("conv2d", "batch_norm", "relu", "silu")
    }
    exported, stock = program.module(), copy.deepcopy(model)
    for batch_size in (4, 7):
        x = torch.randn(batch_size, 4, 6, 6)
        torch.testing.assert_close(exported(x), stock(x))
    for name, buffer in exported.named_buffers():
        torch.testing.assert_close(buffer, stock.get_buffer(name))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dims", BLOCKS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_trace_of_evaluation(dims: int, grad: bool) -> None:
    """What TorchScript and the older ONNX export get: torch's operations, the parameters not folded."""
    block = make_block(4, 8, 3, dims=dims, bias=True, activation="silu").eval()
    x = make_input(dims)
    with torch.set_grad_enabled(grad):
        block(x)
        traced = torch.jit.trace(block, (x,))
        kinds = [node.kind() for node in traced.inlined_graph.nodes() if "::" in node.kind()]
        assert [kind for kind in kinds if not kind.startswith("prim::")] == [
            "aten::_convolution",
            "aten::batch_norm",
            "aten::silu",
        ]
        assert set(traced.state_dict()) == set(block.state_dict())
        torch.testing.assert_close(traced(x[:2]), block(x[:2]))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = make_block(4, 8, 3, padding=1), make_block(8, 8, 3, padding=1, activation="gelu")

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y, y)


def test_symbolic_trace() -> None:
    model = Residual().eval()
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == [
        "first.conv",
        "first.bn",
        "second.conv",
        "second.bn",
    ]
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(graph(x), model(x))


def test_onnx() -> None:
    pytest.importorskip("onnxscript", reason="the ONNX exporter needs onnx and onnxscript")
    program: Any = torch.onnx.export(
        model_of(make_block(4, 8, 3)).eval(), (torch.randn(2, 4, 6, 6),), dynamo=True, verbose=False
    )
    kinds = {node.op_type for node in program.model.graph}
    assert "Conv" in kinds
    assert not any("deepops" in str(node.domain) for node in program.model.graph)


@pytest.mark.parametrize("dims", BLOCKS)
@pytest.mark.parametrize("mode", MODES)
def test_meta_and_fake_tensors(mode: str, dims: int) -> None:
    expected = make_block(4, 8, 3, dims=dims)(make_input(dims)).shape
    block = make_block(4, 8, 3, dims=dims, device="meta")
    set_mode(block, mode)
    y = block(make_input(dims).to("meta"))
    assert y.shape == expected
    y.sum().backward()
    with torch.no_grad():
        assert block(make_input(dims).to("meta")).device.type == "meta"
    with FakeTensorMode():
        block = make_block(4, 8, 3, dims=dims)
        set_mode(block, mode)
        y = block(make_input(dims))
        assert y.shape == expected
        y.sum().backward()
        assert block.conv.weight.grad.shape == block.conv.weight.shape


def test_stock_has_the_same_graph() -> None:
    """What is exported is what stock modules export."""
    block = make_block(4, 8, 3, bias=True).eval()
    x = torch.randn(2, 4, 6, 6)
    graphs = [
        [str(node.target) for node in torch.export.export(module, (x,)).graph.nodes if node.op == "call_function"]
        for module in (block, Stock(block))
    ]
    assert graphs[0] == graphs[1]


# ---- torch.func ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_func(mode: str) -> None:
    """Without running statistics in training, as torch's own batch normalization needs it."""
    block = make_block(4, 8, 3, bias=True, activation="silu", track_running_stats=mode != "train").double()
    set_mode(block, mode)
    stock = Stock(block)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    direction = torch.randn_like(x)

    def results(module: Any) -> Any:
        state = {name: tensor.detach() for name, tensor in module.state_dict().items()}

        def loss(state: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(module, state, (x,)).square().sum()

        floating = {name: tensor for name, tensor in state.items() if name.startswith(("conv", "bn.w", "bn.b"))}
        gradients = torch.func.grad(loss)(floating, x)
        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(floating, torch.stack([x, 2 * x]))
        return gradients, per_sample, torch.func.jvp(lambda x: loss(floating, x), (x,), (direction,))

    ours, theirs = results(block), results(stock)
    torch.testing.assert_close(ours[1:], theirs[1:])
    for name, value in ours[0].items():
        if name != "conv.bias" or mode != "train":  # 0, where stock has what rounding left of it
            torch.testing.assert_close(value, theirs[0][name])


def test_vmap_over_a_residual_alone() -> None:
    block = make_block(4, 8, 3)
    set_mode(block, "frozen affine")
    x, residuals = torch.randn(2, 4, 6, 6), torch.randn(3, 2, 8, 4, 4)
    batched = torch.func.vmap(block, (None, 0))(x, residuals)
    torch.testing.assert_close(batched, torch.stack([block(x, residual) for residual in residuals]))


def test_vmap_over_running_statistics_is_refused() -> None:
    for module in (make_block(4, 4, 3), BatchNormAct2d(4)):
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(RuntimeError, match=r"running_mean: expected a batched tensor.* track_running_stats=False"):
            torch.func.vmap(module)(torch.randn(3, 2, 4, 6, 6))
        assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_half_convolution_under_func() -> None:
    block = make_block(4, 8, 3, track_running_stats=False)
    block.conv.half()
    x = torch.randn(2, 4, 6, 6).half()
    expected = torch.autograd.grad(block(x.requires_grad_()).float().square().sum(), x)[0]
    actual = torch.func.grad(lambda x: block(x).float().square().sum())(x.detach())
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
