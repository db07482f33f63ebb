"""Predict from the compiled kernels, without a GPU, the speed-up of other tile sizes and the cost of a learnt α.

    python scripts/predict_gpu.py [--beside REVISION] [--write]

Takes five minutes; --write keeps the page as benchmarks/gpu_predictions.md, --beside also counts the kernels of another
commit. Counts the instructions per score in the innermost loops over tiles of keys or of queries, and in each kernel
takes the shortest loop of a kind: that of tiles which no mask cuts, with α of at least 1.1. The kernels have far more
other arithmetic than matrix products, so their speed is limited by the number of instructions. A prediction is a ratio
of these counts. It ignores latencies, caches and the number of tiles with weight.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import compile_kernels
import torch
import triton
from gpu_timing import TILES, plan_of, planned
from triton.backends.nvidia import compiler

from sparse_attn.kernels.setting import Setting
from sparse_attn.kernels.triton.attention import backward, forward
from sparse_attn.kernels.triton.attention.plan import Plan

PAGE = Path(__file__).parents[1] / "benchmarks" / "gpu_predictions.md"
SWEEPS = 2  # the usual number of passes of Newton's method
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z0-9]+)\S*\s*(.*?);")


_INTRODUCTION = """\
# GPU speed predicted from the compiled kernels

Made by `python scripts/predict_gpu.py --write` on {today} with Triton {triton}, for compute capability 9.0.
**Nothing here has been measured.** `scripts/gpu_check.py` times the same tile sizes on a device, so that each
prediction can be checked.

The table has instructions per score, for causal attention with head size 64 in bfloat16: for the pass that finds the
largest scores, one pass of Newton's method, the pass that computes the output, the gradients of queries (and α), and
the gradients of keys and values. `all` is their sum, with {sweeps} Newton passes. `relative` is `all` divided by
`all` of the tile size in use, which is the first row for each α. `spilled bytes` counts the bytes that all kernels
together spill. A kernel is slower than predicted if it spills, or if its tiles are large and few keys have weight.
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
    parser.add_argument("--beside", metavar="REVISION", help="a commit whose kernels are counted, too")
    parser.add_argument("--counts", action="store_true", help=argparse.SUPPRESS)  # of the tiles in use, as JSON
    options = parser.parse_args()
    if options.counts:
        print(json.dumps([count(None, alpha) for alpha in ALPHAS.values()]))
        return
    text = "\n".join(page(options.beside)) + "\n"
    print(text, end="")
    if options.write:
        PAGE.write_text(text, encoding="utf-8")


ALPHAS = {"1.5": None, "learnt": torch.ones(2)}


def page(beside: str | None) -> Iterator[str]:
    """The table, largest predicted gain first."""
    yield _INTRODUCTION.format(today=date.today(), triton=triton.__version__, sweeps=SWEEPS)
    yield f"| {' | '.join(_COLUMNS)} |"
    yield "|---" * len(_COLUMNS) + "|"
    counts = {(name, tile): count(tile, alpha) for name, alpha in ALPHAS.items() for tile in TILES}
    others = [] if beside is None else [Count(*x) for x in counts_of(beside)]
    for number, name in enumerate(ALPHAS):
        now = counts[name, TILES[0]].total()
        for tile in (TILES[0], *sorted(TILES[1:], key=lambda tile: counts[name, tile].total())):
            yield line(name, f"{tile[0]} × {tile[1]}, {tile[2]}", counts[name, tile], now)
        if others:
            yield line(name, f"at {beside}", others[number], now)
    ratio = counts["learnt", TILES[0]].total() / counts["1.5", TILES[0]].total()
    yield ""
    yield (
        f"By these counts, a learnt α with its gradient takes {ratio:.1f} times as long as a fixed α = 1.5; the target "
        "is 1.3."
    )


def line(name: str, shape: str, one: Count, now: float) -> str:
    """A line of the table."""
    figures = " | ".join(f"{x:.1f}" for x in (*one[:-1], one.total()))
    return f"| {name} | {shape} | {figures} | {one.total() / now:.2f} | {one.spilled} |"


def counts_of(revision: str) -> list[list[float]]:
    """The counts of another commit's kernels, with the tiles that it uses."""
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run(["git", "archive", revision, "sparse_attn"], cwd=root, capture_output=True, check=True)
        subprocess.run(["tar", "x", "-C", folder], input=packed.stdout, check=True)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join((folder, os.environ.get("PYTHONPATH", "")))}
        command = [sys.executable, __file__, "--counts"]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return json.loads(found.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def count(tile: tuple[int, int, int] | None, alpha: torch.Tensor | None) -> Count:
    """The instruction counts of the three attention kernels, compiled with these tiles or those in use."""
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
    products: int  # of which instructions of the matrix units
    weights: bool  # whether it computes weights: a fused multiply-add for each score


def loops(cubin: bytes) -> list[Loop]:
    """The innermost loops that multiply matrices, in the order of the program."""
    tool = Path(compiler.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        text = subprocess.run([tool, "-sass", file.name], check=True, capture_output=True, text=True).stdout
    code = [(int(address, 16), name, rest) for address, name, rest in _INSTRUCTION.findall(text)]
    places = {address: number for number, (address, *_) in enumerate(code)}
    spans = []
    for number, (address, name, rest) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", rest) if name == "BRA" else None
        if target and int(target[1], 16) < address:
            spans.append((places[int(target[1], 16)], number))
    innermost = [(i, j) for i, j in spans if not any(i <= k and m <= j and (i, j) != (k, m) for k, m in spans)]
    found = []
    for i, j in sorted(innermost):
        names = [name for _, name, _ in code[i : j + 1]]
        if matrices := sum("MMA" in name for name in names):
            found.append(Loop(len(names), matrices, names.count("FFMA") + names.count("FADD") >= 16))
    return found


if __name__ == "__main__":
    main()
