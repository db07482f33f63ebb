"""Row kernels on a GPU: the contract of ``kernels.reference.entmax``, computed in float32 for every dtype.

A row of up to 16,384 entries is read once and stays on the chip; a longer row is read in chunks, several times. Rows
of 512 entries or more start from the largest scores of strided lanes, from which follows a lower bound close to σ.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.kernels.triton.family import (
    GENERAL,
    LOOSE,
    MODES,
    NEARLY,
    SOFTMAX,
    all_gentle,
    along,
    alpha_gradient,
    away_from_zero,
    bound_from_lanes,
    deviation_of_y,
    fast_weights,
    log2,
    log2_of_scores,
    open_after,
    place_rows,
    power,
    reference_of,
    softmax_weights,
    solve_on_chip,
    start_of,
    step,
    sum_of_row,
    weigh,
)
from sparse_attn.kernels.triton.launch import launch
from sparse_attn.kernels.triton.pairs import LN2, difference, fast_exp2, inverse, zero

_ON_CHIP = 2**14
_CHUNK = 2**13
_OF_A_WARP = 2**10  # entries: 32 for each thread
# Tolerance of a row's sum; dividing by the sum removes the remaining error.
_TOLERANCE = tl.constexpr(2.4e-7)


class Tile(NamedTuple):
    """The shape in which a program holds rows: entry ``e`` of a row is at ``(e // lanes, row, e % lanes)``.

    The lanes of a row belong to as few threads as memory accesses allow, because each of these threads repeats the
    computations per row. The entries of a lane belong to one thread.
    """

    entries: int  # of a lane
    rows: int
    lanes: int
    warps: int

    @staticmethod
    def of(size: int) -> Tile:
        """The tile for rows of this size."""
        block = max(triton.next_power_of_2(size), 16)
        lanes = max(block // 8, 16)
        return Tile(block // lanes, max(128 // lanes, 1), lanes, max(block // _OF_A_WARP, 1))


def entmax_forward(
    scores: Tensor, a: float | Tensor, lowest: float, k: int | None = None, *, in_place: bool = False
) -> Tensor:
    """The probabilities. Scores at or below ``lowest`` are masked; a row of masked scores only is all zeros.

    A row with NaN or ``+inf``, or with α outside ``(0, inf)``, is NaN throughout. With ``k``, only the k largest scores
    of each row take part; ties go to the lowest index. ``in_place`` allows the scores to be overwritten.
    """
    size = scores.shape[-1]
    if k is not None and size > _ON_CHIP:
        index = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]
        return torch.zeros_like(scores).scatter_(-1, index, entmax_forward(scores.gather(-1, index), a, lowest))
    reuse = in_place and scores.is_contiguous()  # every entry is read before it is written
    p = scores if reuse else torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    if not p.numel():
        return p
    x = scores.reshape(-1, size)
    per_row, number, mode = _parameter(a, scores)
    arguments = (x, per_row, p, number, lowest, len(x), size, *x.stride())
    if size <= _ON_CHIP:
        tile = Tile.of(size)
        top_k = (k or 0, mode, *tile[:3], k is not None)
        launch(_forward_on_chip, triton.cdiv(len(x), tile.rows), *arguments, *top_k, warps=tile.warps)
    else:
        launch(_forward_in_chunks, len(x), *arguments, mode, _CHUNK, warps=16)
    return p


def entmax_backward(
    p: Tensor, a: float | Tensor, grad: Tensor, with_alpha: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The gradient for the scores and, if wanted, for α per row ``(..., 1)``, in float32.

    Where ``p`` is 0 the gradient is 0 for any ``grad``, so the function serves the top-k mapping too.
    """
    result = torch.empty(p.shape, dtype=p.dtype, device=p.device)
    grad_a = torch.zeros((*p.shape[:-1], 1), dtype=torch.float32, device=p.device) if with_alpha else None
    if not p.numel():
        return result, grad_a
    size = p.shape[-1]
    x, g = p.reshape(-1, size), grad.reshape(-1, size)
    per_row, number, mode = _parameter(a, p)
    arguments = (x, g, per_row, result, grad_a, number, len(x), size, *x.stride(), *g.stride())
    mode = GENERAL if with_alpha or mode == SOFTMAX else mode
    if size <= (_ON_CHIP // 2 if with_alpha else _ON_CHIP):  # a program holds several tensors
        tile = Tile.of(size)
        warps = min(2 * tile.warps, 16)
        launch(_backward_on_chip, triton.cdiv(len(x), tile.rows), *arguments, mode, *tile[:3], warps=warps)
    else:
        launch(_backward_in_chunks, len(x), *arguments, mode, _CHUNK, warps=16)
    return result, grad_a


def _parameter(a: float | Tensor, x: Tensor) -> tuple[Tensor | None, float, int]:
    """``a`` per row, or as a number, and the mode of the kernels."""
    if not isinstance(a, Tensor):
        return None, a, SOFTMAX if a == 0.0 else MODES.get(a, GENERAL)
    return a.expand(*x.shape[:-1], 1).reshape(-1).contiguous(), 0.0, GENERAL


@triton.jit
def _a_of(A, row, valid, number):
    """``a`` of each row, never exactly 0."""
    if A is None:  # noqa: SIM108, one branch does not exist
        a = number + 0.0 * row.to(tl.float32)
    else:
        a = tl.load(A + row, mask=valid, other=1.0).to(tl.float32)
    return away_from_zero(a)


@triton.jit
def _checked(top, a):
    """The largest score of each row; NaN if a score is NaN or ``+inf``, or if α is outside ``(0, inf)``."""
    return tl.where((top < float("inf")) & (a > -1.0) & (a < float("inf")), top, float("nan"))


@triton.jit
def _largest(z):
    """The largest score of each row (C, R, B); NaN if there is one."""
    broken = tl.max(tl.max((z != z).to(tl.int32), 0), 1) > 0
    return tl.where(broken, float("nan"), tl.max(tl.max(z, 0), 1))


@triton.jit
def _count_rows(condition):
    """How many entries of each row (R, B) or (C, R, B) fulfil a condition."""
    return sum_of_row(condition.to(tl.int32))


@triton.jit
def _order(z):
    """Unsigned integers that are ordered like the scores."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0, so that both have the same bits
    return tl.where(bits < 0, ~bits, bits | -(2**31)).to(tl.uint32, bitcast=True)


@triton.jit
def _largest_bound(order, k, bound, bit):
    """For each row, a bound that at least ``k`` entries reach, and a count.

    The count is ``k`` if exactly ``k`` entries reach the bound; otherwise it is more than ``k``, and the bound is the
    largest. The bound is found bit by bit, beginning with ``bit``; ``bound`` has the higher bits.
    """
    found = tl.zeros([order.shape[-2]], tl.int32) + (k + 1)
    n = 0
    go = True
    while go:
        tried = bound | (bit >> n)
        count = _count_rows(order >= along(tried, order))
        fits = (count >= k) & (found != k)
        bound, found = tl.where(fits, tried, bound), tl.where(fits, count, found)
        n += 1
        go = (n < 32) & (tl.max(((found != k) & ((bit >> n) > 0)).to(tl.int32), 0) > 0)
    return bound, found


@triton.jit
def _only_largest(z, k):
    """The ``k`` largest scores of each row (ties go to the lowest index); the others become ``-inf``."""
    order = _order(z)
    bound = tl.zeros([z.shape[1]], tl.uint32)
    bit = tl.full([z.shape[1]], 0x80000000, tl.uint32)
    if z.shape[2] >= 1024:  # with fewer lanes this costs more than it saves
        # The k-th largest maximum of a lane is a lower bound. The bits in which it equals the largest score are known.
        lanes = tl.max(order, 0)
        low, _ = _largest_bound(lanes, k, bound, bit)
        differ = low ^ tl.max(lanes, 1)
        # The conversion may round up to the next power of two, which is one bit too many.
        exponent = (differ.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        bit = tl.full([z.shape[1]], 1, tl.uint32) << tl.minimum(tl.maximum(exponent, 0), 31).to(tl.uint32)
        bound = low - (low & (bit | (bit - 1)))  # the interpreter has no ~ of unsigned integers
    bound, found = _largest_bound(order, k, bound, bit)
    kept = order >= along(bound, z)
    if tl.max((found != k).to(tl.int32), 0) > 0:  # some row has equal scores at its bound
        tied = order == along(bound, z)
        room = k - _count_rows(order > along(bound, z))
        of_lane = tl.sum(tied.to(tl.int32), 2)
        before = (tl.cumsum(of_lane, 0) - of_lane)[:, :, None] + tl.cumsum(tied.to(tl.int32), 2)
        kept = kept & (~tied | (before <= along(room, z)))
    return tl.where(kept, z, float("-inf"))


@triton.jit
def _places(row, entry, stride_row, stride_entry):
    """Offsets of the entries (C, B) of rows (R,), as (C, R, B)."""
    return row[None, :, None] * stride_row + entry[:, None, :] * stride_entry


@triton.jit(do_not_specialize=("count", "k"))
def _forward_on_chip(
    X,
    A,
    P,
    number,
    lowest,
    count,
    size,
    stride_row,
    stride_entry,
    k,
    MODE: tl.constexpr,
    ENTRIES: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    TOP_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    entry = (tl.arange(0, ENTRIES)[:, None] * LANES + tl.arange(0, LANES)[None, :]).to(tl.int64)
    inside = (row < count)[None, :, None] & (entry < size)[:, None, :]
    z = tl.load(X + _places(row, entry, stride_row, stride_entry), mask=inside, other=float("-inf")).to(tl.float32)
    z = tl.where(z <= lowest, float("-inf"), z)
    a = _a_of(A, row, row < count, number)
    top = _checked(_largest(z), a)
    if TOP_K:
        z = _only_largest(z, k)
    empty = top == float("-inf")
    x = z - along(tl.where(empty, 0.0, top), z)
    if MODE == 3:
        p = softmax_weights(x)
        total = tl.where(empty, 1.0, sum_of_row(p))
    else:
        by_a = inverse(a)
        start = zero(a, True)
        if LANES >= 64:
            start = bound_from_lanes(tl.max(x, 0), size, a, by_a, empty, MODE)
        p, total = solve_on_chip(x, start, size, a, by_a, empty, _TOLERANCE, MODE)
    p = p * along(1.0 / total, p)
    tl.store(P + _places(row, entry, size, 1), p.to(P.dtype.element_ty), mask=inside)


@triton.jit
def _chunk(x, first, entry, size, stride_entry, lowest):
    """Scores of a row; ``-inf`` for masked scores, and after the last."""
    z = tl.load(x + (first + entry) * stride_entry, mask=first + entry < size, other=float("-inf")).to(tl.float32)
    return tl.where(z <= lowest, float("-inf"), z)


@triton.jit(do_not_specialize=("count",))
def _forward_in_chunks(
    X, A, P, number, lowest, count, size, stride_row, stride_entry, MODE: tl.constexpr, CHUNK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    entry = tl.arange(0, CHUNK).to(tl.int64)[None, :]
    start = X + row[:, None] * stride_row
    lanes = tl.full([1, CHUNK], float("-inf"), tl.float32)
    for first in range(0, size, CHUNK):
        z = _chunk(start, first, entry, size, stride_entry, lowest)
        lanes = tl.maximum(lanes, z, propagate_nan=tl.PropagateNan.ALL)
    broken = tl.max((lanes != lanes).to(tl.int32), 1) > 0
    a = _a_of(A, row, row < count, number)
    top = _checked(tl.where(broken, float("nan"), tl.max(lanes, 1)), a)
    empty = top == float("-inf")
    shown = tl.where(empty, 0.0, top)[:, None]
    by_a = inverse(a)
    total = 0.0 * a
    if MODE == 3:
        totals = tl.zeros([1, CHUNK], tl.float32)
        for first in range(0, size, CHUNK):
            totals += softmax_weights(_chunk(start, first, entry, size, stride_entry, lowest) - shown)
        total = tl.where(empty, 1.0, tl.sum(totals, 1))
    else:
        low = bound_from_lanes(lanes - shown, size, a, by_a, empty, MODE)
        high, error = start_of(low, size, a)
        sigma = low
        placed = place_rows(sigma, a, by_a, MODE)
        if MODE == 0:  # as in `approach`
            upper = high
            lower = low
            error_before = error
            sweeps = 0
            go = all_gentle(a)
            while go:
                totals = tl.zeros([1, CHUNK], tl.float32)
                slopes = tl.zeros([1, CHUNK], tl.float32)
                for first in range(0, size, CHUNK):
                    x = _chunk(start, first, entry, size, stride_entry, lowest) - shown
                    p, u = fast_weights(x, sigma, a)
                    totals += p
                    slopes += u
                total, slope = tl.where(empty, 1.0, tl.sum(totals, 1)), tl.sum(slopes, 1)
                sigma, lower, upper, error_before, still_open = step(
                    sigma, lower, upper, error_before, total, slope, a, NEARLY, MODE
                )
                sweeps += 1
                go = (sweeps < 100) & (tl.max((still_open & (error_before > LOOSE)).to(tl.int32), 0) > 0)
        sweeps = 0
        go = True
        while go:
            before = sigma
            placed = place_rows(sigma, a, by_a, MODE)
            totals = tl.zeros([1, CHUNK], tl.float32)
            slopes = tl.zeros([1, CHUNK], tl.float32)
            for first in range(0, size, CHUNK):
                p, u, _ = weigh(_chunk(start, first, entry, size, stride_entry, lowest) - shown, placed, MODE)
                totals += p
                slopes += u
            total, slope = tl.where(empty, 1.0, tl.sum(totals, 1)), tl.sum(slopes, 1)
            sigma, low, high, error, still_open = step(sigma, low, high, error, total, slope, a, _TOLERANCE, MODE)
            if MODE == 0:
                still_open, nearly = open_after(error, still_open, total, a)
                # The pass for the output computes the weights at the new σ.
                placed = place_rows(sigma, a, by_a, MODE)
                total = total - tl.where(nearly, difference(sigma, before), 0.0) * slope
            sweeps += 1
            go = (sweeps < 100) & (tl.max(still_open.to(tl.int32), 0) > 0)
    factor = (1.0 / total)[:, None]
    for first in range(0, size, CHUNK):
        x = _chunk(start, first, entry, size, stride_entry, lowest) - shown
        if MODE == 3:
            p = softmax_weights(x)
        else:
            p, _, _ = weigh(x, placed, MODE)
        tl.store(
            P + row[:, None] * size + first + entry, (p * factor).to(P.dtype.element_ty), mask=first + entry < size
        )


@triton.jit
def _slope(p, a, largest, MODE: tl.constexpr):
    """``u = p^(2-α)`` and, for any α, ``log(p / max p)``; 0 where p is 0, NaN where p is NaN."""
    if MODE == 2:
        return tl.where(p > 0.0, 1.0, p), p
    elif MODE == 1:
        return tl.sqrt(p), p
    else:
        known = tl.where(largest == 0.0, 1.0, largest)
        scale = along(1.0 / known, p)
        log_p = log2_of_scores(p * scale, (p - along(largest, p)) * scale)
        u = fast_exp2(log_p * along(1.0 - a, p)) * along(power(known, 1.0 - a), p)
        return tl.where(p == 0.0, p, u), tl.where(p == 0.0, 0.0, log_p * LN2)


@triton.jit(do_not_specialize=("count",))
def _backward_on_chip(
    P,
    G,
    A,
    DZ,
    DA,
    number,
    count,
    size,
    stride_row,
    stride_entry,
    stride_grad_row,
    stride_grad_entry,
    MODE: tl.constexpr,
    ENTRIES: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    entry = (tl.arange(0, ENTRIES)[:, None] * LANES + tl.arange(0, LANES)[None, :]).to(tl.int64)
    inside = (row < count)[None, :, None] & (entry < size)[:, None, :]
    p = tl.load(P + _places(row, entry, stride_row, stride_entry), mask=inside, other=0.0).to(tl.float32)
    g = tl.load(G + _places(row, entry, stride_grad_row, stride_grad_entry), mask=inside, other=0.0)
    g = tl.where(p == 0.0, 0.0, g.to(tl.float32))
    a = _a_of(A, row, row < count, number)
    largest = tl.max(tl.max(p, 0), 1)
    u, log_p = _slope(p, a, largest, MODE)
    total = sum_of_row(u)
    by_total = 1.0 / tl.where(total == 0.0, 1.0, total)
    # The mean is subtracted twice, so that a constant common to the row does not cost digits.
    g -= along(sum_of_row(u * g) * by_total, g)
    g -= along(sum_of_row(u * g) * by_total, g)
    tl.store(DZ + _places(row, entry, size, 1), (u * g).to(DZ.dtype.element_ty), mask=inside)
    if DA is not None:
        log_largest = _log(largest)
        reference = reference_of(log_largest, a)
        y = deviation_of_y(p, u, log_p, a, reference)
        mean_log, mean_y = sum_of_row(p * log_p), sum_of_row(y)
        with_log = sum_of_row(p * (log_p - along(mean_log, p)) * g)
        with_y = sum_of_row((y - p * along(mean_y, p)) * g)
        sums = ((with_log,), (with_y,), (mean_log,), (mean_y,))
        da = alpha_gradient(*sums, by_total, a, log_largest, reference)
        tl.store(DA + row, da, mask=row < count)


@triton.jit
def _log(largest):
    """The logarithm of the largest probability of each row; 0 for a row of zeros."""
    known = tl.where(largest == 0.0, 1.0, largest)
    return log2(known, known - 1.0) * LN2


@triton.jit
def _load_both(P, G, p_row, g_row, entry, size, stride_entry, stride_grad_entry):
    p = tl.load(P + p_row + entry * stride_entry, mask=entry < size, other=0.0).to(tl.float32)
    g = tl.load(G + g_row + entry * stride_grad_entry, mask=entry < size, other=0.0).to(tl.float32)
    return p, tl.where(p == 0.0, 0.0, g)


@triton.jit(do_not_specialize=("count",))
def _backward_in_chunks(
    P,
    G,
    A,
    DZ,
    DA,
    number,
    count,
    size,
    stride_row,
    stride_entry,
    stride_grad_row,
    stride_grad_entry,
    MODE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    entry = tl.arange(0, CHUNK).to(tl.int64)[None, :]
    p_row, g_row = row[:, None] * stride_row, row[:, None] * stride_grad_row
    a = _a_of(A, row, row < count, number)
    # Sums of a row are accumulated in lanes, and added up at the end.
    lanes = tl.zeros([1, CHUNK], tl.float32)
    if MODE == 0:
        for first in range(0, size, CHUNK):
            p, _ = _load_both(P, G, p_row, g_row, first + entry, size, stride_entry, stride_grad_entry)
            lanes = tl.maximum(lanes, p)
    largest = tl.max(lanes, 1)
    log_largest = _log(largest)
    reference = reference_of(log_largest, a)
    totals = tl.zeros([1, CHUNK], tl.float32)
    products = tl.zeros([1, CHUNK], tl.float32)
    logs = tl.zeros([1, CHUNK], tl.float32)
    ys = tl.zeros([1, CHUNK], tl.float32)
    for first in range(0, size, CHUNK):
        p, g = _load_both(P, G, p_row, g_row, first + entry, size, stride_entry, stride_grad_entry)
        u, log_p = _slope(p, a, largest, MODE)
        totals += u
        products += u * g
        if DA is not None:
            logs += p * log_p
            ys += deviation_of_y(p, u, log_p, a, reference)
    total = tl.sum(totals, 1)
    by_total = 1.0 / tl.where(total == 0.0, 1.0, total)
    centre = (tl.sum(products, 1) * by_total)[:, None]
    mean_log, mean_y = tl.sum(logs, 1), tl.sum(ys, 1)
    products = tl.zeros([1, CHUNK], tl.float32)
    logs = tl.zeros([1, CHUNK], tl.float32)
    ys = tl.zeros([1, CHUNK], tl.float32)
    for first in range(0, size, CHUNK):
        p, g = _load_both(P, G, p_row, g_row, first + entry, size, stride_entry, stride_grad_entry)
        u, log_p = _slope(p, a, largest, MODE)
        g -= centre
        products += u * g
        if DA is not None:
            logs += p * (log_p - mean_log[:, None]) * g
            ys += (deviation_of_y(p, u, log_p, a, reference) - p * mean_y[:, None]) * g
    rest_of_centre = (tl.sum(products, 1) * by_total)[:, None]
    for first in range(0, size, CHUNK):
        p, g = _load_both(P, G, p_row, g_row, first + entry, size, stride_entry, stride_grad_entry)
        u, _ = _slope(p, a, largest, MODE)
        dz = u * ((g - centre) - rest_of_centre)
        tl.store(DZ + row[:, None] * size + first + entry, dz.to(DZ.dtype.element_ty), mask=first + entry < size)
    if DA is not None:
        with_log, with_y = tl.sum(logs, 1), tl.sum(ys, 1)
        sums = ((with_log,), (with_y,), (mean_log,), (mean_y,))
        da = alpha_gradient(*sums, by_total, a, log_largest, reference)
        tl.store(DA + row, da)
