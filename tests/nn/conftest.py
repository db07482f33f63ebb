from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest


def cover_all_pairs(factors: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Cases that together contain every pair of values of any two factors: far fewer cases than all combinations."""
    generator = random.Random(0)
    names = list(factors)
    wanted = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(factors[a])), range(len(factors[b])))
    }
    cases = []
    while wanted:
        fixed = dict(generator.choice(sorted(wanted)))
        tries = [{n: fixed.get(n, generator.randrange(len(factors[n]))) for n in names} for _ in range(20)]
        met = [wanted & set(itertools.combinations(row.items(), 2)) for row in tries]
        best = max(range(len(tries)), key=lambda index: len(met[index]))
        wanted -= met[best]
        cases.append({name: factors[name][index] for name, index in tries[best].items()})
    return cases


@pytest.fixture
def all_pairs() -> Callable[[dict[str, Sequence[Any]]], list[dict[str, Any]]]:
    return cover_all_pairs
