"""What ``deepops train --data`` offers: real digits, random images, files in MNIST's IDX format, or a text."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor

from deepops.cli.errors import UserError, first_line, require
from deepops.cli.text import load_text
from deepops.cli.training_data import TrainingData

SIDE = 28  # images are SIDE x SIDE, as the module's CNN expects
CLASSES = 10


def load_data(source: str, seed: int, kind: str = "images") -> TrainingData:
    """Load data of a ``kind``: "images" or "text".

    Args:
        source: for images "digits", "synthetic", a folder with IDX files, or the common beginning of their paths; for a
            text "python", or the path of a file.
        seed: chooses the split (digits) or the images (synthetic).
        kind: what the model takes.

    Raises:
        UserError: nothing there, a damaged file, files that do not belong together, data of another kind.
    """
    if kind == "text":
        if source in ("digits", "synthetic"):
            raise UserError(f"--data {source}: the model takes a text: python, or the path of a file")
        return load_text(source)
    if source == "python":
        raise UserError("--data python: the model takes images: digits, synthetic, or the path of IDX files")
    if source == "digits":
        return _digits(seed)
    if source == "synthetic":
        return _synthetic(seed)
    return _idx(source)


def with_label_noise(data: TrainingData, fraction: float, seed: int) -> TrainingData:
    """``data`` with this part of the training labels wrong: another class at random, every other one equally likely.

    For one seed the labels that are wrong at a smaller fraction are wrong at a larger one too, in the same way.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = data.train_targets.clone()
    chosen = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    shift = torch.randint(1, CLASSES, labels.shape, generator=generator)
    labels[chosen] = (labels[chosen] + shift[chosen]) % CLASSES
    return replace(data, train_targets=labels)


def _resized(images: Tensor) -> Tensor:
    """[N, height, width] -> [N, 1, 28, 28], bilinear."""
    images = images.unsqueeze(1)
    if images.shape[-2:] == (SIDE, SIDE):
        return images
    return F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)


def _digits(seed: int) -> TrainingData:
    """scikit-learn's 1,797 handwritten digits (8x8, grey values 0-16), a fifth of each class kept for the test."""
    require("sklearn")
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

    digits = load_digits()
    images = _resized(torch.from_numpy(digits.images).float() / 16)
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=0.2, random_state=seed, stratify=digits.target
    )
    return TrainingData("digits", images[train], labels[train], images[test], labels[test])


def _synthetic(seed: int) -> TrainingData:
    """The course module's random data: 500 images of noise with random labels, and 100 more for the test."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(600, 1, SIDE, SIDE, generator=generator)
    labels = torch.randint(0, CLASSES, (600,), generator=generator)
    note = "random images with random labels: the accuracy is meaningless (chance is 10 %)"
    return TrainingData("synthetic", images[:500], labels[:500], images[500:], labels[500:], note)


# ---- IDX files: http://yann.lecun.com/exdb/mnist describes the format ------------------------------------------------
# Big-endian: two zero bytes, the element type (8: unsigned byte), the number of dimensions; the size of each
# dimension as 32 bits; then the elements.

_FILES = {
    "train images": "train-images-idx3-ubyte",
    "train labels": "train-labels-idx1-ubyte",
    "test images": "t10k-images-idx3-ubyte",
    "test labels": "t10k-labels-idx1-ubyte",
}
_UNSIGNED_BYTE = 8
_BLOCK = 1 << 20  # bytes per read: a wrong size in a header must not reserve memory


def _idx(source: str) -> TrainingData:
    base = Path(source).expanduser()
    if not base.is_dir() and not base.parent.is_dir():
        raise UserError(f"--data {source}: no such folder (allowed: digits, synthetic, or the path of IDX files)")
    paths = {part: _find(source, base, name) for part, name in _FILES.items()}
    train_inputs, train_targets = _pair(paths["train images"], paths["train labels"])
    test_inputs, test_targets = _pair(paths["test images"], paths["test labels"])
    if train_inputs.shape[1:] != test_inputs.shape[1:]:
        raise UserError(
            f"{paths['test images']}: images of {_size(test_inputs)} pixels, but those for training have "
            f"{_size(train_inputs)}"
        )
    note = "" if tuple(train_inputs.shape[1:]) == (SIDE, SIDE) else f"resized from {_size(train_inputs)} pixels"
    name = base.resolve().name.rstrip("-_.") or "idx"
    scaled_train, scaled_test = (_resized(images.float() / 255) for images in (train_inputs, test_inputs))
    return TrainingData(name, scaled_train, train_targets, scaled_test, test_targets, note)


def _size(images: Tensor) -> str:
    return f"{images.shape[1]}x{images.shape[2]}"


def _find(source: str, base: Path, name: str) -> Path:
    """The file ``name``, plain or gzipped, in the folder ``base`` or with the prefix ``base``."""
    start = base / name if base.is_dir() else base.with_name(base.name + name)
    for path in (start, start.with_name(start.name + ".gz")):
        if path.is_file():
            return path
    raise UserError(f"--data {source}: neither {start} nor {start.name}.gz is there")


def _pair(image_path: Path, label_path: Path) -> tuple[Tensor, Tensor]:
    """Images [N, height, width] (uint8) and labels [N] (int64) that belong together."""
    images, labels = _read_idx(image_path, 3), _read_idx(label_path, 1).long()
    if images.numel() == 0:
        raise UserError(f"{image_path}: holds no images")
    if len(images) != len(labels):
        raise UserError(f"{label_path}: {len(labels)} labels, but {image_path.name} holds {len(images)} images")
    if int(labels.max()) >= CLASSES:
        where = int((labels >= CLASSES).nonzero()[0])
        raise UserError(f"{label_path}: label {int(labels[where])} at item {where}; allowed are 0 to {CLASSES - 1}")
    return images, labels


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """The unsigned bytes of one IDX file, in the shape that its header states."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            return _parse_idx(path, file, dimensions)  # type: ignore[arg-type]  # a GzipFile reads as a file does
    except EOFError as error:
        raise UserError(f"{path}: truncated gzip file") from error
    except (OSError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise UserError(f"{path}: cannot be read: {reason}") from error


def _parse_idx(path: Path, file: BinaryIO, dimensions: int) -> Tensor:
    header = file.read(4 + 4 * dimensions)
    magic = bytes([0, 0, _UNSIGNED_BYTE, dimensions])
    if header[:4] != magic:
        raise UserError(
            f"{path}: not an IDX file of bytes in {dimensions} dimensions: it starts with "
            f"{header[:4].hex() or 'nothing'}, not {magic.hex()}"
        )
    if len(header) < 4 + 4 * dimensions:
        raise UserError(f"{path}: truncated: the header ends after {len(header)} bytes")
    shape = [int.from_bytes(header[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    expected = 1
    for size in shape:
        expected *= size
    data = bytearray()
    while len(data) <= expected and (block := file.read(min(_BLOCK, expected + 1 - len(data)))):
        data += block
    if len(data) != expected:
        what = f"truncated: {len(data)} bytes of data" if len(data) < expected else "longer than its header says: more"
        raise UserError(f"{path}: {what}, the header promises {' x '.join(map(str, shape))} = {expected}")
    return torch.frombuffer(data, dtype=torch.uint8).reshape(shape) if data else torch.empty(shape, dtype=torch.uint8)
