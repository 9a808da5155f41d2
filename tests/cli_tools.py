"""What the tests of the command line share: IDX files, and the command, called or as a process."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deepops
from deepops.cli import main

PACKAGES = Path(deepops.__file__).parent.parent  # a process imports the deepops that is tested here
NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx_bytes(data: Tensor) -> bytes:
    """The IDX file of a uint8 tensor."""
    return struct.pack(f">BBBB{data.dim()}I", 0, 0, 8, data.dim(), *data.shape) + bytes(data.flatten().tolist())


def write_idx(folder: Path, *, prefix: str = "", gz: bool = False, side: int = 28) -> None:
    """Four IDX files, 12 random images to train and 5 to test; the label of image i is i % 10."""
    generator = torch.Generator().manual_seed(0)
    for count, names in ((12, NAMES[:2]), (5, NAMES[2:])):
        images = torch.randint(0, 256, (count, side, side), generator=generator, dtype=torch.uint8)
        labels = (torch.arange(count) % 10).to(torch.uint8)
        for name, data in zip(names, (images, labels), strict=True):
            content = idx_bytes(data)
            path = folder / f"{prefix}{name}{'.gz' if gz else ''}"
            path.write_bytes(gzip.compress(content) if gz else content)


def report_of(out: Path, name: str, *options: str) -> dict[str, Any]:
    """The report ``name`` that ``deepops train`` with these options has written into the folder ``out``."""
    assert main(["train", *options, "--out", str(out)]) == 0
    report: dict[str, Any] = json.loads((out / name).read_text())
    return report


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGES), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "deepops", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
