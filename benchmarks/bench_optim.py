"""``step()`` of the optimizers, gradients in place: one large tensor, many small ones, and what real networks have.

All optimizers of a case step the same parameters, gradients and moments: where those lie in memory changes the time of
a large step by up to 1.4x, whichever optimizer takes it. The baseline is the fastest of torch's own steps: fused
(RMSprop has none), foreach and, where it ends in reasonable time, the for-loop.

The groups named "bandwidth" compare a step with an in-place ``add_`` that moves as many bytes: 1.0x is a step as fast
as this machine's memory. The groups named "small" measure what Python costs around the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

import deepops.amp
import deepops.optim
from benchmarks.harness import FASTEST, Case

Shapes = list[tuple[int, ...]]


def resnet50() -> Shapes:
    """The parameters of torchvision's ResNet-50: 161 tensors, 25.6 M elements."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for shape in ((planes, channels, 1, 1), (planes, planes, 3, 3), (4 * planes, planes, 1, 1)):
                shapes += [shape, shape[:1], shape[:1]]
            if block == 0:
                shapes += [(4 * planes, channels, 1, 1), (4 * planes,), (4 * planes,)]
            channels = 4 * planes
    return [*shapes, (1000, 2048), (1000,)]


def transformer(width: int, layers: int, others: Shapes) -> Shapes:
    """The parameters of a stack of transformer layers, and others."""
    layer = [(width,)] * 2 + [(3 * width, width), (3 * width,), (width, width), (width,)]
    layer += [(width,)] * 2 + [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [*others, *(shape for _ in range(layers) for shape in layer)]


NETWORKS: dict[str, Shapes] = {
    "ResNet-50": resnet50(),
    "ViT-B": transformer(768, 12, [(1, 197, 768), (768, 3, 16, 16), (768,), (768,), (768,), (1000, 768), (1000,)]),
    "GPT-2": transformer(768, 12, [(50257, 768), (1024, 768), (768,), (768,)]),
}

# Options, tensors that a step moves per parameter tensor, and goals: large, networks, many, small, bf16.
OPTIMIZERS: dict[str, tuple[dict[str, Any], int, tuple[float, float, float, float, float]]] = {
    "AdamW": ({}, 7, (0.98, 0.98, 6.0, 6.0, 1.4)),
    "SGD": ({"lr": 1e-5, "momentum": 0.9}, 5, (0.98, 0.98, 3.0, 4.0, 1.1)),
    "RMSprop": ({"lr": 1e-5}, 5, (4.5, 4.0, 8.0, 6.0, 4.0)),
}


def make_parameters(shapes: Shapes, dtype: torch.dtype) -> list[torch.Tensor]:
    """Random parameters that have their gradients."""
    torch.manual_seed(0)
    params = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def steppers(name: str, shapes: Shapes, dtype: torch.dtype, loop: bool = False) -> dict[str, Callable[[], object]]:
    """``step`` of each implementation of one optimizer over the same parameters and moments."""
    params, options = make_parameters(shapes, dtype), OPTIMIZERS[name][0]
    kinds: dict[str, dict[str, Any]] = {} if name == "RMSprop" else {"torch fused": {"fused": True}}
    kinds["torch foreach"] = {"foreach": True}
    if loop:
        kinds["torch for-loop"] = {"foreach": False}
    optimizers: dict[str, torch.optim.Optimizer] = {
        kind: getattr(torch.optim, name)(params, **options, **choice) for kind, choice in kinds.items()
    }
    optimizers["deepops"] = getattr(deepops.optim, name)(params, **options)
    first = next(iter(optimizers.values()))
    first.step()
    for optimizer in list(optimizers.values())[1:]:
        for param in params:
            for key, value in first.state[param].items():
                optimizer.state[param][key] = value.clone() if key == "step" else value
    return {kind: optimizer.step for kind, optimizer in optimizers.items()}


def bandwidth(name: str, shapes: Shapes, ours: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """Our step beside ``add_``, three tensors read or written, of a size that moves as many bytes."""
    elements = sum(torch.Size(shape).numel() for shape in shapes) * OPTIMIZERS[name][1] // 3
    a, b = torch.zeros(elements), torch.zeros(elements)
    return {"add_": lambda: a.add_(b), "deepops": ours}


def amp_steppers(shapes: Shapes) -> dict[str, Callable[[], object]]:
    """Unscale, clip to norm 1 and step: torch's way and ours. The scale is 1, so that each time does the same."""
    params = make_parameters(shapes, torch.float32)
    stock, ours = torch.optim.AdamW(params, fused=True), deepops.optim.AdamW(params, max_grad_norm=1.0)
    device = params[0].device.type
    stock_scaler, our_scaler = (
        cls(device, init_scale=1.0, growth_interval=10**9) for cls in (torch.amp.GradScaler, deepops.amp.GradScaler)
    )
    for scaler in (stock_scaler, our_scaler):
        scaler.scale(torch.ones((), device=device))

    def torch_way() -> None:
        stock_scaler.unscale_(stock)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        stock_scaler.step(stock)
        stock_scaler.update()

    def our_way() -> None:
        our_scaler.step(ours)
        our_scaler.update()

    torch_way()
    for param in params:
        for key, value in stock.state[param].items():
            ours.state[param][key] = value.clone() if key == "step" else value
    return {"torch": torch_way, "deepops": our_way}


def cases_of(name: str) -> Iterator[Case]:
    """The cases of one optimizer."""
    large, networks, many, small, bf16 = OPTIMIZERS[name][2]
    everything: Iterable[tuple[str, str, Shapes, float, bool]] = (
        ("1 x 32 M", "large", [(32 * 2**20,)], large, False),
        *((network, "networks", shapes, networks, False) for network, shapes in NETWORKS.items()),
        ("1000 x 1,000", "many", [(1000,)] * 1000, many, True),
        ("200 x 64", "small", [(64,)] * 200, small, True),
    )
    for case, group, shapes, goal, loop in everything:
        providers = steppers(name, shapes, torch.float32, loop)
        yield Case(case, f"{name} {group}", providers, baseline=FASTEST, goal=goal)
        if group == "networks":
            beside = bandwidth(name, shapes, providers["deepops"])
            yield Case(case, f"{name} bandwidth", beside, baseline="add_", goal=0.9)
    providers = steppers(name, NETWORKS["ResNet-50"], torch.bfloat16)
    yield Case("ResNet-50", f"{name} bf16", providers, baseline=FASTEST, goal=bf16)


def cases() -> Iterator[Case]:
    """All optimizers; then AdamW's whole mixed-precision step."""
    for name in OPTIMIZERS:
        yield from cases_of(name)
    yield Case("ViT-B", "AdamW unscale, clip, step", amp_steppers(NETWORKS["ViT-B"]), goal=1.8)
