"""What is counted of the kernels that convolve on the GPU, on the SIMT executor; values: ``test_conv_bn_act_fused.py``.

Compulsory bytes: x, filter, residual and y once each. What moves beyond that is said kernel by kernel.
"""

from __future__ import annotations

import pytest
import simt
import torch
from conv_tile_cases import BF16, F16, F32, Case, evaluate, make_case, statistics

pytestmark = pytest.mark.usefixtures("on_simt", "one_thread")

STEM = {"filter_size": (7, 7), "stride": (2, 2), "padding": (3, 3, 3, 3)}


def bytes_of(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def count(case: Case) -> tuple[simt.Counted, simt.Counted, int]:
    """Of evaluation, of training; and the bytes of y."""
    with simt.counting() as evaluation:
        y = evaluate(case)
    with simt.counting() as training:
        statistics(case.clone())
    return evaluation, training, bytes_of(y)


def test_number_of_launches():
    """One kernel; for statistics a memset before it, of the counters with which blocks find out who is last."""
    for image in [(2, 9, 20), (3, 67, 65)]:
        evaluation, training, _ = count(make_case(image, 1, 5, F16, filter_size=(1, 1), padding=(0, 0, 0, 0)))
        assert [launch.kind for launch in evaluation.launches] == ["kernel"]
        assert [launch.kind for launch in training.launches] == ["memset", "kernel"]


def test_nothing_launches_nothing():
    """But the batch is counted."""
    case = make_case((0, 9, 9), 3, 20, F16)
    with simt.counting() as counted:
        evaluate(case)
        statistics(case)
    assert [launch.name for launch in counted.launches] == ["conv_bn_act_count"]


# Bytes that move over compulsory ones, in evaluation with a residual and in training, in fp32 and in 16 bits. The rest:
# the borders that blocks share of x, the rest of the sectors in which rows of a patch begin and end, the filter for
# every block (of a large batch, for several tiles), partial statistics out and in. Counted without caches.
NONE = {"padding": (0, 0, 0, 0)}
DIRECT = {
    "module": ((2, 34, 34), 1, 32, NONE, {4: (1.09, 1.23), 2: (1.13, 1.35)}),
    "rgb": ((2, 34, 34), 3, 32, NONE, {4: (1.24, 1.49), 2: (1.38, 1.80)}),
    "stem": ((1, 69, 69), 3, 64, STEM | NONE, {4: (2.04, 2.85), 2: (2.57, 3.80)}),
}


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("name", DIRECT)
def test_direct_bytes(name, dtype):
    """y and residual once, in whole packs."""
    image, channels, out_channels, geometry, limits = DIRECT[name]
    case = make_case(image, channels, out_channels, dtype, residual=True, **geometry)
    evaluation, training, size = count(case)
    given = bytes_of(case.x, case.conv_weight)
    for counted, streams, limit in zip((evaluation, training), (2, 1), limits[dtype.itemsize], strict=True):
        kernel = counted.kernels[0]
        assert 16 * kernel.lanes_of_width["16"] == streams * size
        ratio = kernel.sector_bytes / (given + streams * size)
        assert 1 <= ratio <= limit, f"{ratio:.4f} times the compulsory bytes"
        assert 32 * kernel.store_sectors >= size
    assert evaluation.kernels[0].store_bytes == 32 * evaluation.kernels[0].store_sectors == size


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("name", DIRECT)
def test_direct_bank_conflicts(name, dtype):
    image, channels, out_channels, geometry, _ = DIRECT[name]
    for counted in count(make_case(image, channels, out_channels, dtype, residual=True, **geometry))[:2]:
        kernel = counted.kernels[0]
        assert kernel.wavefronts == kernel.ideal_wavefronts, f"{kernel.wavefronts / kernel.ideal_wavefronts:.4f}"
