"""The convolution block inside the course CNN: its training step by precision, and what a block saves for backward.

The baseline is the loop of the course module as any user would write it, with stock layers and stock Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import deepops.nn
from benchmarks.harness import Case
from deepops.cli.models import OPTIMIZERS, build_pair
from deepops.cli.side import count_saved_bytes

BATCH = 32


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
    """Training steps, then bytes."""
    for name, precision, goal in (
        ("fp32", torch.float32, 1.3),
        ("bf16", torch.bfloat16, None),
        ("fp16", torch.float16, 10),
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
