"""``deepops check``: every op on this machine against stock PyTorch and a float64 oracle."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

from deepops import testing
from deepops._library import binaries, has_kernel
from deepops.cli.check_ops import CHECKS
from deepops.cli.check_types import Comparison, OpCheck, Setting
from deepops.cli.errors import first_line

LIMIT = 1.5  # the tolerance rule of deepops.testing


@dataclass
class Row:
    """One line of the table: all cases of one op in one setting.

    Errors are the largest differences from the oracle, relative to the largest value the oracle has in that output;
    those shown belong to the output (y, grad_x, ...) with the largest ratio.
    """

    op: str
    device: str
    isa: str  # "" where the kernel has no choice, "reference" where plain PyTorch runs for want of a kernel
    dtype: str
    layout: str
    cases: int = 0
    output: str = ""  # the one that the numbers belong to
    error: float = 0.0
    error_stock: float = 0.0
    ratio: float = 0.0  # what exceeds half an ulp, over stock's error; allowed is 1.5
    passed: bool = True
    reason: str = ""  # why it failed


def run_check(*, as_json: bool) -> int:
    """Run all checks and print the table; 1 when any failed, else 0."""
    rows = []
    for row in check_rows(CHECKS):
        rows.append(row)
        if not as_json:
            if len(rows) == 1:
                print(_HEADER)
            print(_format(row), flush=True)
    failed = sum(not row.passed for row in rows)
    if as_json:
        print(json.dumps({"passed": not failed, "limit": LIMIT, "rows": [_as_json(row) for row in rows]}, indent=1))
        return 1 if failed else 0
    for row in rows:
        if row.reason:
            print(f"failed: {row.op}, {row.device} {row.isa}, {row.dtype}, {row.layout}: {row.reason}")
    for name, place in binaries().items():
        print(f"{name}: {place}")
    cases = sum(row.cases for row in rows)
    print(f"{len(rows)} checks of {cases} results: {f'{failed} FAILED' if failed else 'all passed'}")
    return 1 if failed else 0


def check_rows(checks: tuple[OpCheck, ...]) -> Iterator[Row]:
    """Run ``checks`` on every device and, on the CPU, every instruction set; yield a row for each setting."""
    for check in checks:
        for device in testing.devices():
            if device not in check.devices:
                continue
            for isa in _isas(check, device):
                for dtype in check.dtypes:
                    for layout in check.layouts:
                        setting = Setting(device, dtype, layout)
                        choice = testing.use_isa(isa) if isa in testing.isas() else nullcontext()
                        yield _run(check, setting, isa, choice)


def _isas(check: OpCheck, device: str) -> list[str]:
    if not has_kernel(check.kernel, device):
        return ["reference"]
    return testing.isas() if device == "cpu" else [""]


def _run(check: OpCheck, setting: Setting, isa: str, choice: AbstractContextManager[None]) -> Row:
    dtype = str(setting.dtype).removeprefix("torch.")
    row = Row(check.op, setting.device, isa, dtype, setting.layout)
    results: dict[str, list[Comparison]] = defaultdict(list)
    try:
        with choice:
            for comparison in check.compare(setting):
                results[comparison.output].append(comparison)
                row.cases += 1
        for output, comparisons in results.items():
            _judge(row, output, comparisons)
    except Exception as error:  # an op that raises has failed its check; the others still run
        row.passed, row.ratio = False, float("inf")
        row.reason = row.reason or f"{type(error).__name__}: {first_line(error)}"
    return row


def _judge(row: Row, output: str, comparisons: list[Comparison]) -> None:
    """Apply the tolerance rule to one output over all cases, which share stock's largest error."""
    pool = testing.ErrorPool()
    error = 0.0
    for case in comparisons:
        pool.add(case.actual, case.stock, case.oracle, name=f"{output} of {case.name}")
        scale = float(case.oracle.abs().max()) or 1.0
        error = max(error, testing.error_ratio(case.actual, case.stock, case.oracle).actual / scale)
    if not row.output or pool.ratio > row.ratio:
        row.output, row.error, row.error_stock, row.ratio = output, error, pool.stock_error, pool.ratio
    try:
        pool.check()
    except AssertionError as failure:
        row.passed, row.reason = False, row.reason or first_line(failure)


_FORMAT = "{:<24} {:<6} {:<9} {:<8} {:<13} {:>5}  {:<15} {:>9} {:>9} {:>6}  {}"
_HEADER = _FORMAT.format(
    "op", "device", "isa", "dtype", "layout", "cases", "worst output", "ours", "stock", "ratio", "result"
)


def _format(row: Row) -> str:
    numbers = (f"{row.error:.1e}", f"{row.error_stock:.1e}", f"{row.ratio:.2f}")
    texts = (row.op, row.device, row.isa, row.dtype, row.layout, row.cases, row.output)
    return _FORMAT.format(*texts, *numbers, "pass" if row.passed else "FAIL")


def _as_json(row: Row) -> dict[str, object]:
    """The row as JSON can hold it: null for an infinite ratio."""
    return {key: None if value == float("inf") else value for key, value in asdict(row).items()}
