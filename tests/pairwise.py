"""All pairs of options in few cases: most bugs of options need no more than two of them to show."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs_of(case: Mapping[str, Any]) -> set[Pair]:
    """All pairs of ``(name, value)`` in a case."""
    return set(itertools.combinations(case.items(), 2))


def pairwise(
    factors: Mapping[str, Sequence[Any]], allowed: Callable[[Case], bool], seed: int = 0, tries: int = 30
) -> list[Case]:
    """Cases that hold every allowed pair of values of two factors. Greedy: of some random cases always the best.

    ``allowed`` is asked about complete cases and about pairs alone, in which the other names are missing.
    """
    generator = random.Random(seed)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(factors, 2)
        for x, y in itertools.product(factors[a], factors[b])
        if allowed({a: x, b: y})
    }
    cases = []
    while missing:
        first = min(missing, key=str)  # sets have no order of their own
        candidates = []
        while len(candidates) < tries:
            case = {name: generator.choice(values) for name, values in factors.items()} | dict(first)
            if allowed(case):
                candidates.append(case)
        best = max(candidates, key=lambda case: len(pairs_of(case) & missing))
        cases.append(best)
        missing -= pairs_of(best)
    return cases
