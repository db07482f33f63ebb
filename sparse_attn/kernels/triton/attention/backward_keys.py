"""Fused attention, backward: the pass for the keys and values, over the tiles that have weight."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from sparse_attn.kernels.triton.attention.tiles import (
    dot,
    dropout,
    end_of_keys,
    head_a,
    hide,
    keys_of,
    load_rows,
    load_tile,
    of_head,
)
from sparse_attn.kernels.triton.attention.weights import weights
from sparse_attn.kernels.triton.newton import GENTLE


@triton.jit
def _keys_sweep(
    k,
    v,
    q_start,
    grad,
    kept,
    listed,
    begin,
    skip_from,
    skip,
    stop,
    dk,
    dvalue,
    a,
    first,
    limit,
    inputs,
    lengths,
    head,
    n,
    h,
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
    FINE: tl.constexpr,
    EXACT: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add the gradients of a tile of keys and values from listed tiles of queries.

    ``skip`` tiles of the list, from position ``skip_from`` on, are left out.
    """
    queries = lengths.queries
    j = first + tl.arange(0, BLOCK_N)
    for position in range(0, stop - skip - begin):  # from 0: see `_newton_sweep`
        t = begin + position
        tile = tl.load(listed + tl.where(t < skip_from, t, t + skip))
        i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = i < queries
        row = head * queries + i
        q = load_tile(q_start, tile * BLOCK_M, inputs.query.row, inside, D, BLOCK_M, BLOCK_D, EDGE)
        do = load_tile(grad, tile * BLOCK_M, DV, inside, DV, BLOCK_M, BLOCK_DV, EDGE)
        delta = tl.load(kept.delta + row, mask=inside, other=0.0)
        # Q Kᵀ is computed, not K Qᵀ: all kernels must round the products in the same way.
        z = dot(q, k.T, UPCAST, PRECISION)
        if EDGE:
            end = end_of_keys(i, queries, limit, lengths.offset, CAUSAL)
            z = hide(z, i[:, None], j[None, :], end[:, None], inputs, n, h)
        placed = load_rows(kept.statistics, row, inside, lengths.rows, MODE)
        p, u, _ = weights(z, placed, a, inputs.scale, MODE, FINE, EXACT, True)
        dp = dot(do, v.T, UPCAST, PRECISION)
        if inputs.mask.start is not None:
            dp = tl.where(z == float("-inf"), 0.0, dp)  # a hidden value may be NaN
        if inputs.seed is not None:
            factor = dropout(inputs, head, i, first, queries, BLOCK_N)
            p, dp = p * factor, dp * factor
        dvalue += dot(p.to(do.dtype).T, do, UPCAST, PRECISION)
        ds = u * (dp - delta[:, None])
        dk += dot(ds.to(q.dtype).T, q, UPCAST, PRECISION)
    return dk, dvalue


@triton.jit
def _first_listed(listed, count, tile):
    """The position of the first tile that is not before ``tile``, in a list of tiles in ascending order."""
    low, high = count * 0, count
    while low < high:
        middle = (low + high) // 2
        before = tl.load(listed + middle) < tile
        low, high = tl.where(before, middle + 1, low), tl.where(before, high, middle)
    return low


@triton.jit
def _keys_of_member(
    k,
    v,
    kept,
    dk,
    dvalue,
    a,
    tile_n,
    limit,
    inputs,
    lengths,
    n,
    h,
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
    FINE: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Add the gradients of a tile of keys and values from one of the query heads that share them."""
    queries = lengths.queries
    tiles_m, tiles_n = tl.cdiv(queries, BLOCK_M), tl.cdiv(inputs.keys, BLOCK_N)
    first = tile_n * BLOCK_N
    head = n * inputs.heads + h
    q_start = of_head(inputs.query, n, h)
    grad = kept.grad + head * queries * DV
    line = head * tiles_n + tile_n
    listed = kept.lists + line * tiles_m
    count = tl.load(kept.counts + line)
    begin, stop = count * 0, count * 0
    if inputs.mask.start is None and not EXACT:
        # All queries of the tiles at the positions from `begin` to `stop` see all of these keys. The other
        # tiles are the first tiles under a causal mask, and the last tile if it is not full.
        seen = queries * 0
        if CAUSAL:
            seen = tl.cdiv(tl.maximum(first + BLOCK_N - 1 - lengths.offset, 0), BLOCK_M)
        stop = _first_listed(listed, count, queries // BLOCK_M)
        begin = tl.minimum(_first_listed(listed, count, seen), stop)
        if first + BLOCK_N > limit:
            begin = stop
        dk, dvalue = _keys_sweep(
            *(k, v, q_start, grad, kept, listed, begin, stop, 0, stop, dk, dvalue, a, first, limit),
            *(inputs, lengths, head, n, h, CAUSAL, MODE, UPCAST, PRECISION, D, DV, BLOCK_D, BLOCK_DV),
            *(BLOCK_M, BLOCK_N, FINE, EXACT, False),
        )
    return _keys_sweep(
        *(k, v, q_start, grad, kept, listed, 0, begin, stop - begin, count, dk, dvalue, a, first, limit),
        *(inputs, lengths, head, n, h, CAUSAL, MODE, UPCAST, PRECISION, D, DV, BLOCK_D, BLOCK_DV),
        *(BLOCK_M, BLOCK_N, FINE, EXACT, True),
    )


@triton.jit(do_not_specialize=("lengths",))
def backward_keys(
    inputs,
    lengths,
    kept,
    grad_key,
    grad_value,
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
):
    """A program computes the gradients of a tile of keys and values, over all query heads that share it."""
    keys = inputs.keys
    FINE: tl.constexpr = inputs.query.start.dtype.element_ty == tl.float32
    tiles_n = tl.cdiv(keys, BLOCK_N)
    tile_n = tl.program_id(0) % tiles_n  # under a causal mask the first tiles have most work
    pair = tl.program_id(0) // tiles_n  # batch entry and head of the keys
    key_heads = inputs.heads // inputs.group
    n, key_head = (pair // key_heads).to(tl.int64), (pair % key_heads).to(tl.int64)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    first = tile_n * BLOCK_N
    j = first + tl.arange(0, BLOCK_N)
    limit = keys_of(inputs, lengths, n, CAUSAL)
    k = load_tile(of_head(inputs.key, n, key_head), first, inputs.key.row, j < limit, D, BLOCK_N, BLOCK_D)
    v = load_tile(of_head(inputs.value, n, key_head), first, inputs.value.row, j < limit, DV, BLOCK_N, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dvalue = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(0, inputs.group):
        h = key_head * inputs.group + member
        a = head_a(inputs, h)
        if MODE == 0 and not FINE:  # see newton.GENTLE
            if tl.max(a, 0) < GENTLE:
                dk, dvalue = _keys_of_member(
                    *(k, v, kept, dk, dvalue, a, tile_n, limit, inputs, lengths, n, h, CAUSAL, MODE, UPCAST),
                    *(PRECISION, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, FINE, True),
                )
            else:
                dk, dvalue = _keys_of_member(
                    *(k, v, kept, dk, dvalue, a, tile_n, limit, inputs, lengths, n, h, CAUSAL, MODE, UPCAST),
                    *(PRECISION, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, FINE, False),
                )
        else:
            dk, dvalue = _keys_of_member(
                *(k, v, kept, dk, dvalue, a, tile_n, limit, inputs, lengths, n, h, CAUSAL, MODE, UPCAST, PRECISION),
                *(D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, FINE, MODE == 0),
            )
    row = (pair.to(tl.int64) * keys + j)[:, None]
    within = (j < keys)[:, None]
    tl.store(
        grad_key + row * D + d[None, :],
        (dk * inputs.scale).to(grad_key.dtype.element_ty),
        mask=within & (d < D)[None, :],
    )
    tl.store(
        grad_value + row * DV + dv[None, :], dvalue.to(grad_value.dtype.element_ty), mask=within & (dv < DV)[None, :]
    )
