"""What is special about contiguous data in the ``depthwise_bn_act`` ops: rows in lanes, memory of threads.

All that holds for both layouts is in ``test_depthwise_bn_act.py``.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import replace
from itertools import product

import pytest
import torch
from depthwise_cases import GEOMETRIES, DepthwisePools, make_case, op_results, oracle_results
from torch import Tensor

from deepops import testing
from deepops._library import has_kernel
from deepops.testing import use_isa

pytestmark = pytest.mark.usefixtures("one_thread")
if not has_kernel("depthwise_bn_act_train", "cpu"):
    pytest.skip("no compiled kernels", allow_module_level=True)

PLANES = torch.contiguous_format
WIDTHS = [*range(1, 20), 31, 32, 33, 48, 49]
every_isa = pytest.mark.parametrize("isa", testing.isas())


@every_isa
@pytest.mark.parametrize("geometry", ["3x3", "3x3 stride 2", "5x5 stride 2", "dilation and stride", "wide padding"])
def test_every_width(geometry, isa):
    """Rows that end anywhere within lanes, few channels; later images and channels show what goes beyond a row."""
    pools = DepthwisePools()
    widths = WIDTHS if geometry != "dilation and stride" else WIDTHS[2:]  # as wide as the filter
    for width, height in product(widths, (4, 7)):
        case = make_case((4, 3, height, width), **GEOMETRIES[geometry], activation="silu", eps=1e-1, layout=PLANES)
        with use_isa(isa):
            pools.add(case, f"{height}x{width}")
    pools.check()


@every_isa
def test_strides_that_differ(isa):
    """Of 1, 2 and more in either direction: columns are sorted in three ways, rows of grad_x come in order or not."""
    pools = DepthwisePools()
    for stride, width in product(product((1, 2, 3), repeat=2), (3, 16, 21, 40)):
        for filter_size, padding in [((3, 3), (1, 1, 1, 1)), ((2, 4), (0, 1, 1, 2))]:
            case = make_case(
                (3, 2, 6, width), filter_size, stride=stride, padding=padding, activation="hardswish", layout=PLANES
            )
            with use_isa(isa):
                pools.add(case, f"stride {stride} width {width} {filter_size}")
    pools.check()


@every_isa
@pytest.mark.parametrize("geometry", ["3x3", "3x3 stride 2", "uneven"])
def test_more_images_than_are_worked_on_at_a_time(geometry, isa):
    """Then the backward computes z twice, and the last images are fewer."""
    pools = DepthwisePools()
    for shape in [(11, 2, 40, 48), (23, 3, 50, 33)]:
        case = make_case(shape, **GEOMETRIES[geometry], activation="relu6", layout=PLANES)
        with use_isa(isa):
            pools.add(case, f"{shape}")
    pools.check()


@every_isa
def test_more_than_the_cache_holds(isa):
    """The forward then computes z twice; one image at a time."""
    pools = DepthwisePools()
    for shape, activation in product([(2, 3, 260, 256), (1, 2, 401, 330)], ("identity", "silu", "relu6")):
        case = make_case(shape, activation=activation, layout=PLANES)
        assert case.grad_y[:, 0].numel() > 2**17
        with use_isa(isa):
            pools.add(case, f"{shape} {activation}")
    pools.check()


@every_isa
def test_every_width_in_double(isa):
    """fp64 has nothing finer to be compared with."""
    for width, geometry in product(WIDTHS, ("3x3", "3x3 stride 2", "wide padding")):
        case = make_case(
            (3, 2, 6, width), dtype=torch.float64, **GEOMETRIES[geometry], activation="silu", eps=1e-1, layout=PLANES
        )
        with use_isa(isa):
            actual = op_results(case)
        for name, value in oracle_results(case).items():
            torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-9, msg=f"{geometry} {width} {name}")


# ---- memory ---------------------------------------------------------------------------------------------------------


def beside_forbidden_memory(values: Tensor, *, before: bool) -> Tensor:
    """A copy whose first byte comes right after a page that must not be touched, or whose last right before one."""
    pages = -(-values.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    place = torch.frombuffer(memory, dtype=torch.uint8)
    forbidden = place.data_ptr() + (0 if before else pages * mmap.PAGESIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    no_access = 0
    assert libc.mprotect(ctypes.c_void_p(forbidden), mmap.PAGESIZE, no_access) == 0, ctypes.get_errno()
    offset = mmap.PAGESIZE if before else pages * mmap.PAGESIZE - values.nbytes
    copy = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset).view(values.shape)
    return copy.copy_(values)


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("before", [True, False], ids=["before", "behind"])
def test_nothing_beside_the_data_is_read(before, dtype, isa):
    for width, stride in product((1, 5, 13, 16, 17, 33), (1, 2, 3)):
        case = make_case((2, 3, 5, width), dtype=dtype, stride=(stride, stride), activation="silu", layout=PLANES)
        moved = {n: beside_forbidden_memory(getattr(case, n), before=before) for n in ("x", "grad_y", "conv_weight")}
        with use_isa(isa):
            expected, actual = op_results(case), op_results(replace(case, **moved))
        for name, value in expected.items():
            assert torch.equal(actual[name], value), (width, stride, name)


@every_isa
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_channel_leaves_nothing_behind(stride, isa):
    """The memory that it was worked on in is used for the next one, with the same zeros around the data."""
    case = make_case((2, 6, 7, 19), stride=(stride, stride), activation="silu", layout=PLANES)
    x, grad_y = case.x.clone(), case.grad_y.clone()
    x[:, :3], grad_y[:, :3] = float("nan"), float("inf")
    with use_isa(isa):
        clean, broken = op_results(case), op_results(replace(case, x=x, grad_y=grad_y))
    for name in ("y", "grad_x"):
        assert torch.equal(broken[name][:, 3:], clean[name][:, 3:]), name
    for name in ("grad_conv_weight", "grad_weight", "grad_bias", "running_mean", "running_var"):
        assert torch.equal(broken[name][3:], clean[name][3:]), name
