"""The page and the short table of `gpu_check.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpu_figures import figures

from sparse_attn import backends

Measured = dict[str, Any]


def short_table(timings: list[Measured]) -> Iterator[str]:
    """The targets, and the measured figures or why there are none."""
    yield "| figure, the worst of its cases | to reach | measured | where |"
    yield "|---|---|---|---|"
    for name, bound, values, missing in figures(timings):
        at_most = bound.startswith("≤")
        worst = (max if at_most else min)(values, key=lambda x: x[0], default=None)
        if worst is None:
            yield f"| {name} | {bound} | not measured | {missing[0] if missing else ''} |"
            continue
        reached = worst[0] <= float(bound[1:]) if at_most else worst[0] >= float(bound[1:])
        of = f"; {len(missing)} not measured" if missing else ""
        yield f"| {name} | {bound} | {worst[0]:.2f}{'' if reached else ' MISSED'} | {worst[1]}{of} |"


def page(result: dict[str, Any]) -> Iterator[str]:
    """The page benchmarks/gpu.md, with its date."""
    checks, timings = result["checks"], result["timings"]
    yield "# The Triton kernels on a GPU"
    yield ""
    yield "Made by `python scripts/gpu_check.py`; raw figures in `gpu.json`."
    yield ", ".join(f"{name} {value}" for name, value in result["environment"].items()) + "."
    yield f"Backend: {backends()['triton']}."
    yield ""
    yield f"{sum(bool(check.get('right')) for check in checks)} of {len(checks)} checks against float64 passed."
    yield "Times are medians over calls with the same tensors, measured between device events."
    yield ""
    yield from short_table(timings)
    yield ""
    yield "## Times"
    yield ""
    yield "| case | what | ms | MiB |"
    yield "|---|---|---|---|"
    for line in timings:
        if "kernels" not in line:
            yield f"| {line['case']} | {line.get('what', '')} | {figures_of(line)} |"
    yield ""
    yield "## Kernels by themselves"
    yield ""
    columns = ("registers", "spilled", "shared", "sweeps", "most sweeps")
    yield f"| case | what | kernel | ms | {' | '.join(columns)} |"
    yield "|---" * (4 + len(columns)) + "|"
    for line in timings:
        for kernel, found in line.get("kernels", {}).items():
            rest = " | ".join(f"{found[name]:.6g}" if name in found else "" for name in columns)
            yield f"| {line['case']} | {line['who']} | {kernel} | {found['ms']:.3f} | {rest} |"
    yield ""
    yield "## Checks"
    yield ""
    yield "| case | largest relative error | bound |"
    yield "|---|---|---|"
    for check in checks:
        found = f"not run: {check['unsuited']}" if "unsuited" in check else check.get("error", check.get("skipped"))
        wrong = "" if check.get("right") or "unsuited" in check else " WRONG"
        yield f"| {check['case']} | {found}{wrong} | {check.get('bound', 0):.0e} |"


def figures_of(line: Measured) -> str:
    """Time and memory of a timing, or a share, or the reason why it was not measured."""
    if "seconds" in line:
        return f"{line['seconds'] * 1e3:.3f} | {line['bytes'] / 2**20:.0f}"
    return f"{line['share']:.2f} |" if "share" in line else f"{line['skipped']} |"
