"""Real training: a small CNN on handwritten digits reaches the loss that torch's optimizers reach, in every precision.

Seeds differ in initial weights and in the order of the images. The median of our runs has to lie within the range of
torch's over the same seeds. The convolution has no bias: before a batch norm its gradient is rounding noise alone,
which Adam and RMSprop make as large as any other.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import deepops.amp
import deepops.optim
from deepops._library import has_kernel

pytestmark = pytest.mark.skipif(not has_kernel("adam", "cpu"), reason="the kernels were not built")

SEEDS = range(3)
STEPS = {torch.float32: 50, torch.bfloat16: 50, torch.float16: 20}  # torch's fp16 convolution is very slow on the CPU
BATCH = 32
OPTIMIZERS = {
    "Adam": {"lr": 3e-3},
    "AdamW": {"lr": 3e-3},
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    "RMSprop": {"lr": 1e-3, "momentum": 0.5, "centered": True},
}


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = pytest.importorskip("sklearn.datasets").load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


def train(package, name: str, precision: torch.dtype, seed: int, digits: tuple[Tensor, Tensor]) -> float:
    """Loss over all images after a short training with the optimizer of torch or deepops."""
    images, labels = digits
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 10),
    )
    optimizer = getattr(package.optim, name)(model.parameters(), **OPTIMIZERS[name])
    scaler = package.amp.GradScaler("cpu", enabled=precision is torch.float16)
    autocast = torch.autocast("cpu", precision, enabled=precision is not torch.float32)
    for _ in range(STEPS[precision]):
        batch = torch.randint(len(images), (BATCH,))
        optimizer.zero_grad()
        with autocast:
            loss = nn.functional.cross_entropy(model(images[batch]).float(), labels[batch])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    with torch.no_grad():
        return nn.functional.cross_entropy(model.eval()(images), labels).item()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_reaches_the_loss_of_torch(name, precision, digits):
    ours, stock = (sorted(train(p, name, precision, seed, digits) for seed in SEEDS) for p in (deepops, torch))
    assert stock[-1] < 2.0, "torch's own runs do not learn: the test says nothing"
    assert stock[0] <= ours[len(ours) // 2] <= stock[-1], f"ours {ours}, torch's {stock}"
