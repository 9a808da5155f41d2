"""What every kind of data looks like to a training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TrainingData:
    """What to train on and what to test with: inputs and the targets that belong to them.

    Images [N, 1, 28, 28], float32 in [0, 1] (synthetic: normal), and their labels [N], int64 in [0, 10); or pieces of a
    text [N, T], bytes as int64, and for each of its bytes the one that follows [N, T].
    """

    name: str
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    note: str = ""  # what a reader of the results must know
    samples: str = "images"  # what an input is
