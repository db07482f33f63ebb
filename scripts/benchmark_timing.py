"""Times of functions that run in turn in one process, and the lines of a table that compares them."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from sparse_attn import use_backend

Run = Callable[[], object]
_TURN = 2e-3  # seconds


def on_backend(backend: str, make: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A function whose result is computed by one backend; `both_passes` computes its gradient with this backend too."""
    if not backend:
        return make

    def run() -> Tensor:
        with use_backend(backend):
            return make()

    run.backend = backend  # type: ignore[attr-defined]
    return run


def both_passes(makes: dict[str, Run], upstream: Tensor | None, rounds: int) -> dict[str, list[float]]:
    """Seconds of each function: of forward, and of forward + backward."""
    runs: dict[tuple[str, int], Run] = {}
    for name, make in makes.items():
        backend = getattr(make, "backend", "")

        def step(make: Run = make, backend: str = backend) -> None:
            with use_backend(backend) if backend else nullcontext():
                make().backward(upstream)  # type: ignore[attr-defined]

        runs[name, 0], runs[name, 1] = make, step
    times = interleave(runs, rounds)
    return {name: [times[name, 0], times[name, 1]] for name in makes}


def interleave(runs: dict, rounds: int) -> dict:
    """The minimum time of each function. The functions run in turn, so that other load affects all of them equally.

    A short function runs several times per turn, as in a loop: its first run is slower, since the other functions have
    replaced its data in the caches.
    """
    taken: dict = {name: [] for name in runs}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for turn in range(rounds + 1):
        for name, run in runs.items():
            spent, least = 0.0, math.inf
            while spent < _TURN:
                begin = clock()
                run()
                seconds = clock() - begin
                spent += seconds
                least = min(least, seconds)
            if turn:  # the first round warms up
                taken[name].append(least)
    _spreads.extend(statistics.median(times) / min(times) for times in taken.values())
    return {name: min(times) for name, times in taken.items()}


_spreads: list[float] = []  # for each function of a section, the median time divided by the smallest


def spread_line() -> Iterator[str]:
    """A line for the end of a section: how much the rounds differed since the last call of this function."""
    if _spreads:
        yield ""
        middle = statistics.median(_spreads)
        yield f"Spread: the median round took {middle:.2f} times as long as the fastest (median over the functions)."
        _spreads.clear()


def heading(title: str, columns: list[str]) -> Iterator[str]:
    """A heading, with the number of threads if there are several, and the first two lines of a table in Markdown."""
    threads = torch.get_num_threads()
    title += f", {threads} threads" if threads > 1 else ""
    yield from ("", f"## {title}", "", row("", columns), "|---" * (len(columns) + 1) + "|")


def row(name: str, cells: list[str]) -> str:
    """A row of a table in Markdown."""
    return f"| {name} | " + " | ".join(cells) + " |"


def ratio(ours: list[float], softmax: list[float]) -> str:
    """Our times divided by those of softmax, one number per pass."""
    return " / ".join(f"{a / b:.2f}" if a < 10 * b else f"{a / b:.0f}" for a, b in zip(ours, softmax, strict=True))


def processor() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
