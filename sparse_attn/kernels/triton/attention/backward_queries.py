"""Fused attention, backward: the pass for the queries, α and a float mask, over the tiles that have weight."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.kernels.triton.attention.arguments import Mask
from sparse_attn.kernels.triton.attention.tiles import (
    dot,
    dropout,
    end_of_keys,
    head_a,
    head_of_program,
    keys_of,
    keys_seen,
    load_rows,
    load_tile,
    of_head,
    of_mask,
    products,
    queries_of_program,
    whole_tiles,
)
from sparse_attn.kernels.triton.attention.weights import (
    alpha_gradient_of_sums,
    log_weights,
    per_row,
    relative_scores,
    weights,
)
from sparse_attn.kernels.triton.family import alpha_gradient, deviation_from_scores, reference_of
from sparse_attn.kernels.triton.newton import GENTLE
from sparse_attn.kernels.triton.pairs import (
    add,
    inverse,
    multiply,
    natural_log,
    quotient,
    scaled,
    single,
    subtract,
    zero,
)


class Gradients(NamedTuple):
    """Tensors that the pass over the queries writes; ``alpha`` and the fields of ``mask`` are None if not wanted."""

    query: Tensor
    alpha: Tensor | None
    mask: Mask


@triton.jit
def _queries_sweep(
    q,
    do,
    k_start,
    v_start,
    listed,
    begin,
    stop,
    row,
    delta,
    reference,
    acc,
    sums,
    column,
    a,
    i,
    end,
    limit,
    inputs,
    lengths,
    gradients,
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
    ONE_ROW: tl.constexpr,
    ONE_COLUMN: tl.constexpr,
    FINE: tl.constexpr,
    EXACT: tl.constexpr,
    EDGE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Add the gradients of the queries from listed tiles, and the sums for the gradient of α.

    Each tile is computed in ``PARTS`` parts: more parts need fewer registers.
    """
    SIZE: tl.constexpr = BLOCK_N // PARTS
    for t in range(0, (stop - begin) * PARTS):  # from 0: see `_newton_sweep`
        first = tl.load(listed + begin + t // PARTS) * BLOCK_N + t % PARTS * SIZE
        j = first + tl.arange(0, SIZE)
        inside = j < limit
        if EDGE:
            inside = keys_seen(inputs, n, h, j, limit)
        k, z = products(q, k_start, first, i, end, inside, inputs, n, h, UPCAST, PRECISION, D, BLOCK_D, SIZE, EDGE)
        p, u, log = weights(z, row, a, inputs.scale, MODE, FINE, EXACT, True)
        v = load_tile(v_start, first, inputs.value.row, inside, DV, SIZE, BLOCK_DV, EDGE)
        dp = dot(do, v.T, UPCAST, PRECISION)
        if inputs.seed is not None:
            dp *= dropout(inputs, head, i, first, lengths.queries, SIZE)
        dp -= delta[:, None]
        ds = u * dp
        acc += dot(ds.to(k.dtype), k, UPCAST, PRECISION)
        if gradients.alpha is not None:
            if EXACT:
                each = per_row(a, i.shape[0])
                by_a = inverse(each)
                log_p = log * single(natural_log(by_a))[:, None]
                with_log = p * log_p
                x = relative_scores(z, row, inputs.scale)
                y = deviation_from_scores(x, p, u, log_p, row, by_a[0], reference)
                sums = (
                    add(sums[0], tl.sum(u, 1)),
                    add(sums[1], tl.sum(with_log, 1)),
                    add(sums[2], tl.sum(y, 1)),
                    add(sums[3], tl.sum(p * dp, 1)),
                    add(sums[4], tl.sum(with_log * dp, 1)),
                    add(sums[5], tl.sum(y * dp, 1)),
                    add(sums[6], tl.sum(p, 1)),
                )
            else:
                by_p = p * dp
                log_p = log_weights(log, row, a)
                sums = (
                    sums[0] + tl.sum(u, 1),
                    sums[1] + tl.sum(ds, 1),
                    sums[2] + tl.sum(by_p, 1),
                    sums[3] + tl.sum(p * log_p, 1),
                    sums[4] + tl.sum(by_p * log_p, 1),
                    sums[5],
                    sums[6],
                )
        if gradients.mask.start is not None:
            place = of_mask(gradients.mask, n, h)
            if ONE_COLUMN:
                column += tl.sum(ds, 1)
            elif ONE_ROW:
                tl.atomic_add(place + j * gradients.mask.key, tl.sum(ds, 0), mask=j < inputs.keys)
            else:
                place += i.to(tl.int64)[:, None] * gradients.mask.query + j[None, :] * gradients.mask.key
                within = (i < lengths.queries)[:, None] & (j < inputs.keys)[None, :]
                tl.atomic_add(place, ds, mask=within)
    return acc, sums, column


@triton.jit
def _backward_rows(
    inputs,
    lengths,
    kept,
    second,
    gradients,
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
    ONE_ROW: tl.constexpr,
    ONE_COLUMN: tl.constexpr,
    FINE: tl.constexpr,
    EXACT: tl.constexpr,
):
    queries, keys = lengths.queries, inputs.keys
    tiles_m, tile_m, head, n, h, i = queries_of_program(inputs, lengths, BLOCK_M)
    inside = i < queries
    d = tl.arange(0, BLOCK_D)
    k_start = of_head(inputs.key, n, h // inputs.group)
    v_start = of_head(inputs.value, n, h // inputs.group)
    line = head.to(tl.int64) * tiles_m + tile_m
    listed = kept.lists + line * tl.cdiv(keys, BLOCK_N)
    limit = keys_of(inputs, lengths, n, CAUSAL)
    end = end_of_keys(i, queries, limit, lengths.offset, CAUSAL)
    row = head.to(tl.int64) * queries + i
    q = load_tile(of_head(inputs.query, n, h), tile_m * BLOCK_M, inputs.query.row, inside, D, BLOCK_M, BLOCK_D)
    start = head.to(tl.int64) * queries * DV
    do = load_tile(kept.grad + start, tile_m * BLOCK_M, DV, inside, DV, BLOCK_M, BLOCK_DV)
    weighted = load_tile(second + start, tile_m * BLOCK_M, DV, inside, DV, BLOCK_M, BLOCK_DV)
    delta = tl.sum(do.to(tl.float32) * weighted.to(tl.float32), 1)
    tl.store(kept.delta + row, delta, mask=inside)
    placed = load_rows(kept.statistics, row, inside, lengths.rows, MODE)
    each = per_row(a, BLOCK_M)
    log_factor = tl.zeros([BLOCK_M], tl.float32)
    reference = (delta, delta, delta)
    if EXACT:
        log_factor = placed[7]
        reference = reference_of(log_factor, each)
        # exp(a ℓ₀) is computed as the ratio of two factors that p and u contain. Another computation would have another
        # rounding error. All entries of the row would share this error, so it would not average out.
        reference = (reference[0], quotient(placed[2], (placed[4], 0.0)), reference[2])
    none = log_factor
    if EXACT:
        none = zero(each, True)
    # With EXACT, these are the sums of: u; p ℓ; p y; p dp; p ℓ dp; p y dp; p. Here ℓ stands for ℓ - ℓ₀, y for y - y₀,
    # and dp for dP - δ. Without EXACT, these are the sums of: u; u dp; p dp; p ℓ; p ℓ dp, where ℓ is log p.
    sums = (none, none, none, none, none, none, none)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    column = tl.zeros([BLOCK_M], tl.float32)
    count = tl.load(kept.counts + line)
    split = count * 0
    if inputs.mask.start is None and not EXACT:
        # The list is in order, so the tiles that some query does not see completely are at the end of the list.
        whole = whole_tiles(inputs, lengths, limit, tile_m * BLOCK_M, BLOCK_N, CAUSAL, EXACT)
        split = count
        while (split > 0) & (tl.load(listed + tl.maximum(split - 1, 0)) >= whole):
            split -= 1
        acc, sums, column = _queries_sweep(
            *(q, do, k_start, v_start, listed, 0, split, placed, delta, reference, acc, sums, column),
            *(a, i, end, limit, inputs, lengths, gradients, head, n, h),
            *(MODE, UPCAST, PRECISION, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, ONE_ROW, ONE_COLUMN, FINE, EXACT, False, 1),
        )
    PARTS: tl.constexpr = 2 if EXACT and BLOCK_N >= 64 else 1
    acc, sums, column = _queries_sweep(
        *(q, do, k_start, v_start, listed, split, count, placed, delta, reference, acc, sums, column),
        *(a, i, end, limit, inputs, lengths, gradients, head, n, h),
        *(MODE, UPCAST, PRECISION, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, ONE_ROW, ONE_COLUMN, FINE, EXACT, True, PARTS),
    )
    _, _, head, n, h, i = queries_of_program(inputs, lengths, BLOCK_M, True)
    inside = i < queries
    row = head.to(tl.int64) * queries + i
    d = tl.arange(0, BLOCK_D)
    place = row[:, None] * D + d[None, :]
    tl.store(
        gradients.query + place,
        (acc * inputs.scale).to(gradients.query.dtype.element_ty),
        mask=inside[:, None] & (d < D)[None, :],
    )
    if gradients.alpha is not None:
        if EXACT:
            slope = single(sums[0])
            by_slope = 1.0 / tl.where(slope == 0.0, 1.0, slope)
            # Σ p differs from 1 by rounding errors that all entries of the row share and that would not average out. So
            # the sums are divided by Σ p: 1 / Σ p is about 2 - Σ p.
            by_p = tl.where(slope == 0.0, 1.0, 2.0 - single(sums[6]))
            mean = scaled(sums[3], by_p)
            with_log = scaled(subtract(sums[4], multiply(sums[1], mean)), by_p)
            with_y = scaled(subtract(sums[5], multiply(sums[2], mean)), by_p)
            means = (scaled(sums[1], by_p), scaled(sums[2], by_p))
            da = alpha_gradient(with_log, with_y, *means, by_slope, each, log_factor, reference)
        else:
            slope = tl.where(sums[0] == 0.0, 1.0, sums[0])
            da = alpha_gradient_of_sums(slope, sums[1], sums[2], sums[3], sums[4], each)
        seen = placed[0] == placed[0]
        tl.store(gradients.alpha + row, tl.where(seen, da, float("nan")), mask=inside)
    if gradients.mask.start is not None and ONE_COLUMN:
        place = of_mask(gradients.mask, n, h) + i.to(tl.int64) * gradients.mask.query
        tl.atomic_add(place, column, mask=inside)


@triton.jit(do_not_specialize=("lengths",))
def backward_queries(
    inputs,
    lengths,
    kept,
    second,
    gradients,
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
    ONE_ROW: tl.constexpr,
    ONE_COLUMN: tl.constexpr,
):
    """A program computes the gradients of a tile of queries. ``second`` is a result of the forward: see ``Results``."""
    FINE: tl.constexpr = inputs.query.start.dtype.element_ty == tl.float32
    a = head_a(inputs, head_of_program(inputs, lengths, BLOCK_M))
    if MODE == 0 and not FINE:  # see newton.GENTLE
        if tl.max(a, 0) < GENTLE:
            _backward_rows(
                *(inputs, lengths, kept, second, gradients, a, CAUSAL, MODE, UPCAST, PRECISION, D, DV),
                *(BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, ONE_ROW, ONE_COLUMN, FINE, True),
            )
        else:
            _backward_rows(
                *(inputs, lengths, kept, second, gradients, a, CAUSAL, MODE, UPCAST, PRECISION, D, DV),
                *(BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, ONE_ROW, ONE_COLUMN, FINE, False),
            )
    else:
        _backward_rows(
            *(inputs, lengths, kept, second, gradients, a, CAUSAL, MODE, UPCAST, PRECISION, D, DV, BLOCK_D, BLOCK_DV),
            *(BLOCK_M, BLOCK_N, ONE_ROW, ONE_COLUMN, FINE, MODE == 0),
        )
