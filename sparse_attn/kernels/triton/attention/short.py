"""Fused attention of up to 1,024 keys, forward: all scores of a tile of queries stay on the chip, in one pass."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.triton.attention.tiles import (
    LENGTHS,
    dot,
    dropout,
    end_of_keys,
    head_a,
    load_tile,
    masked_scores,
    store_rows,
)
from sparse_attn.kernels.triton.family import (
    bound_from_lanes,
    place_rows,
    solve_on_chip,
    weigh,
)


@triton.jit(do_not_specialize=LENGTHS)
def forward_short(
    Q,
    K,
    V,
    Alpha,
    Mask,
    Lengths,
    Seed,
    Out,
    Second,
    Stats,
    Flags,
    number,
    scale,
    dropout_p,
    kept_scale,
    lowest,
    offset,
    heads,
    group,
    queries,
    keys,
    rows,
    stride_qn,
    stride_qh,
    stride_ql,
    stride_kn,
    stride_kh,
    stride_ks,
    stride_vn,
    stride_vh,
    stride_vs,
    stride_alpha,
    stride_mn,
    stride_mh,
    stride_ml,
    stride_ms,
    CAUSAL: tl.constexpr,
    MODE: tl.constexpr,
    TOLERANCE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES_N: tl.constexpr,
    BACKWARD_M: tl.constexpr,
):
    """As the kernel for many keys; the tiles that the backward goes by are ``BACKWARD_M`` by ``BLOCK_N``."""
    ALL: tl.constexpr = BLOCK_N * TILES_N
    tiles_m = tl.cdiv(queries, BLOCK_M)
    tile_m = tl.program_id(0) % tiles_m
    head = tl.program_id(0) // tiles_m
    n, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    i = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    dv = tl.arange(0, BLOCK_DV)
    j = tl.arange(0, ALL)
    K += n * stride_kn + (h // group) * stride_kh
    V += n * stride_vn + (h // group) * stride_vh
    if Mask is not None:
        Mask += n * stride_mn + h * stride_mh
    Q += n * stride_qn + h * stride_qh
    q = load_tile(Q, tile_m * BLOCK_M, stride_ql, queries, D, BLOCK_M, BLOCK_D)
    k = load_tile(K, 0, stride_ks, keys, D, ALL, BLOCK_D)
    limit = keys
    if Lengths is not None:
        limit = tl.minimum(limit, tl.load(Lengths + n).to(tl.int32))
    end = end_of_keys(i, queries, limit, offset, CAUSAL)
    s = masked_scores(
        dot(q, k.T, UPCAST, PRECISION),
        i[:, None],
        j[None, :],
        end[:, None],
        scale,
        Mask,
        stride_ml,
        stride_ms,
        lowest,
        keys,
    )
    broken = tl.max((s != s).to(tl.int32), 1) > 0
    top = tl.where(broken, float("nan"), tl.max(s, 1))
    a = head_a(Alpha, h, stride_alpha, number) + tl.zeros([BLOCK_M], tl.float64)
    start = 0.0 * a
    if TILES_N >= 4:
        start = bound_from_lanes(tl.max(tl.reshape(s, [BLOCK_M, TILES_N, BLOCK_N]), 1), top, keys, a, MODE)
    sigma, _ = solve_on_chip(s, top, start, keys, a, TOLERANCE, MODE)
    placed = place_rows(top, sigma, 1.0, a, MODE)
    p, u, _ = weigh(s, placed, a, 1, MODE)
    total, slope = tl.sum(p, 1).to(tl.float64), tl.sum(u, 1).to(tl.float64)
    if Flags is not None:
        # A tile of queries of the backward may be several of ours.
        active = tl.max(tl.max(tl.reshape((p != 0.0).to(tl.int32), [BLOCK_M, TILES_N, BLOCK_N]), 2), 0)
        tile = tl.arange(0, TILES_N)
        tiles_n = tl.cdiv(keys, BLOCK_N)
        Flags += (head.to(tl.int64) * tl.cdiv(queries, BACKWARD_M) + tile_m * BLOCK_M // BACKWARD_M) * tiles_n
        tl.store(Flags + tile, tl.full([TILES_N], 1, tl.uint8), mask=(tile < tiles_n) & (active > 0))
    if Seed is not None:
        kept = dropout(Seed, head, i[:, None], j[None, :], queries, keys, dropout_p, kept_scale)
        p, u = p * kept, u * kept
    v = load_tile(V, 0, stride_vs, keys, DV, ALL, BLOCK_DV)
    acc = dot(p.to(v.dtype), v, UPCAST, PRECISION)
    acc2 = acc
    if Second is not None:
        acc2 = dot(u.to(v.dtype), v, UPCAST, PRECISION)
    store_rows(
        Out,
        Second,
        Stats,
        acc,
        acc2,
        total,
        slope,
        top,
        sigma,
        a,
        head,
        i,
        dv,
        queries,
        rows,
        DV,
        MODE,
    )
