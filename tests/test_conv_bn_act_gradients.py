"""Gradients of the blocks: first and second derivatives in fp64, only the wanted ones, and what is kept for them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conv_cases import ACTIVATION_MODULES, Stock, make_block, make_input, needs_kernel, set_mode
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from deepops.testing import saved_storages

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("activation", ACTIVATION_MODULES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("mode", ["train", "frozen", "frozen affine"])  # evaluation computes what frozen does
def test_first_and_second_derivative(mode: str, with_residual: bool, activation: nn.Module) -> None:
    """With respect to everything that there is; the dimensions take turns."""
    dims = 1 + ACTIVATION_MODULES.index(activation) % 3
    block = make_block(2, 2, 2, dims=dims, bias=True, activation=activation, track_running_stats=mode != "train")
    if isinstance(activation, nn.ReLU6):
        nn.init.constant_(block.bn.bias, 5.0)  # on both sides of 6
    block = block.double()
    set_mode(block, mode)
    x = torch.randn(2, 2, *[4, 3, 2][:dims], dtype=torch.float64, requires_grad=True)
    names = [name for name, parameter in block.named_parameters() if parameter.requires_grad]
    values = [block.get_parameter(name).detach().requires_grad_() for name in names]
    inputs = [x, *values]
    if with_residual:
        inputs.append(torch.randn_like(block(x)).mul(2).requires_grad_())

    def function(x: Tensor, *rest: Tensor) -> Tensor:
        for name, value in zip(names, rest, strict=False):
            module, _, leaf = name.rpartition(".")
            block.get_submodule(module)._parameters[leaf] = value  # what functional_call does, without a check
        return block(x, *rest[len(names) :])

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)
    # gradgradcheck sees only the differentiable path: that its gradients are the kernel's is checked here.
    y = function(*inputs)
    grad_y = torch.randn_like(y)
    from_kernel = torch.autograd.grad(y, inputs, grad_y, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, grad_y, create_graph=True), from_kernel)


WANTED = ("x", "residual", "conv.weight", "conv.bias", "bn.weight", "bn.bias")


@pytest.mark.parametrize("mode", ["train", "frozen"])
@pytest.mark.parametrize("wanted", WANTED)
def test_only_the_wanted_gradient(wanted: str, mode: str) -> None:
    block = make_block(4, 8, 3, bias=True, padding=1, activation="silu")
    set_mode(block, mode)
    block.requires_grad_(False)
    stock = Stock(block)
    results = []
    for module in (block, stock):
        torch.manual_seed(3)
        tensors = {"x": make_input(2), "residual": torch.randn(4, 8, 11, 10), **dict(module.named_parameters())}
        leaf = tensors[wanted].requires_grad_()
        module(tensors["x"], tensors["residual"]).square().sum().backward()
        assert [name for name in WANTED if tensors[name].grad is not None] == [wanted]
        results.append(leaf.grad)
    if wanted == "conv.bias" and mode == "train":
        assert torch.equal(results[0], torch.zeros(8))
    else:
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def convolution_outputs(block: Any, x: Tensor, mode: str) -> list[bool]:
    """Which of the gradients for (x, weight, bias) the convolution's backward is asked for."""
    set_mode(block, mode)
    asked: list[list[bool]] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.convolution_backward.default:
                asked.append(list(args[-1]))
            return func(*args, **(kwargs or {}))

    y = block(x)
    with Record():
        y.sum().backward()
    assert len(asked) <= 1
    return asked[0] if asked else [False] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mode", ["train", "frozen", "frozen affine"])
def test_the_convolution_is_asked_for_nothing_else(mode: str, dtype: torch.dtype) -> None:
    block = make_block(4, 8, 3)
    block.conv.to(dtype)
    x = make_input(2).to(dtype)
    assert convolution_outputs(block, x, mode) == [False, True, False]  # the first layer: x needs none
    assert convolution_outputs(block, x.clone().requires_grad_(), mode) == [True, True, False]
    block.conv.requires_grad_(False)
    assert convolution_outputs(block, x.clone().requires_grad_(), mode) == [True, False, False]
    if mode != "frozen affine":
        assert convolution_outputs(block, x, mode) == [False, False, False]


@needs_kernel
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "relu6", "silu", "gelu", "hardswish", "identity"])
def test_what_a_frozen_block_keeps(activation: str, residual: bool) -> None:
    """For the ReLU family the output itself, which the next layer keeps anyway; else the activation's input."""
    block = make_block(4, 16, 3, padding=1, activation=activation)
    stock = Stock(block)
    x, z = torch.randn(4, 4, 16, 16), torch.randn(4, 16, 16, 16) if residual else None
    size = 4 * 16 * 16 * 16 * 4
    kept = []
    for module in (block, stock):
        set_mode(module, "frozen affine")
        outputs: list[Tensor] = []

        def run(module: Any = module, outputs: list[Tensor] = outputs) -> None:
            outputs.append(module(x, z))

        storages = [storage for storage in saved_storages(run) if storage.nbytes() == size]
        others = [storage for storage in storages if storage.data_ptr() != outputs[0].untyped_storage().data_ptr()]
        kept.append((len(storages), len(others)))
    smooth = activation in ("silu", "gelu", "hardswish")
    assert kept[0] == (0, 0) if activation == "identity" else kept[0] == (1, int(smooth))
    assert kept[0] <= kept[1]


def test_a_step_of_the_statistics_does_not_disturb_a_frozen_backward() -> None:
    block = make_block(4, 8, 3)
    set_mode(block, "frozen affine")
    other = copy.deepcopy(block)
    x = make_input(2)
    y = block(x)
    other(x).square().sum().backward()
    with torch.no_grad():
        block.bn.train()(torch.randn(4, 8, 5, 5))
    y.square().sum().backward()
    assert torch.equal(block.conv.weight.grad, other.conv.weight.grad)
