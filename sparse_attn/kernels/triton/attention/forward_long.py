"""Fused attention for many keys, forward: scores and weights are never written to memory.

A program computes a tile of queries of one head and passes over the keys several times: once to find the largest
score of each strided lane (every ``BLOCK_N``-th key), from which a lower bound close to σ follows; a few times for
Newton's method; and once for the output. There is a list of the key tiles that may have weight; for α up to 2, each
Newton pass can remove tiles from this list. The output pass marks the tiles that have weight, for the backward.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.triton.attention.tiles import (
    dot,
    dropout,
    end_of_keys,
    head_a,
    head_of_program,
    keys_of,
    keys_seen,
    load_tile,
    of_head,
    products,
    queries_of_program,
    store_rows,
    whole_tiles,
)
from sparse_attn.kernels.triton.attention.weights import any_of, bound, per_row, place, weights
from sparse_attn.kernels.triton.newton import GENTLE, start_of, step
from sparse_attn.kernels.triton.pairs import add, single, zero


@triton.jit
def _largest_sweep(
    q,
    k_start,
    listed,
    begin,
    stop,
    lanes,
    largest,
    i,
    end,
    limit,
    inputs,
    n,
    h,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Find the largest product of each lane and row; store how near each tile comes to the largest of a row so far.

    The last tiles are visited first: under a causal mask, and where scores fall with the distance, they often have the
    largest products. The products of the other tiles are then compared with these.
    """
    for t in range(0, stop - begin):
        tile = stop - 1 - t
        first = tile * BLOCK_N
        inside = first + tl.arange(0, BLOCK_N) < limit
        _, z = products(q, k_start, first, i, end, inside, inputs, n, h, UPCAST, PRECISION, D, BLOCK_D, BLOCK_N, EDGE)
        lanes = tl.maximum(lanes, z, propagate_nan=tl.PropagateNan.ALL)
        highest = tl.max(z, 1)
        largest = tl.maximum(largest, highest)
        near = tl.max(tl.where((end > 0) & (highest > float("-inf")), highest - largest, float("-inf")), 0)
        tl.store(listed + tile, near.to(tl.int32, bitcast=True))
    return lanes, largest


@triton.jit
def _list_near(listed, begin, stop, distance):
    """List, from ``begin`` on, the tiles that ``_largest_sweep`` found nearer than ``distance``; return how many."""
    BLOCK: tl.constexpr = 128
    kept = begin * 0
    for first in range(begin, stop, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        near = tl.load(listed + tile, mask=tile < stop, other=0).to(tl.float32, bitcast=True)
        alive = ((tile < stop) & ~(near <= distance)).to(tl.int32)
        # The list is packed in place: the write position never passes the read position.
        tl.store(listed + begin + kept + tl.cumsum(alive, 0) - 1, tile, mask=alive > 0)
        kept += tl.sum(alive, 0)
    return kept


@triton.jit
def _newton_sweep(
    q,
    k_start,
    listed,
    begin,
    stop,
    kept,
    row,
    totals,
    slopes,
    a,
    i,
    end,
    limit,
    inputs,
    n,
    h,
    MODE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FINE: tl.constexpr,
    EXACT: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add the weights and slopes of listed tiles to two accumulators, and list the tiles that may have weight.

    The accumulators (M, N) are summed after the sweep; with ``EXACT`` they are sums (M,), as pairs.
    """
    for t in range(0, stop - begin):  # Triton 3.4 does not compile a `for` loop that starts at the result of a `while`
        tile = tl.load(listed + begin + t)
        first = tile * BLOCK_N
        inside = first + tl.arange(0, BLOCK_N) < limit
        _, z = products(q, k_start, first, i, end, inside, inputs, n, h, UPCAST, PRECISION, D, BLOCK_D, BLOCK_N, EDGE)
        p, u, _ = weights(z, row, a, inputs.scale, MODE, FINE, EXACT, False)
        if EXACT:  # exact weights leave too few registers for accumulators (M, N)
            totals = add(totals, tl.sum(p, 1))
            slopes = add(slopes, tl.sum(u, 1))
        else:
            totals += p
            slopes += u
        # The list is packed in place: the write position never passes the read position.
        tl.store(listed + kept, tile)
        # For α up to 2, σ only increases: a tile without weight will have no weight in later passes. NaN counts as
        # weight.
        kept += tl.max((tl.max(u, 1) != 0.0).to(tl.int32) | (a > 1.0).to(tl.int32), 0)
    return totals, slopes, kept


@triton.jit
def _output_sweep(
    q,
    k_start,
    v_start,
    flags,
    listed,
    begin,
    stop,
    row,
    acc,
    acc2,
    total,
    slope,
    a,
    i,
    end,
    limit,
    inputs,
    lengths,
    head,
    n,
    h,
    MODE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FINE: tl.constexpr,
    EXACT: tl.constexpr,
    EDGE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Add the outputs of listed tiles, and mark tiles with weight. ``PARTS`` is as in ``backward_queries``."""
    SIZE: tl.constexpr = BLOCK_N // PARTS
    for t in range(0, (stop - begin) * PARTS):  # from 0: see `_newton_sweep`
        tile = tl.load(listed + begin + t // PARTS)
        first = tile * BLOCK_N + t % PARTS * SIZE
        j = first + tl.arange(0, SIZE)
        inside = j < limit
        if EDGE:
            inside = keys_seen(inputs, n, h, j, limit)
        _, z = products(q, k_start, first, i, end, inside, inputs, n, h, UPCAST, PRECISION, D, BLOCK_D, SIZE, EDGE)
        p, u, _ = weights(z, row, a, inputs.scale, MODE, FINE, EXACT, False)
        total = add(total, tl.sum(p, 1))
        slope = add(slope, tl.sum(u, 1))
        if flags is not None:
            tl.store(flags + tile, 1, mask=any_of(tl.max(p, 1) != 0.0))
        if inputs.seed is not None:
            multiplier = dropout(inputs, head, i, first, lengths.queries, SIZE)
            p, u = p * multiplier, u * multiplier
        v = load_tile(v_start, first, inputs.value.row, inside, DV, SIZE, BLOCK_DV, EDGE)
        acc += dot(p.to(v.dtype), v, UPCAST, PRECISION)
        if flags is not None:
            acc2 += dot(u.to(v.dtype), v, UPCAST, PRECISION)
    return acc, acc2, total, slope


@triton.jit
def _forward_rows(
    inputs,
    lengths,
    results,
    tiles,
    a,
    CAUSAL: tl.constexpr,
    MODE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TOLERANCE: tl.constexpr,
    LOOSE: tl.constexpr,
    FINE: tl.constexpr,
    EXACT: tl.constexpr,
):
    queries, keys = lengths.queries, inputs.keys
    tiles_m, tile_m, head, n, h, i = queries_of_program(inputs, lengths, BLOCK_M)
    k_start = of_head(inputs.key, n, h // inputs.group)
    v_start = of_head(inputs.value, n, h // inputs.group)
    line = (head.to(tl.int64) * tiles_m + tile_m) * tl.cdiv(keys, BLOCK_N)
    listed = tiles + line
    q = load_tile(of_head(inputs.query, n, h), tile_m * BLOCK_M, inputs.query.row, i < queries, D, BLOCK_M, BLOCK_D)
    limit = keys_of(inputs, lengths, n, CAUSAL)
    end = end_of_keys(i, queries, limit, lengths.offset, CAUSAL)
    last = limit
    if CAUSAL:
        last = tl.minimum(limit, (tile_m + 1) * BLOCK_M + lengths.offset)
    count = tl.cdiv(tl.maximum(last, 0), BLOCK_N)
    whole = tl.minimum(whole_tiles(inputs, lengths, limit, tile_m * BLOCK_M, BLOCK_N, CAUSAL, EXACT), count)

    lanes = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    lanes, largest = _largest_sweep(
        *(q, k_start, listed, whole, count, lanes, largest, i, end, limit, inputs, n, h),
        *(UPCAST, PRECISION, D, BLOCK_D, BLOCK_N, True),
    )
    if inputs.mask.start is None and not EXACT:
        lanes, largest = _largest_sweep(
            *(q, k_start, listed, 0, whole, lanes, largest, i, end, limit, inputs, n, h),
            *(UPCAST, PRECISION, D, BLOCK_D, BLOCK_N, False),
        )
    broken = tl.max((lanes != lanes).to(tl.int32), 1) > 0
    top = tl.where(broken, float("nan"), tl.max(lanes, 1))
    top = tl.where(i < queries, top, float("-inf"))
    each = per_row(a, BLOCK_M)
    low = bound(lanes, top, keys, a, inputs.scale, MODE, FINE, EXACT)
    sigma = low
    high, error = start_of(low, keys, each)
    # A product has no weight if the product minus the largest of its row is at most this negative number.
    distance = (single(low) - 1.0 / each) / inputs.scale - 1e-5 * tl.abs(top)
    distance = tl.where(each <= 0.0, float("-inf"), distance)
    distance = tl.min(tl.where(top == float("-inf"), float("inf"), distance), 0)
    # If a row is not valid, all gradients from this row must become NaN. So all tiles are kept: no number is below NaN.
    distance = tl.where(any_of(broken | (top == float("inf"))), float("nan"), distance)
    tl.debug_barrier()
    # Tiles that all queries see completely are listed from 0 on, the others from `first_edge` on.
    first_edge = whole
    stop = first_edge + _list_near(listed, first_edge, count, distance)
    whole = _list_near(listed, 0, whole, distance)
    tl.debug_barrier()

    sweeps = 0
    go = stop > 0
    while go:
        row = place(top, sigma, None, each, inputs.scale, MODE, EXACT)
        if EXACT:
            totals = zero(each, True)
            slopes = zero(each, True)
        else:
            totals = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            slopes = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        kept = 0
        if inputs.mask.start is None and not EXACT:
            totals, slopes, kept = _newton_sweep(
                *(q, k_start, listed, 0, whole, kept, row, totals, slopes, a, i, end, limit, inputs, n, h),
                *(MODE, UPCAST, PRECISION, D, BLOCK_D, BLOCK_N, FINE, EXACT, False),
            )
        kept_whole = kept
        totals, slopes, kept = _newton_sweep(
            *(q, k_start, listed, first_edge, stop, kept, row, totals, slopes, a, i, end, limit, inputs, n, h),
            *(MODE, UPCAST, PRECISION, D, BLOCK_D, BLOCK_N, FINE, EXACT, True),
        )
        tl.debug_barrier()
        whole, first_edge, stop = kept_whole, kept_whole, kept
        if EXACT:
            total, slope = single(totals), single(slopes)
        else:
            total, slope = tl.sum(totals, 1), tl.sum(slopes, 1)
        total = tl.where(top == float("-inf"), 1.0, total)
        sigma, low, high, error, still_open = step(sigma, low, high, error, total, slope, each, TOLERANCE, MODE)
        sweeps += 1
        far = still_open & (error > tl.where(each > 1.0, TOLERANCE, LOOSE))
        go = (sweeps < 100) & any_of(far)

    # After the last Newton step the sum is close to 1; dividing by the sum removes the remaining error.
    row = place(top, sigma, None, each, inputs.scale, MODE, EXACT)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    acc2 = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = zero(each, FINE or EXACT)
    slope = zero(each, FINE or EXACT)
    flags = None
    if results.flags is not None:
        flags = results.flags + line
    if inputs.mask.start is None and not EXACT:
        acc, acc2, total, slope = _output_sweep(
            *(q, k_start, v_start, flags, listed, 0, whole, row, acc, acc2, total, slope, a),
            *(i, end, limit, inputs, lengths, head, n, h),
            *(MODE, UPCAST, PRECISION, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, FINE, EXACT, False, 1),
        )
    PARTS: tl.constexpr = 2 if EXACT and BLOCK_N >= 64 else 1
    acc, acc2, total, slope = _output_sweep(
        *(q, k_start, v_start, flags, listed, first_edge, stop, row, acc, acc2, total, slope, a),
        *(i, end, limit, inputs, lengths, head, n, h),
        *(MODE, UPCAST, PRECISION, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, FINE, EXACT, True, PARTS),
    )
    _, _, head, _, _, i = queries_of_program(inputs, lengths, BLOCK_M, True)
    store_rows(
        *(results, acc, acc2, total, slope, row, top, sigma, each, inputs.scale),
        *(head, i, lengths, DV, BLOCK_DV, MODE, EXACT),
    )
    if results.sweeps is not None:
        tl.store(results.sweeps + head * tiles_m + tile_m, sweeps)


@triton.jit(do_not_specialize=("lengths",))
def forward_long(
    inputs,
    lengths,
    results,
    tiles,
    CAUSAL: tl.constexpr,
    MODE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TOLERANCE: tl.constexpr,
    LOOSE: tl.constexpr,
):
    """A program computes a tile of queries; it uses its line of ``tiles`` for the list of key tiles."""
    FINE: tl.constexpr = inputs.query.start.dtype.element_ty == tl.float32
    a = head_a(inputs, head_of_program(inputs, lengths, BLOCK_M))
    if MODE == 0 and not FINE:  # see newton.GENTLE
        if tl.max(a, 0) < GENTLE:
            _forward_rows(
                *(inputs, lengths, results, tiles, a, CAUSAL, MODE, UPCAST, PRECISION, D, DV, BLOCK_D, BLOCK_DV),
                *(BLOCK_M, BLOCK_N, TOLERANCE, LOOSE, FINE, True),
            )
        else:
            _forward_rows(
                *(inputs, lengths, results, tiles, a, CAUSAL, MODE, UPCAST, PRECISION, D, DV, BLOCK_D, BLOCK_DV),
                *(BLOCK_M, BLOCK_N, TOLERANCE, LOOSE, FINE, False),
            )
    else:
        _forward_rows(
            *(inputs, lengths, results, tiles, a, CAUSAL, MODE, UPCAST, PRECISION, D, DV, BLOCK_D, BLOCK_DV),
            *(BLOCK_M, BLOCK_N, TOLERANCE, LOOSE, FINE, MODE == 0),
        )
