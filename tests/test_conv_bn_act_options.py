"""Every pair of options, dtypes, layouts and modes of the blocks, by the tolerance rule."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import pytest
import torch
from conv_cases import ACTIVATION_MODULES, MODES, Pools, Stock, check, compare, make_block, make_input
from pairwise import pairs_of, pairwise

from deepops.testing import ErrorPool, make_layouts

pytestmark = pytest.mark.usefixtures("one_thread")

AUTOCAST = {"autocast bf16": torch.bfloat16, "autocast fp16": torch.float16}
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    **dict.fromkeys(AUTOCAST, torch.float32),
}
FACTORS: dict[str, list[Any]] = {
    "dims": [1, 2, 3],
    "kernel_size": [1, 2, 3],
    "stride": [1, 2],
    "padding": [0, 1, "same", "valid"],
    "dilation": [1, 2],
    "groups": [1, 2, 4],
    "padding_mode": ["zeros", "reflect", "replicate", "circular"],
    "bias": [False, True],
    "eps": [1e-5, 1e-2],
    "momentum": [0.1, None],
    "affine": [True, False],
    "track_running_stats": [True, False],
    "activation": list(range(len(ACTIVATION_MODULES))),
    "residual": [False, True],
    "dtype": list(DTYPES),
    "statistics": ["wide", "narrow"],
    "layout": ["contiguous", "channels_last", "sliced", "offset", "transposed", "expanded"],
    "mode": [*MODES, "no_grad"],
}


def allowed(case: dict[str, Any]) -> bool:
    """Whether torch's own modules take it."""
    if case.get("padding") == "same" and case.get("stride", 1) != 1:
        return False
    if case.get("layout") == "channels_last" and case.get("dims", 2) == 1:
        return False
    return case.get("statistics", "wide") == "wide" or case.get("dtype", "bf16") in ("bf16", "fp16")


CASES = pairwise(FACTORS, allowed)


def test_the_cases_hold_all_pairs() -> None:
    covered = set().union(*(pairs_of(case) for case in CASES))
    wanted = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(FACTORS, 2)
        for x, y in itertools.product(FACTORS[a], FACTORS[b])
        if allowed({a: x, b: y})
    }
    assert wanted <= covered
    assert all(allowed(case) for case in CASES)
    assert len(CASES) < 120


def test_all_pairs_of_options() -> None:
    pools: Pools = defaultdict(ErrorPool)
    for seed, case in itertools.product(range(3), CASES):
        case = dict(case)
        dims, dtype, mode = case.pop("dims"), case.pop("dtype"), case.pop("mode")
        layout, statistics, with_residual = case.pop("layout"), case.pop("statistics"), case.pop("residual")
        activation = ACTIVATION_MODULES[case.pop("activation")]
        block = make_block(4, 8, dims=dims, activation=activation, seed=seed, **case)
        block.conv.to(DTYPES[dtype])
        if statistics == "narrow":
            block.bn.to(DTYPES[dtype])
        x = make_layouts(make_input(dims).to(DTYPES[dtype]))[layout]
        residual = torch.randn_like(Stock(block).conv(x)) if with_residual else None
        name = f"{dtype}, {mode}, {layout}, {activation}, {dims}d, residual {with_residual}, {case}"
        if mode != "no_grad":
            compare(pools, block, x, residual, mode, name, AUTOCAST.get(dtype), pool=f" {dtype}")
            continue
        stock = Stock(block.eval())
        with torch.no_grad():
            with torch.autocast("cpu", dtype=AUTOCAST.get(dtype), enabled=dtype in AUTOCAST):
                ours, theirs = block(x, residual), stock(x, residual)
            oracle = stock.double()(x.double(), None if residual is None else residual.double())
        assert ours.dtype is theirs.dtype
        pools[f"no_grad {dtype}"].add(ours, theirs, oracle, name=name)
    check(pools)
