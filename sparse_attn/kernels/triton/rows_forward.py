"""Row kernels, forward: for rows held on the chip, also with only the k largest scores, and for rows read in chunks.

Except for softmax, the kernels first compute a lower bound close to σ for rows of more than 256 entries. The bound
follows from the largest scores of strided lanes.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.triton.family import a_of, along, place_rows, places, softmax_weights, sum_of_row, weigh
from sparse_attn.kernels.triton.newton import (
    LOOSE,
    NEARLY,
    all_gentle,
    bound_from_lanes,
    fast_weights,
    open_after,
    solve_on_chip,
    start_of,
    step,
)
from sparse_attn.kernels.triton.pairs import difference, inverse, zero

# Tolerance of a row's sum; dividing by the sum removes the remaining error.
_TOLERANCE = tl.constexpr(2.4e-7)


@triton.jit
def _checked(top, a):
    """The largest score of each row; NaN if a score is NaN or ``+inf``, or if α is outside ``(0, inf)``."""
    return tl.where((top < float("inf")) & (a > -1.0) & (a < float("inf")), top, float("nan"))


@triton.jit
def _largest(z):
    """The largest score of each row of scores (C, R, B); NaN if the row has a NaN."""
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

    The count is ``k`` if exactly ``k`` entries reach the bound. Otherwise the count is more than ``k``, and the bound
    is the largest possible. The bound is found bit by bit, beginning with ``bit``; the argument
    ``bound`` contains the higher bits.
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
        # The k-th largest of the maxima of lanes is a lower bound. The leading bits that this lower bound and the
        # largest score share are also the leading bits of the result.
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


@triton.jit(do_not_specialize=("count", "k"))
def forward_on_chip(
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
    """A program computes one or more rows, each read once. With ``TOP_K`` only the ``k`` largest scores take part."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    entry = (tl.arange(0, ENTRIES)[:, None] * LANES + tl.arange(0, LANES)[None, :]).to(tl.int64)
    inside = (row < count)[None, :, None] & (entry < size)[:, None, :]
    z = tl.load(X + places(row, entry, stride_row, stride_entry), mask=inside, other=float("-inf")).to(tl.float32)
    z = tl.where(z <= lowest, float("-inf"), z)
    a = a_of(A, row, row < count, number)
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
    tl.store(P + places(row, entry, size, 1), p.to(P.dtype.element_ty), mask=inside)


@triton.jit
def _chunk(x, first, entry, size, stride_entry, lowest):
    """Scores of a row; ``-inf`` for masked scores, and after the end of the row."""
    z = tl.load(x + (first + entry) * stride_entry, mask=first + entry < size, other=float("-inf")).to(tl.float32)
    return tl.where(z <= lowest, float("-inf"), z)


@triton.jit(do_not_specialize=("count",))
def forward_in_chunks(
    X, A, P, number, lowest, count, size, stride_row, stride_entry, MODE: tl.constexpr, CHUNK: tl.constexpr
):
    """A program computes one row, and reads it several times."""
    row = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    entry = tl.arange(0, CHUNK).to(tl.int64)[None, :]
    start = X + row[:, None] * stride_row
    lanes = tl.full([1, CHUNK], float("-inf"), tl.float32)
    for first in range(0, size, CHUNK):
        z = _chunk(start, first, entry, size, stride_entry, lowest)
        lanes = tl.maximum(lanes, z, propagate_nan=tl.PropagateNan.ALL)
    broken = tl.max((lanes != lanes).to(tl.int32), 1) > 0
    a = a_of(A, row, row < count, number)
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
                # The pass for the output computes the weights at the new σ. Their sum is known without another pass.
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
