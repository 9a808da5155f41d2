"""Both ways of convolution blocks on a GPU: ``python -m benchmarks.conv_ways`` (`make gpu` runs it).

deepops' fused convolution against torch's (cuDNN's) with the rest in one pass, forward in training and evaluation, on
the blocks of ResNet-18 and ResNet-50 for images of 224 x 224 and of the course CNN for 28 x 28, in channels_last. Each
line has both times, the ratio, and the share of what the device was measured to be able to: the time that the block's
products take at the speed of a large matrix product, or its bytes at that of a large copy, whichever is longer, over
the time of the fused way.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import deepops
import deepops.nn
from benchmarks import harness
from benchmarks.harness import Case, Sample

BATCH = 32
WAYS: dict[str, deepops.backends.Conv] = {"torch": "aten", "deepops": "fused"}  # provider -> deepops.backends.conv


class Block(NamedTuple):
    """Images and filters of a block."""

    inputs: int
    outputs: int
    size: int  # of the input
    kernel: int
    stride: int = 1
    residual: bool = False
    batch: int = BATCH

    @property
    def name(self) -> str:
        """E.g. ``"3x3/2 64->128, 56"``."""
        stride = f"/{self.stride}" if self.stride > 1 else ""
        residual = " + residual" if self.residual else ""
        return f"{self.kernel}x{self.kernel}{stride} {self.inputs}->{self.outputs}, {self.size}{residual}"

    @property
    def pixels(self) -> int:
        """Of the output, in all images."""
        side = (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1
        return self.batch * side * side

    @property
    def operations(self) -> int:
        """Multiplications and additions of the convolution."""
        return 2 * self.pixels * self.outputs * self.inputs * self.kernel**2


RESNET_18 = [
    Block(3, 64, 224, 7, 2),
    Block(64, 64, 56, 3),
    Block(64, 64, 56, 3, residual=True),
    Block(64, 128, 56, 3, 2),
    Block(64, 128, 56, 1, 2),
    Block(128, 128, 28, 3, residual=True),
    Block(128, 256, 28, 3, 2),
    Block(128, 256, 28, 1, 2),
    Block(256, 256, 14, 3, residual=True),
    Block(256, 512, 14, 3, 2),
    Block(256, 512, 14, 1, 2),
    Block(512, 512, 7, 3, residual=True),
]
RESNET_50 = [
    Block(64, 64, 56, 1),
    Block(64, 256, 56, 1, residual=True),
    Block(256, 64, 56, 1),
    Block(256, 128, 56, 1),
    Block(128, 128, 56, 3, 2),
    Block(256, 512, 56, 1, 2),
    Block(128, 512, 28, 1, residual=True),
    Block(512, 128, 28, 1),
    Block(512, 256, 28, 1),
    Block(256, 256, 28, 3, 2),
    Block(512, 1024, 28, 1, 2),
    Block(256, 1024, 14, 1, residual=True),
    Block(1024, 256, 14, 1),
    Block(1024, 512, 14, 1),
    Block(512, 512, 14, 3, 2),
    Block(1024, 2048, 14, 1, 2),
    Block(512, 2048, 7, 1, residual=True),
    Block(2048, 512, 7, 1),
]
COURSE = [Block(1, 32, 28, 3), Block(32, 64, 14, 3)]
NETWORKS = {"ResNet-18": RESNET_18, "ResNet-50": RESNET_50, "course CNN": COURSE}


class Peaks(NamedTuple):
    """What the device was measured to do in a second."""

    operations: float  # of a large matrix product
    bytes: float  # read and written by a large copy


class Row(NamedTuple):
    """A block, one way against the other."""

    network: str
    block: Block
    dtype: torch.dtype
    training: bool
    samples: dict[str, Sample]
    least: float  # ms, see ``least_milliseconds``

    @property
    def ratio(self) -> float:
        """How many times as fast the fused way is."""
        return self.samples["torch"].median / self.samples["deepops"].median

    @property
    def share(self) -> float:
        """Of the device's peak."""
        return self.least / self.samples["deepops"].median


def peaks(dtype: torch.dtype, device: str, side: int = 8192) -> Peaks:
    """Of ``device``, by a product of two square matrices and a copy of one of them."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    to = torch.empty_like(a)

    def best(call: Callable[[], object]) -> float:
        call()
        return min(harness.TIMERS[device](call, 3) for _ in range(5)) / 1e3

    return Peaks(2 * side**3 / best(lambda: torch.mm(a, b, out=to)), 2 * a.nbytes / best(lambda: to.copy_(a)))


def least_milliseconds(block: Block, item: int, training: bool, peaks: Peaks) -> float:
    """The block at the device's peak: every tensor is moved once, in training the convolution's result three times.

    item: bytes of a value.
    """
    x, weights = block.batch * block.inputs * block.size**2, block.outputs * block.inputs * block.kernel**2
    y = block.pixels * block.outputs
    residual = y if block.residual else 0
    moved = x + weights + y + (0 if training else residual)
    seconds = max(block.operations / peaks.operations, moved * item / peaks.bytes)
    if training:  # the pass that normalizes
        seconds += (2 * y + residual) * item / peaks.bytes
    return seconds * 1e3


def providers(block: Block, dtype: torch.dtype, training: bool, device: str) -> dict[str, Callable[[], Tensor]]:
    """Both ways of one block with the same weights."""
    options = {"stride": block.stride, "padding": block.kernel // 2, "device": device}
    module = deepops.nn.ConvBNReLU2d(block.inputs, block.outputs, block.kernel, **options)  # type: ignore[arg-type]
    module.conv.to(dtype)
    module.to(memory_format=torch.channels_last).train(training)
    x = torch.randn(block.batch, block.inputs, block.size, block.size, device=device).to(dtype)
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        residual = torch.randn_like(module.conv(x)) if block.residual else None

    def way(conv: deepops.backends.Conv) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad(), deepops.backends.flags(conv=conv):
                return module(x, residual)  # type: ignore[no-any-return]

        return call

    return {provider: way(conv) for provider, conv in WAYS.items()}


def rows(networks: dict[str, list[Block]], device: str, quick: bool, side: int = 8192) -> Iterator[Row]:
    """Every block in fp16, first layers in fp32 too, in training and evaluation."""
    measured: dict[torch.dtype, Peaks] = {}
    for network, blocks in networks.items():
        for block in blocks:
            for dtype in (torch.float16, torch.float32) if block.inputs <= 4 else (torch.float16,):
                limits = measured.get(dtype) or measured.setdefault(dtype, peaks(dtype, device, side))
                for training in (True, False):
                    case = Case(block.name, network, providers(block, dtype, training, device), seconds=0.5)
                    least = least_milliseconds(block, dtype.itemsize, training, limits)
                    yield Row(network, block, dtype, training, harness.measure(case, quick=quick, device=device), least)


HEAD = f"{'':12}{'block':34}{'dtype':9}{'':12}{'torch ms':>10}{'deepops ms':>12}{'ratio':>7}{'of peak':>9}"


def line(row: Row) -> str:
    """One line of the table."""
    what = f"{row.network:12}{row.block.name:34}{str(row.dtype).removeprefix('torch.'):9}"
    times = f"{row.samples['torch'].median:10.4f}{row.samples['deepops'].median:12.4f}"
    return f"{what}{'training' if row.training else 'evaluation':12}{times}{row.ratio:7.2f}{row.share:9.0%}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conv_ways", description="Times both convolutions.")
    parser.add_argument("--quick", action="store_true", help="a tenth of the time")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("torch finds no CUDA device", file=sys.stderr)
        return 2
    print(HEAD)
    faster = []
    for row in rows(NETWORKS, "cuda", options.quick):
        print(line(row), flush=True)
        faster.append(row.ratio > 1)
    print(f"deepops' convolution is the faster one in {sum(faster)} of {len(faster)}: deepops.backends.conv = 'auto'")
    print("takes it there, and torch's elsewhere. Torch's in float32 may use TF32 (torch.backends.cudnn.allow_tf32).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
