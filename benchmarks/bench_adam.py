"""``step()`` of Adam, fp32, gradients in place: one large tensor, many small ones, and what a real network has.

All optimizers of a case step the same parameters, gradients and moments: where those lie in memory changes the time of
a large step by up to 1.4x, whichever optimizer takes it.

The baseline is torch's fused step; its foreach and for-loop steps are shown where they end in reasonable time. The
groups named "small" measure what Python costs around the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

import deepops.optim
from benchmarks.harness import Case

Shapes = list[tuple[int, ...]]

RESNET18: Shapes = [
    (64, 3, 7, 7),
    *[(channels, channels, 3, 3) for channels in (64, 128, 256, 512) for _ in range(3)],
    *[(2 * channels, channels, 3, 3) for channels in (64, 128, 256)],
    *[(channels,) for channels in (64, 128, 256, 512) for _ in range(10)],
    (1000, 512),
    (1000,),
]
OPTIMIZERS: dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]] = {
    "torch": lambda params: torch.optim.Adam(params, fused=True),
    "torch foreach": lambda params: torch.optim.Adam(params, foreach=True),
    "torch for-loop": lambda params: torch.optim.Adam(params, foreach=False),
    "deepops": lambda params: deepops.optim.Adam(params),
}


def steppers(names: Iterable[str], shapes: Shapes, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """``step`` of each optimizer over the same random parameters, which have their gradients."""
    torch.manual_seed(0)
    params = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    moments = [(torch.zeros_like(param), torch.zeros_like(param)) for param in params]
    steps: dict[str, Callable[[], object]] = {}
    for name in names:
        optimizer = OPTIMIZERS[name](params)
        for param, (exp_avg, exp_avg_sq) in zip(params, moments, strict=True):
            # as torch has it: without `fused` counters are on the CPU, where they are read without waiting for the GPU
            step = torch.tensor(0.0) if name in ("torch", "deepops") else torch.tensor(0.0, device="cpu")
            optimizer.state[param] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        steps[name] = optimizer.step
    return steps


def cases() -> Iterator[Case]:
    """The three cases with a goal, then two without."""
    fused = ("torch", "deepops")
    for case, group, shapes, goal, names in (
        ("1 x 32 M", "large", [(32 * 2**20,)], 0.95, fused),
        ("1000 x 1,000", "many", [(1000,)] * 1000, 5.0, OPTIMIZERS),
        ("200 x 64", "small", [(64,)] * 200, 4.0, OPTIMIZERS),
        ("ResNet-18", "network", RESNET18, None, OPTIMIZERS),
    ):
        yield Case(case, f"Adam {group}", steppers(names, shapes, torch.float32), goal=goal)
    for dtype in (torch.bfloat16, torch.float16):
        providers = steppers(fused, RESNET18, dtype)
        yield Case(f"ResNet-18, {str(dtype).removeprefix('torch.')}", "Adam network, 16-bit", providers)
