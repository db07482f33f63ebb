"""The figures that `gpu_check.py` computes from its timings: the targets, and the measured values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from gpu_timing import LENGTHS
from gpu_workloads import BACKWARD, BOTH, FIXED, FLASH, FORWARD, LEARNT, REPLAY, V2, Measured


class Figure(NamedTuple):
    """A target: its name, its bound, the measured values with their cases, and why other values are missing."""

    name: str
    bound: str
    values: list[tuple[float, str]]
    missing: list[str]


def figures(timings: list[Measured]) -> Iterator[Figure]:
    """The targets and the measured figures."""
    found = {(x["group"], x["length"], x["who"], x["step"]): x for x in timings}
    reasons: list[str] = []

    def value(group: str, length: int, what: str, step: str = BOTH, of: str = "seconds") -> float:
        result = found.get((group, length, what, step), {"skipped": "not in this run"})
        if of not in result:
            reasons.append(f"{what} at {length}: {result.get('skipped', 'no such figure')}")
        return float(result.get(of, math.nan))

    def figure(name: str, bound: str, values: Iterator[tuple[float, str]]) -> Figure:
        reasons.clear()
        known = [pair for pair in values if not math.isnan(pair[0])]
        return Figure(name, bound, known, list(dict.fromkeys(reasons)))

    def ratios(group: str, lengths: tuple[int, ...], ours: str, others: str, step: str = BOTH) -> Iterator[Any]:
        for n in lengths:
            place = f"N {n}"
            if others == FLASH and step == BOTH:
                place += f", {value(group, n, 'tiles', 'share with weight', 'share'):.0%} of tiles have weight"
            yield value(group, n, ours, step) / value(group, n, others, step), place

    local, published = "causal attention", "causal attention, published share"
    shared = (4096, 16384)
    yield figure("causal α 1.5, time / adasplash_v2's, 1k to 16k", "≤1.0", ratios(local, LENGTHS[2:7], FIXED, V2))
    yield figure("published share of tiles, time / adasplash_v2's", "≤1.0", ratios(published, shared, FIXED, V2))
    yield figure("causal α 1.5, time / flash attention's, from 16k", "≤1.0", ratios(local, LENGTHS[6:], FIXED, FLASH))
    at = (16384, 65536)
    yield figure("published share of tiles, time / flash attention's", "≤1.0", ratios(published, at, FIXED, FLASH))
    yield figure("learnt α with its gradient, time / fixed α 1.5's", "≤1.3", ratios(local, LENGTHS, LEARNT, FIXED))
    short = LENGTHS[:3]
    yield figure("N up to 1024, graph, time / flash attention's", "≤1.5", ratios(local, short, FIXED, FLASH, REPLAY))
    full = ((value("full attention", n, FIXED) / (2 * value(local, n, FIXED)), f"N {n}") for n in shared)
    yield figure("not causal, time / twice the causal time", "≤1.2", full)

    def cross() -> Iterator[tuple[float, str]]:
        predicted = value(local, 16384, FIXED) * 2 * 2048 / 16384
        yield value("cross-attention of 2048 queries", 16384, FIXED) / predicted, "2048 to 16384"

    yield figure("cross-attention, time / time predicted from causal", "≤1.2", cross())
    yield figure("rows, share of the bandwidth of a copy", "≥0.5", bandwidths(found))

    def memory() -> Iterator[tuple[float, str]]:
        few, many = (value(local, n, LEARNT, BOTH, "bytes") / (n * h) for n, h in ((16384, 16), (65536, 4)))
        yield many / few, "α learnt"

    yield figure("memory of a token at 64k / at 16k", "≤1.1", memory())
    seconds = ((value(local, 65536, LEARNT), "4 heads") for _ in range(1))
    yield figure("64k tokens with a learnt α and its gradient, seconds", "≤inf", seconds)


def bandwidths(found: dict[tuple[str, int, str, str], Measured]) -> Iterator[tuple[float, str]]:
    """The share of a copy's bandwidth that each operator reaches, and the case.

    A forward pass moves as many bytes as a copy, a backward pass one and a half times as many.
    """
    for (group, size, what, step), result in found.items():
        copied = found.get((group, size, "copy", FORWARD), {})
        if what in ("sparsemax", "1.5-entmax", "α per row") and "seconds" in result and "seconds" in copied:
            moved = 1.5 if step == BACKWARD else 1.0
            yield moved * copied["seconds"] / result["seconds"], f"{group}, {size}, {what}, {step}"
