"""The training passes of ``batch_norm_act`` in one launch each way, for data that stays on the chip; on the executor.

Without a pretended device (``simt.device``) there is no room on the chip: the other tests run the two launches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import simt
import torch
from bn_cases import ACTIVATIONS, DTYPES, Case, Pools, backward, make_case, op_results, train

pytestmark = pytest.mark.usefixtures("on_simt", "one_thread")

FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
# Odd planes and channels, several blocks to a channel, a single channel, more channels than blocks, two dimensions.
SHAPES = [(3, 5, 7, 7), (2, 3, 90, 91), (9, 1, 33, 5), (5, 130, 3, 3), (300, 17, 1, 1), (2, 64, 8, 8)]
NAMES = ["batch_norm_act_persistent_forward", "batch_norm_act_persistent_backward"]
each_layout = pytest.mark.parametrize("layout", FORMATS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def on_chip(on_simt: None) -> Iterator[None]:  # which skips where there is no executor
    with simt.device(multiprocessors=6, shared_bytes=512 << 10):
        yield


def run(case: Case) -> tuple[dict[str, torch.Tensor], simt.Counted]:
    with simt.counting() as counted:
        results = op_results(case, True)
    return results, counted


def names(counted: simt.Counted) -> list[str]:
    return [launch.name for launch in counted.kernels]


@each_layout
@each_dtype
@pytest.mark.usefixtures("on_chip")
def test_values(dtype, layout):
    """The tolerance rule, by one launch each way and at most one memset, for the counters of the blocks."""
    pools = Pools()
    for i, activation in enumerate(ACTIVATIONS):
        shape = SHAPES[i % len(SHAPES)]
        for residual in (False, True):
            options = {"affine": i != 2, "momentum": None if i % 2 else 0.1}
            case = make_case(shape, dtype, FORMATS[layout], activation=activation, residual=residual, **options)
            actual, counted = run(case)
            assert names(counted) == NAMES
            assert sum(launch.kind != "kernel" for launch in counted.launches) <= 2
            pools.add(case, True, f"{shape} {activation}", actual)
    pools.anchor(make_case((8, 16, 14, 14), dtype, FORMATS[layout], residual=True), True)
    pools.check()


@each_layout
def test_one_or_several_pieces_to_a_channel(layout):
    """The same sums as by two launches, where they have the same pieces: the same bits."""
    case = make_case((3, 5, 7, 7), torch.float32, FORMATS[layout], residual=True, activation="silu")
    expected = op_results(case, True)
    with simt.device(multiprocessors=30):
        actual, counted = run(case)
    assert names(counted) == NAMES
    for key in expected:
        assert torch.equal(actual[key], expected[key]), key


@each_layout
@each_dtype
@pytest.mark.usefixtures("on_chip")
def test_same_bits_in_every_schedule(dtype, layout):
    for i, shape in enumerate(SHAPES[:5]):
        case = make_case(shape, dtype, FORMATS[layout], activation=ACTIVATIONS[i], residual=i % 2 == 0)
        expected = op_results(case, True)
        for name, seed in [("reverse", 0), ("random", 1), ("random", 2)]:
            with simt.schedule(name, seed):
                actual = op_results(case, True)
            for key in expected:
                assert torch.equal(actual[key], expected[key]), f"{key} {name} {seed} {shape}"


@each_layout
@pytest.mark.usefixtures("on_chip")
def test_a_replay_needs_no_clean_memory(layout):
    """The counters are zeroed by the pass itself, so that it may come again with the memory it has left."""
    case = make_case((2, 3, 90, 91), torch.float32, FORMATS[layout])
    first = op_results(case, True)
    for _ in range(3):
        again = op_results(case, True)
        for key in first:
            assert torch.equal(first[key], again[key]), key


@each_layout
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_bytes_and_coalescing(residual, layout):
    """One read of the data: at most 1.02 times the tensors' bytes, in 16-byte accesses, without bank conflicts."""
    case = make_case((4, 16, 56, 56), torch.float32, FORMATS[layout], residual=residual)
    size = case.x.numel() * case.x.element_size()
    with simt.device(multiprocessors=6, shared_bytes=1 << 20):
        with simt.counting() as forward:
            y, mean, invstd = train(case.clone())
        with simt.counting() as backwards:
            backward(case, y, mean, invstd, True)
    # in: x, residual; out: y. In: grad_y, x, the kept output; out: one or two gradients.
    for counted, name, streams in zip((forward, backwards), NAMES, (3, 5) if residual else (2, 3), strict=True):
        (launch,) = counted.kernels
        ratio = launch.sector_bytes / (size * streams)
        assert launch.name == name
        assert 1 <= ratio <= 1.02, f"{name}: {ratio:.4f} times the compulsory bytes"
        assert launch.coalescing >= 0.99, f"{name}: {launch.coalescing:.4f}"
        assert 16 * launch.lanes_of_width["16"] == size * streams, name
        assert launch.wavefronts == launch.ideal_wavefronts, name


@each_layout
def test_what_does_not_fit_takes_two_launches(layout):
    """Either way by itself: the backward keeps twice as much as the forward, three times with a kept output."""
    case = make_case((4, 8, 40, 40), torch.float32, FORMATS[layout], residual=True)  # 200 KiB
    two = [["statistics", "forward"], ["reduce", "backward"]]
    expected = op_results(case, True)
    # A device has 48 KiB a block fewer than this for the data.
    for kibibytes, fits in [(10, (False, False)), (72, (True, False)), (300, (True, True))]:
        with simt.device(multiprocessors=3, shared_bytes=(48 + kibibytes) << 10):
            actual, counted = run(case)
        taken = [["persistent_" + two[i][1]] if fit else two[i] for i, fit in enumerate(fits)]
        assert names(counted) == [f"batch_norm_act_{name}" for name in taken[0] + taken[1]]
        for key in expected:
            torch.testing.assert_close(actual[key], expected[key], rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.usefixtures("on_chip")
def test_other_passes_stay_as_they_are():
    """Evaluation, and a backward that has no statistics to take."""
    case = make_case((4, 8, 6, 6), training=False)
    with simt.counting() as counted:
        op_results(case, False)
    assert names(counted) == ["batch_norm_act_forward", "batch_norm_act_reduce", "batch_norm_act_backward"]
    y, mean, invstd = train(replace(case.clone(), momentum=0.1))
    with simt.counting() as counted:
        backward(case, y, mean, invstd, True, (False, False, True))
    assert names(counted) == ["batch_norm_act_reduce"]


@each_layout
def test_overflow_and_non_finite_values(layout):
    """Squares that overflow single precision, a channel with an infinity: as by two launches."""
    case = make_case((4, 6, 30, 30), torch.float32, FORMATS[layout])
    case.x[:, 1] *= 1e25
    case.x[1, 2, 3, 4] = float("inf")
    expected = op_results(case, True)
    with simt.device(multiprocessors=6):
        actual, counted = run(case)
    assert names(counted) == NAMES
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-4, atol=1e-4, equal_nan=True, msg=key)
