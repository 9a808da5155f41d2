"""The convolution block: by itself in the shapes of known networks, and inside the course CNN.

Blocks: forward and backward, or evaluation, of ``conv, bn, act`` with the baseline in the faster of its two memory
formats and its activation in place. The course CNN: a training step of the course module's loop as any user would write
it, with stock layers and stock Adam.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import deepops.nn
from benchmarks.harness import FASTEST, Case
from deepops.cli.models import OPTIMIZERS, build_pair
from deepops.cli.side import count_saved_bytes

BATCH = 32
NCHW, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


class Block(NamedTuple):
    """A convolution block of a network and the size of its input."""

    batch: int
    inputs: int
    outputs: int
    size: int
    kernel: int
    stride: int = 1
    groups: int = 1
    activation: str = "relu"

    @property
    def is_depthwise(self) -> bool:
        """Each channel by itself."""
        return self.groups == self.inputs > 1

    @property
    def is_expanding(self) -> bool:
        """1x1, to several times as many channels."""
        return self.kernel == 1 and self.outputs > 2 * self.inputs

    def make(self, memory_format: torch.memory_format) -> tuple[nn.Module, nn.Module, Tensor]:
        """``(stock, ours, x)`` with equal weights; a first layer's input needs no gradient."""
        ours = deepops.nn.ConvBNAct2d(
            self.inputs,
            self.outputs,
            self.kernel,
            self.stride,
            self.kernel // 2,
            groups=self.groups,
            activation=self.activation,
        )
        conv, bn, act = copy.deepcopy(ours).to_modules()
        if isinstance(act, nn.ReLU | nn.ReLU6):
            act.inplace = True
        x = torch.randn(self.batch, self.inputs, self.size, self.size).to(memory_format=memory_format)
        stock = nn.Sequential(conv, bn, act).to(memory_format=memory_format)
        return stock, ours.to(memory_format=memory_format), x.requires_grad_(self.inputs > 3)


BLOCKS = {
    "ResNet 7x7/2 3->64, 224": Block(8, 3, 64, 224, 7, 2),
    "ResNet 3x3 64, 56": Block(16, 64, 64, 56, 3),
    "ResNet 3x3 128, 28": Block(16, 128, 128, 28, 3),
    "ResNet 3x3 256, 14": Block(16, 256, 256, 14, 3),
    "ResNet 3x3 512, 7": Block(16, 512, 512, 7, 3),
    "ResNet 1x1 64->256, 56": Block(16, 64, 256, 56, 1),
    "ResNet 1x1 256->64, 56": Block(16, 256, 64, 56, 1),
    "ResNet 1x1 128->512, 28": Block(16, 128, 512, 28, 1),
    "ResNet 1x1 256->1024, 14": Block(16, 256, 1024, 14, 1),
    "ResNet 1x1 1024->256, 14": Block(16, 1024, 256, 14, 1),
    "ResNet 1x1 512->2048, 7": Block(16, 512, 2048, 7, 1),
    "MobileNetV2 1x1 16->96, 112": Block(8, 16, 96, 112, 1, activation="relu6"),
    "MobileNetV2 3x3/2 96, 112": Block(8, 96, 96, 112, 3, 2, 96, "relu6"),
    "MobileNetV2 1x1 24->144, 56": Block(8, 24, 144, 56, 1, activation="relu6"),
    "MobileNetV2 3x3 144, 56": Block(8, 144, 144, 56, 3, 1, 144, "relu6"),
    "MobileNetV2 1x1 144->24, 56": Block(8, 144, 24, 56, 1, activation="identity"),
    "MobileNetV2 1x1 32->192, 28": Block(8, 32, 192, 28, 1, activation="relu6"),
    "MobileNetV2 3x3 192, 28": Block(8, 192, 192, 28, 3, 1, 192, "relu6"),
    "MobileNetV2 1x1 64->384, 14": Block(8, 64, 384, 14, 1, activation="relu6"),
    "MobileNetV2 3x3 384, 14": Block(8, 384, 384, 14, 3, 1, 384, "relu6"),
    "MobileNetV2 1x1 160->960, 7": Block(8, 160, 960, 7, 1, activation="relu6"),
    "MobileNetV2 3x3 960, 7": Block(8, 960, 960, 7, 3, 1, 960, "relu6"),
    "course 3x3 1->32, 28": Block(32, 1, 32, 28, 3),
    "course 3x3 32->64, 14": Block(32, 32, 64, 14, 3),
}


def forward_and_backward(module: nn.Module, x: Tensor, precision: torch.dtype = torch.float32) -> Callable[[], None]:
    """Of one block; its gradients are dropped afterwards, as ``zero_grad()`` does.

    Other precisions than float32: under autocast, as in a network whose blocks before have rounded ``x``.
    """
    x = x.detach().to(precision).requires_grad_(x.requires_grad)
    leaves = [*module.parameters(), x]
    autocast = torch.autocast(x.device.type, dtype=precision, enabled=precision is not torch.float32)
    with autocast:
        grad = torch.randn_like(module(x))

    def run() -> None:
        with autocast:
            y = module(x)
        y.backward(grad)
        for leaf in leaves:
            leaf.grad = None

    return run


def evaluation(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """Of one block, without gradients."""
    module.eval()

    def run() -> None:
        with torch.no_grad():
            module(x)

    return run


def block_case(
    name: str, group: str, goal: float, run: Callable[[nn.Module, Tensor], Callable[[], None]], batch: int | None = None
) -> Case:
    """Ours in channels_last against stock's faster one."""
    block = BLOCKS[name] if batch is None else BLOCKS[name]._replace(batch=batch)
    plain, _, x = block.make(NCHW)
    stock, ours, x_last = block.make(CHANNELS_LAST)
    providers = {
        "torch": run(plain, x),
        "torch channels_last": run(stock, x_last),
        "deepops": run(ours, x_last),
    }
    return Case(name, group, providers, baseline=FASTEST, goal=goal, seconds=2.0)


def nchw_case(name: str) -> Case:
    """Both in NCHW."""
    stock, ours, x = BLOCKS[name].make(NCHW)
    providers = {"torch": forward_and_backward(stock, x), "deepops": forward_and_backward(ours, x)}
    return Case(name, "block training, NCHW", providers, goal=1.4, seconds=1.5)


def block_cases() -> Iterator[Case]:
    """Every block by itself."""
    narrow = [name for name, block in BLOCKS.items() if block.is_depthwise or block.is_expanding]
    for name in BLOCKS:
        yield block_case(name, "block training", 1.3, forward_and_backward)
    for name in narrow:
        yield block_case(name, "block training, depthwise and expanding 1x1", 1.6, forward_and_backward)
    for name in BLOCKS:
        yield block_case(name, "block evaluation", 1.5, evaluation)
    for name in BLOCKS:
        yield nchw_case(name)
    for name in BLOCKS:  # stock takes seconds
        run = partial(forward_and_backward, precision=torch.float16)
        yield block_case(name, "block training, fp16", 10, run, batch=8)


def training_step(side: str, precision: torch.dtype) -> Callable[[], float]:
    """One step of the course's loop: forward, loss, backward, update.

    Args:
        side: ``"stock"`` or ``"deepops"``; both start from the same weights.
        precision: ``torch.float32``; ``torch.bfloat16``: autocast; ``torch.float16``: autocast with a gradient scaler.
    """
    model = build_pair("cnn", seed=0)[side].train()
    optimizer = OPTIMIZERS["adam"].build(side, model.parameters())
    criterion = nn.CrossEntropyLoss()
    device = torch.get_default_device().type
    scaler = torch.amp.GradScaler(device, enabled=precision is torch.float16)
    images, labels = torch.randn(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast(device, dtype=precision, enabled=precision is not torch.float32):
            loss: Tensor = criterion(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    return step


def block_bytes(module: nn.Module, inputs: int, size: int) -> Callable[[], float]:
    """KiB that one block keeps for its backward, without input, parameters and buffers."""
    x = torch.randn(BATCH, inputs, size, size, requires_grad=True)
    known = [x, *module.parameters(), *module.buffers()]

    def kibibytes() -> float:
        with count_saved_bytes(known) as counter:
            module(x)
        return counter.bytes / 1024

    return kibibytes


def cases() -> Iterator[Case]:
    """Training steps of the course CNN, bytes, blocks: these last, because large ones change what memory costs."""
    for name, precision, goal in (
        ("fp32", torch.float32, 1.3),
        ("bf16", torch.bfloat16, None),
        ("fp16", torch.float16, 10),  # of what is left torch's Linear and MaxPool2d take more than half
    ):
        yield Case(
            f"course CNN, batch {BATCH}",
            f"training step {name}",
            {"torch": training_step("stock", precision), "deepops": training_step("deepops", precision)},
            goal=goal,
            seconds=6.0,
        )
    for inputs, outputs, size in ((1, 32, 28), (32, 64, 14)):
        stock = nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())
        ours = deepops.nn.ConvBNReLU2d(inputs, outputs, 3, padding=1, bias=True)
        yield Case(
            f"{inputs}->{outputs}, {size}x{size}",
            "bytes saved for backward",
            {"torch": block_bytes(stock, inputs, size), "deepops": block_bytes(ours, inputs, size)},
            goal=2,  # half of stock's
            unit="KiB",
            measured=True,
            seconds=0,
        )
    yield from block_cases()
