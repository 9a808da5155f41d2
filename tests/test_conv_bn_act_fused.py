"""The ops that convolve on the GPU: values, statistics, what they refuse. Counts: ``test_conv_bn_act_simt.py``."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import product

import backends
import pytest
import simt
import torch
from conv_tile_cases import (
    ACTIVATIONS,
    BF16,
    BUFFERS,
    EXACT_ACTIVATIONS,
    F16,
    F32,
    Case,
    ConvPools,
    case_of,
    cover,
    evaluate,
    make_case,
    op_results,
    oracle_results,
    statistic_scales,
    statistics,
    stock_results,
    stock_statistics,
)  # fmt: skip
from torch import Tensor

from deepops import _fake_conv, reference
from deepops.testing import ErrorPool, assert_close_to_oracle, error_ratio

pytestmark = [
    pytest.mark.usefixtures("backend", "one_thread"),
    pytest.mark.parametrize("backend", ["simt", "cuda"], indirect=True),
]
KERNELS = ["direct", "gemm"]
each_kernel = pytest.mark.parametrize("kernel", KERNELS)
# Few values of each kernel: what a test needs that is not about geometry.
SMALL = {"direct": ((2, 9, 20), 3, 20), "gemm": ((2, 9, 20), 16, 40)}  # image, C, K
DTYPES = [F32, F16, BF16]
# Row tiles: one, a few, more than a block merges at once (of 64 pixels or more).
TILES = [(1, 1, 2), (2, 9, 20), (3, 67, 65)]


def dtypes_of(kernel: str) -> list[torch.dtype]:
    return DTYPES if kernel == "direct" else DTYPES[1:]


# ---- values ---------------------------------------------------------------------------------------------------------


@each_kernel
def test_small_integers_are_exact(kernel):
    """Every sum is exact: the result is the oracle's, rounded once."""
    for options in cover(kernel, EXACT_ACTIVATIONS):
        case = case_of(options, integers=True)
        expected, actual = oracle_results(case), op_results(case)
        for name in ("y", "z"):
            assert torch.equal(actual[name].cpu(), expected[name].to(case.x.dtype)), f"{name} {options}"


@each_kernel
def test_random_values(kernel):
    pools = ConvPools()
    for options in cover(kernel, ACTIVATIONS):
        pools.add(case_of(options), str(options))
    pools.check()


@each_kernel
def test_16_bit_results_are_rounded_once(kernel):
    """Sums that have no place in 16 bits, brought back into their range by scale, shift and residual."""
    image, channels, out_channels = SMALL[kernel]
    for dtype in (F16, BF16):
        case = make_case(image, channels, out_channels, dtype, integers=True, residual=True, activation="identity")
        case.x.add_(20)
        case.conv_weight.add_(20)  # sums of about 400 a term
        z = oracle_results(case)["z"]
        assert not torch.equal(z, z.to(dtype).double())
        shift = -(z.mean([0, 2, 3]) * case.scale.cpu()).round().float().to(case.shift.device)
        case = replace(case, shift=shift)
        assert torch.equal(evaluate(case).cpu(), oracle_results(case)["y"].to(dtype)), dtype


@pytest.mark.parametrize("filter_size", [(11, 13), (1, 200), (200, 1)], ids=str)
def test_filters_in_steps(filter_size):
    """The direct kernel takes a filter in steps of some taps where the whole does not fit on the chip."""
    high, wide = filter_size
    padding = (high // 2, (high - 1) // 2, wide // 2, (wide - 1) // 2)
    case = make_case((1, 9, 18), 3, 5, integers=True, filter_size=filter_size, padding=padding)
    assert torch.equal(op_results(case)["y"].cpu(), oracle_results(case)["y"].float())


def test_steps_with_dilation_and_stride():
    """Far beyond what the patch could hold without leaving out what no tap reads."""
    for stride, dilation in (((1, 1), (40, 30)), ((17, 19), (1, 1)), ((17, 19), (34, 38)), ((6, 9), (4, 6))):
        case = make_case((1, 90, 97), 4, 3, integers=True, stride=stride, dilation=dilation)
        assert torch.equal(op_results(case)["y"].cpu(), oracle_results(case)["y"].float()), (stride, dilation)


def test_several_tiles_a_block():
    """As in large batches; with a filter that stays where it is, and with one in steps, a tap each."""
    image, geometry = (2060, 1, 1), {"filter_size": (1, 2), "dilation": (1, 1000)}
    stays = make_case(image, 1, 1, integers=True, filter_size=(1, 1), padding=(0, 0, 0, 0))
    steps = make_case(image, 1, 1, integers=True, padding=(0, 0, 1000, 0), **geometry)
    for case in (stays, steps):
        assert torch.equal(evaluate(case).cpu(), oracle_results(case)["y"].float())
    z, mean, invstd = statistics(stays)
    expected, stock = oracle_results(stays), stock_results(stays)
    assert torch.equal(z.cpu(), expected["z"].float())
    assert_close_to_oracle(mean, stock["mean"], expected["mean"])
    assert_close_to_oracle(invstd, stock["invstd"], expected["invstd"])


@each_kernel
def test_not_a_number_and_infinity(kernel):
    """They reach what they reach in stock, statistics included."""
    image, channels, out_channels = SMALL[kernel]
    for value, dtype in product((float("nan"), float("inf"), -float("inf")), dtypes_of(kernel)):
        case = make_case(image, channels, out_channels, dtype, activation="relu")
        case.x[0, 0, 4, 5] = value
        actual, expected = op_results(case), oracle_results(case)
        for name in (*expected.keys() - {"num_batches_tracked"},):
            error_ratio(actual[name], None, expected[name], name=f"{name} {value} {dtype}")  # asserts that they agree


@each_kernel
def test_overflow(kernel):
    """Of a 16-bit result to infinity, which the statistics then see; of squares in fp32 to nothing special."""
    image, channels, out_channels = SMALL[kernel]
    if kernel == "direct":
        case = make_case(image, channels, out_channels)
        case.x.mul_(1e22)
        _, mean, invstd = statistics(case)
        expected, stock = oracle_results(case), stock_results(case)
        assert_close_to_oracle(mean, stock["mean"], expected["mean"])
        assert_close_to_oracle(invstd, stock["invstd"], expected["invstd"])
    case = make_case(image, channels, out_channels, F16)
    case.conv_weight[0] = 30.0
    case.x[0, 0, 4, 5] = 1e4
    z, mean, invstd = statistics(case)
    assert z[0, 0, 4, 5].isinf()
    assert mean[0].isinf()
    assert invstd[0].isnan()
    assert mean[1:].isfinite().all()
    assert invstd[1:].isfinite().all()


# ---- statistics -----------------------------------------------------------------------------------------------------


@each_kernel
def test_statistics_are_those_of_what_is_stored(kernel):
    """As accurate as stock's batch norm on the same z, however many tiles and however large the mean."""
    pools = {name: ErrorPool() for name in ("mean", "invstd")}
    for image, mean, dtype in product(TILES, (0.0, 30.0), dtypes_of(kernel)):
        case = make_case(image, SMALL[kernel][1], 5, dtype, mean=mean, filter_size=(1, 1), padding=(0, 0, 0, 0))
        z, *actual = statistics(case)
        wide = z.cpu().double()
        expected = wide.mean([0, 2, 3]), (wide.var([0, 2, 3], correction=0) + case.eps).rsqrt()
        stock = stock_statistics(z.cpu(), None, None, None, case.eps)
        scales = statistic_scales({"z": wide})
        for (name, pool), got, theirs, want in zip(pools.items(), actual, stock, expected, strict=True):
            pool.add(got, theirs, want, name=f"{name} {image} {mean} {dtype}", scale=scales.get(name))
    for pool in pools.values():
        pool.check()


@pytest.mark.parametrize("image", [(1, 1, 2), (1, 1, 3), (2, 2, 2), (1, 5, 7)], ids=str)
def test_statistics_of_few_values(image):
    """The rounding of a single term would show."""
    case = make_case(image, 4, 400, filter_size=(1, 1), padding=(0, 0, 0, 0), eps=0.0)
    z, *actual = statistics(case)
    wide = z.cpu().double()
    expected = wide.mean([0, 2, 3]), wide.var([0, 2, 3], correction=0).rsqrt()
    for got, theirs, want in zip(actual, stock_statistics(z.cpu(), None, None, None, 0.0), expected, strict=True):
        # Relative to each value, of which the smallest says most.
        assert_close_to_oracle((got.cpu().double() / want).float(), (theirs.double() / want).float(), want / want)


@each_kernel
@pytest.mark.parametrize("missing", [(), BUFFERS, ("running_mean",), ("running_var",), ("num_batches_tracked",)])
def test_running_statistics(kernel, missing):
    """Whichever there are, and as the op that takes a convolution's result learns them."""
    image, channels, out_channels = SMALL[kernel]
    pools = {name: ErrorPool() for name in ("running_mean", "running_var")}
    for momentum, dtype in product((0.3, None), dtypes_of(kernel)):
        case = make_case(image, channels, out_channels, dtype, momentum=momentum)
        case = replace(case, **dict.fromkeys(missing))
        fused, apart, wide = case.clone(), case.clone(), case.in_double()
        z, *_ = statistics(fused)
        backends.ops().batch_norm_act_train(
            z, None, None, None, apart.running_mean, apart.running_var, apart.num_batches_tracked, momentum, case.eps,
            "identity", 0.0,
        )  # fmt: skip
        reference.batch_norm_act(
            z.cpu().double(), wide.running_mean, wide.running_var, None, None, True, momentum,
            num_batches_tracked=wide.num_batches_tracked,
        )  # fmt: skip
        for name, pool in pools.items():
            if name not in missing:
                pool.add(getattr(fused, name), getattr(apart, name), getattr(wide, name), name=f"{name} {dtype}")
        if "num_batches_tracked" not in missing:
            assert fused.num_batches_tracked == apart.num_batches_tracked == wide.num_batches_tracked == 4
    for name, pool in pools.items():
        if name not in missing:
            pool.check()


def test_the_rest_of_the_forward():
    """Together with batch_norm_act_eval: a block in training."""
    case = make_case((2, 9, 20), 3, 20, residual=True, activation="silu")
    z, mean, invstd = statistics(case)
    y = backends.ops().batch_norm_act_eval(z, case.residual, case.scale, case.shift, mean, invstd, "silu", 0.0)

    def forward(case: Case, z: Tensor) -> Tensor:
        return reference.batch_norm_act(
            z, None, None, case.scale, case.shift, True, activation="silu", residual=case.residual
        )

    stock = forward(case.on_cpu(), stock_results(case)["z"])
    assert_close_to_oracle(y, stock, forward(case.in_double(), oracle_results(case)["z"]))


@each_kernel
def test_same_bits_every_time(kernel):
    """In every order of threads and blocks."""
    pointwise = {"filter_size": (1, 1), "padding": (0, 0, 0, 0)}
    for image, dtype, geometry in [(TILES[1], F16, {}), (TILES[1], BF16, {}), (TILES[2], F16, pointwise)]:
        case = make_case(
            image, SMALL[kernel][1], 5, dtype, residual=True, activation="silu", momentum=None, **geometry
        )  # fmt: skip
        expected = op_results(case)
        for name, seed in [("reverse", 0), ("random", 1)]:
            with simt.schedule(name, seed) if backends.current == "simt" else nullcontext():
                actual = op_results(case)
            for key in expected:
                assert torch.equal(actual[key], expected[key]), f"{key} {name} {seed} {image} {dtype}"


# ---- nothing, and what is refused -----------------------------------------------------------------------------------


@each_kernel
def test_no_images(kernel):
    """Nothing is learnt, but the batch is counted."""
    image, channels, out_channels = SMALL[kernel]
    case = make_case((0, *image[1:]), channels, out_channels, F16, residual=True)
    before = case.clone()
    assert evaluate(case).shape == (0, out_channels, *image[1:])
    z, mean, invstd = statistics(case)
    assert z.shape == (0, out_channels, *image[1:])
    assert not mean.any()
    assert not invstd.any()
    assert torch.equal(case.running_mean, before.running_mean)
    assert torch.equal(case.running_var, before.running_var)
    assert case.num_batches_tracked == before.num_batches_tracked + 1


def askew(tensor: Tensor) -> Tensor:
    """The same values, not on a 16-byte boundary."""
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)[1:]
    return moved.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


# What is wrong with a case of fp16, 8 channels in and 4 out, and the message.
BAD = {
    "three dimensions": (lambda c: {"x": c.x[0]}, r"x must be \[N, C, H, W\], channels_last"),
    "x NCHW": (lambda c: {"x": c.x.contiguous()}, "x must be .* channels_last"),
    "filter NCHW": (lambda c: {"conv_weight": c.conv_weight.contiguous()}, "conv_weight must be .* channels_last"),
    "fp64": (lambda c: {"x": c.x.double(), "conv_weight": c.conv_weight.double()}, "float32, float16 or bfloat16"),
    "integers": (lambda c: {"x": c.x.int(), "conv_weight": c.conv_weight.int()}, "x must be float32"),
    "two dtypes": (lambda c: {"x": c.x.bfloat16()}, "conv_weight must have the dtype of x"),
    "fp32 of many channels": (lambda c: {"x": c.x.float(), "conv_weight": c.conv_weight.float()},
                              "x has 8 channels of float32; allowed: up to 4 in float32"),
    "6 channels": (lambda c: {"x": last(c.x[:, :6]), "conv_weight": last(c.conv_weight[:, :6])},
                   "x has 6 channels; allowed: .* multiples of 8"),
    "groups": (lambda c: {"conv_weight": last(c.conv_weight[:, :4])}, "x has 8 channels, conv_weight is for 4; groups"),
    "no filters": (lambda c: {"conv_weight": c.conv_weight[:0]}, "conv_weight is empty"),
    "no pixels": (lambda c: {"x": c.x[:, :, :0]}, "images of x are empty"),
    "x askew": (lambda c: {"x": askew(c.x)}, "must begin on 16-byte boundaries"),
    "filter askew": (lambda c: {"conv_weight": askew(c.conv_weight)}, "must begin on 16-byte boundaries"),
    "large filter": (lambda c: {"dilation": [9, 1]}, "conv_weight is larger than x with its padding"),
    "stride 0": (lambda c: {"stride": [1, 0]}, r"stride and dilation must be 1 to 2\^24, not 0"),
    "dilation below 0": (lambda c: {"dilation": [-1, 1]}, r"stride and dilation must be 1 to 2\^24, not -1"),
    "padding below 0": (lambda c: {"padding": [0, 0, -2, 0]}, r"padding must be 0 to 2\^24, not -2"),
    "huge padding": (lambda c: {"padding": [0, 0, 0, 1 << 30]}, r"padding must be 0 to 2\^24"),
    "too many pixels": (lambda c: {"padding": [1 << 16, 1 << 16, 1 << 16, 0]}, "the output has more than"),
    "three strides": (lambda c: {"stride": [1, 1, 1]}, "stride and dilation have 2 numbers|expected"),
}  # fmt: skip
BAD_EVAL = {
    "residual of another shape": (lambda c: {"residual": c.residual[:1]}, "residual must have the shape of the output"),
    "residual of another dtype": (lambda c: {"residual": c.residual.float()}, "residual must have .* the dtype of x"),
    "residual NCHW": (lambda c: {"residual": c.residual.contiguous()}, "residual must have .* channels_last"),
    "residual askew": (lambda c: {"residual": askew(c.residual)}, "residual must begin on a 16-byte boundary"),
    "scale too long": (lambda c: {"scale": c.scale.repeat(2)}, r"scale must be \[4\]"),
    "shift in fp16": (lambda c: {"shift": c.shift.half()}, "shift must be float32"),
    "activation": (lambda c: {"activation": "softmax"}, "activation 'softmax' is not known"),
}  # fmt: skip
BAD_STATISTICS = {
    "one value": (lambda c: {"x": last(c.x[:1, :, :1, :1])}, "more than one value per channel"),
    "running_mean too short": (lambda c: {"running_mean": c.running_mean[1:]}, "running_mean must be"),
    "running_var in fp64": (lambda c: {"running_var": c.running_var.double()}, "running_var must be float32"),
    "counter of fp32": (lambda c: {"num_batches_tracked": torch.zeros((), device=c.x.device)},
                        "num_batches_tracked must be one int64"),
}  # fmt: skip


def last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("op", ["evaluate", "statistics"])
def test_bad_input(op):
    """An error that names the argument, what came and what is allowed; nothing is changed."""
    case = make_case((2, 5, 6), 8, 4, F16, residual=True)
    own = BAD_EVAL if op == "evaluate" else BAD_STATISTICS
    for name, (change, message) in (BAD | own).items():
        bad = replace(case.clone(), **change(case))
        before = bad.clone()
        with pytest.raises(RuntimeError, match=message):
            evaluate(bad) if op == "evaluate" else statistics(bad)
        for buffer in BUFFERS:
            assert torch.equal(getattr(bad, buffer), getattr(before, buffer)), f"{name}: {buffer}"


def test_a_tensor_anywhere():
    """The kernel for few channels takes x and filters from any address, and views of channels_last images."""
    case = make_case((3, 9, 11), 3, 8, F16, integers=True)
    expected = op_results(case)["y"]
    moved = replace(case, x=askew(case.x), conv_weight=askew(case.conv_weight))
    assert torch.equal(op_results(moved)["y"], expected)
    assert torch.equal(op_results(replace(case, x=case.x[1:]))["y"], expected[1:])


def test_opcheck():
    """Schemas tell what is written, fakes the sizes, strides and dtypes. On the executor with the same fakes."""
    namespace = "deepops_simt" if backends.current == "simt" else "deepops"
    fakes = {"eval": _fake_conv._conv_bn_act_eval, "statistics": _fake_conv._conv_bn_act_statistics}
    library = torch.library.Library(namespace, "FRAGMENT")
    try:
        if namespace == "deepops_simt":
            for name, fake in fakes.items():
                torch.library.register_fake(f"deepops_simt::conv_bn_act_{name}", fake, lib=library)
        case = make_case((2, 9, 11), 3, 8, F16, stride=(2, 1), padding=(2, 0, 1, 3), residual=True)
        utils = ("test_schema", "test_faketensor")
        given = (case.x, case.conv_weight, case.residual, case.scale, case.shift, *case.geometry, "relu", 0.0)
        torch.library.opcheck(backends.ops().conv_bn_act_eval.default, given, test_utils=utils)
        buffers = (case.running_mean, case.running_var, case.num_batches_tracked)
        given = (case.x, case.conv_weight, *buffers, *case.geometry, 0.1, 1e-5)
        torch.library.opcheck(backends.ops().conv_bn_act_statistics.default, given, test_utils=utils)
    finally:
        library._destroy()
