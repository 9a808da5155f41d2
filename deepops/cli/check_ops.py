"""What ``deepops check`` compares: for each op a function that yields results beside stock's and the oracle's.

To add an op, write such a function and one more line in ``CHECKS``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import deepops.backends
import deepops.functional
import deepops.nn
import deepops.optim
from deepops import reference
from deepops._conv_problem import gpu_reason
from deepops.cli.check_lstm import check_lstm, check_lstm_cell
from deepops.cli.check_types import Comparison, OpCheck, Setting
from deepops.testing import away_from_kinks, to_double

# ---- batch_norm_act --------------------------------------------------------------------------------------------------

_SHAPE = (5, 37, 6, 7)  # 37 channels and 42 positions: full vectors and a rest, on every instruction set
_ACTIVATIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("relu", {}),
    ("leaky_relu", {"negative_slope": 0.1}),
    ("leaky_relu", {"negative_slope": -0.1}),
    ("relu6", {}),
    ("silu", {}),
    ("gelu", {}),
    ("gelu", {"approximate": "tanh"}),
    ("hardswish", {}),
    ("identity", {}),
)


def _stock_batch_norm_act(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, training: bool, **options: Any
) -> Tensor:
    """What a user of stock PyTorch writes."""
    residual, activation = options.pop("residual"), options.pop("activation")
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training)
    return reference.activation(y if residual is None else y + residual, activation, **options)


def _batch_norm_act_inputs(setting: Setting, with_residual: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    statistics = torch.float64 if setting.dtype == torch.float64 else torch.float32

    def per_channel(low: float, high: float) -> Tensor:
        values = low + (high - low) * torch.rand(_SHAPE[1], generator=generator)
        return values.to(setting.device, statistics)

    return {
        "x": setting.tensor(*_SHAPE, generator=generator, scale=2.0) + 1,
        "running_mean": per_channel(-1, 1),
        "running_var": per_channel(0.5, 4),
        "weight": per_channel(0.5, 3),
        "bias": per_channel(-1, 1),
        "residual": setting.tensor(*_SHAPE, generator=generator) if with_residual else None,
    }


def _run_batch_norm_act(function: Callable[..., Tensor], inputs: dict[str, Any], grad_y: Tensor, **options: Any) -> Any:
    """Output, updated statistics and gradients of one implementation, by name."""
    fresh: dict[str, Any] = {name: None if value is None else value.clone() for name, value in inputs.items()}
    wanted = [name for name in ("x", "weight", "bias", "residual") if fresh[name] is not None]
    for name in wanted:
        fresh[name].requires_grad_()
    y = function(**fresh, **options)
    gradients = torch.autograd.grad(y, [fresh[name] for name in wanted], grad_y)
    results = {"y": y.detach(), "running_mean": fresh["running_mean"], "running_var": fresh["running_var"]}
    return results | {f"grad_{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}


def check_batch_norm_act(training: bool) -> Callable[[Setting], Iterator[Comparison]]:
    """Forward and backward of every activation, with and without a residual, in training or in evaluation."""

    def compare(setting: Setting) -> Iterator[Comparison]:
        for with_residual in (False, True):
            inputs = _batch_norm_act_inputs(setting, with_residual)
            exact = to_double(inputs)
            before = reference.batch_norm_act(**to_double(inputs), training=training, activation="identity")
            noise = setting.tensor(*_SHAPE, generator=torch.Generator().manual_seed(1))
            for activation, extra in _ACTIVATIONS:
                options = {"training": training, "activation": activation, **extra}
                grad_y = away_from_kinks(noise, before, activation)
                actual = _run_batch_norm_act(deepops.functional.batch_norm_act, inputs, grad_y, **options)
                stock = _run_batch_norm_act(_stock_batch_norm_act, inputs, grad_y, **options)
                oracle = _run_batch_norm_act(reference.batch_norm_act, exact, grad_y.double(), **options)
                name = ", ".join([activation, *(f"{k}={v}" for k, v in extra.items()), *["residual"] * with_residual])
                for output in actual:
                    if training or not output.startswith("running"):
                        yield Comparison(name, output, actual[output], stock[output], oracle[output])

    return compare


# ---- conv_bn_act -----------------------------------------------------------------------------------------------------


_CONVOLUTIONS = {
    1: (deepops.nn.ConvBNReLU1d, nn.Conv1d, nn.BatchNorm1d, (90,)),
    2: (deepops.nn.ConvBNReLU2d, nn.Conv2d, nn.BatchNorm2d, (9, 10)),
    3: (deepops.nn.ConvBNReLU3d, nn.Conv3d, nn.BatchNorm3d, (5, 6, 4)),
}  # by spatial dimensions


@dataclass(frozen=True)
class _Block:
    """A block to check."""

    dims: int = 2
    inputs: int = 8
    outputs: int = 19
    kernel: int = 3
    groups: int = 1
    frozen: bool = False  # by running statistics, and without gradients of batch norm's parameters
    conv: deepops.backends.Conv = "auto"  # deepops.backends.conv, where there are the kernels for it


def check_conv_bn_act(block: _Block) -> Callable[[Setting], Iterator[Comparison]]:
    """A step and an evaluation of ConvBNReLU beside convolution, batch norm and ReLU; 16 bits by autocast."""

    def compare(setting: Setting) -> Iterator[Comparison]:
        lost = block.conv != "auto" and gpu_reason(torch.device(setting.device))
        with deepops.backends.flags(conv="auto" if lost else block.conv):
            for seed in range(3):
                yield from _conv_bn_act(setting, seed, block)

    return compare


def _conv_bn_act(setting: Setting, seed: int, block: _Block) -> Iterator[Comparison]:
    our_class, conv_class, norm_class, size = _CONVOLUTIONS[block.dims]
    inputs, outputs, kernel, groups, frozen = block.inputs, block.outputs, block.kernel, block.groups, block.frozen
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        conv = conv_class(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
        norm = norm_class(outputs)
        if frozen:  # statistics that are not the initial ones
            norm(conv(torch.randn(6, inputs, *size) * 2 + 1))
    ours = our_class(inputs, outputs, kernel, padding=kernel // 2, groups=groups)
    ours.conv.load_state_dict(conv.state_dict())
    ours.bn.load_state_dict(norm.state_dict())
    exact_conv, exact_norm = copy.deepcopy(conv).double(), copy.deepcopy(norm).double()
    models: dict[str, tuple[nn.Module, Any, Any]] = {
        "ours": (ours, ours.conv, ours.bn),
        "stock": (nn.Sequential(conv, norm, nn.ReLU()), conv, norm),
        "oracle": (nn.Sequential(exact_conv, exact_norm, nn.ReLU()), exact_conv, exact_norm),
    }
    for model, _, _ in models.values():
        model.to(setting.device)

    generator = torch.Generator().manual_seed(seed)
    # Not centered, as images are not: the running mean is then a number of weight, not what rounding left of zero.
    x = Setting(setting.device, torch.float32, setting.layout).tensor(6, inputs, *size, generator=generator) + 1
    noise = torch.randn(6, outputs, *size, generator=generator).to(setting.device)
    with torch.no_grad():
        statistics = (exact_norm.running_mean, exact_norm.running_var) if frozen else (None, None)
        before = F.batch_norm(exact_conv(x.double()), *statistics, training=not frozen)
    grad_y = away_from_kinks(noise, before, "relu")
    results = {name: _conv_step(*layers, x, grad_y, setting.dtype, frozen) for name, layers in models.items()}
    for output in results["oracle"]:
        yield Comparison(f"seed {seed}", output, *(results[name][output] for name in ("ours", "stock", "oracle")))


def _conv_step(
    model: nn.Module, conv: Any, norm: Any, x: Tensor, grad_y: Tensor, dtype: torch.dtype, frozen: bool
) -> dict[str, Tensor]:
    """Output, gradients and statistics of one training step, then the output in evaluation."""
    is_oracle = conv.weight.dtype == torch.float64
    x = (x.double() if is_oracle else x.clone()).requires_grad_()
    autocast = torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32 and not is_oracle)
    model.train()
    norm.train(not frozen).requires_grad_(not frozen)
    with autocast:
        y = model(x)
    wanted = {"x": x, "conv_weight": conv.weight} | ({} if frozen else {"weight": norm.weight, "bias": norm.bias})
    gradients = torch.autograd.grad(y, list(wanted.values()), grad_y.to(y.dtype))
    with autocast, torch.no_grad():
        y_eval = model.eval()(x)
    results = {"y": y.detach(), **{f"grad_{name}": grad for name, grad in zip(wanted, gradients, strict=True)}}
    if not frozen:
        results |= {"running_mean": norm.running_mean, "running_var": norm.running_var}
    return {**results, "y_eval": y_eval}


# ---- optimizers ------------------------------------------------------------------------------------------------------

_SIZES = (1, 7, 64, 1000, 4097)
_OPTIMIZER_OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "Adam": ({}, {"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True, "betas": (0.8, 0.95)}),
    "AdamW": ({}, {"weight_decay": 0.1, "amsgrad": True}),
    "SGD": ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {"maximize": True}),
    "RMSprop": ({}, {"momentum": 0.9}, {"centered": True}, {"weight_decay": 0.1, "maximize": True, "alpha": 0.9}),
}


def check_optimizer(name: str) -> Callable[[Setting], Iterator[Comparison]]:
    """Three steps on tensors of several sizes; all of them are compared as one vector. ``name``: the class."""

    def compare(setting: Setting) -> Iterator[Comparison]:
        ours, stock = getattr(deepops.optim, name), getattr(torch.optim, name)
        for options in _OPTIMIZER_OPTIONS[name]:
            generator = torch.Generator().manual_seed(0)
            start = [setting.tensor(size, generator=generator) for size in _SIZES]
            gradients = [[_away_from_zero(setting, size, generator) for size in _SIZES] for _ in range(3)]
            actual = _train(ours, start, gradients, options)
            plain = _train(stock, start, gradients, {**options, "foreach": False})
            oracle = _train(stock, to_double(start), to_double(gradients), {**options, "foreach": False})
            case = ", ".join(f"{key}={value}" for key, value in options.items()) or "defaults"
            for output in oracle:
                yield Comparison(case, output, actual[output], plain[output], oracle[output])

    return compare


def check_master_weights(setting: Setting) -> Iterator[Comparison]:
    """Parameters of 16 bits with master weights are a float32 run, rounded: nothing but that rounding is allowed."""
    for master in (True, "split"):
        generator = torch.Generator().manual_seed(0)
        start = [setting.tensor(size, generator=generator) for size in _SIZES]
        gradients = [[_away_from_zero(setting, size, generator) for size in _SIZES] for _ in range(3)]
        wide = [[gradient.float() for gradient in step] for step in gradients]
        actual = _train(deepops.optim.AdamW, start, gradients, {"master_weights": master})
        stock = _train(torch.optim.AdamW, [value.float() for value in start], wide, {"foreach": False})
        oracle = _train(torch.optim.AdamW, to_double(start), to_double(gradients), {"foreach": False})
        for output in oracle:
            yield Comparison(f"master_weights={master}", output, actual[output], stock[output], oracle[output])


def _away_from_zero(setting: Setting, size: int, generator: torch.Generator) -> Tensor:
    """Random gradients whose squares fp16 moments can hold; smaller ones divide by zero in stock's Adam."""
    gradient = setting.tensor(size, generator=generator)
    return gradient + torch.where(gradient < 0, -0.5, 0.5).to(gradient.dtype)


def _train(
    make: Callable[..., Optimizer], start: list[Tensor], gradients: list[list[Tensor]], options: dict[str, Any]
) -> dict[str, Tensor]:
    """Parameters and states after one step per entry of ``gradients``."""
    parameters = [nn.Parameter(value.clone()) for value in start]
    optimizer = make(parameters, lr=0.01, **options)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    names = [name for name in optimizer.state[parameters[0]] if name != "step"]
    results = {name: torch.cat([optimizer.state[p][name] for p in parameters]) for name in names}
    return {"parameters": torch.cat([p.detach() for p in parameters]), **results}


CHECKS: tuple[OpCheck, ...] = (
    OpCheck("batch_norm_act train", "batch_norm_act_train", check_batch_norm_act(training=True)),
    OpCheck("batch_norm_act eval", "batch_norm_act_eval", check_batch_norm_act(training=False)),
    OpCheck("conv_bn_act 1d", "batch_norm_act_train", check_conv_bn_act(_Block(dims=1)), layouts=("contiguous",)),
    OpCheck("conv_bn_act 2d", "batch_norm_act_train", check_conv_bn_act(_Block())),
    OpCheck("conv_bn_act 3d", "batch_norm_act_train", check_conv_bn_act(_Block(dims=3))),
    OpCheck("conv_bn_act frozen", "batch_norm_act_train", check_conv_bn_act(_Block(frozen=True))),
    OpCheck("conv_bn_act depthwise", "depthwise_bn_act_train", check_conv_bn_act(_Block(inputs=19, groups=19))),
    OpCheck("conv_bn_act expanding 1x1", "pointwise_bn_act_train", check_conv_bn_act(_Block(outputs=40, kernel=1))),
    # In training the statistics' op, in evaluation the other; on tensor cores and, for few channels, without them.
    OpCheck(
        "conv_bn_act fused",
        "conv_bn_act_eval",
        check_conv_bn_act(_Block(inputs=16, conv="fused")),
        (torch.bfloat16, torch.float16),
        ("channels_last",),
        ("cuda",),
    ),
    OpCheck(
        "conv_bn_act fused, RGB",
        "conv_bn_act_eval",
        check_conv_bn_act(_Block(inputs=3, conv="fused")),
        layouts=("channels_last",),
        devices=("cuda",),
    ),
    OpCheck("lstm", "lstm_sequence", check_lstm, layouts=("contiguous",)),
    OpCheck("lstm_cell", "lstm_cell", check_lstm_cell, layouts=("contiguous",)),
    OpCheck("adam", "adam", check_optimizer("Adam"), layouts=("contiguous",)),
    OpCheck("adamw", "adam", check_optimizer("AdamW"), layouts=("contiguous",)),
    OpCheck("sgd", "sgd", check_optimizer("SGD"), layouts=("contiguous",)),
    OpCheck("rmsprop", "rmsprop", check_optimizer("RMSprop"), layouts=("contiguous",)),
    OpCheck("master weights", "adam", check_master_weights, (torch.bfloat16, torch.float16), ("contiguous",)),
)
