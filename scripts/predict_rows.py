"""The share of the bandwidth of a copy that the row kernels would reach, predicted from their compiled code.

The model counts code outside of loops once, and a loop over chunks once per chunk. It counts a loop over the bits of
scores or over Newton steps as often as the loop runs for rows of `torch.randn`. The time of a kernel is the time of its
slowest units: the units that start instructions, the units for float64, or the units for logarithms, powers and roots.
The time of a copy is the time of its memory accesses. All rates are the peak rates of the device, as if nothing ever
waited.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import compile_kernels
import sass
import torch
from torch import Tensor

from sparse_attn.kernels.triton import newton, rows

WIDTHS = (128, 1024, 8192, 32768)
K = 32
_CHUNK, _TOLERANCE = 2**13, 2.4e-7
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
    """The prediction for one pass of one mapping over float32 rows of one width."""

    instructions: float  # per entry
    share: float  # of the bandwidth of a copy on an H200
    share_without_float64: float  # the same share on an RTX 4090, which has few float64 units


def predictions() -> Iterator[tuple[str, int, str, Prediction]]:
    """The mapping, the width, the pass and its prediction."""
    for mapping in MAPPINGS:
        for width in WIDTHS:
            if mapping == "top-32" and width > 2**14:
                continue  # torch sorts such rows
            yield mapping, width, "forward", predicted(mapping, width, backward=False)
            if mapping != "top-32":  # its backward is the backward of softmax
                yield mapping, width, "backward", predicted(mapping, width, backward=True)


def predicted(mapping: str, width: int, *, backward: bool) -> Prediction:
    """The prediction for one pass, whose kernel is compiled."""
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


class Sweeps(NamedTuple):
    """How often a program runs the loops of Newton's method, for rows of `torch.randn`.

    The first passes for any α use the hardware's logarithm; a program repeats a loop until all of its rows are done.
    """

    of_lanes: float  # for the largest scores of lanes
    fast: float
    exact: float


def on_chip(kernel: str, mapping: str, width: int) -> Trips:
    """The loops of a kernel that holds rows on the chip."""
    starts = width >= 512  # from the largest scores of lanes
    if "backward" in kernel:
        known = []
    elif mapping == "top-32":
        known = [bits for bits in bits_until_k(width) if bits]
    else:
        sweeps = newton_sweeps(mapping, width)
        if mapping in ("sparsemax", "1.5-entmax"):
            known = [*([sweeps.of_lanes] if starts else []), sweeps.exact]
        else:  # with the hardware's logarithm, without it
            known = [*([sweeps.of_lanes, 0.0] if starts else []), sweeps.fast, sweeps.exact]
    return lambda spans: known[len(known) - len(spans) :]  # the compiler may unroll the first


def chunks(kernel: str, mapping: str, width: int) -> Trips:
    """The loops of a kernel that reads rows in chunks: only the loops of Newton's method enclose another loop."""
    sweeps = newton_sweeps(mapping, width)
    number = float(math.ceil(width / _CHUNK))
    both = mapping not in ("sparsemax", "1.5-entmax")
    of_lanes = [sweeps.of_lanes, 0.0] if both else [sweeps.of_lanes]
    of_rows = [sweeps.fast, sweeps.exact] if both else [sweeps.exact]

    def trips(spans: list[sass.Span]) -> list[float]:
        enclosing = iter(of_rows)
        found = []
        for position, span in enumerate(spans):
            if any(span.contains(other) for other in spans):
                found.append(next(enclosing))
            elif "forward" in kernel and 0 < position <= len(of_lanes):
                found.append(of_lanes[position - 1])
            else:
                found.append(number)
        return found

    return trips


def newton_sweeps(mapping: str, width: int) -> Sweeps:
    """How often Newton's method computes the weights of rows."""
    a = {"sparsemax": 1.0, "1.5-entmax": 0.5}.get(mapping, 0.3)
    x = torch.randn(64, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x -= x.amax(-1, keepdim=True)
    sigma, of_lanes, fast = torch.zeros(64, 1, dtype=torch.float64), 0.0, 0.0
    lanes, rows_of_program = min(width // 8, _CHUNK), rows.Tile.of(width).rows
    general = a == 0.3
    if width >= 512:
        loose = newton.LOOSE.value if general else 1e-2
        sigma, of_lanes = _newton(x.view(64, -1, lanes).amax(1), sigma, a, loose, rows_of_program, general)
    if general:
        sigma, fast = _newton(x, sigma, a, newton.LOOSE.value, rows_of_program, True)
    exact = _newton(x, sigma, a, newton.NEARLY.value if general else _TOLERANCE, rows_of_program, general)[1]
    return Sweeps(of_lanes, fast, exact)


def _newton(
    x: Tensor, sigma: Tensor, a: float, enough: float, rows_of_program: int, last_step: bool
) -> tuple[Tensor, float]:
    """σ, and the mean number of sweeps of a program, until the sums of its rows are within ``enough`` of 1.

    With ``last_step`` a Newton step follows the last sweep.
    """
    sweeps = torch.ones_like(sigma)
    while True:
        u = (1 + a * (x - sigma)).clamp(min=0).pow(1 / a - 1) if a != 1.0 else (1 + x - sigma > 0).double()
        p = u * (1 + a * (x - sigma)).clamp(min=0)
        total = p.sum(-1, keepdim=True)
        error = (total - 1).abs()
        still_open = error > enough
        step = -total * torch.expm1(-a * total.log()) / a / u.sum(-1, keepdim=True)
        sigma = sigma + step * ((error > _TOLERANCE) if last_step else still_open)
        if not bool(still_open.any()):
            return sigma, float(sweeps.view(-1, rows_of_program).amax(1).mean())
        sweeps += still_open


def bits_until_k(width: int) -> tuple[float, float]:
    """How many bits of the scores are tried to find the k-th largest, for rows of `torch.randn`.

    A search ends with the first bit in which the k-th largest score differs from the next score. The first number is
    for a search in the largest scores of lanes. The search in the row begins after the bits that the result of the
    first search shares with the largest score.
    """
    x = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    tile = rows.Tile.of(width)

    def search(x: Tensor) -> tuple[Tensor, Tensor]:
        """The k-th largest of each row, up to the last bit that is tried, and the number of that bit."""
        kth, following = x.topk(K + 1).values[:, -2:].view(torch.int32).unbind(1)  # positive: ordered as integers
        last = (kth ^ following).clamp(min=1).log2().floor().int()
        return kth >> last << last, last

    def mean(bits: Tensor) -> float:
        """The mean, over programs, of the largest number of bits in the rows of a program."""
        return float(bits.view(-1, tile.rows).amax(1).float().mean())

    last = search(x)[1]
    if tile.lanes < 1024:
        return 0.0, mean(32 - last)
    low, last_of_lanes = search(x.view(64, -1, tile.lanes).amax(1))
    first = (low ^ x.amax(1).view(torch.int32)).clamp(min=1).log2().floor().int()
    return mean(32 - last_of_lanes), mean((first - last + 1).clamp(min=1))
