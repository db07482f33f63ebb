"""Fused attention for up to 1,024 keys, forward: one pass; all scores of a tile of queries stay on the chip."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.triton.attention.tiles import (
    dot,
    dropout,
    end_of_keys,
    head_a,
    keys_of,
    keys_seen,
    load_tile,
    masked_scores,
    of_head,
    queries_of_program,
    store_rows,
)
from sparse_attn.kernels.triton.family import (
    bound_from_lanes,
    place_rows,
    solve_on_chip,
    weigh,
)


@triton.jit(do_not_specialize=("lengths",))
def forward_short(
    inputs,
    lengths,
    results,
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
    TILES_N: tl.constexpr,
    BACKWARD_M: tl.constexpr,
):
    """As ``forward._forward``. The backward uses tiles of ``BACKWARD_M`` queries and ``BLOCK_N`` keys."""
    ALL: tl.constexpr = BLOCK_N * TILES_N
    queries, keys = lengths.queries, inputs.keys
    _, tile_m, head, n, h, i = queries_of_program(inputs, lengths, BLOCK_M)
    j = tl.arange(0, ALL)
    q = load_tile(of_head(inputs.query, n, h), tile_m * BLOCK_M, inputs.query.row, i < queries, D, BLOCK_M, BLOCK_D)
    limit = keys_of(inputs, lengths, n, CAUSAL)
    seen = keys_seen(inputs, n, h, j, limit)
    k = load_tile(of_head(inputs.key, n, h // inputs.group), 0, inputs.key.row, seen, D, ALL, BLOCK_D)
    end = end_of_keys(i, queries, limit, lengths.offset, CAUSAL)
    s = masked_scores(dot(q, k.T, UPCAST, PRECISION), i[:, None], j[None, :], end[:, None], inputs, n, h)
    broken = tl.max((s != s).to(tl.int32), 1) > 0
    top = tl.where(broken, float("nan"), tl.max(s, 1))
    a = head_a(inputs, h) + tl.zeros([BLOCK_M], tl.float64)
    start = 0.0 * a
    if TILES_N >= 4:
        start = bound_from_lanes(tl.max(tl.reshape(s, [BLOCK_M, TILES_N, BLOCK_N]), 1), top, keys, a, MODE)
    sigma, _ = solve_on_chip(s, top, start, keys, a, TOLERANCE, MODE)
    placed = place_rows(top, sigma, 1.0, a, MODE)
    p, u, _ = weigh(s, placed, a, 1, MODE)
    total, slope = tl.sum(p, 1).to(tl.float64), tl.sum(u, 1).to(tl.float64)
    if results.flags is not None:
        # A tile of queries of the backward may cover several tiles of this kernel.
        active = tl.max(tl.max(tl.reshape((p != 0.0).to(tl.int32), [BLOCK_M, TILES_N, BLOCK_N]), 2), 0)
        tile = tl.arange(0, TILES_N)
        tiles_n = tl.cdiv(keys, BLOCK_N)
        line = (head.to(tl.int64) * tl.cdiv(queries, BACKWARD_M) + tile_m * BLOCK_M // BACKWARD_M) * tiles_n
        tl.store(results.flags + line + tile, tl.full([TILES_N], 1, tl.uint8), mask=(tile < tiles_n) & (active > 0))
    if inputs.seed is not None:
        kept = dropout(inputs, head, i[:, None], j[None, :], queries)
        p, u = p * kept, u * kept
    v = load_tile(of_head(inputs.value, n, h // inputs.group), 0, inputs.value.row, seen, DV, ALL, BLOCK_DV)
    acc = dot(p.to(v.dtype), v, UPCAST, PRECISION)
    acc2 = acc
    if results.second is not None:
        acc2 = dot(u.to(v.dtype), v, UPCAST, PRECISION)
    store_rows(results, acc, acc2, total, slope, top, sigma, a, head, i, lengths, DV, BLOCK_DV, MODE)
