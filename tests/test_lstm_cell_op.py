"""The ops ``lstm_pack``, ``lstm_cell`` and ``lstm_cell_backward``."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from lstm_cell_cases import (
    DTYPES,
    CellPools,
    backward,
    differentiate,
    expected_of,
    forward,
    make_case,
    op_results,
    pack,
    sums,
)
from torch import Tensor

from deepops import functional, testing
from deepops._library import has_kernel
from deepops.testing import count_parallel_regions, make_layouts, use_isa, use_threads

pytestmark = pytest.mark.usefixtures("one_thread")
if not has_kernel("lstm_cell", "cpu"):
    pytest.skip("no compiled kernels", allow_module_level=True)

VARIANTS = {
    "plain": {},
    "no bias": {"bias": False},
    "peephole": {"peephole": True},
    "clip": {"clip": True},
    "all": {"peephole": True, "clip": True},
}
ops = torch.ops.deepops
assert functional  # importing it registers the fakes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype):
    """Around the borders of lanes, panels and tiles of rows; inputs and units in different numbers.

    All pairs of a variant, a number of units and a batch.
    """
    pools = {isa: CellPools() for isa in testing.isas()}
    for (v, (name, options)), (h, hidden) in product(enumerate(VARIANTS.items()), enumerate((1, 3, 16, 20, 127, 129))):
        for b, (batch, inputs) in enumerate(((1, 5), (3, 64), (8, 65), (13, 1), (26, 130))):
            if (v + h + b) % 2:
                continue
            case = make_case(batch, inputs, hidden, dtype, **options)
            expected = expected_of(case)
            for isa, pool in pools.items():
                with use_isa(isa):
                    pool.add(case, f"{isa} {name} {batch, inputs, hidden}", expected)
    for pool in pools.values():
        pool.check()


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(dtype, isa):
    """The same bits alone and among others, whatever the tile."""
    case = make_case(51, 37, 40, dtype, peephole=True)
    packed = pack(case)
    with use_isa(isa):
        state = forward(case, packed)
        grads = backward(case, packed, state[2])
        for rows in (slice(0, 1), slice(3, 8), slice(7, 13), slice(20, 51)):
            part = replace(case, **{name: getattr(case, name)[rows] for name in ("x", "h", "c", "grad_h", "grad_c")})
            part_state = forward(part, packed)
            part_grads = backward(part, packed, part_state[2])
            for whole, alone in zip((*state, *grads[:4]), (*part_state, *part_grads[:4]), strict=True):
                assert torch.equal(whole[rows], alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_repetitions_give_the_same_bits(dtype):
    case = make_case(50, 200, 190, dtype, peephole=True)
    results = []
    for threads in (1, 2, 3, 2):
        with use_threads(threads):
            results.append(op_results(case))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


def test_small_work_stays_on_one_thread_and_large_work_does_not():
    """By the ranges that are handed out: rows of a large product are divided, and every part is computed."""
    with use_threads(2):
        for batch, hidden in ((1, 128), (64, 256)):
            case = make_case(batch, hidden, hidden)
            packed = pack(case)
            with count_parallel_regions() as regions:
                _, _, gates = forward(case, packed)
            assert regions.count == 1
            with count_parallel_regions() as regions:
                backward(case, packed, gates)
            assert regions.count == 2  # gates, then both products


@pytest.mark.parametrize("missing", ["grad_h", "grad_c"])
def test_a_missing_gradient_is_zero(missing):
    case = make_case(5, 9, 33, peephole=True)
    zero = replace(case, **{missing: torch.zeros_like(case.h)})
    packed = pack(case)
    gates = forward(case, packed)[2]
    expected = backward(zero, packed, gates)
    for value, other in zip(backward(replace(case, **{missing: None}), packed, gates), expected, strict=True):
        assert torch.equal(value, other)


def test_what_is_not_asked_for_is_empty():
    case = make_case(4, 70, 20)
    packed = pack(case)
    h, c, gates = forward(case, packed)
    again = forward(case, packed, save=False)
    assert torch.equal(again[0], h)
    assert torch.equal(again[1], c)
    assert again[2].numel() == 0
    every = backward(case, packed, gates)
    for need_x, need_h in ((True, False), (False, True), (False, False)):
        some = backward(case, packed, gates, need_x=need_x, need_h=need_h)
        for i, needed in enumerate((True, need_x, need_h, True)):
            assert torch.equal(some[i], every[i]) if needed else some[i].numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype):
    """Any strides; rows of a longer tensor, as ``inputs[:, t]`` has them, are read where they are."""
    case = make_case(6, 19, 35, dtype)
    packed = pack(case)
    expected = forward(case, packed)
    expected_grads = backward(case, packed, expected[2])
    names = ("x", "h", "c", "grad_h", "grad_c")
    layouts = {name: make_layouts(getattr(case, name)) for name in names}
    for layout in layouts["x"]:
        if layout == "expanded":
            continue
        other = replace(case, **{name: layouts[name][layout] for name in names})
        actual = (*forward(other, packed), *backward(other, packed, expected[2]))
        for a, b in zip(actual, (*expected, *expected_grads), strict=True):
            assert torch.equal(a, b), layout
    long = torch.randn(6, 4, 19).to(dtype)
    long[:, 2] = case.x
    assert torch.equal(forward(replace(case, x=long[:, 2]), packed)[0], expected[0])
    ones = replace(case, grad_h=torch.ones((), dtype=dtype).expand(6, 35))
    dense = replace(case, grad_h=torch.ones(6, 35, dtype=dtype))
    for a, b in zip(backward(ones, packed, expected[2]), backward(dense, packed, expected[2]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "inputs"), [(0, 4), (3, 0), (0, 0)])
def test_empty(batch, inputs, dtype):
    case = make_case(batch, inputs, 5, dtype, peephole=True) if inputs else None
    if case is None:
        case = make_case(batch, 1, 5, dtype, peephole=True)
        case = replace(case, x=case.x[:, :0], weight_ih=case.weight_ih[:, :0].contiguous())
    actual, expected = op_results(case), differentiate(case)
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        if batch == 0:
            assert not actual[name].any(), name
    if inputs == 0:  # as inputs of 0
        zeros = replace(case, x=case.h.new_zeros(batch, 1), weight_ih=case.h.new_zeros(20, 1))
        for name, value in op_results(zeros).items():
            if name not in ("grad_x", "grad_weight_ih"):
                assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saturation(dtype, isa):
    """Gates far out: exactly 0, 1 or -1, finite gradients, as torch's."""
    pools = CellPools()
    with use_isa(isa):
        for hidden in (20, 33, 64, 100):
            case = make_case(26, 60, hidden, dtype, peephole=True)
            far = torch.tensor([-100.0, 100.0, 0.5])[torch.randint(0, 3, (4 * hidden,))]
            case = replace(case, bias=far.to(dtype))
            if dtype != torch.float64:  # sums are as in test_values, and everything else exact or nearly so
                pools.add(case, f"{hidden}")
            for value in op_results(replace(case, bias=far.to(dtype) * 300)).values():
                assert value.isfinite().all()
    if pools.pools:
        pools.check()


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_stand_where_torch_has_them(bad, dtype, isa):
    with use_isa(isa):
        for name in ("x", "h", "c", "grad_h", "grad_c"):
            case = make_case(4, 5, 18, dtype)
            getattr(case, name)[1, 2] = bad
            actual, stock = op_results(case), differentiate(case)
            for key, value in stock.items():
                assert torch.equal(actual[key].isnan(), value.isnan()), f"{name}: {key}"
                assert torch.equal(actual[key].isinf(), value.isinf()), f"{name}: {key}"


def test_clipping_is_decided_as_in_the_forward():
    """At the limit itself, where torch.clamp lets the gradient through, and one ulp on either side of it."""
    case = make_case(1, 3, 16, bias=False)
    case = replace(case, x=torch.zeros(1, 3), h=torch.zeros(1, 16), grad_h=None)
    case.c[:] = torch.linspace(-3, 3, 16)  # gates of 0.5: the cell is c / 2, exactly
    for limit in (case.c[0, 12].item() / 2, 0.5):
        for clip in (limit, torch.tensor(limit).nextafter(torch.tensor(0.0)).item()):
            clipped = replace(case, cell_clip=clip)
            packed = pack(clipped)
            _, c, gates = forward(clipped, packed)
            assert torch.equal(c, (case.c / 2).clamp(-clip, clip))
            inside = (case.c / 2).abs() <= torch.tensor(clip)
            assert torch.equal(backward(clipped, packed, gates)[3], torch.where(inside, case.grad_c * 0.5, 0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packing_converts_and_copies(dtype):
    """Weights may be changed afterwards."""
    case = make_case(3, 4, 5, dtype)
    packed = pack(case)
    expected = forward(case, packed)
    assert packed.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    case.weight_ih.zero_()
    case.weight_hh.zero_()
    for a, b in zip(forward(case, packed), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loop_has_the_bits_of_the_sequence(variant, dtype, isa):
    """Where inputs are 0: the product with W_ih of a sequence is torch's, with other roundings than the cell's."""
    case = make_case(5, 4, 70, dtype, **VARIANTS[variant])
    case = replace(case, x=torch.zeros_like(case.x))
    steps, (batch, hidden) = 4, case.h.shape
    gates_x = torch.zeros(steps, batch, 4 * hidden, dtype=pack(case).dtype)
    if case.bias is not None:
        gates_x += sums(case.bias)
    options = (None, case.weight_peephole, None, None, None, None, None, None, False, case.cell_clip, 1e-5, 0.0, 0.0)
    with use_isa(isa):
        whole = ops.lstm_sequence(gates_x, case.h, case.c, case.weight_hh, *options, 0.0, 0, True, True)
        packed, state, gates = pack(case), (case.h, case.c), []
        for t in range(steps):
            h, c, g = forward(replace(case, h=state[0], c=state[1]), packed)
            state = (h, c)
            gates.append(g)
            assert torch.equal(whole[0][t], h)
            assert torch.equal(whole[1][t], c)
            assert torch.equal(whole[4][t], g)
        if case.h.element_size() == 2:
            return  # between its steps a sequence keeps gradients in fp32
        grads = ops.lstm_sequence_backward(
            None, None, case.grad_h, case.grad_c, *whole[4:5], whole[1], *whole[6:], case.c, case.weight_hh, *options,
            0.0, 0,
        )  # fmt: skip
        grad_h, grad_c = case.grad_h, case.grad_c
        for t in reversed(range(steps)):
            before = whole[1][t - 1] if t else case.c
            step = replace(case, c=before, grad_h=grad_h, grad_c=grad_c)
            grad_gates, _, grad_h, grad_c, _ = backward(step, packed, gates[t])
            assert torch.equal(grads[0][t].to(dtype), grad_gates)
        assert torch.equal(grads[3], grad_h)
        assert torch.equal(grads[4], grad_c)


def _wrong_calls() -> dict[str, tuple[str, str, dict[str, object]]]:
    short, wide = torch.zeros(2, 5), torch.zeros(3, 6)
    return {
        "x rank": ("cell", "x must be", {"x": torch.zeros(3)}),
        "x batch": ("cell", "x must be", {"x": torch.zeros(2, 4)}),
        "x dtype": ("cell", "x must have the dtype", {"x": torch.zeros(3, 4).double()}),
        "x features": ("cell", "packed", {"x": torch.zeros(3, 70)}),
        "h rank": ("cell", "h \\[B, H\\]", {"h": torch.zeros(5)}),
        "h integer": ("cell", "h must be float", {"h": torch.zeros(3, 5, dtype=torch.int64)}),
        "c batch": ("cell", "c must be", {"c": short}),
        "c units": ("cell", "c must be", {"c": wide}),
        "packed dtype": ("cell", "packed", {"packed": torch.zeros(4).double()}),
        "bias size": ("cell", "bias must be", {"bias": torch.zeros(5)}),
        "bias dtype": ("cell", "bias", {"bias": torch.zeros(20).double()}),
        "peephole size": ("cell", "weight_peephole must be", {"weight_peephole": torch.zeros(20)}),
        "clip": ("cell", "cell_clip must not be negative", {"cell_clip": -1.0}),
        "gates size": ("backward", "gates must be", {"gates": torch.zeros(3, 5)}),
        "gates layout": ("backward", "gates must be contiguous", {"gates": torch.zeros(20, 3).t()}),
        "grad_h": ("backward", "grad_h must be", {"grad_h": short}),
        "grad_c": ("backward", "grad_c must be", {"grad_c": wide}),
        "grad dtype": ("backward", "grad_c must have the dtype", {"grad_c": torch.zeros(3, 5).half()}),
        "input_size": ("backward", "packed", {"input_size": 70}),
        "negative input_size": ("backward", "input_size must not be negative", {"input_size": -1}),
        "weight_hh": ("pack", "weight_hh must be", {"weight_hh": torch.zeros(20, 4)}),
        "weight_ih": ("pack", "weight_ih must be", {"weight_ih": torch.zeros(16, 4)}),
        "weight layout": ("pack", "weight_ih must be", {"weight_ih": torch.zeros(4, 20).t()}),
        "weight dtype": ("pack", "weight_ih must have the dtype", {"weight_ih": torch.zeros(20, 4).half()}),
    }


@pytest.mark.parametrize("name", _wrong_calls())
def test_bad_input(name):
    """What could not be read is refused, by name."""
    op, message, change = _wrong_calls()[name]
    case = make_case(3, 4, 5)
    weights = {"weight_ih": case.weight_ih, "weight_hh": case.weight_hh}
    packed = pack(case)
    options = {"packed": packed, "weight_peephole": None, "cell_clip": None}
    state = {"x": case.x, "h": case.h, "c": case.c, "bias": sums(case.bias), "save": True, **options}
    grads = {
        "grad_h": case.grad_h, "grad_c": case.grad_c, "gates": forward(case, packed)[2], "c_before": case.c,
        "input_size": 4, "need_x": True, "need_h": True, **options,
    }  # fmt: skip
    call, arguments = {
        "pack": (ops.lstm_pack, weights),
        "cell": (ops.lstm_cell, state),
        "backward": (ops.lstm_cell_backward, grads),
    }[op]
    call(**arguments)
    with pytest.raises(RuntimeError, match=message):
        call(**{**arguments, **change})


def test_opcheck():
    """Schemas and fakes say what the ops do."""
    case = make_case(3, 4, 5, peephole=True)
    packed = pack(case)
    gates = forward(case, packed)[2]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.lstm_pack.default, (case.weight_ih, case.weight_hh), test_utils=checks)
    for save in (True, False):
        arguments = (case.x, case.h, case.c, packed, case.bias, case.weight_peephole, 1.0, save)
        torch.library.opcheck(ops.lstm_cell.default, arguments, test_utils=checks)
    for need in (True, False):
        some: tuple[Tensor | float | int | bool | None, ...] = (
            case.grad_h, None, gates, case.c, packed, case.weight_peephole, None, 4, need, need,
        )  # fmt: skip
        torch.library.opcheck(ops.lstm_cell_backward.default, some, test_utils=checks)
