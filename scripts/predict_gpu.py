"""Predict from the compiled kernels, without a GPU, the speed-up of other tile sizes and the cost of a learnt α.

    python scripts/predict_gpu.py [--write]     five minutes; --write keeps the page as benchmarks/gpu_predictions.md

Counts the instructions per score in the innermost loops over tiles of keys or of queries. The kernels have far more
other arithmetic than matrix products, so their speed is limited by the number of instructions. A prediction is a ratio
of these counts. It ignores latencies, caches and the number of tiles with weight.
"""

from __future__ import annotations

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
from gpu_timing import TILES, planned
from triton.backends.nvidia import compiler

from sparse_attn.kernels.setting import Setting
from sparse_attn.kernels.triton.attention import backward, forward

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
    text = "\n".join(page()) + "\n"
    print(text, end="")
    if "--write" in sys.argv:
        PAGE.write_text(text, encoding="utf-8")


def page() -> Iterator[str]:
    """The table, largest predicted gain first."""
    yield _INTRODUCTION.format(today=date.today(), triton=triton.__version__, sweeps=SWEEPS)
    yield f"| {' | '.join(_COLUMNS)} |"
    yield "|---" * len(_COLUMNS) + "|"
    counts = {
        (name, tile): count(tile, alpha) for name, alpha in (("1.5", None), ("learnt", torch.ones(2))) for tile in TILES
    }
    for name in ("1.5", "learnt"):
        now = counts[name, TILES[0]].total()
        for tile in (TILES[0], *sorted(TILES[1:], key=lambda tile: counts[name, tile].total())):
            one = counts[name, tile]
            figures = " | ".join(f"{x:.1f}" for x in (*one[:-1], one.total()))
            shape = f"{tile[0]} × {tile[1]}, {tile[2]}"
            yield f"| {name} | {shape} | {figures} | {one.total() / now:.2f} | {one.spilled} |"
    ratio = counts["learnt", TILES[0]].total() / counts["1.5", TILES[0]].total()
    yield ""
    yield (
        f"By these counts, a learnt α with its gradient takes {ratio:.1f} times as long as a fixed α = 1.5; the target "
        "is 1.3."
    )


def count(tile: tuple[int, int, int], alpha: torch.Tensor | None) -> Count:
    """The instruction counts of the three attention kernels, compiled with these tiles."""
    found: list[list[float]] = []
    spilled: list[int] = []

    def launch(kernel: Any, programs: int, *arguments: Any, warps: int = 4, stages: int = 2) -> None:
        if kernel.__name__ == "_list_tiles":
            return
        compiled = compile_kernels.compile_kernel(kernel, *arguments, warps=warps, stages=stages)
        each = warps * 32 / (tile[0] * tile[1])
        found.append([length * each for length in loops(compiled.asm["cubin"])])
        spilled.append(compile_kernels.resources(compiled)[1])

    forward.launch = backward.launch = launch
    with planned(tile):
        query, key = (torch.zeros(1, 2, length, 64, dtype=torch.bfloat16) for length in (256, 5120))
        setting = Setting(0.5, 0.125, 0.0, 0)
        tensors = (query, key, key, alpha, None, None, None)
        output, *kept = forward.forward(*tensors, setting, True)
        backward.backward(output, *tensors, *kept, setting, alpha is not None, False)
    (largest, newton, out), (queries,), (keys,) = found
    return Count(largest, newton, out, queries, keys, sum(spilled))


def loops(cubin: bytes) -> list[int]:
    """Lengths of the innermost loops that multiply matrices, in the order of the program."""
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
    products = [(i, j) for i, j in innermost if any("MMA" in name for _, name, _ in code[i : j + 1])]
    return [j - i + 1 for i, j in sorted(products)]


if __name__ == "__main__":
    main()
