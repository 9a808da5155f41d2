"""What is counted and promised of the GPU kernels of ``batch_norm_act``, on the SIMT executor.

Values are tested on the same cases as the CPU kernels: the tests with the ``backend`` fixture.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import simt
import torch
from bn_cases import ACTIVATIONS, DTYPES, Case, backward, evaluate, make_case, op_results, train
from bn_sync import input_grad, join, merge, reduce, results_of_parts

pytestmark = pytest.mark.usefixtures("on_simt")

FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
ALIGNED = (4, 16, 56, 56)  # whole 16-byte packs in every dtype; several work items to a channel
# Odd planes and channels, several work items to a channel, a single channel, many channels, two dimensions.
SHAPES = [(3, 5, 7, 7), (2, 3, 90, 91), (9, 1, 33, 5), (5, 130, 3, 3), (300, 17, 1, 1), (2, 64, 8, 8)]
each_layout = pytest.mark.parametrize("layout", FORMATS)


def run_all(case: Case, training: bool) -> tuple[simt.Counted, simt.Counted]:
    """Counts of the forward and of the backward."""
    with simt.counting() as forward:
        y, mean, invstd = train(case.clone()) if training else (evaluate(case), *case.statistics())
    with simt.counting() as backwards:
        backward(case, y, mean, invstd, training)
    return forward, backwards


@each_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_number_of_launches(shape, layout):
    """Two kernels each way, one to evaluate; at most one memset, for the counters of the blocks; nothing is copied."""
    for training in (True, False):
        case = make_case(shape, memory_format=FORMATS[layout], residual=True, training=training)
        forward, backwards = run_all(case, training)
        assert len(forward.kernels) == (2 if training else 1)
        assert len(backwards.kernels) == 2
        for counted in (forward, backwards):
            others = [launch.kind for launch in counted.launches if launch.kind != "kernel"]
            assert others in ([], ["memset"])


def test_what_is_not_wanted_is_not_computed():
    case = make_case((4, 8, 6, 6), residual=True)
    y, mean, invstd = train(case.clone())
    expected = {(True, True, True): 2, (True, True, False): 2, (False, True, False): 1, (False, False, True): 1,
                (False, False, False): 0}  # fmt: skip
    for need, launches in expected.items():
        with simt.counting() as counted:
            backward(case, y, mean, invstd, True, need)
        assert len(counted.kernels) == launches, need
    with simt.counting() as counted:
        backward(case, y, mean, invstd, False, (True, True, False))  # evaluation: no sums to take
    assert len(counted.kernels) == 1


def test_nothing_launches_nothing():
    """But the batch is counted."""
    case = make_case((0, 3, 4, 5))
    with simt.counting() as counted:
        train(case.clone())
    assert [launch.name for launch in counted.launches] == ["batch_norm_act_count"]
    with simt.counting() as counted:
        train(replace(case.clone(), num_batches_tracked=None))
        evaluate(case)
    assert not counted.launches


@each_layout
@pytest.mark.parametrize("batch", [6, 0])
def test_launches_where_processes_share_a_batch(batch, layout):
    """The passes of the whole op, and beside them three kernels with a thread per channel; no data, no pass."""
    case = make_case((6, 20, 5, 7), memory_format=FORMATS[layout], residual=True)
    y, mean, invstd = train(case.clone())
    case, y = replace(case, **{n: getattr(case, n)[:batch] for n in ("x", "residual", "grad_y")}), y[:batch]
    launches = []
    with simt.counting() as counted:
        part = torch.ops.deepops_simt.batch_norm_act_statistics(case.x)
    launches.append([launch.name for launch in counted.kernels])
    with simt.counting() as counted:
        _, _, count = merge(case, part[None])
    launches.append([launch.name for launch in counted.kernels])
    with simt.counting() as counted:
        sums, _, _ = reduce(case, y, mean, invstd)
    launches.append([launch.name for launch in counted.kernels])
    with simt.counting() as counted:
        input_grad(case, y, mean, invstd, sums, count, True)
    launches.append([launch.name for launch in counted.kernels])
    passes = [["statistics"], ["count", "merge"], ["reduce"], ["mean_gradients", "backward"]]
    expected = passes if batch else [[], passes[1], [], []]
    assert launches == [[f"batch_norm_act_{name}" for name in names] for names in expected]


@each_layout
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_bytes_and_coalescing_of_elementwise_kernels(residual, dtype, layout):
    """They move what they must, in 16-byte accesses: sector bytes at most 1.02 times the tensors' bytes."""
    case = make_case(ALIGNED, dtype, FORMATS[layout], residual=residual)
    size = case.x.numel() * case.x.element_size()
    forward, backwards = run_all(case, True)
    # in: x, residual; out: y. In: grad_y, x, the kept output; out: one or two gradients.
    assert_moves(forward.kernels[1], "forward", size * (3 if residual else 2), 1.02)
    assert_moves(backwards.kernels[1], "backward", size * (5 if residual else 3), 1.02)


@each_layout
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_and_coalescing_of_sums(dtype, layout):
    """Beside the data: partial sums, sampled values and per-channel numbers, of every block."""
    case = make_case((8, 16, 56, 56), dtype, FORMATS[layout])
    size = case.x.numel() * case.x.element_size()
    forward, backwards = run_all(case, True)
    assert_moves(forward.kernels[0], "statistics", size, 1.06)
    assert_moves(backwards.kernels[0], "reduce", 2 * size, 1.06)


def assert_moves(launch: simt.Launch, name: str, compulsory: int, limit: float) -> None:
    assert launch.name == f"batch_norm_act_{name}"
    ratio = launch.sector_bytes / compulsory
    assert 1 <= ratio <= limit, f"{name}: {ratio:.4f} times the compulsory bytes"
    assert launch.coalescing >= 0.99, f"{name}: {launch.coalescing:.4f}"
    in_packs = 16 * launch.lanes_of_width["16"]
    assert in_packs == compulsory, f"{name}: {in_packs} bytes in packs of {compulsory}"


@each_layout
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bank_conflicts(dtype, layout):
    case = make_case((4, 64, 28, 28), dtype, FORMATS[layout], residual=True)
    for counted in run_all(case, True):
        for launch in counted.kernels:
            assert launch.wavefronts == launch.ideal_wavefronts, launch.name


@each_layout
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_every_schedule(dtype, layout):
    for shape, activation in zip(SHAPES, ACTIVATIONS, strict=False):
        case = make_case(shape, dtype, FORMATS[layout], activation=activation, residual=shape[0] % 2 == 0)
        expected = op_results(case, True)
        for name, seed in [("reverse", 0), ("random", 1), ("random", 2)]:
            with simt.schedule(name, seed):
                actual = op_results(case, True)
            for key in expected:
                assert torch.equal(actual[key], expected[key]), f"{key} {name} {seed} {shape} {activation}"


@each_layout
def test_parts_have_the_same_bits_in_every_schedule(layout):
    """300 channels: more than a block of the kernels with a thread per channel has."""
    case = make_case((4, 300, 3, 3), torch.float32, FORMATS[layout], momentum=None)
    expected = join(case, results_of_parts(case, (1, 3)))
    for name, seed in [("reverse", 0), ("random", 1)]:
        with simt.schedule(name, seed):
            actual = join(case, results_of_parts(case, (1, 3)))
        for key in expected:
            assert torch.equal(actual[key], expected[key]), f"{key} {name} {seed}"


@each_layout
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_streams_that_start_anywhere(offset, layout):
    """x, residual and grad_y at different places within 16 bytes: right results, and no misaligned access."""
    for dtype, shape in product((torch.float32, torch.float16), [(3, 8, 5, 5), (2, 16, 8, 8)]):
        case = make_case(shape, dtype, FORMATS[layout], residual=True)
        expected = op_results(case, True)

        def moved(t: torch.Tensor, by: int) -> torch.Tensor:
            return torch.empty(t.numel() + by, dtype=t.dtype)[by:].as_strided(t.shape, t.stride()).copy_(t)

        assert case.residual is not None
        for by in [(offset, offset, offset), (offset, 0, 0), (0, offset, 2 * offset)]:
            tensors = {n: moved(getattr(case, n), b) for n, b in zip(("x", "residual", "grad_y"), by, strict=True)}
            actual = op_results(Case(**{**vars(case), **tensors}), True)
            for key in expected:
                close = torch.allclose(actual[key].double(), expected[key].double(), rtol=1e-3, atol=1e-3)
                assert close, f"{key} {by} {shape} {dtype}"
