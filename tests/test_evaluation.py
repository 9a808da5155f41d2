"""The CPU kernels of evaluation: ``pointwise_bn_act_eval``, ``depthwise_bn_act_eval``, and when they are chosen."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import deepops
from deepops import _evaluation, reference, testing
from deepops._library import has_kernel
from deepops.testing import ErrorPool, count_parallel_regions, use_isa, use_threads

pytestmark = pytest.mark.usefixtures("one_thread")
if not has_kernel("pointwise_bn_act_eval", "cpu"):
    pytest.skip("no compiled kernels", allow_module_level=True)

ACTIVATIONS = ("identity", "relu", "leaky_relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish")


class Pointwise(NamedTuple):
    """One call of ``pointwise_bn_act_eval``."""

    inputs: int
    outputs: int
    size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    batch: int = 2
    residual: bool = False
    activation: str = "relu"


# Channels and pixels around 16 and 64, which are taken at a time, and around 64, of which a chain of a sum is made.
POINTWISE = [
    Pointwise(8, 24, (5, 7)),
    Pointwise(16, 96, (12, 12), residual=True, activation="relu6"),
    Pointwise(24, 65, (9, 8), (2, 2), activation="silu"),
    Pointwise(64, 64, (8, 8), activation="gelu"),
    Pointwise(65, 16, (16, 4), (1, 3), residual=True, activation="identity"),
    Pointwise(3, 5, (3, 3), (2, 1), activation="hardswish"),
    Pointwise(130, 70, (1, 17), residual=True, activation="leaky_relu"),
    Pointwise(1, 49, (10, 13), batch=3, activation="gelu_tanh"),
    Pointwise(200, 1, (1, 1), batch=97, residual=True),
]
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def make(case: Pointwise, memory_format: torch.memory_format, dtype: torch.dtype) -> list[Any]:
    torch.manual_seed(0)
    x = torch.randn(case.batch, case.inputs, *case.size, dtype=dtype).to(memory_format=memory_format)
    weight, bias = torch.randn(case.outputs, case.inputs, 1, 1, dtype=dtype), torch.randn(case.outputs, dtype=dtype)
    sizes = [(n - 1) // step + 1 for n, step in zip(case.size, case.stride, strict=True)]
    residual = torch.randn(case.batch, case.outputs, *sizes, dtype=dtype).to(memory_format=memory_format)
    return [x, weight, bias, residual if case.residual else None]


def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, case: Pointwise) -> Tensor:
    z = F.conv2d(x, weight, bias, case.stride)
    name, tanh = ("gelu", "tanh") if case.activation == "gelu_tanh" else (case.activation, "none")
    return reference.activation(z if residual is None else z + residual, name, 0.1, tanh)


def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, case: Pointwise, pack: bool = True) -> Tensor:
    packed = torch.ops.deepops.pointwise_bn_act_pack(weight) if pack else None
    y: Tensor = torch.ops.deepops.pointwise_bn_act_eval(
        x, weight, packed, bias, residual, case.stride, case.activation, 0.1
    )
    return y


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("layout", FORMATS)
def test_pointwise_values(layout: str, isa: str) -> None:
    pool = ErrorPool()
    with use_isa(isa):
        for case in POINTWISE:
            arguments = make(case, FORMATS[layout], torch.float32)
            wide = [None if t is None else t.double() for t in arguments]
            ours, stock, oracle = run(*arguments, case), plain(*arguments, case), plain(*wide, case)  # type: ignore[arg-type]
            assert torch.equal(ours, run(*arguments, case, pack=False))
            if arguments[0].is_contiguous():
                assert ours.is_contiguous()
            else:
                assert ours.is_contiguous(memory_format=torch.channels_last)
            pool.add(ours, stock, oracle, name=f"{case}")
    pool.check()


@pytest.mark.parametrize("layout", FORMATS)
def test_pointwise_in_double_precision(layout: str) -> None:
    for case in POINTWISE:
        arguments = make(case, FORMATS[layout], torch.float64)
        torch.testing.assert_close(run(*arguments, case), plain(*arguments, case), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", FORMATS)
def test_large_results_are_stored_past_the_caches(layout: str) -> None:
    """From 16 MB on, with the same bits as small ones."""
    case = Pointwise(8, 272, (128, 128), batch=1)
    x, weight, bias, _ = make(case, FORMATS[layout], torch.float32)
    large = run(x, weight, bias, None, case)
    assert large.nbytes >= 16 << 20
    for row in (0, 64, 127):
        piece = x[:, :, row : row + 1].contiguous(memory_format=FORMATS[layout])
        assert torch.equal(large[:, :, row : row + 1], run(piece, weight, bias, None, case))


def test_same_bits_for_every_thread_count() -> None:
    case = Pointwise(64, 96, (40, 40), residual=True)
    for memory_format in FORMATS.values():
        arguments = make(case, memory_format, torch.float32)
        expected = run(*arguments, case)
        for threads in (2, 3):
            with use_threads(threads), count_parallel_regions() as regions:
                again = run(*arguments, case, pack=False)
            assert torch.equal(again, expected)
            assert regions.count == 1 + (memory_format is torch.channels_last)  # packing, the product


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_are_packed_by_any_number_of_threads(dtype: torch.dtype) -> None:
    """Columns are outputs, 64 to a panel; those beyond the last are 0."""
    outputs, inputs = 1100, 700
    weight = torch.randn(outputs, inputs, 1, 1, dtype=dtype)
    columns = F.pad(weight.view(outputs, inputs), [0, 0, 0, -outputs % 64])
    panels = columns.view(-1, 64, inputs).transpose(1, 2)
    for threads in (1, 2, 3):
        with use_threads(threads), count_parallel_regions() as regions:
            packed = torch.ops.deepops.pointwise_bn_act_pack(weight)
        assert regions.count == 1
        assert torch.equal(packed.view(panels.shape), panels)


def test_values_that_are_not_finite() -> None:
    case = Pointwise(20, 70, (4, 4))
    for memory_format in FORMATS.values():
        x, weight, bias, _ = make(case, memory_format, torch.float32)
        x[0, 3, 1, 2], x[1, 4, 0, 0] = float("nan"), float("inf")
        y = run(x, weight.abs(), bias, None, case)
        assert y[0, :, 1, 2].isnan().all()
        assert y[1, :, 0, 0].isposinf().all()
        assert y.isfinite().sum() == y.numel() - 2 * 70


def depthwise_cases() -> Iterator[tuple[Any, ...]]:
    """Channels, size, filter, stride, padding, dilation, activation."""
    shapes = [(16, (7, 9), (3, 3)), (19, (5, 5), (5, 3)), (48, (6, 20), (1, 1)), (33, (4, 4), (2, 2))]
    geometries = [([1, 1], [1, 1, 1, 1], [1, 1]), ([2, 1], [2, 1, 0, 3], [1, 2])]
    for i, ((channels, size, filter_), geometry) in enumerate(product(shapes, geometries)):
        yield channels, size, filter_, *geometry, ACTIVATIONS[i]


@pytest.mark.parametrize("isa", testing.isas())
def test_depthwise_values(isa: str) -> None:
    pool = ErrorPool()
    with use_isa(isa):
        for channels, size, filter_, stride, padding, dilation, activation in depthwise_cases():
            torch.manual_seed(0)
            x = torch.randn(3, channels, *size).to(memory_format=torch.channels_last)
            weight, bias = torch.randn(channels, 1, *filter_), torch.randn(channels)
            name, tanh = ("gelu", "tanh") if activation == "gelu_tanh" else (activation, "none")

            def stock(
                x: Tensor, weight: Tensor, bias: Tensor, geometry=(stride, padding, dilation), act=(name, 0.1, tanh)
            ) -> Tensor:
                step, (top, bottom, left, right), spread = geometry
                padded = F.pad(x, (left, right, top, bottom))
                z = F.conv2d(padded, weight, bias, step, 0, spread, weight.size(0))
                return reference.activation(z, *act)

            ours = torch.ops.deepops.depthwise_bn_act_eval(x, weight, bias, stride, padding, dilation, activation, 0.1)
            pool.add(ours, stock(x, weight, bias), stock(x.double(), weight.double(), bias.double()), name=activation)
            wide = torch.ops.deepops.depthwise_bn_act_eval(
                x.double(), weight.double(), bias.double(), stride, padding, dilation, activation, 0.1
            )
            torch.testing.assert_close(wide, stock(x.double(), weight.double(), bias.double()), rtol=1e-12, atol=1e-12)
    pool.check()


def block(*arguments: Any, **options: Any) -> deepops.nn.ConvBNAct2d:
    torch.manual_seed(0)
    layer = deepops.nn.ConvBNAct2d(*arguments, **options)
    with torch.no_grad():
        layer.bn.running_mean.normal_()
        layer.bn.running_var.uniform_(0.5, 2)
    return layer.eval()


@pytest.mark.parametrize(
    ("layer", "shape", "residual"),
    [
        (block(64, 80, 1), (2, 64, 16, 16), False),
        (block(64, 80, 1, 2, bias=True, activation="relu6"), (3, 64, 16, 16), False),
        (block(64, 80, 1, padding="same"), (2, 64, 16, 16), True),
        (block(32, 32, 3, 2, 1, groups=32, activation="silu"), (2, 32, 9, 9), False),
        (block(32, 32, (3, 2), padding="same", groups=32), (2, 32, 9, 9), False),
    ],
)
def test_blocks_use_them(layer: deepops.nn.ConvBNAct2d, shape: tuple[int, ...], residual: bool) -> None:
    pool, counts = ErrorPool(), []
    for memory_format in FORMATS.values():
        x = torch.randn(shape).to(memory_format=memory_format)
        z = layer.conv(x)
        extra = torch.randn_like(z) if residual else None
        with torch.no_grad(), torch.profiler.profile() as profile:
            ours = layer(x, extra)
        counts.append({event.key for event in profile.key_averages() if event.key.startswith("deepops::")})

        def stock(x: Tensor, extra: Tensor | None, modules: Any) -> Tensor:
            conv, bn, act = modules
            y = bn(conv(x))
            result: Tensor = act(y if extra is None else y + extra)
            return result

        modules = layer.to_modules()
        wide_layer = block_in_double(layer)
        with torch.no_grad():
            pool.add(
                ours,
                stock(x, extra, modules),
                stock(x.double(), None if extra is None else extra.double(), wide_layer.to_modules()),
            )
        assert ours.stride() == z.stride()
    pool.check()
    depthwise = layer.conv.groups > 1
    assert "deepops::depthwise_bn_act_eval" in counts[0] if depthwise else "pointwise_bn_act_eval" in str(counts[0])
    assert counts[1] == set() if depthwise else "deepops::pointwise_bn_act_eval" in counts[1]


def block_in_double(layer: deepops.nn.ConvBNAct2d) -> deepops.nn.ConvBNAct2d:
    import copy

    return copy.deepcopy(layer).double()


def test_what_is_left_to_onednn() -> None:
    weight = torch.randn(24, 16, 1, 1)
    last = torch.randn(2, 16, 16, 16).to(memory_format=torch.channels_last)
    applies = _evaluation.pointwise_applies
    assert not applies(last, weight, 1, 0, 1)  # few channels, a small result
    assert applies(last.contiguous(), weight, 1, 0, 1)
    assert not applies(torch.randn(2, 16, 7, 7), weight, 1, 0, 1)  # 49 pixels are no whole number of lanes
    assert not applies(last.contiguous(), weight, 1, 1, 1)
    assert not applies(last.contiguous(), torch.randn(24, 8, 1, 1), 1, 0, 2)
    assert not applies(last.contiguous().half(), weight.half(), 1, 0, 1)
    assert not applies(last[:, :, ::2], weight, 1, 0, 1)


def test_fakes() -> None:
    checks = ("test_schema", "test_faketensor")
    for case, memory_format in product(POINTWISE[:3], FORMATS.values()):
        x, weight, bias, residual = make(case, memory_format, torch.float32)
        packed = torch.ops.deepops.pointwise_bn_act_pack(weight)
        arguments = (x, weight, packed, bias, residual, case.stride, case.activation, 0.1)
        torch.library.opcheck(torch.ops.deepops.pointwise_bn_act_eval, arguments, test_utils=checks)
        torch.library.opcheck(torch.ops.deepops.pointwise_bn_act_pack, (weight,), test_utils=checks)
    x = torch.randn(2, 16, 5, 6).to(memory_format=torch.channels_last)
    arguments = (x, torch.randn(16, 1, 3, 3), torch.randn(16), [2, 1], [1, 0, 1, 1], [1, 1], "relu", 0.0)
    torch.library.opcheck(torch.ops.deepops.depthwise_bn_act_eval, arguments, test_utils=checks)


def test_bad_input() -> None:
    x, weight, bias = torch.randn(2, 8, 4, 4), torch.randn(6, 8, 1, 1), torch.randn(6)
    call = torch.ops.deepops.pointwise_bn_act_eval
    for change, message in (
        ({"x": x[0]}, r"x must be \[N, C, H, W\]"),
        ({"x": x.double()}, "with the dtype of conv_weight"),
        ({"x": x[:, :7]}, r"x must be \[N, C, H, W\]"),
        ({"x": x[:, :, :, ::2]}, "x must be contiguous or channels_last"),
        ({"conv_weight": weight.half()}, "float32 or float64"),
        ({"conv_weight": weight.expand(6, 8, 1, 2)}, r"conv_weight must be \[K, C, 1, 1\]"),
        ({"packed": bias}, r"packed must be \[512\]"),
        ({"bias": bias[:5]}, r"bias must be \[6\]"),
        ({"residual": x}, "residual"),
        ({"stride": (0, 1)}, "stride must be two positive numbers"),
        ({"activation": "tanh"}, "activation 'tanh' is not known"),
    ):
        arguments = {"x": x, "conv_weight": weight, "packed": None, "bias": bias, "residual": None, "stride": (1, 1)}
        arguments.update(activation="relu", negative_slope=0.0)
        arguments.update(change)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match=message):
            call(**arguments)
