"""The ``lstm_sequence`` ops: values of every variant, edges, threads, bad input."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from typing import Any

import backends
import pytest
import torch
from lstm_cases import (
    DTYPES,
    FACTORS,
    OUTPUTS,
    TENSORS,
    VARIANTS,
    Case,
    Expected,
    LstmPools,
    backward,
    expected_of,
    forward,
    make_case,
    op_results,
    oracle_results,
    stock_results,
)
from pairwise import pairwise

from deepops import functional, testing
from deepops._library import has_kernel
from deepops.testing import count_parallel_regions, use_isa, use_threads

assert functional  # registers the fakes
pytestmark = pytest.mark.usefixtures("one_thread")
if not has_kernel("lstm_sequence", "cpu"):
    pytest.skip("no compiled kernels", allow_module_level=True)

SIZES: list[dict[str, int]] = [
    {"hidden": 1, "batch": 40},
    {"hidden": 3, "batch": 20},
    {"hidden": 16, "batch": 1, "steps": 30},
    {"hidden": 17, "batch": 7, "steps": 11},
    {"hidden": 64, "batch": 13, "steps": 6},
    {"hidden": 127, "batch": 6},
    {"hidden": 129, "batch": 6, "steps": 3},
]


@pytest.fixture(autouse=True)
def _exists(request):
    """Backends that have no such op yet show as skipped."""
    if "backend" in request.fixturenames and not hasattr(backends.ops(), "lstm_sequence"):
        pytest.skip(f"{backends.current}: the op has no kernel")


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """The same bits. On GPUs products are torch's, whose bits depend on sizes and addresses: the same fp64 values."""
    if backends.current == "cpu":
        return torch.equal(actual, expected)
    return torch.allclose(actual, expected, rtol=1e-10, atol=1e-10)


def exact(dtype: torch.dtype = torch.float32) -> torch.dtype:
    """Of cases for ``same``."""
    return dtype if backends.current == "cpu" else torch.float64


Judged = list[tuple[str, Case, Expected]]


def judged(cases: Iterable[dict[str, Any]]) -> Judged:
    """Cases by what ``make_case`` takes, and what is expected of them: most of the time goes into that."""
    torch.manual_seed(0)
    return [(str(options), case := make_case(**options), expected_of(case)) for options in cases]


@functools.lru_cache(maxsize=1)  # the backends share them, one after the other
def cases_of(variant: str, device: str) -> Judged:
    return judged(VARIANTS[variant] | size | {"dtype": dtype} for dtype, size, _ in product(DTYPES, SIZES, range(4)))


@functools.lru_cache(maxsize=1)
def cases_of_pairs(device: str) -> Judged:
    return judged(options | {"batch": 7} for options, _ in product(pairwise(FACTORS, lambda case: True), range(5)))


@pytest.mark.parametrize("backend", backends.BACKENDS, indirect=True)  # changes first
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, backend):
    """Every option alone, in every dtype and size; one pool, as stock is right by luck on few values."""
    pools = LstmPools()
    for name, case, expected in cases_of(variant, backends.device()):
        pools.add(case, name, expected)
    pools.check()


def test_pairs_of_variants(backend):
    pools = LstmPools()
    for name, case, expected in cases_of_pairs(backends.device()):
        pools.add(case, name, expected)
    pools.check()


def test_instruction_sets():
    pools = {isa: LstmPools() for isa in testing.isas()}
    sizes = ({"hidden": 35, "batch": 11}, {"hidden": 16, "batch": 13})
    for variant, dtype, _, size in product(VARIANTS, DTYPES, range(4), sizes):
        case = make_case(**VARIANTS[variant], **size, dtype=dtype)
        expected = expected_of(case)
        for isa, pool in pools.items():
            with use_isa(isa):
                pool.add(case, f"{isa} {variant} {size} {dtype}", expected)
    for pool in pools.values():
        pool.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_thousand_steps(dtype):
    """Options take turns in the dtypes; shorter sequences have all of both."""
    pools = LstmPools()
    turns = {torch.float32: ("plain", "layer norm", "peephole", "zoneout h"), torch.float64: ("plain", "zoneout h")}
    for variant in turns.get(dtype, ("plain", "layer norm" if dtype == torch.float16 else "peephole")):
        pools.add(make_case(1000, 4, 18, dtype, **VARIANTS[variant]), variant)
    pools.check()


def test_saturation(backend):
    """Gates that are 0 and 1: nothing overflows, and what is saturated passes no gradient."""
    pools = LstmPools()
    for dtype, scale, seed in product(DTYPES, (100.0, 1000.0), range(3)):
        torch.manual_seed(seed)
        pools.add(make_case(dtype=dtype, scale=scale), f"{dtype} {scale}")
    pools.check()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["gates_x", "h0", "c0"])
def test_values_that_are_not_finite(where, value, backend):
    """NaN and infinity stand where the reference has them."""
    pools = LstmPools()
    for dtype in (torch.float32, torch.float64):
        case = make_case(dtype=dtype, hidden=20)
        getattr(case, where).select(-1, 3)[..., 1] = value
        if where == "gates_x":
            case.gates_x[2, 0, 25], case.gates_x[1, 2, 75] = value, value
        actual, stock = op_results(case), stock_results(case)
        for name, expected in stock.items():
            got = actual[name]
            assert torch.equal(got.isnan(), expected.isnan()), f"{where} {value} {name}"
            assert torch.equal(got.isposinf(), expected.isposinf()), f"{where} {value} {name}"
            assert torch.equal(got.isneginf(), expected.isneginf()), f"{where} {value} {name}"
    assert not pools.pools


@pytest.mark.parametrize(("steps", "batch"), [(0, 3), (4, 0), (0, 0)])
@pytest.mark.parametrize("variant", ["plain", "layer norm", "projection", "peephole", "lengths in reverse"])
def test_empty(steps, batch, variant, backend):
    case = make_case(steps, batch, **VARIANTS[variant])
    actual, expected = op_results(case), oracle_results(case)
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert torch.equal(actual[name].double(), value), name


def test_missing_gradients(backend):
    """A gradient that is not given is 0."""
    for variant in ("plain", "projection", "zoneout h", "zoneout c", "lengths", "layer norm"):
        case = make_case(**VARIANTS[variant], hidden=18)
        saved = forward(case)
        for name in OUTPUTS:
            given: Any = getattr(case, f"grad_{name}")
            without = backward(replace(case, **{f"grad_{name}": None}), saved)
            zeros = backward(replace(case, **{f"grad_{name}": torch.zeros_like(given)}), saved)
            assert all(torch.equal(a, b) for a, b in zip(without, zeros, strict=True)), (variant, name)


def test_what_is_not_asked_for_is_empty(backend):
    for variant in VARIANTS.values():
        case = make_case(**variant)
        full = forward(case)
        for save, all_c in ((False, True), (False, False), (True, False)):
            some = forward(case, save=save, all_c=all_c)
            assert [t.numel() for t in some[4:]] == [t.numel() if save else 0 for t in full[4:]]
            assert some[1].numel() == (full[1].numel() if save or all_c else 0)
            for a, b in zip(full, some, strict=True):
                assert not b.numel() or torch.equal(a, b)


def test_same_bits_for_one_and_two_threads():
    for name, variant in VARIANTS.items():
        case = make_case(12, 37, 40, **variant)
        expected = op_results(case)
        for isa, threads in product(testing.isas()[-1:], (2, 3)):
            with use_isa(isa), use_threads(threads):
                actual = op_results(case)
            for key, value in expected.items():
                assert torch.equal(actual[key], value), (name, threads, key)


def test_one_sequence_alone_has_the_same_bits(backend):
    """Rows of a batch never meet."""
    for name in ("plain", "projection", "layer norm", "hidden mask", "lengths in reverse"):
        case = make_case(4, 7, 24, exact(), **VARIANTS[name])
        whole = forward(case)
        for row in (0, 3, 6):
            rows = {n: t[row : row + 1] for n in ("h0", "c0", "hidden_mask", "lengths")
                    if (t := getattr(case, n)) is not None}  # fmt: skip
            alone = forward(replace(case, gates_x=case.gates_x[:, row : row + 1].contiguous(), **rows))
            assert same(alone[0], whole[0][:, row : row + 1]), (name, row)
            assert same(alone[3], whole[3][row : row + 1]), (name, row)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("variant", ["plain", "zoneout h", "recurrent dropout", "layer norm", "projection", "clip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_in_two_parts_has_the_same_bits(variant, reverse, dtype, backend):
    case = make_case(7, 3, 20, exact(dtype), **VARIANTS[variant], reverse=reverse)
    whole = forward(case)
    halves = [(0, 4), (4, 7)]
    h, c, outputs = case.h0, case.c0, {}
    for begin, end in reversed(halves) if reverse else halves:
        part = replace(case, gates_x=case.gates_x[begin:end].contiguous(), h0=h, c0=c, first_step=begin)
        outputs[begin], _, h, c, *_ = forward(part)
    assert same(torch.cat([outputs[begin] for begin, _ in halves]), whole[0])
    assert same(h, whole[2])
    assert same(c, whole[3])


def test_lengths_are_shorter_sequences(backend):
    """A sequence that ends early has the bits of one that is cut there, and nothing comes back from beyond."""
    for reverse, layer_norm in product((False, True), repeat=2):
        case = make_case(6, 3, 18, exact(), reverse=reverse, layer_norm=layer_norm)
        whole = replace(case, lengths=torch.tensor([4, 4, 4], device=backends.device()))
        cut = {name: t[:4].contiguous() for name in ("gates_x", "grad_h", "grad_c")
               if (t := getattr(case, name)) is not None}  # fmt: skip
        expected, actual = op_results(replace(case, **cut)), op_results(whole)
        for name, value in expected.items():
            got = actual[name]
            if name in ("h", "c", "grad_gates_x"):
                assert not got[4:].any(), name
                got = got[:4]
            assert same(got, value) or name == "grad_weight_hh", name


def test_parallel_regions():
    for variant in VARIANTS.values():
        case = make_case(5, 33, 40, **variant)
        with use_threads(2), count_parallel_regions() as regions:
            saved = forward(case)
            backward(case, saved)
        assert regions.count == 2


def test_fakes():
    """``opcheck`` compares shapes, dtypes and strides of the fakes with those of the results."""
    checks = ("test_schema", "test_faketensor")
    for name, dtype in product(("plain", "projection", "layer norm", "peephole"), (torch.float32, torch.float16)):
        case = make_case(**VARIANTS[name], dtype=dtype)
        for save, all_c in ((True, False), (False, False)):
            torch.library.opcheck(
                torch.ops.deepops.lstm_sequence, forward_arguments(case, save, all_c), test_utils=checks
            )
        saved = forward(case)
        torch.library.opcheck(
            torch.ops.deepops.lstm_sequence_backward, backward_arguments(case, saved), test_utils=checks
        )


def forward_arguments(case: Case, save: bool = True, all_c: bool = True) -> tuple[Any, ...]:
    tensors = [getattr(case, name) for name in (*TENSORS, "hidden_mask", "lengths", "seed")]
    return (*tensors, *case.options().values(), save, all_c)


def backward_arguments(case: Case, saved: tuple[Any, ...]) -> tuple[Any, ...]:
    given = [getattr(case, f"grad_{name}") for name in OUTPUTS]
    tensors = [getattr(case, name) for name in (*TENSORS[2:], "hidden_mask", "lengths", "seed")]
    return (*given, saved[4], saved[1], saved[6], saved[7], *tensors, *case.options().values())


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "gates_x": ({"gates_x": torch.zeros(5, 3, 76)}, "gates_x has the wrong shape"),
    "rank": ({"gates_x": torch.zeros(3, 80)}, r"gates must be \[T, B, 4H\]"),
    "strides": ({"gates_x": torch.zeros(3, 5, 80).transpose(0, 1)}, "gates_x .*not contiguous"),
    "dtype": ({"gates_x": torch.zeros(5, 3, 80, dtype=torch.float64)}, "gates_x has the wrong dtype"),
    "h0": ({"h0": torch.zeros(2, 20)}, "h0 has the wrong shape"),
    "c0": ({"c0": torch.zeros(2, 20)}, "c0 has the wrong shape"),
    "integers": ({"c0": torch.zeros(3, 20, dtype=torch.int64)}, "c0 must be float32"),
    "weight_hh": ({"weight_hh": torch.zeros(80, 19)}, r"weight_hh must be \[4H, H\]"),
    "weight_hr": ({"weight_hr": torch.zeros(20, 19)}, "weight_hr has the wrong shape"),
    "weight_peephole": ({"weight_peephole": torch.zeros(59)}, "weight_peephole has the wrong shape"),
    "weight_ln_hh": ({"weight_ln_hh": torch.ones(80)}, "come together"),
    "hidden_mask": ({"hidden_mask": torch.ones(3, 19)}, "hidden_mask has the wrong shape"),
    "lengths": ({"lengths": torch.tensor([1, 2])}, "lengths has the wrong shape"),
    "lengths' dtype": ({"lengths": torch.tensor([1, 2, 3], dtype=torch.int32)}, "lengths has the wrong dtype"),
    "too long": ({"lengths": torch.tensor([1, 6, 3])}, "lengths must be between 0 and 5, not 6"),
    "seed": ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed has the wrong shape"),
    "cell_clip": ({"cell_clip": -1.0}, "cell_clip must not be negative"),
    "zoneout_h": ({"zoneout_h": 1.5}, "zoneout_h must be between 0 and 1"),
    "zoneout_c": ({"zoneout_c": -0.5}, "zoneout_c must be between 0 and 1"),
    "recurrent_dropout": ({"recurrent_dropout": float("nan")}, "recurrent_dropout must be between 0 and 1"),
    "first_step": ({"first_step": -1}, "first_step must not be negative"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changes, message = BAD[name]
    case = make_case(5, 3, 20)
    with pytest.raises(RuntimeError, match=message):
        forward(replace(case, **changes))


def test_bad_input_of_the_backward():
    case = make_case(5, 3, 20, layer_norm=True)
    saved = forward(case)
    for index, name in ((1, "c"), (6, "r"), (7, "stats")):
        wrong = list(saved)
        wrong[index] = saved[index][1:]
        with pytest.raises(RuntimeError, match=f": {name} has the wrong shape"):
            backward(case, tuple(wrong))
    for name in OUTPUTS:
        with pytest.raises(RuntimeError, match=f"grad_{name} has the wrong shape"):
            backward(replace(case, **{f"grad_{name}": torch.zeros(2, 2)}), saved)
