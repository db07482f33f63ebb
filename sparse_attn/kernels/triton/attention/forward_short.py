"""Fused attention for few keys, forward: one pass; all scores of a tile of queries stay on the chip.

``plan`` has the largest number of keys for which this kernel is used.
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
)
from sparse_attn.kernels.triton.attention.weights import bound, per_row, place, solve, weights
from sparse_attn.kernels.triton.newton import GENTLE
from sparse_attn.kernels.triton.pairs import zero


@triton.jit
def _short_rows(
    inputs,
    lengths,
    results,
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
    TILES_N: tl.constexpr,
    BACKWARD_M: tl.constexpr,
    FINE: tl.constexpr,
    EXACT: tl.constexpr,
):
    ALL: tl.constexpr = BLOCK_N * TILES_N
    queries, keys = lengths.queries, inputs.keys
    _, tile_m, head, n, h, i = queries_of_program(inputs, lengths, BLOCK_M)
    j = tl.arange(0, ALL)
    q = load_tile(of_head(inputs.query, n, h), tile_m * BLOCK_M, inputs.query.row, i < queries, D, BLOCK_M, BLOCK_D)
    limit = keys_of(inputs, lengths, n, CAUSAL)
    end = end_of_keys(i, queries, limit, lengths.offset, CAUSAL)
    seen = keys_seen(inputs, n, h, j, limit)
    k_start = of_head(inputs.key, n, h // inputs.group)
    _, z = products(q, k_start, 0, i, end, seen, inputs, n, h, UPCAST, PRECISION, D, BLOCK_D, ALL, True)
    broken = tl.max((z != z).to(tl.int32), 1) > 0
    top = tl.where(broken, float("nan"), tl.max(z, 1))
    each = per_row(a, BLOCK_M)
    start = zero(each, FINE or EXACT)
    if TILES_N >= 4:
        lanes = tl.max(tl.reshape(z, [BLOCK_M, TILES_N, BLOCK_N]), 1)
        start = bound(lanes, top, keys, a, inputs.scale, MODE, FINE, EXACT)
    sigma, _ = solve(z, top, start, keys, a, inputs.scale, TOLERANCE, MODE, FINE, EXACT)
    row = place(top, sigma, None, each, inputs.scale, MODE, EXACT)
    p, u, _ = weights(z, row, a, inputs.scale, MODE, FINE, EXACT, False)
    total, slope = tl.sum(p, 1), tl.sum(u, 1)
    if results.flags is not None:
        # A tile of queries of the backward may cover several tiles of this kernel.
        active = tl.max(tl.max(tl.reshape((p != 0.0).to(tl.int32), [BLOCK_M, TILES_N, BLOCK_N]), 2), 0)
        tile = tl.arange(0, TILES_N)
        tiles_n = tl.cdiv(keys, BLOCK_N)
        line = (head.to(tl.int64) * tl.cdiv(queries, BACKWARD_M) + tile_m * BLOCK_M // BACKWARD_M) * tiles_n
        tl.store(results.flags + line + tile, tl.full([TILES_N], 1, tl.uint8), mask=(tile < tiles_n) & (active > 0))
    if inputs.seed is not None:
        kept = dropout(inputs, head, i, 0, queries, ALL)
        p, u = p * kept, u * kept
    v = load_tile(of_head(inputs.value, n, h // inputs.group), 0, inputs.value.row, seen, DV, ALL, BLOCK_DV)
    acc = dot(p.to(v.dtype), v, UPCAST, PRECISION)
    acc2 = acc
    if results.second is not None:
        acc2 = dot(u.to(v.dtype), v, UPCAST, PRECISION)
    store_rows(
        *(results, acc, acc2, (total,), (slope,), row, top, sigma, each, inputs.scale),
        *(head, i, lengths, DV, BLOCK_DV, MODE, EXACT),
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
    """A program computes a tile of queries. The backward uses tiles of ``BACKWARD_M`` queries and ``BLOCK_N`` keys."""
    FINE: tl.constexpr = inputs.query.start.dtype.element_ty == tl.float32
    a = head_a(inputs, head_of_program(inputs, lengths, BLOCK_M))
    if MODE == 0 and not FINE:  # see newton.GENTLE
        if tl.max(a, 0) < GENTLE:
            _short_rows(
                *(inputs, lengths, results, a, CAUSAL, MODE, UPCAST, PRECISION, D, DV, BLOCK_D, BLOCK_DV),
                *(BLOCK_M, BLOCK_N, TOLERANCE, TILES_N, BACKWARD_M, FINE, True),
            )
        else:
            _short_rows(
                *(inputs, lengths, results, a, CAUSAL, MODE, UPCAST, PRECISION, D, DV, BLOCK_D, BLOCK_DV),
                *(BLOCK_M, BLOCK_N, TOLERANCE, TILES_N, BACKWARD_M, FINE, False),
            )
    else:
        _short_rows(
            *(inputs, lengths, results, a, CAUSAL, MODE, UPCAST, PRECISION, D, DV, BLOCK_D, BLOCK_DV),
            *(BLOCK_M, BLOCK_N, TOLERANCE, TILES_N, BACKWARD_M, FINE, MODE == 0),
        )
