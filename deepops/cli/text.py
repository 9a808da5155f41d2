"""Texts for ``deepops train --model lstm-text``: to predict each byte from those before it."""

from __future__ import annotations

from pathlib import Path

import torch

from deepops.cli.errors import UserError, first_line
from deepops.cli.training_data import TrainingData

STEPS = 192  # bytes in a piece: about four lines, so that a line can be told from the one before it
SYMBOLS = 256  # the values of a byte


def load_text(source: str) -> TrainingData:
    """A text in pieces of ``STEPS`` bytes, its last tenth for the test: no piece of it is near one to train on.

    Args:
        source: "python" for the Python language's own reference, which every Python brings along, or a file's path.

    Raises:
        UserError: the file cannot be read or is too short.
    """
    if source == "python":
        name, data = source, _python_reference()
    else:
        path = Path(source).expanduser()
        try:
            name, data = path.stem or "text", path.read_bytes()
        except OSError as error:
            raise UserError(f"--data {source}: cannot be read: {error.strerror or first_line(error)}") from error
    pieces = (len(data) - 1) // STEPS
    if pieces < 10:
        raise UserError(f"--data {source}: {len(data)} bytes are too short a text, {10 * STEPS + 1} needed at least")
    symbols = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    inputs, targets = (symbols[start : start + pieces * STEPS].view(pieces, STEPS) for start in (0, 1))
    test = pieces // 10
    note = f"a byte is predicted from at most {STEPS - 1} before it; accuracy: the part of the bytes that is right"
    return TrainingData(
        name, inputs[:-test], targets[:-test], inputs[-test:], targets[-test:], note, f"pieces of {STEPS} bytes"
    )


def _python_reference() -> bytes:
    """What ``help("if")`` and its like print: about half a megabyte of English and of grammar."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(f"--data python: this Python came without its reference: {first_line(error)}") from error
    return "\n\n".join(topics[topic] for topic in sorted(topics)).encode()
