"""Predict the speed of the kernels from their compiled code, without a GPU.

    python scripts/predict_gpu.py [--beside REVISION] [--write]

The script takes five minutes. --write saves the page as benchmarks/gpu_predictions.md, --beside also counts the kernels
of another commit. For attention the script counts the instructions per score in the innermost loops over tiles of keys
or of queries; of several loops of a kind it takes the shortest, which is the loop for tiles without a mask and for α of
at least 1.1. In these kernels most instructions are not matrix products, so their speed is limited by the number
of instructions. A prediction is a ratio of these counts, and ignores latencies, caches and the number of tiles with
weight. For the row kernels see `predict_rows.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import compile_kernels
import predict_rows
import sass
import torch
import triton
from gpu_timing import TILES
from gpu_workloads import plan_of, planned

from sparse_attn.kernels.setting import Setting
from sparse_attn.kernels.triton.attention import backward, forward
from sparse_attn.kernels.triton.attention.plan import Plan

PAGE = Path(__file__).parents[1] / "benchmarks" / "gpu_predictions.md"
SWEEPS = 2  # the usual number of passes of Newton's method


_INTRODUCTION = """\
# GPU speed predicted from the compiled kernels

Made by `python scripts/predict_gpu.py --write` on {today} with Triton {triton}, for compute capability 9.0.
**Nothing here has been measured.** `scripts/gpu_check.py` times the same tile sizes and row kernels on a device, so
that each prediction can be checked.

## Attention

The table shows the number of instructions per score for causal attention with head size 64 in bfloat16. Its columns
are: the pass that finds the largest scores, one pass of Newton's method, the pass that computes the output, the
gradients of queries (and α), and the gradients of keys and values. `all` is their sum, with {sweeps} Newton passes.
`relative` is `all` divided by `all` of the tile size in use, which is the first row for each α. `spilled bytes` is the
number of bytes per thread that are spilled, summed over all kernels. A kernel is slower than predicted if it spills, or
if its tiles are large and few keys have weight.
"""
_ROWS = """
## Rows

Float32 rows of `torch.randn`. `instructions` is the number of instructions per entry. `share` is the predicted share
of the bandwidth of a copy on an H200; the aim is half. `few float64 units` is the same share on an RTX 4090, which
computes float64 at a 64th of the speed. A forward pass moves as many bytes as a copy, a backward pass one and a half
times as many. The model (`scripts/predict_rows.py`) assumes that no unit ever waits, so the shares are upper bounds.
"""
_COLUMNS = (
    *("α", "queries × keys, warps", "largest scores", "Newton pass", "output", "d queries", "d keys"),
    *("all", "relative", "spilled bytes"),
)


class Count(NamedTuple):
    """Instructions per score."""

    largest: float
    newton: float
    output: float
    queries: float
    keys: float
    spilled: int  # bytes per thread, summed over all kernels

    def total(self) -> float:
        """The count of a forward and backward pass in which all tiles have weight."""
        return self.largest + SWEEPS * self.newton + self.output + self.queries + self.keys


def main() -> None:
    """Print the page; with ``--write``, also save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"keep the page as {PAGE.name}")
    parser.add_argument("--beside", metavar="REVISION", help="a commit whose kernels are also counted")
    parser.add_argument("--counts", action="store_true", help=argparse.SUPPRESS)  # of the tiles in use, as JSON
    options = parser.parse_args()
    if options.counts:
        print(json.dumps([[count(None, alpha) for alpha in ALPHAS.values()], [*predict_rows.predictions()]]))
        return
    text = "\n".join(page(options.beside)) + "\n"
    print(text, end="")
    if options.write:
        PAGE.write_text(text, encoding="utf-8")


ALPHAS = {"1.5": None, "learnt": torch.ones(2)}


def page(beside: str | None) -> Iterator[str]:
    """The page. In the table of each α, the tile size in use comes first, then the others by count."""
    yield _INTRODUCTION.format(today=date.today(), triton=triton.__version__, sweeps=SWEEPS)
    yield f"| {' | '.join(_COLUMNS)} |"
    yield "|---" * len(_COLUMNS) + "|"
    counts = {(name, tile): count(tile, alpha) for name, alpha in ALPHAS.items() for tile in TILES}
    of_other, rows_of_other = ([], []) if beside is None else counts_of(beside)
    others = [Count(*x) for x in of_other]
    for number, name in enumerate(ALPHAS):
        now = counts[name, TILES[0]].total()
        for tile in (TILES[0], *sorted(TILES[1:], key=lambda tile: counts[name, tile].total())):
            yield line(name, f"{tile[0]} × {tile[1]}, {tile[2]}", counts[name, tile], now)
        if others:
            yield line(name, f"at {beside}", others[number], now)
    ratio = counts["learnt", TILES[0]].total() / counts["1.5", TILES[0]].total()
    yield ""
    yield (
        f"By these counts, a learnt α with its gradient would take {ratio:.1f} times as long as a fixed α = 1.5; "
        "we want at most 1.3 times."
    )
    yield _ROWS
    yield from row_table(rows_of_other, beside)


def row_table(before: list[Any], beside: str | None) -> Iterator[str]:
    """The predictions for the row kernels, beside those of another commit."""
    titles = ["instructions", "share", "few float64 units"]
    columns = ["mapping", "width", "pass", *titles, *(f"{title} at {beside}" for title in titles if beside)]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for number, (*key, now) in enumerate(predict_rows.predictions()):
        both = [now, predict_rows.Prediction(*before[number][-1])] if beside else [now]
        figures = [f"{one[0]:.0f} | {one[1]:.0%} | {one[2]:.0%}" for one in both]
        yield f"| {' | '.join(map(str, key))} | {' | '.join(figures)} |"


def line(name: str, shape: str, one: Count, now: float) -> str:
    """A line of the table."""
    figures = " | ".join(f"{x:.1f}" for x in (*one[:-1], one.total()))
    return f"| {name} | {shape} | {figures} | {one.total() / now:.2f} | {one.spilled} |"


def counts_of(revision: str) -> tuple[list[Any], list[Any]]:
    """The counts for another commit, with the tiles that it uses: for the attention kernels and for the row kernels."""
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run(["git", "archive", revision, "sparse_attn"], cwd=root, capture_output=True, check=True)
        subprocess.run(["tar", "x", "-C", folder], input=packed.stdout, check=True)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join((folder, os.environ.get("PYTHONPATH", "")))}
        command = [sys.executable, __file__, "--counts"]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return json.loads(found.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def count(tile: tuple[int, int, int] | None, alpha: torch.Tensor | None) -> Count:
    """The instruction counts of the three attention kernels, compiled with this tile or with the tile in use."""
    found: dict[str, list[Loop]] = {}
    spilled: list[int] = []
    query, key = (torch.zeros(1, 2, length, 64, dtype=torch.bfloat16) for length in (256, 5120))
    used = Plan.of(query, key)
    size = tile[0] * tile[1] if tile else used.block_m * used.block_n

    def launch(kernel: Any, programs: int, *arguments: Any, warps: int = 4, stages: int = 2) -> None:
        if kernel.__name__ == "_list_tiles":
            return
        compiled = compile_kernels.compile_kernel(kernel, *arguments, warps=warps, stages=stages)
        each = warps * 32 / size
        found[kernel.__name__.lstrip("_")] = [
            one._replace(length=one.length * each) for one in loops(compiled.asm["cubin"])
        ]
        spilled.append(compile_kernels.resources(compiled)[1])

    forward.launch = backward.launch = launch
    with planned(plan_of(tile)) if tile else contextlib.nullcontext():
        setting = Setting(0.5, 0.125, 0.0, 0)
        tensors = (query, key, key, alpha, None, None, None)
        output, *kept = forward.forward(*tensors, setting, True)
        backward.backward(output, *tensors, *kept, setting, alpha is not None, False)
    sweeps = found.get("forward_long") or found["forward"]
    most = max(one.products for one in sweeps)
    outputs = [one.length for one in sweeps if one.products == most]
    rest = [one for one in sweeps if one.products < most]
    newton = [one.length for one in rest if one.weights]
    largest = [one.length for one in rest if not one.weights]
    others = (min(one.length for one in found[name]) for name in ("backward_queries", "backward_keys"))
    return Count(min(largest), min(newton), min(outputs), *others, sum(spilled))


class Loop(NamedTuple):
    """An innermost loop that multiplies matrices."""

    length: float  # instructions
    products: int  # number of instructions of the matrix units among them
    weights: bool  # whether it computes weights: a fused multiply-add for each score


def loops(cubin: bytes) -> list[Loop]:
    """The innermost loops that multiply matrices, in the order of the program."""
    code = sass.instructions(cubin)
    spans = sass.loops(code)
    found = []
    for span in spans:
        if any(span.contains(other) for other in spans):
            continue
        names = [one.name for one in code[span.first : span.last + 1]]
        if matrices := sum("MMA" in name for name in names):
            found.append(Loop(len(names), matrices, names.count("FFMA") + names.count("FADD") >= 16))
    return found


if __name__ == "__main__":
    main()
