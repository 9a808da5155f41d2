"""The data of ``deepops train``: digits, synthetic images and IDX files, whole and damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_tools import NAMES, idx_bytes, write_idx

from deepops.cli.data import load_data
from deepops.cli.errors import UserError


def test_digits_are_real_images_split_by_class_and_seed() -> None:
    from sklearn.datasets import load_digits

    data = load_data("digits", seed=3)
    assert data.train_inputs.shape == (1437, 1, 28, 28)
    assert data.test_inputs.shape == (360, 1, 28, 28)
    assert data.train_inputs.dtype == torch.float32
    assert data.train_inputs.min() == 0
    assert data.train_inputs.max() == 1
    everything = torch.from_numpy(load_digits().target).bincount()
    assert (data.train_targets.bincount() + data.test_targets.bincount()).tolist() == everything.tolist()
    assert (data.test_targets.bincount() - everything / 5).abs().max() <= 1, "not stratified"
    again, other = load_data("digits", seed=3), load_data("digits", seed=4)
    assert torch.equal(data.train_inputs, again.train_inputs)
    assert not torch.equal(data.train_targets, other.train_targets)


def test_no_digit_is_in_both_parts_and_images_keep_their_labels() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images).float() / 16
    resized = torch.nn.functional.interpolate(small.unsqueeze(1), size=(28, 28), mode="bilinear")
    labels_of: dict[bytes, list[int]] = {}
    for image, label in zip(resized, digits.target, strict=True):
        labels_of.setdefault(image.numpy().tobytes(), []).append(int(label))
    data = load_data("digits", seed=0)
    for image, label in zip(
        torch.cat([data.train_inputs, data.test_inputs]),
        torch.cat([data.train_targets, data.test_targets]),
        strict=True,
    ):
        labels_of[image.numpy().tobytes()].remove(int(label))  # each image once, with its own label
    assert not any(labels_of.values())


def test_synthetic_is_the_modules_random_data_and_says_so() -> None:
    data = load_data("synthetic", seed=0)
    assert data.train_inputs.shape == (500, 1, 28, 28)
    assert data.test_inputs.shape == (100, 1, 28, 28)
    assert set(data.train_targets.tolist()) == set(range(10))
    assert "meaningless" in data.note
    assert torch.equal(data.train_inputs, load_data("synthetic", seed=0).train_inputs)
    assert not torch.equal(data.train_inputs, load_data("synthetic", seed=1).train_inputs)


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("prefix", ["", "kana-"])
def test_idx_files_hold_what_was_written(tmp_path: Path, gz: bool, prefix: str) -> None:
    write_idx(tmp_path, prefix=prefix, gz=gz)
    data = load_data(str(tmp_path / prefix) if prefix else str(tmp_path), seed=0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 28, 28), generator=generator, dtype=torch.uint8)
    assert torch.equal(data.train_inputs, images.unsqueeze(1).float() / 255)
    assert data.train_targets.tolist() == [*range(10), 0, 1]
    assert data.test_targets.tolist() == [0, 1, 2, 3, 4]
    assert data.test_inputs.shape == (5, 1, 28, 28)
    assert data.note == ""


def test_images_of_another_size_are_resized(tmp_path: Path) -> None:
    write_idx(tmp_path, side=16)
    data = load_data(str(tmp_path), seed=0)
    assert data.train_inputs.shape == (12, 1, 28, 28)
    assert "16x16" in data.note


def _replace(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


IMAGES, LABELS, TEST_IMAGES, _ = NAMES
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated data": (
        _replace(IMAGES, lambda b: b[:-1]),
        "truncated: 9407 bytes of data, the header promises 12 x 28 x 28",
    ),
    "truncated header": (_replace(IMAGES, lambda b: b[:9]), "truncated: the header ends after 9 bytes"),
    "empty file": (_replace(LABELS, lambda b: b""), "starts with nothing"),
    "too long": (_replace(IMAGES, lambda b: b + b"x"), "longer than its header says"),
    "wrong magic": (_replace(LABELS, lambda b: b"\x00\x00\x0d" + b[3:]), "starts with 00000d01, not 00000801"),
    "labels as images": (
        lambda d: (d / IMAGES).write_bytes((d / LABELS).read_bytes()),
        "starts with 00000801, not 00000803",
    ),
    "fewer labels": (_replace(LABELS, lambda b: idx_bytes(torch.zeros(11, dtype=torch.uint8))), "11 labels, but"),
    "label 10": (_replace(LABELS, lambda b: b[:-1] + b"\x0a"), "label 10 at item 11; allowed are 0 to 9"),
    "no images": (
        _replace(IMAGES, lambda b: idx_bytes(torch.zeros(0, 28, 28, dtype=torch.uint8))),
        "holds no images",
    ),
    "another size": (
        _replace(TEST_IMAGES, lambda b: idx_bytes(torch.zeros(5, 27, 28, dtype=torch.uint8))),
        "images of 27x28 pixels, but those for training have 28x28",
    ),
    "header of 4 GB images": (
        _replace(IMAGES, lambda b: b[:4] + b"\xff" * 12 + b[16:]),
        "truncated: 9408 bytes of data",
    ),
    "missing file": (lambda d: (d / LABELS).unlink(), "neither"),
    "folder in its place": (lambda d: ((d / LABELS).unlink(), (d / LABELS).mkdir()), "neither"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_with_the_reason(tmp_path: Path, damage: str) -> None:
    write_idx(tmp_path)
    load_data(str(tmp_path), seed=0)  # fine before
    change, message = DAMAGES[damage]
    change(tmp_path)
    with pytest.raises(UserError) as caught:
        load_data(str(tmp_path), seed=0)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[: len(b) // 2], "truncated gzip file"),
        (lambda b: b"plain" + b, "cannot be read: Not a gzipped file"),
        (lambda b: b[:40] + bytes(255 - c for c in b[40:60]) + b[60:], "cannot be read"),
    ],
    ids=["truncated", "not gzip", "garbled"],
)
def test_a_damaged_gzip_file(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    write_idx(tmp_path, gz=True)
    path = tmp_path / f"{IMAGES}.gz"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        load_data(str(tmp_path), seed=0)
    assert str(path) in str(caught.value)
