"""The convolution on tensor cores: every tile with all that its loads, its pipeline and its epilogue have to get right;
which tile a call gets; what is moved, by count. Values of both kernels are also in ``test_conv_bn_act_fused.py``.
"""

from __future__ import annotations

from itertools import product

import conv_gemm
import pytest
import simt
import torch
from conv_gemm import EPILOGUE_ROWS, FORCED, Shape
from conv_tile_cases import (
    BF16,
    EXACT_ACTIVATIONS,
    F16,
    GEOMETRIES,
    evaluate,
    make_case,
    op_results,
    oracle_results,
    statistics,
)  # fmt: skip
from cuda_gate.gate import read_budget
from pairwise import pairwise

pytestmark = pytest.mark.usefixtures("on_simt", "one_thread")


each_tile = pytest.mark.parametrize("forced", FORCED, ids=lambda forced: forced.name)
CHANNELS = [8, 24, 32, 40]  # several taps in a piece of depth; two; whole pieces; pieces across taps


def launched(counted: simt.Counted) -> list[str]:
    return [launch.name for launch in counted.kernels]


# ---- values ---------------------------------------------------------------------------------------------------------


@each_tile
def test_small_integers_are_exact(forced):
    """Every filter, stride, padding and dilation; pieces of depth, rows and columns that are not whole."""
    factors = {
        "geometry": list(GEOMETRIES),
        "channels": CHANNELS,
        "out_channels": list(forced.out_channels),
        "dtype": [F16, BF16],
        "residual": [False, True],
        "activation": EXACT_ACTIVATIONS,
    }
    for options in pairwise(factors, lambda case: True):
        case = forced.case(integers=True, **options)
        with simt.device(forced.multiprocessors), simt.counting() as counted:
            actual = op_results(case)
        assert launched(counted) == [forced.name] * 2, options
        expected = oracle_results(case)
        for name in ("y", "z"):
            assert torch.equal(actual[name], expected[name].to(case.x.dtype)), f"{name} {options}"
        torch.testing.assert_close(actual["mean"].double(), actual["z"].double().mean([0, 2, 3]), rtol=1e-6, atol=1e-6)


@each_tile
def test_every_schedule(forced):
    """The copies land as early or late as they may, the warps come in any order."""
    for geometry, channels in (("3x3", 40), ("1x1", 72)):
        case = forced.case(
            geometry, channels=channels, out_channels=forced.out_channels[0], dtype=F16, residual=True, integers=True
        )
        with simt.device(forced.multiprocessors):
            expected = op_results(case)
            for name, seed in [("reverse", 0), ("random", 1), ("random", 2)]:
                with simt.schedule(name, seed):
                    actual = op_results(case)
                for key, value in expected.items():
                    assert torch.equal(actual[key], value), f"{key} {name} {seed} {geometry}"
        assert torch.equal(expected["z"], oracle_results(case)["z"].to(F16))


@pytest.mark.parametrize("filter_size", [(1, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("channels", [8, 40])
def test_zeros_are_zeros(channels, filter_size):
    """Infinity times 0 is not a number: where padding, depth, rows or columns end, both factors have to be 0."""
    for padding, infinite in product(((0, 0, 0, 0), (2, 2, 2, 2)), ("x", "conv_weight")):
        case = make_case(
            (2, 5, 6), channels, 5, F16, integers=True, filter_size=filter_size, padding=padding, activation="identity"
        )
        # the first and the last image pixel, or all of one filter
        getattr(case, infinite)[((0, 1), slice(None), (0, -1), (0, -1)) if infinite == "x" else 3] = float("inf")
        actual, expected = evaluate(case).double(), oracle_results(case)["y"].half().double()
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        assert actual.isfinite().any()


def test_more_than_2_to_the_31_elements():
    """Of x: offsets into it need 64 bits. Its memory is never touched but where the filter looks."""
    channels, height, width, stride = 16, 9, 15_000_000, 2_999_999
    memory = torch.empty(height * width * channels, dtype=F16)  # 4.3 GB, of which few pages become real
    x = memory.as_strided((1, channels, height, width), (memory.numel(), 1, width * channels, channels))
    picked = x[:, :, ::4, ::stride]
    picked.copy_(torch.randint(-3, 4, picked.shape))
    weight = torch.randint(-3, 4, (5, channels)).half()
    y = torch.ops.deepops_simt.conv_bn_act_eval(
        x, weight.as_strided((5, channels, 1, 1), (channels, 1, channels, channels)), None, torch.ones(5),
        torch.zeros(5), [4, stride], [0, 0, 0, 0], [1, 1], "identity", 0.0,
    )  # fmt: skip
    assert torch.equal(y.double(), torch.einsum("nchw,kc->nkhw", picked.double(), weight.double()))


# ---- the choice -----------------------------------------------------------------------------------------------------


def test_which_tile():
    """As conv_gemm.py says; that must be the tile of what is launched."""
    seen = set()
    for output, out_channels in product([(1, 4, 5), (2, 8, 13), (1, 25, 26), (3, 16, 17)], (8, 64, 72, 200)):
        case = make_case(output, 8, out_channels, F16, filter_size=(1, 1), padding=(0, 0, 0, 0))
        rows = output[0] * output[1] * output[2]
        for multiprocessors in (0, 1, 3, 8):
            with simt.device(multiprocessors), simt.counting() as counted:
                evaluate(case)
            tile = conv_gemm.tile_of(rows, out_channels, multiprocessors)
            assert launched(counted) == [f"conv_bn_act_{tile[0]}x{tile[1]}"], (rows, out_channels, multiprocessors)
            assert counted.kernels[0].blocks == conv_gemm.up(rows, tile[0]) * conv_gemm.up(out_channels, tile[1])
            seen.add(tile)
    assert seen == set(conv_gemm.TILES)


def test_every_block_of_the_networks_fills_the_device():
    """Blocks for all multiprocessors of an A100, but where there are not enough even of the smallest tile."""
    for shape in conv_gemm.shapes():
        smallest = shape.blocks((64, 64))
        assert shape.blocks(shape.tile(conv_gemm.MULTIPROCESSORS)) >= 0.9 * min(conv_gemm.MULTIPROCESSORS, smallest)


# ---- counts ---------------------------------------------------------------------------------------------------------


@each_tile
@pytest.mark.parametrize(
    ("filter_size", "stride"), [(1, 1), (3, 1), (3, 2), (1, 2)], ids=["1x1", "3x3", "3x3/2", "1x1/2"]
)
def test_bytes_that_are_moved(forced, filter_size, stride):
    """As the table in csrc/conv_bn_act/README.md reckons; 16 bytes at a time, whole sectors, no bank conflicts."""
    size = {64: 8, 128: 11, 256: 15}[forced.rows] * stride
    shape = Shape("", 1, size, 64, forced.columns, filter_size, stride)
    padding = (shape.padding,) * 4
    case = make_case(
        (1, size, size), 64, shape.out_channels, F16, filter_size=(filter_size,) * 2, stride=(stride,) * 2,
        padding=padding,
    )  # fmt: skip
    with simt.device(forced.multiprocessors), simt.counting() as counted:
        evaluate(case)
        statistics(case)
    evaluation, batch = counted.kernels
    tile = (forced.rows, forced.columns)
    assert launched(counted) == [forced.name] * 2
    row_tiles = conv_gemm.up(shape.rows, tile[0])
    # Scales and shifts of the tile's columns, for each part of a tile that the epilogue finishes: from the
    # multiprocessor's own cache, but for the first time.
    vectors = shape.blocks(tile) * tile[0] // EPILOGUE_ROWS * tile[1] * 2 * 4
    assert evaluation.load_bytes == shape.copied(tile) + vectors
    assert evaluation.store_bytes == 2 * shape.rows * shape.out_channels
    assert evaluation.lanes_of_width["16"] * 16 == shape.moved(tile)
    assert evaluation.sector_bytes == shape.moved(tile) + vectors
    # What statistics move beside it: mean and variance of each column of a tile, in double, once there and back.
    small = batch.load_bytes + batch.store_bytes - shape.moved(tile)
    assert 0 < small <= row_tiles * shape.out_channels * 2 * 16 + 64 * shape.out_channels + 64 * shape.blocks(tile)
    assert batch.lanes_of_width["16"] * 16 == shape.moved(tile)
    assert batch.lanes_of_width["2"] == 0


@each_tile
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_no_bank_conflicts(forced, dtype):
    """cp.async, ldmatrix and the epilogue take no more rounds than their bytes need."""
    for geometry, channels in (("3x3", 40), ("1x1 stride 2", 64), ("dilation", 8)):
        case = forced.case(geometry, channels=channels, out_channels=forced.out_channels[0], dtype=dtype, residual=True)
        with simt.device(forced.multiprocessors), simt.counting() as counted:
            op_results(case)
        assert launched(counted) == [forced.name] * 2
        for launch in counted.kernels:
            assert launch.wavefronts == launch.ideal_wavefronts, geometry


def test_tables_of_the_readme():
    """csrc/conv_bn_act/README.md has what conv_gemm.py prints."""
    readme = (simt.ROOT / "csrc/conv_bn_act/README.md").read_text()
    assert conv_gemm.tiles_table() in readme
    assert conv_gemm.table() in readme


def test_few_instantiations():
    """Each is compiled for every architecture."""
    kernels = {key.kernel for key in read_budget() if key.kernel.startswith("implicit_gemm<")}
    assert len(kernels) == len(conv_gemm.TILES) * 2 * 2 * 2 <= 60  # dtypes, epilogues, 1 x 1 or any filter
