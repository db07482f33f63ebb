"""Fused attention, backward: one pass for the queries and α, one for the keys and values, over tiles that have weight.

``dS = u ∘ (dP - δ)`` with ``dP = Z ∘ (dO Vᵀ)``, ``δ = dO · (Σ u Z v / Σ u)`` and the dropout multiplier ``Z``.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.kernels.setting import Setting
from sparse_attn.kernels.triton.attention.arguments import Mask, arguments_of
from sparse_attn.kernels.triton.attention.plan import Plan
from sparse_attn.kernels.triton.attention.tiles import (
    dot,
    dropout,
    end_of_keys,
    head_a,
    head_of_program,
    hide,
    keys_of,
    keys_seen,
    load_tile,
    of_head,
    of_mask,
    products,
    queries_of_program,
    whole_tiles,
)
from sparse_attn.kernels.triton.attention.weights import GENTLE, alpha_gradient_of_sums, log_weights, per_row, weights
from sparse_attn.kernels.triton.family import alpha_gradient, deviation_from_scores, reference_of
from sparse_attn.kernels.triton.launch import launch


@triton.jit(do_not_specialize=("lines", "size", "stride_head", "stride_line"))
def _list_tiles(Flags, Lists, Counts, lines, size, stride_head, stride_line, stride_tile, BLOCK: tl.constexpr):
    """The indices of the flags that are set in one line: the key tiles of a query tile, or the reverse."""
    line = tl.program_id(0).to(tl.int64)
    Flags += (line // lines) * stride_head + (line % lines) * stride_line
    Lists += line * size
    count = 0
    for first in range(0, size, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        flag = tl.load(Flags + tile.to(tl.int64) * stride_tile, mask=tile < size, other=0).to(tl.int32)
        tl.store(Lists + count + tl.cumsum(flag, 0) - 1, tile, mask=flag > 0)
        count += tl.sum(flag, 0)
    tl.store(Counts + line, count)


@triton.jit
def _load_rows(Stats, row, inside, rows, MODE: tl.constexpr):
    """The results of ``weights.place`` for these rows, stored by the forward; rows outside get weights of 0."""
    rows = tl.cast(rows, tl.int64)
    first = tl.load(Stats + row, mask=inside, other=0.0)
    second = tl.load(Stats + rows + row, mask=inside, other=0.0)
    third = tl.load(Stats + 2 * rows + row, mask=inside, other=1.0)  # a factor of -inf must not be 0
    if MODE != 0:
        return first, second, third
    else:
        fourth = tl.load(Stats + 3 * rows + row, mask=inside, other=0.0)
        fifth = tl.load(Stats + 4 * rows + row, mask=inside, other=0.0)
        sixth = tl.load(Stats + 5 * rows + row, mask=inside, other=0.0)
        seventh = tl.load(Stats + 6 * rows + row, mask=inside, other=0.0)
        eighth = tl.load(Stats + 7 * rows + row, mask=inside, other=0.0)
        return first, second, third, fourth, fifth, sixth, seventh, eighth


class Kept(NamedTuple):
    """Tensors that the forward kept for the backward, and lists of the tiles with weight."""

    grad: Tensor  # gradient of the output
    delta: Tensor  # δ of each row: dO · (Σ u v / Σ u)
    statistics: Tensor
    lists: Tensor
    counts: Tensor


class Gradients(NamedTuple):
    """Tensors that the pass over the queries writes; None if no gradient is wanted."""

    query: Tensor
    alpha: Tensor | None
    mask: Mask | None


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

    With ``PARTS`` each tile is computed in so many parts, to need fewer registers.
    """
    SIZE: tl.constexpr = BLOCK_N // PARTS
    for t in range(begin * PARTS, stop * PARTS):
        first = tl.load(listed + t // PARTS) * BLOCK_N + t % PARTS * SIZE
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
                each = per_row(a, i.shape[0], True)
                with_log = p * log
                y = deviation_from_scores(z * inputs.scale, p, u, log, row, each, reference, 1)
                sums = (
                    sums[0] + tl.sum(u, 1).to(tl.float64),
                    sums[1] + tl.sum(with_log, 1).to(tl.float64),
                    sums[2] + tl.sum(y, 1).to(tl.float64),
                    sums[3] + tl.sum(p * dp, 1).to(tl.float64),
                    sums[4] + tl.sum(with_log * dp, 1).to(tl.float64),
                    sums[5] + tl.sum(y * dp, 1).to(tl.float64),
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
                )
        if gradients.mask is not None:
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
    placed = _load_rows(kept.statistics, row, inside, lengths.rows, MODE)
    each = per_row(a, BLOCK_M, True)
    log_factor = tl.zeros([BLOCK_M], tl.float64)
    reference = (delta, delta, log_factor)
    if EXACT:
        log_factor = placed[7].to(tl.float64)
        reference = reference_of(log_factor, each)
    zero = tl.zeros([BLOCK_M], tl.float64 if EXACT else tl.float32)
    # With EXACT: u, ℓ and y relative to ℓ₀; 1, ℓ and y times the upstream gradient. Else: u; u, p times the upstream
    # gradient; p ℓ; p ℓ times the upstream gradient.
    sums = (zero, zero, zero, zero, zero, zero)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    column = tl.zeros([BLOCK_M], tl.float32)
    count = tl.load(kept.counts + line)
    split = count * 0
    if (
        inputs.mask is None and not EXACT
    ):  # the list is in order: the tiles that a query does not see as a whole are its last
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
    place = row[:, None] * D + d[None, :]
    tl.store(
        gradients.query + place,
        (acc * inputs.scale).to(gradients.query.dtype.element_ty),
        mask=inside[:, None] & (d < D)[None, :],
    )
    if gradients.alpha is not None:
        slope = tl.where(sums[0] == 0.0, 1.0, sums[0])
        if EXACT:
            with_log, with_y = sums[4] - sums[1] * sums[3], sums[5] - sums[2] * sums[3]
            da = alpha_gradient(with_log, with_y, sums[1], sums[2], slope, each, log_factor, reference)
        else:
            da = alpha_gradient_of_sums(slope, sums[1], sums[2], sums[3], sums[4], each)
        seen = placed[0] == placed[0]
        tl.store(gradients.alpha + row, tl.where(seen, da, float("nan")).to(tl.float32), mask=inside)
    if gradients.mask is not None and ONE_COLUMN:
        place = of_mask(gradients.mask, n, h) + i.to(tl.int64) * gradients.mask.query
        tl.atomic_add(place, column, mask=inside)


@triton.jit(do_not_specialize=("lengths",))
def _backward_queries(
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
    FINE: tl.constexpr = inputs.query.start.dtype.element_ty == tl.float32
    a = head_a(inputs, head_of_program(inputs, lengths, BLOCK_M))
    if MODE == 0 and not FINE:  # α is data: one branch for all programs of a head
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
    """Add the gradients of a tile of keys and values from listed tiles of queries, except ``skip`` in the middle."""
    queries = lengths.queries
    j = first + tl.arange(0, BLOCK_N)
    for t in range(begin, stop - skip):
        tile = tl.load(listed + tl.where(t < skip_from, t, t + skip))
        i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = i < queries
        row = head * queries + i
        q = load_tile(q_start, tile * BLOCK_M, inputs.query.row, inside, D, BLOCK_M, BLOCK_D, EDGE)
        do = load_tile(grad, tile * BLOCK_M, DV, inside, DV, BLOCK_M, BLOCK_DV, EDGE)
        delta = tl.load(kept.delta + row, mask=inside, other=0.0)
        # Products of queries and keys, and not of keys and queries: all kernels round them alike.
        z = dot(q, k.T, UPCAST, PRECISION)
        if EDGE:
            end = end_of_keys(i, queries, limit, lengths.offset, CAUSAL)
            z = hide(z, i[:, None], j[None, :], end[:, None], inputs, n, h)
        placed = _load_rows(kept.statistics, row, inside, lengths.rows, MODE)
        p, u, _ = weights(z, placed, a, inputs.scale, MODE, FINE, EXACT, True)
        dp = dot(do, v.T, UPCAST, PRECISION)
        if inputs.mask is not None:
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
    """The position in a list of tiles, in order, of the first that is not before ``tile``."""
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
    """Add the gradients of a tile of keys and values from one of the heads that share them."""
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
    if inputs.mask is None and not EXACT:
        # The tiles from `begin` to `stop` see all of these keys. The others are the first under a causal mask, and the
        # last if it has fewer queries than the others.
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
def _backward_keys(
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
        if MODE == 0 and not FINE:  # α is data: one branch for all programs of a head
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


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    second: Tensor,
    statistics: Tensor,
    flags: Tensor,
    setting: Setting,
    with_alpha: bool,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for query, key, value, α and a float mask; the last two are empty if they are not wanted."""
    plan = Plan.of(query, value)
    device, (batch, heads, queries), key_heads = query.device, query.shape[:3], key.shape[1]
    rows, (tiles_m, tiles_n) = batch * heads, flags.shape[1:]
    grad = grad.contiguous()
    inputs, lengths, constants = arguments_of(query, key, value, alpha, mask, key_lengths, seed, setting)
    compiled = (*constants, plan.block_d, plan.block_dv, plan.block_m, plan.block_n)
    delta = torch.empty(rows * queries, dtype=torch.float32, device=device)
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=device)
    grad_key = torch.empty(key.shape, dtype=key.dtype, device=device)
    grad_value = torch.empty(value.shape, dtype=value.dtype, device=device)
    grad_alpha = torch.empty((batch, heads, queries) if with_alpha else (0,), dtype=torch.float32, device=device)
    grad_mask = torch.zeros(mask.shape if with_mask and mask is not None else (0,), device=device)
    gradients = Gradients(
        grad_query,
        grad_alpha if with_alpha else None,
        Mask.of(grad_mask, shared=False) if with_mask and mask is not None else None,
    )
    one_row, one_column = (gradients.mask is not None and grad_mask.shape[dim] == 1 for dim in (2, 3))
    kept = Kept(grad, delta, statistics, *_lists(flags))
    compiled_queries = (*compiled, one_row, one_column)
    launch(
        _backward_queries,
        rows * tiles_m,
        inputs,
        lengths,
        kept,
        second,
        gradients,
        *compiled_queries,
        warps=plan.warps,
        stages=plan.stages,
    )
    kept = Kept(grad, delta, statistics, *_lists(flags.transpose(1, 2)))
    programs = batch * key_heads * tiles_n
    launch(
        _backward_keys,
        programs,
        inputs,
        lengths,
        kept,
        grad_key,
        grad_value,
        *compiled,
        warps=plan.warps,
        stages=plan.stages,
    )
    return grad_query, grad_key, grad_value, grad_alpha.sum((0, 2)) if with_alpha else grad_alpha, grad_mask


def _lists(flags: Tensor) -> tuple[Tensor, Tensor]:
    """The indices of the tiles that are set in the last dimension, packed at the front, and their number."""
    heads, lines, size = flags.shape
    lists = torch.empty((heads, lines, size), dtype=torch.int32, device=flags.device)
    counts = torch.empty((heads, lines), dtype=torch.int32, device=flags.device)
    block = min(triton.next_power_of_2(size), 1024)
    launch(_list_tiles, heads * lines, flags, lists, counts, lines, size, *flags.stride(), block)
    return lists, counts
