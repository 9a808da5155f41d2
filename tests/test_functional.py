"""``deepops.functional``: values, autograd, autocast, compiling, and one test per kind of bad input."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import deepops.functional
from deepops import _convolution, _fallback, reference
from deepops._library import has_kernel
from deepops.functional import batch_norm_act, conv_bn_act
from deepops.testing import assert_close_to_oracle, make_layouts, saved_storages

pytestmark = pytest.mark.usefixtures("one_thread")
needs_kernel = pytest.mark.skipif(not has_kernel("batch_norm_act_train", "cpu"), reason="no compiled kernels")

# name, negative_slope, approximate
ACTIVATIONS = [
    ("relu", 0.01, "none"),
    ("leaky_relu", 0.2, "none"),
    ("leaky_relu", -0.3, "none"),
    ("relu6", 0.01, "none"),
    ("silu", 0.01, "none"),
    ("gelu", 0.01, "none"),
    ("gelu", 0.01, "tanh"),
    ("hardswish", 0.01, "none"),
    ("identity", 0.01, "none"),
]
MEMORY_FORMATS = [torch.contiguous_format, torch.channels_last]


def make_arguments(
    shape: tuple[int, ...] = (4, 3, 5, 6), dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype is torch.float64 else torch.float32

    def vector(low: float) -> Tensor:
        return torch.rand(shape[1], generator=generator, dtype=wide) + low

    return {
        "x": (torch.randn(shape, generator=generator, dtype=wide) * 2 + 0.5).to(dtype),
        "running_mean": vector(-0.5),
        "running_var": vector(0.5),
        "weight": vector(0.5),
        "bias": vector(-0.5),
        "training": True,
        "num_batches_tracked": torch.tensor(3),
    }


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) and not v.requires_grad else v for k, v in arguments.items()}


# ---- autograd -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("activation", "negative_slope", "approximate"), ACTIVATIONS)
def test_first_and_second_derivative(
    activation: str, negative_slope: float, approximate: str, with_residual: bool, training: bool
) -> None:
    torch.manual_seed(1)
    for memory_format in MEMORY_FORMATS:
        x = (torch.randn(2, 3, 2, 3, dtype=torch.float64) * 2).to(memory_format=memory_format).requires_grad_()
        low = 5.0 if activation == "relu6" else 0.5  # relu6: on both sides of 6
        bias = torch.rand(3, dtype=torch.float64).add(low).requires_grad_()
        inputs = [x, torch.rand(3, dtype=torch.float64).add(0.5).requires_grad_(), bias]
        if with_residual:
            inputs.append(torch.randn(2, 3, 2, 3, dtype=torch.float64).requires_grad_())
        mean, var = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5

        def function(
            x: Tensor,
            weight: Tensor,
            bias: Tensor,
            residual: Tensor | None = None,
            mean: Tensor = mean,
            var: Tensor = var,
        ) -> Tensor:
            return batch_norm_act(
                x,
                mean.clone(),
                var.clone(),
                weight,
                bias,
                training,
                activation=activation,
                negative_slope=negative_slope,
                approximate=approximate,
                residual=residual,
            )

        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)
        # gradgradcheck sees only the differentiable path: that its gradients are the kernel's is checked here.
        y = function(*inputs)
        grad_y = torch.randn_like(y)
        from_kernel = torch.autograd.grad(y, inputs, grad_y, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(y, inputs, grad_y, create_graph=True), from_kernel)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
def test_only_wanted_gradients(wanted: str) -> None:
    arguments = make_arguments() | {"residual": torch.randn(4, 3, 5, 6)}
    arguments[wanted].requires_grad_()
    batch_norm_act(**copied(arguments)).square().sum().backward()
    expected = make_arguments() | {"residual": arguments["residual"].detach()}
    expected[wanted] = expected[wanted].detach().clone().requires_grad_()
    reference.batch_norm_act(**copied(expected)).square().sum().backward()
    for name in ("x", "weight", "bias", "residual"):
        assert (arguments[name].grad is not None) == (name == wanted)
    torch.testing.assert_close(arguments[wanted].grad, expected[wanted].grad)


def test_no_node_without_gradients() -> None:
    arguments = make_arguments()
    assert not batch_norm_act(**copied(arguments)).requires_grad
    arguments["x"].requires_grad_()
    with torch.no_grad():
        assert not batch_norm_act(**copied(arguments)).requires_grad


@needs_kernel
@pytest.mark.parametrize(
    ("activation", "with_residual", "data_tensors"),
    [("relu", False, 1), ("silu", False, 1), ("relu", True, 2), ("silu", True, 2), ("identity", True, 1)],
)
def test_what_is_kept_for_backward(activation: str, with_residual: bool, data_tensors: int) -> None:
    arguments = make_arguments((8, 4, 16, 16))
    for name in ("x", "weight", "bias"):
        arguments[name].requires_grad_()
    if with_residual:
        arguments["residual"] = torch.randn(8, 4, 16, 16, requires_grad=True)
    storages = saved_storages(lambda: batch_norm_act(**copied(arguments), activation=activation))
    data = [storage for storage in storages if storage.nbytes() == arguments["x"].numel() * 4]
    vectors = [storage for storage in storages if storage.nbytes() == 4 * 4]
    assert len(data) == data_tensors
    assert len(vectors) == 4  # weight, bias, mean, invstd
    assert len(storages) == data_tensors + 4


def test_expanded_gradient() -> None:
    for memory_format in MEMORY_FORMATS:
        results = []
        for function in (batch_norm_act, reference.batch_norm_act):
            arguments = make_arguments()
            x = arguments["x"] = arguments["x"].to(memory_format=memory_format).requires_grad_()
            y = function(**copied(arguments))
            y.backward(torch.full((1,), 0.5).expand_as(y))  # stride 0 in every dimension
            results.append(x.grad)
        torch.testing.assert_close(*results)


def test_evaluation_keeps_the_statistics_of_its_forward() -> None:
    """A training step between the forward and its backward must neither fail nor change the gradient."""
    arguments = make_arguments() | {"training": False}
    x = arguments["x"].requires_grad_()
    mean, var = arguments["running_mean"], arguments["running_var"]
    (expected,) = torch.autograd.grad(batch_norm_act(**arguments).square().sum(), x)
    y = batch_norm_act(**arguments)
    with torch.no_grad():
        batch_norm_act(x, mean, var, training=True)
    (actual,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(actual, expected)


def test_writes_are_counted() -> None:
    """``Tensor._version`` goes up, as for torch's own in-place operations: caches rely on it."""
    arguments = make_arguments()
    names = ("running_mean", "running_var", "num_batches_tracked")
    before = [arguments[name]._version for name in names]
    batch_norm_act(**arguments)
    assert all(arguments[name]._version > old for name, old in zip(names, before, strict=True))
    before = [arguments[name]._version for name in names]
    batch_norm_act(**arguments | {"training": False})
    assert [arguments[name]._version for name in names] == before


def test_func_transforms_take_the_plain_path() -> None:
    arguments = make_arguments(dtype=torch.float64) | {
        "running_mean": None,
        "running_var": None,
        "num_batches_tracked": None,
    }
    x = arguments.pop("x")

    def loss(x: Tensor) -> Tensor:
        return batch_norm_act(x, **arguments, activation="silu").square().sum()

    expected = torch.autograd.grad(loss(x.requires_grad_()), x)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)
    direction = torch.randn_like(x)
    _, tangent = torch.func.jvp(loss, (x.detach(),), (direction,))
    torch.testing.assert_close(tangent, (expected * direction).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), direction)
        tangent = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
        torch.testing.assert_close(tangent, (expected * direction).sum())
    stacked = torch.stack([x.detach(), 2 * x.detach()])
    torch.testing.assert_close(torch.func.vmap(loss)(stacked)[0], loss(x.detach()))


# ---- layouts, sizes, dtypes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "offset", "transposed", "expanded"])
@pytest.mark.parametrize("residual_layout", [None, "contiguous", "channels_last", "sliced", "expanded"])
def test_layouts(layout: str, residual_layout: str | None, training: bool) -> None:
    x = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(3))
    results = []
    for function in (batch_norm_act, reference.batch_norm_act):
        arguments = make_arguments() | {"training": training, "x": make_layouts(x)[layout].requires_grad_()}
        if residual_layout is not None:
            arguments["residual"] = make_layouts(x * 0.5)[residual_layout].requires_grad_()
        running = arguments["running_mean"], arguments["running_var"]
        y = function(**arguments, activation="silu")
        y.square().sum().backward()
        grads = [arguments["x"].grad, arguments["residual"].grad if residual_layout else None]
        results.append([y, *running, *(grad for grad in grads if grad is not None)])
        if function is batch_norm_act and layout == "channels_last":
            assert y.is_contiguous(memory_format=torch.channels_last)
        if function is batch_norm_act and layout == "contiguous":
            assert y.is_contiguous()
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 6), (2, 3, 2, 3, 4), (3, 2, 1, 1), (1, 3, 2, 2)])
def test_ranks(shape: tuple[int, ...]) -> None:
    arguments = make_arguments(shape)
    expected = copied(arguments)
    torch.testing.assert_close(batch_norm_act(**arguments), reference.batch_norm_act(**expected))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(arguments[name], expected[name])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_empty(shape: tuple[int, ...], training: bool) -> None:
    arguments = make_arguments((2, 3, 4, 4)) | {"training": training, "x": torch.zeros(shape)}
    leaves = [arguments[name].requires_grad_() for name in ("x", "weight", "bias")]
    running = arguments["running_mean"].clone()
    y = batch_norm_act(**arguments)
    y.sum().backward()
    assert y.shape == shape
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)
    assert torch.equal(arguments["running_mean"], running)
    assert int(arguments["num_batches_tracked"]) == 3 + training


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
def test_running_statistics_are_those_of_torch(momentum: float | None) -> None:
    arguments = make_arguments() | {"momentum": momentum}
    stock = torch.nn.BatchNorm2d(3, momentum=momentum)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        getattr(stock, name).copy_(arguments[name])
    wide = torch.nn.BatchNorm2d(3, momentum=momentum, dtype=torch.float64)
    wide.load_state_dict(stock.state_dict())
    for _ in range(3):
        stock(arguments["x"])
        wide(arguments["x"].double())
        batch_norm_act(**arguments)
    assert torch.equal(arguments["num_batches_tracked"], stock.num_batches_tracked)
    for name in ("running_mean", "running_var"):
        assert_close_to_oracle(arguments[name], getattr(stock, name), getattr(wide, name), name=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("statistics", ["wide", "narrow"])
def test_16_bit(dtype: torch.dtype, statistics: str) -> None:
    arguments = make_arguments((8, 4, 6, 6), dtype)
    if statistics == "narrow":
        for name in ("running_mean", "running_var", "weight", "bias"):
            arguments[name] = arguments[name].to(dtype)
    for name in ("x", "weight", "bias"):
        arguments[name].requires_grad_()
    kept_dtype = arguments["weight"].dtype
    stock_x = arguments["x"].detach().clone().requires_grad_()
    stock_running = [arguments[name].clone() for name in ("running_mean", "running_var")]
    affine = [arguments[name].detach() for name in ("weight", "bias")]
    wide_running = [tensor.double() for tensor in stock_running]
    wide_x = arguments["x"].detach().double().requires_grad_()
    y = batch_norm_act(**arguments, activation="silu")
    stock = F.silu(F.batch_norm(stock_x, *stock_running, *affine, True))
    oracle = F.silu(F.batch_norm(wide_x, *wide_running, *(tensor.double() for tensor in affine), True))
    assert y.dtype is dtype
    assert_close_to_oracle(y, stock, oracle, name="y")
    for name, mine, theirs in zip(("running_mean", "running_var"), stock_running, wide_running, strict=True):
        assert arguments[name].dtype is kept_dtype
        assert_close_to_oracle(arguments[name], mine, theirs, name=name)
    for result in (y, stock, oracle):
        result.sum().backward()
    assert arguments["weight"].grad.dtype is kept_dtype
    assert_close_to_oracle(arguments["x"].grad, stock_x.grad, wide_x.grad, name="x.grad")


# ---- autocast and compiling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    arguments = make_arguments((8, 4, 6, 6))
    expected = copied(arguments)
    with torch.autocast("cpu", dtype=dtype):
        y = batch_norm_act(**arguments)
        low = batch_norm_act(**copied(arguments) | {"x": arguments["x"].to(dtype)})
    assert y.dtype is torch.float32
    assert low.dtype is dtype
    assert torch.equal(y, batch_norm_act(**expected))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(arguments[name], expected[name]), name
        assert arguments[name].dtype is expected[name].dtype


def test_autocast_promotes_a_wider_residual() -> None:
    arguments = make_arguments(dtype=torch.bfloat16) | {"residual": torch.randn(4, 3, 5, 6)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert batch_norm_act(**arguments).dtype is torch.float32


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("training", [True, False])
def test_compile_fullgraph(backend: str, training: bool) -> None:
    def function(x: Tensor, conv: Tensor, *args: Any, residual: Tensor) -> Tensor:
        y = conv_bn_act(x, conv, None, *args, training, padding=1, num_batches_tracked=counter)
        return batch_norm_act(y, None, None, training=True, activation="gelu", residual=residual)

    results = []
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for run in (function, compiled):
        torch.manual_seed(4)
        counter = torch.tensor(0)
        arguments = make_arguments((4, 3, 6, 6))
        x, residual = arguments["x"].requires_grad_(), torch.randn(4, 3, 6, 6, requires_grad=True)
        conv = torch.randn(3, 3, 3, 3, requires_grad=True)
        vectors = [arguments[name] for name in ("running_mean", "running_var", "weight", "bias")]
        leaves = [x, conv, vectors[2].requires_grad_(), vectors[3].requires_grad_(), residual]
        for _ in range(2):
            y = run(x, conv, *vectors, residual=residual)
            y.square().sum().backward()
        results.append([y.detach(), *vectors[:2], counter, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*results)


@needs_kernel
@pytest.mark.parametrize("op", ["train", "eval", "backward"])
def test_opcheck(op: str) -> None:
    a = make_arguments((2, 3, 4, 5))
    x, vectors = a["x"], (a["weight"], a["bias"])
    for fmt in MEMORY_FORMATS:
        data = x.to(memory_format=fmt)
        if op == "train":
            running = (a["running_mean"], a["running_var"], a["num_batches_tracked"])
            args: tuple[Any, ...] = (data, data.clone(), *vectors, *running, 0.1, 1e-5, "relu", 0.01)
        elif op == "eval":
            args = (data, None, *vectors, a["running_mean"], a["running_var"], "gelu_tanh", 0.01)
        else:
            stats = (a["running_mean"], a["running_var"])
            args = (data.clone(), data, data.clone(), *vectors, *stats, True, "silu", 0.01, True, True, True)
        torch.library.opcheck(getattr(torch.ops.deepops, f"batch_norm_act_{op}").default, args)


def test_unknown_device_warns_once_and_takes_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fallback, "_LOADED", True)
    monkeypatch.setattr(_fallback, "_warned", set())
    with pytest.warns(RuntimeWarning, match="no kernels for 'toaster'"):
        _fallback.warn_once("toaster")
    arguments = {name: v.to("meta") if isinstance(v, Tensor) else v for name, v in make_arguments().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _fallback.warn_once("toaster")
        assert batch_norm_act(**arguments).device.type == "meta"


# ---- convolution ----------------------------------------------------------------------------------------------------


def test_conv_bias_has_zero_gradient_and_reaches_the_running_mean() -> None:
    torch.manual_seed(5)
    for momentum in (0.1, None):
        x, weight = torch.randn(4, 3, 6, 6), torch.randn(5, 3, 3, 3)
        bias = torch.randn(5).mul(10).requires_grad_()
        stock = torch.nn.BatchNorm2d(5, momentum=momentum)
        wide = torch.nn.BatchNorm2d(5, momentum=momentum, dtype=torch.float64)
        mean, var, counter = torch.zeros(5), torch.ones(5), torch.tensor(0)
        for _ in range(2):
            stock(F.conv2d(x, weight, bias))
            wide(F.conv2d(x.double(), weight.double(), bias.double()))
            y = conv_bn_act(x, weight, bias, mean, var, training=True, momentum=momentum, num_batches_tracked=counter)
        y.square().sum().backward()
        assert bias.grad is not None
        assert torch.equal(bias.grad, torch.zeros(5))
        assert_close_to_oracle(mean, stock.running_mean, wide.running_mean, name="running_mean")
        assert_close_to_oracle(var, stock.running_var, wide.running_var, name="running_var")


@needs_kernel
@pytest.mark.parametrize("autocast", [False, True])
def test_conv_keeps_one_tensor_of_output_size(autocast: bool) -> None:
    x = torch.randn(4, 3, 16, 16)
    weight = torch.randn(8, 3, 3, 3, requires_grad=True)
    affine = [torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)]

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return conv_bn_act(x, weight, None, None, None, *affine, True, padding=1)

    size = 4 * 8 * 16 * 16 * (2 if autocast else 4)
    assert sum(storage.nbytes() == size for storage in saved_storages(run)) == 1


# ---- bad input ------------------------------------------------------------------------------------------------------

BAD_BATCH_NORM: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "not a tensor": ({"x": [1.0]}, TypeError, "x: expected a torch.Tensor, got list"),
    "sparse": (
        {"x": torch.randn(4, 3, 5, 6).to_sparse()},
        TypeError,
        r"x: expected a dense .* layout torch.sparse",
    ),
    "integer": ({"x": torch.ones(4, 3, 5, 6, dtype=torch.int64)}, TypeError, r"x: expected float32.* got torch.int64"),
    "complex": (
        {"x": torch.ones(4, 3, dtype=torch.complex64)},
        TypeError,
        r"x: expected float32.* torch.complex64",
    ),
    "rank 1": ({"x": torch.ones(3)}, ValueError, r"x: expected rank 2 or more.* got shape \[3\]"),
    "weight length": ({"weight": torch.ones(4)}, ValueError, r"weight: expected shape \[3\].* got \[4\]"),
    "bias rank": ({"bias": torch.ones(3, 1)}, ValueError, r"bias: expected shape \[3\].* got \[3, 1\]"),
    "bias dtype": ({"bias": torch.ones(3).double()}, TypeError, r"bias: expected torch.float32 .* got torch.float64"),
    "weight dtype": ({"weight": torch.ones(3).half()}, TypeError, r"weight: expected torch.float32 .* torch.float16"),
    "mean device": (
        {"running_mean": torch.ones(3, device="meta")},
        ValueError,
        "running_mean: expected device cpu, where x is, got meta",
    ),
    "var length": ({"running_var": torch.ones(2)}, ValueError, r"running_var: expected shape \[3\].* got \[2\]"),
    "var type": ({"running_var": 1.0}, TypeError, "running_var: expected a torch.Tensor, got float"),
    "counter dtype": ({"num_batches_tracked": torch.tensor(0.0)}, TypeError, "num_batches_tracked: .* torch.float32"),
    "counter type": ({"num_batches_tracked": 3}, TypeError, "num_batches_tracked: expected a torch.Tensor, got int"),
    "counter missing": ({"num_batches_tracked": None, "momentum": None}, ValueError, "num_batches_tracked: expected"),
    "activation": ({"activation": "tanh"}, ValueError, "activation: expected one of relu, .* got 'tanh'"),
    "approximate": ({"approximate": "erf"}, ValueError, "approximate: expected 'none' or 'tanh', got 'erf'"),
    "residual shape": (
        {"residual": torch.ones(4, 3, 5, 1)},
        ValueError,
        r"residual: expected shape \[4, 3, 5, 6\].* got \[4, 3, 5, 1\]",
    ),
    "residual type": ({"residual": 1}, TypeError, "residual: expected a torch.Tensor, got int"),
    "residual dtype": (
        {"residual": torch.ones(4, 3, 5, 6).half()},
        TypeError,
        "residual: expected torch.float32, the dtype of x, got torch.float16",
    ),
    "residual device": ({"residual": torch.ones(4, 3, 5, 6, device="meta")}, ValueError, "residual: expected device"),
    "eps": ({"eps": 0.0}, ValueError, "batch_norm eps must be positive during training, but got 0.0"),
    "negative eps": ({"eps": -1.0, "training": False}, ValueError, "batch_norm eps must be non-negative, but got -1.0"),
    "no statistics": ({"training": False, "running_var": None}, ValueError, "running_var: expected a tensor"),
    "one value": ({"x": torch.ones(1, 3, 1, 1)}, ValueError, "Expected more than 1 value per channel when training"),
}


@pytest.mark.parametrize("case", BAD_BATCH_NORM)
def test_bad_batch_norm_input(case: str) -> None:
    change, error, message = BAD_BATCH_NORM[case]
    arguments = make_arguments() | change
    before = copied(arguments)
    with pytest.raises(error, match=message):
        batch_norm_act(**arguments)
    for name, value in before.items():
        if isinstance(value, Tensor) and value.layout is torch.strided and value.device.type != "meta":
            assert torch.equal(arguments[name], value), f"{name} was changed"


def test_one_value_per_channel_is_torchs_own_error() -> None:
    x = torch.ones(1, 3, 1, 1)
    with pytest.raises(ValueError, match="Expected more than 1 value") as theirs:
        F.batch_norm(x, None, None, training=True)
    with pytest.raises(ValueError, match="Expected more than 1 value") as ours:
        batch_norm_act(x, None, None, training=True)
    assert str(ours.value) == str(theirs.value)


BAD_CONVOLUTION: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x type": ({"x": None}, TypeError, "x: expected a torch.Tensor, got NoneType"),
    "x rank": ({"x": torch.ones(3, 6, 6)}, ValueError, r"x: expected rank 4, \[N, C, H, W\], got shape \[3, 6, 6\]"),
    "x rank 5": ({"x": torch.ones(2, 3, 6, 6, 6)}, ValueError, r"x: expected rank 4, .* got shape \[2, 3, 6, 6, 6\]"),
    "x channels": ({"x": torch.ones(2, 4, 6, 6)}, ValueError, r"x: expected 3 channels.* got shape \[2, 4, 6, 6\]"),
    "weight type": ({"conv_weight": 1}, TypeError, "conv_weight: expected a torch.Tensor, got int"),
    "weight rank": ({"conv_weight": torch.ones(5, 3)}, ValueError, "conv_weight: expected rank 3, 4 or 5"),
    "padding": ({"padding": "full"}, ValueError, "padding: expected 'same', 'valid' or numbers, got 'full'"),
    "same and stride": ({"padding": "same", "stride": (1, 2)}, ValueError, r"'same' needs .* got stride \(1, 2\)"),
    "eps": ({"eps": 0.0}, ValueError, "batch_norm eps must be positive during training, but got 0.0"),
    "weight dtype": (
        {"conv_weight": torch.ones(5, 3, 3, 3).double()},
        TypeError,
        "conv_weight: expected torch.fl",
    ),
    "weight device": ({"conv_weight": torch.ones(5, 3, 3, 3, device="meta")}, ValueError, "conv_weight: .*device cpu"),
    "bias length": ({"conv_bias": torch.ones(4)}, ValueError, r"conv_bias: expected shape \[5\].* got \[4\]"),
    "bias dtype": ({"conv_bias": torch.ones(5).double()}, TypeError, "conv_bias: expected torch.float32"),
    "groups": ({"groups": 0}, ValueError, "groups: expected a positive integer, got 0"),
    "bn weight": ({"weight": torch.ones(3)}, ValueError, r"weight: expected shape \[5\].* got \[3\]"),
    "residual": ({"residual": torch.ones(2, 5, 6, 6)}, ValueError, r"residual: expected shape \[2, 5, 4, 4\]"),
    "activation": ({"activation": "elu"}, ValueError, "activation: expected one of"),
}


@pytest.mark.parametrize("case", BAD_CONVOLUTION)
def test_bad_convolution_input(case: str) -> None:
    change, error, message = BAD_CONVOLUTION[case]
    running = [torch.zeros(5), torch.ones(5), torch.tensor(0)]
    arguments: dict[str, Any] = {
        "x": torch.randn(2, 3, 6, 6),
        "conv_weight": torch.randn(5, 3, 3, 3),
        "conv_bias": torch.randn(5),
        "running_mean": running[0],
        "running_var": running[1],
        "num_batches_tracked": running[2],
        "training": True,
    }
    with pytest.raises(error, match=message):
        conv_bn_act(**arguments | change)
    assert torch.equal(running[0], torch.zeros(5))
    assert torch.equal(running[1], torch.ones(5))
    assert int(running[2]) == 0


def half_reference(function: Callable[..., Tensor], dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    y = function(*leaves)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape))
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"padding": "same", "dilation": 2},
        {"padding": "same", "kernel": (2, 4)},
        {"padding": "valid"},
        {"stride": 2, "padding": (1, 0)},
        {"groups": 2},
    ],
)
def test_half_convolution_is_as_accurate_as_torchs(options: dict[str, Any]) -> None:
    torch.manual_seed(6)
    x = torch.randn(2, 4, 8, 8).half()
    options = dict(options)
    kernel = options.pop("kernel", (3, 3))
    weight = torch.randn(6, 4 // options.get("groups", 1), *kernel).div(6).half()
    bias = torch.randn(6).half()

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return deepops.functional.convolution(x, weight, bias, **{**defaults, **options})

    def stock(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, **options)

    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    actual, theirs = (half_reference(function, torch.float16, x, weight, bias) for function in (ours, stock))
    oracle = half_reference(stock, torch.float64, x, weight, bias)
    for name, *results in zip(("y", "x.grad", "weight.grad", "bias.grad"), actual, theirs, oracle, strict=True):
        assert results[0].dtype is torch.float16
        assert_close_to_oracle(*results, name=name)


@pytest.mark.skipif(_convolution._NATIVE_HALF, reason="this CPU computes in fp16")
def test_half_convolution_is_computed_in_fp32() -> None:
    """Which path was taken, seen from the autograd node: results are alike, only the time is not."""
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    x = torch.randn(2, 3, 5, 5)

    def node(x: Tensor, weight: Tensor) -> str:
        return type(deepops.functional.convolution(x, weight, None, 1, 0, 1, 1).grad_fn).__name__

    assert node(x, weight) == "ConvolutionBackward0"
    assert node(x.half(), weight.half()) == "HalfConvolutionBackward"
    for dtype, expected in ((torch.float16, "HalfConvolutionBackward"), (torch.bfloat16, "ConvolutionBackward0")):
        with torch.autocast("cpu", dtype=dtype):
            assert node(x, weight) == expected


def test_half_convolution_second_derivative() -> None:
    """Through fp32: the second derivative of its fp16 results is finite and that of a float convolution."""
    torch.manual_seed(7)
    x = torch.randn(2, 3, 5, 5).half().requires_grad_()
    weight = torch.randn(4, 3, 3, 3).half().requires_grad_()
    y = deepops.functional.convolution(x, weight, None, 1, 0, 1, 1)
    (grad,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.float().square().sum(), weight)
    wide_x, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    (wide_grad,) = torch.autograd.grad(F.conv2d(wide_x, wide_weight).square().sum(), wide_x, create_graph=True)
    (wide_second,) = torch.autograd.grad(wide_grad.square().sum(), wide_weight)
    relative = (second.double() - wide_second).norm() / wide_second.norm()
    assert relative < 8 * torch.finfo(torch.float16).eps
