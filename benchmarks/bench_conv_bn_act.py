"""The convolution block inside the course CNN: its training step in fp32 and fp16, and what a block saves for backward.

The baseline is the loop of the course module as any user would write it, with stock layers and stock Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import deepops.nn
import deepops.optim
from benchmarks.harness import Case
from deepops.testing import saved_storages

BATCH = 32
Block = Callable[[int, int], nn.Module]


def stock_block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


def deepops_block(inputs: int, outputs: int) -> nn.Module:
    return deepops.nn.ConvBNReLU2d(inputs, outputs, 3, padding=1, bias=True)


def course_cnn(block: Block) -> nn.Module:
    """The CNN of the course module for 28x28 images, from the same weights whatever the block."""
    torch.manual_seed(0)
    return nn.Sequential(
        block(1, 32),
        nn.MaxPool2d(2),
        block(32, 64),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 128),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(128, 10),
    )


def training_step(block: Block, adam: type[torch.optim.Adam], precision: torch.dtype) -> Callable[[], float]:
    """One step of the course's loop: forward, loss, backward, update. fp16 means autocast with a gradient scaler."""
    model = course_cnn(block).train()
    optimizer = adam(model.parameters(), lr=1e-3, weight_decay=1e-4)
    criterion = nn.CrossEntropyLoss()
    scaler = torch.amp.GradScaler("cpu", enabled=precision is torch.float16)
    images, labels = torch.randn(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=precision, enabled=precision is not torch.float32):
            loss: Tensor = criterion(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    return step


def block_bytes(block: Block, inputs: int, outputs: int, size: int) -> Callable[[], float]:
    """KiB that one block keeps for its backward, without input, parameters and buffers."""
    module = block(inputs, outputs)
    x = torch.randn(BATCH, inputs, size, size, requires_grad=True)
    alive = {tensor.untyped_storage().data_ptr() for tensor in (x, *module.parameters(), *module.buffers())}

    def kibibytes() -> float:
        storages = saved_storages(lambda: module(x))
        return sum(storage.nbytes() for storage in storages if storage.data_ptr() not in alive) / 1024

    return kibibytes


def cases() -> Iterator[Case]:
    """Training steps, then bytes."""
    for name, precision, goal, seconds in (("fp32", torch.float32, 1.3, 6.0), ("fp16", torch.float16, 10, 6.0)):
        yield Case(
            f"course CNN, batch {BATCH}",
            f"training step {name}",
            {
                "torch": training_step(stock_block, torch.optim.Adam, precision),
                "deepops": training_step(deepops_block, deepops.optim.Adam, precision),
            },
            goal=goal,
            seconds=seconds,
        )
    for inputs, outputs, size in ((1, 32, 28), (32, 64, 14)):
        yield Case(
            f"{inputs}->{outputs}, {size}x{size}",
            "bytes saved for backward",
            {
                name: block_bytes(b, inputs, outputs, size)
                for name, b in (("torch", stock_block), ("deepops", deepops_block))
            },
            goal=2,  # half of stock's
            unit="KiB",
            measured=True,
            seconds=0,
        )
