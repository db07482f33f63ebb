"""The share of the bandwidth of a copy that the row kernels would reach, predicted from their compiled code.

The code outside of loops runs once, a loop over the bits of scores or over Newton's method as often as for rows of
`torch.randn`, and a loop over chunks once per chunk. The time of a kernel is the time of its slowest unit: the units
that start instructions, or those for float64, or those for logarithms, powers and roots. A copy is limited by memory.
Both are at the peak rates of the device, as if nothing ever waited.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import compile_kernels
import sass
import torch
from torch import Tensor

from sparse_attn.kernels.triton import rows

WIDTHS = (128, 1024, 8192, 32768)
K = 32
_CHUNK = 2**13
_ENTRIES = 2**22  # of the tensors for which programs are counted


class Device(NamedTuple):
    """Peak rates. Cycles are those of a warp's instruction in one of the four parts of a multiprocessor."""

    name: str
    parts: int
    clock: float  # per second
    bandwidth: float  # bytes per second
    float64: float  # cycles
    special: float  # cycles of a logarithm, power, root or reciprocal


H200 = Device("H200", 132 * 4, 1.98e9, 4.8e12, 2.0, 8.0)
RTX_4090 = Device("RTX 4090", 128 * 4, 2.52e9, 1.008e12, 64.0, 8.0)
MAPPINGS = ("sparsemax", "1.5-entmax", "any α", "learnt α", "top-32")


class Prediction(NamedTuple):
    """Of one pass of one mapping over float32 rows of one width."""

    instructions: float  # per entry
    share: float  # of the bandwidth of a copy on an H200
    share_without_float64: float  # the same on a device whose float64 units are few: an RTX 4090


def predictions() -> Iterator[tuple[str, int, str, Prediction]]:
    """The mapping, the width, the pass and its prediction."""
    for mapping in MAPPINGS:
        for width in WIDTHS:
            if mapping == "top-32" and width > 2**14:
                continue  # torch sorts such rows
            yield mapping, width, "forward", predicted(mapping, width, backward=False)
            if mapping != "top-32":  # the backward of the mapping within the k largest
                yield mapping, width, "backward", predicted(mapping, width, backward=True)


def predicted(mapping: str, width: int, *, backward: bool) -> Prediction:
    """The prediction for one pass, of which every kernel is compiled."""
    x = torch.zeros(max(_ENTRIES // width, 1), width)
    alpha = {"sparsemax": 1.0, "1.5-entmax": 0.5, "any α": 0.3, "top-32": 0.0}
    a: float | Tensor = torch.zeros(len(x), 1) if mapping == "learnt α" else alpha[mapping]
    found: list[Prediction] = []
    moved = 12 if backward else 8  # bytes per entry

    def launch(kernel: Any, programs: int, *arguments: Any, warps: int = 4, stages: int = 2) -> None:
        compiled = compile_kernels.compile_kernel(kernel, *arguments, warps=warps, stages=stages)
        code = sass.until_exit(sass.instructions(compiled.asm["cubin"]))
        trips = chunks if "chunks" in kernel.__name__ else on_chip
        all_, wide, special = executed(code, trips(kernel.__name__, mapping, width))
        per_entry = programs * warps / x.numel()
        shares = []
        for device in (H200, RTX_4090):
            cycles = max(all_, wide * device.float64, special * device.special)
            seconds = cycles * per_entry / (device.parts * device.clock)
            shares.append(min(moved / device.bandwidth / seconds, 1.0))
        found.append(Prediction(32 * all_ * per_entry, *shares))

    rows.launch = launch  # type: ignore[assignment]
    if backward:
        rows.entmax_backward(x, a, x, with_alpha=mapping == "learnt α")
    else:
        rows.entmax_forward(x, a, -1e38, K if mapping == "top-32" else None)
    (result,) = found
    return result


Trips = Callable[[list[sass.Span]], list[float]]


def executed(code: list[sass.Instruction], trips: Trips) -> tuple[float, float, float]:
    """How many instructions a warp executes: all, those in float64, and logarithms, powers, roots and reciprocals."""
    spans = sass.loops(code)
    counts = trips(spans)
    total = wide = special = 0.0
    for number, one in enumerate(code):
        times = math.prod(count for span, count in zip(spans, counts, strict=True) if span.first <= number <= span.last)
        total += times
        wide += times * one.name.startswith(("DADD", "DMUL", "DFMA", "DSETP"))
        special += times * (one.name == "MUFU")
    return total, wide, special


def on_chip(kernel: str, mapping: str, width: int) -> Trips:
    """The loops of a kernel that holds rows on the chip: over bits, over Newton's method for lanes and for rows."""
    sweeps, of_lanes = newton_sweeps(mapping, width)
    known = [*([bits_until_k(width)] if mapping == "top-32" else []), *([of_lanes] if width >= 512 else []), sweeps]
    return lambda spans: known[len(known) - len(spans) :]  # the compiler may unroll the first; a backward has none


def chunks(kernel: str, mapping: str, width: int) -> Trips:
    """The loops of a kernel that reads rows in chunks: one encloses another only in Newton's method."""
    sweeps, of_lanes = newton_sweeps(mapping, width)
    number = float(math.ceil(width / _CHUNK))

    def trips(spans: list[sass.Span]) -> list[float]:
        found = []
        for position, span in enumerate(spans):
            if any(span.contains(other) for other in spans):
                found.append(sweeps)
            else:
                found.append(of_lanes if "forward" in kernel and position == 1 else number)
        return found

    return trips


def newton_sweeps(mapping: str, width: int) -> tuple[float, float]:
    """How often Newton's method computes the weights of rows of `torch.randn`, and of the largest scores of lanes."""
    a = {"sparsemax": 1.0, "1.5-entmax": 0.5, "top-32": 1e-6}.get(mapping, 0.3)
    x = torch.randn(64, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x -= x.amax(-1, keepdim=True)
    start, of_lanes = torch.zeros(64, 1, dtype=torch.float64), 0.0
    if width >= 512:
        start, of_lanes = _newton(x.view(64, 8, -1).amax(1), start, a, 1e-2)
    if mapping == "top-32":
        x = x.topk(K).values
    return _newton(x, start, a, 2.4e-7)[1], of_lanes


def _newton(x: Tensor, sigma: Tensor, a: float, tolerance: float) -> tuple[Tensor, float]:
    """σ, and the mean number of sweeps."""
    sweeps = torch.ones_like(sigma)
    while True:
        u = (1 + a * (x - sigma)).clamp(min=0).pow(1 / a - 1) if a != 1.0 else (1 + x - sigma > 0).double()
        p = u * (1 + a * (x - sigma)).clamp(min=0)
        total = p.sum(-1, keepdim=True)
        still_open = (total - 1).abs() > tolerance
        if not bool(still_open.any()):
            return sigma, float(sweeps.mean())
        step = -total * torch.expm1(-a * total.log()) / a / u.sum(-1, keepdim=True)
        sigma = sigma + step * still_open
        sweeps += still_open


def bits_until_k(width: int) -> float:
    """How many bits of the scores differ at the earliest between the k-th largest and the next, for `torch.randn`."""
    x = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    kth, following = x.topk(K + 1).values[:, -2:].view(torch.int32).unbind(1)  # both positive: ordered as integers
    return float((32 - (kth ^ following).clamp(min=1).log2().floor()).mean())
