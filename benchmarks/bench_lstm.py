"""LSTM, forward and backward: cells in a loop, whole layers, and the variants that stock PyTorch has no layer for.

Shapes are (steps, batch, size): as many inputs as hidden units. The baseline of a variant is what people write today:
stock modules put together to a cell, called in a Python loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import deepops
from benchmarks.harness import Case
from deepops.cli.side import count_saved_bytes

Shape = tuple[int, int, int]
LAYERS: list[Shape] = [(64, 1, 128), (64, 8, 64), (64, 32, 128), (64, 32, 256), (32, 64, 512)]
CELLS: dict[float, list[Shape]] = {  # by goal
    2.0: [(64, 1, 128), (64, 8, 64)],
    1.5: [(64, 32, 128)],
    1.25: [(64, 32, 256)],
    1.0: [(16, 64, 512), (16, 128, 512)],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "LayerNorm": {"layer_norm": True},
    "peepholes": {"peephole": True},
    "zoneout": {"zoneout": 0.1},
}


class StockCell(nn.Module):
    """A step of LayerNorm, peephole or zoneout LSTM from stock modules and functions."""

    def __init__(self, size: int, *, layer_norm: bool = False, peephole: bool = False, zoneout: float = 0.0) -> None:
        """``size``: of inputs and state; the rest as in ``deepops.nn.LSTM``."""
        super().__init__()
        self.inputs, self.recurrent = nn.Linear(size, 4 * size), nn.Linear(size, 4 * size)
        self.norms = nn.ModuleList(nn.LayerNorm(n) for n in (4 * size, 4 * size, size)) if layer_norm else None
        self.peepholes = nn.Parameter(torch.randn(3, size) / 10) if peephole else None
        self.zoneout = zoneout

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The new state."""
        a, r = self.inputs(x), self.recurrent(h)
        if self.norms is not None:
            a, r = self.norms[0](a), self.norms[1](r)
        i, f, g, o = (a + r).chunk(4, 1)
        if self.peepholes is not None:
            i, f = i + self.peepholes[0] * c, f + self.peepholes[1] * c
        new = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        if self.peepholes is not None:
            o = o + self.peepholes[2] * new
        out = torch.sigmoid(o) * torch.tanh(new if self.norms is None else self.norms[2](new))
        if self.zoneout:
            keep_h, keep_c = (torch.rand_like(t) < self.zoneout for t in (out, new))
            out, new = torch.where(keep_h, h, out), torch.where(keep_c, c, new)
        return out, new


def loop(cell: Callable[..., tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """The outputs of all steps of a stock variant."""
    h, c = (x.new_zeros(x.shape[1:]) for _ in range(2))
    outputs = []
    for step in x:
        h, c = cell(step, h, c)
        outputs.append(h)
    return torch.stack(outputs)


def cell_loop(cell: nn.Module, x: Tensor) -> Tensor:
    """The outputs of all steps of an ``LSTMCell``."""
    state = None
    outputs = []
    for step in x:
        state = cell(step, state)
        outputs.append(state[0])
    return torch.stack(outputs)


def layer(module: nn.Module, x: Tensor) -> Tensor:
    """The outputs of all steps of an ``LSTM``."""
    output: Tensor = module(x)[0]
    return output


def step(module: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor], shape: Shape, dtype: torch.dtype) -> Any:
    """A forward and a backward with respect to the input and all parameters."""
    torch.manual_seed(0)
    module = module.to(dtype)
    x = torch.randn(shape, dtype=dtype).requires_grad_()
    grad = torch.randn(forward(module, x).shape, dtype=dtype)
    wanted = (x, *module.parameters())

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(module, x), wanted, grad)

    return run


def saved_bytes(module: nn.Module, shape: Shape) -> Callable[[], float]:
    """What the forward of a layer keeps for its backward, in kilobytes a step."""
    x = torch.randn(shape).requires_grad_()

    def run() -> float:
        with count_saved_bytes([x, *module.parameters()]) as counter:
            module(x)
        return counter.bytes / 1e3 / shape[0]

    return run


def text(shape: Shape) -> str:
    """64x32x128 for 64 steps, a batch of 32, 128 units."""
    return "x".join(map(str, shape))


def same_weights(stock: nn.Module, ours: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Both modules, with the weights of the first."""
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def cells() -> Iterator[Case]:
    """LSTMCell in a loop."""
    for goal, shapes in CELLS.items():
        for shape in shapes:
            pair = same_weights(nn.LSTMCell(shape[2], shape[2]), deepops.nn.LSTMCell(shape[2], shape[2]))
            stock, ours = (step(module, cell_loop, shape, torch.float32) for module in pair)
            sizes = " and ".join(f"({batch}, {size})" for _, batch, size in shapes)
            yield Case(text(shape), f"cell loop, (batch, size) = {sizes}", {"torch": stock, "deepops": ours}, goal=goal)


def layers() -> Iterator[Case]:
    """One layer against ``nn.LSTM``, in every dtype and with projections."""
    goals = {torch.float32: 0.97, torch.float64: 1.5, torch.float16: 1.5, torch.bfloat16: None}
    for dtype, goal in goals.items():
        for shape in LAYERS:
            pair = same_weights(nn.LSTM(shape[2], shape[2]), deepops.nn.LSTM(shape[2], shape[2]))
            stock, ours = (step(module, layer, shape, dtype) for module in pair)
            name = str(dtype).removeprefix("torch.")
            yield Case(text(shape), f"layer, {name}", {"torch": stock, "deepops": ours}, goal=goal)
    for goal, name, shapes in ((2.0, "small", LAYERS[:2]), (1.2, "large", LAYERS[2:])):
        for shape in shapes:
            size = shape[2]
            options = {"input_size": size, "hidden_size": size, "proj_size": size // 2}
            pair = same_weights(nn.LSTM(**options), deepops.nn.LSTM(**options))  # type: ignore[arg-type]
            stock, ours = (step(module, layer, shape, torch.float32) for module in pair)
            yield Case(text(shape), f"layer, proj_size, {name}", {"torch": stock, "deepops": ours}, goal=goal)


def variants() -> Iterator[Case]:
    """Layers of LayerNorm, peephole and zoneout LSTM against a Python loop."""
    for name, options in VARIANTS.items():
        for shape in LAYERS[:4]:
            stock = step(StockCell(shape[2], **options), loop, shape, torch.float32)
            ours = step(deepops.nn.LSTM(shape[2], shape[2], **options), layer, shape, torch.float32)
            yield Case(text(shape), f"layer, {name}", {"torch": stock, "deepops": ours}, goal=5.0)


def memory() -> Iterator[Case]:
    """Bytes kept for the backward."""
    for shape in LAYERS[2:4]:
        pair = same_weights(nn.LSTM(shape[2], shape[2]), deepops.nn.LSTM(shape[2], shape[2]))
        stock, ours = (saved_bytes(module, shape) for module in pair)
        providers = {"torch": stock, "deepops": ours}
        yield Case(text(shape), "saved per step", providers, goal=1.0, unit="kB", measured=True)


def cases() -> Iterator[Case]:
    """All of them."""
    yield from cells()
    yield from layers()
    yield from variants()
    yield from memory()
