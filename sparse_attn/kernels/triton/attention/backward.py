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
    keys_of,
    keys_seen,
    load_tile,
    masked_scores,
    of_head,
    of_mask,
    queries_of_program,
)
from sparse_attn.kernels.triton.family import alpha_gradient, deviation_from_scores, reference_of, weigh
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
    """The results of ``place_rows`` for these rows, stored by the forward."""
    rows = tl.cast(rows, tl.int64)
    edge = tl.load(Stats + row, mask=inside, other=0.0)
    edge_rest = tl.load(Stats + rows + row, mask=inside, other=0.0)
    factor = tl.load(Stats + 2 * rows + row, mask=inside, other=0.0)
    slope_factor = tl.load(Stats + 3 * rows + row, mask=inside, other=0.0)
    if MODE != 0:
        return edge, edge_rest, factor, slope_factor
    else:
        place = tl.load(Stats + 4 * rows + row, mask=inside, other=0.0)
        place_rest = tl.load(Stats + 5 * rows + row, mask=inside, other=0.0)
        rise = tl.load(Stats + 6 * rows + row, mask=inside, other=0.0)
        log_factor = tl.load(Stats + 7 * rows + row, mask=inside, other=0.0)
        return edge, edge_rest, factor, slope_factor, place, place_rest, rise, log_factor


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
    queries, keys = lengths.queries, inputs.keys
    tiles_m, tile_m, head, n, h, i = queries_of_program(inputs, lengths, BLOCK_M)
    tiles_n = tl.cdiv(keys, BLOCK_N)
    inside = i < queries
    d, j = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    k_start = of_head(inputs.key, n, h // inputs.group)
    v_start = of_head(inputs.value, n, h // inputs.group)
    line = head.to(tl.int64) * tiles_m + tile_m
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
    a = head_a(inputs, h) + tl.zeros([BLOCK_M], tl.float64)
    if gradients.alpha is not None:
        log_factor = placed[7].to(tl.float64)
        reference = reference_of(log_factor, a)
    # Sums for the gradient of α: u, and ℓ and y relative to ℓ₀; then 1, ℓ and y times the upstream gradient.
    slope = tl.zeros([BLOCK_M], tl.float64)
    mean_log = tl.zeros([BLOCK_M], tl.float64)
    mean_y = tl.zeros([BLOCK_M], tl.float64)
    with_one = tl.zeros([BLOCK_M], tl.float64)
    with_log = tl.zeros([BLOCK_M], tl.float64)
    with_y = tl.zeros([BLOCK_M], tl.float64)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    for t in range(0, tl.load(kept.counts + line)):
        tile = tl.load(kept.lists + line * tiles_n + t)
        first = tile * BLOCK_N
        seen = keys_seen(inputs, n, h, first + j, limit)
        k = load_tile(k_start, first, inputs.key.row, seen, D, BLOCK_N, BLOCK_D)
        s = masked_scores(dot(q, k.T, UPCAST, PRECISION), i[:, None], (first + j)[None, :], end[:, None], inputs, n, h)
        p, u, deviation = weigh(s, placed, a, 1, MODE)
        v = load_tile(v_start, first, inputs.value.row, seen, DV, BLOCK_N, BLOCK_DV)
        dp = dot(do, v.T, UPCAST, PRECISION)
        if inputs.seed is not None:
            dp *= dropout(inputs, head, i[:, None], (first + j)[None, :], queries)
        dp -= delta[:, None]
        ds = u * dp
        acc += dot(ds.to(k.dtype), k, UPCAST, PRECISION)
        if gradients.alpha is not None:
            log, y = p * deviation, deviation_from_scores(s, p, u, deviation, placed, a, reference, 1)
            slope += tl.sum(u, 1).to(tl.float64)
            mean_log += tl.sum(log, 1).to(tl.float64)
            mean_y += tl.sum(y, 1).to(tl.float64)
            with_one += tl.sum(p * dp, 1).to(tl.float64)
            with_log += tl.sum(log * dp, 1).to(tl.float64)
            with_y += tl.sum(y * dp, 1).to(tl.float64)
        if gradients.mask is not None:
            place = of_mask(gradients.mask, n, h)
            if ONE_COLUMN:
                sums += tl.sum(ds, 1)
            elif ONE_ROW:
                tl.atomic_add(place + (first + j) * gradients.mask.key, tl.sum(ds, 0), mask=first + j < keys)
            else:
                place += i.to(tl.int64)[:, None] * gradients.mask.query + (first + j)[None, :] * gradients.mask.key
                tl.atomic_add(place, ds, mask=inside[:, None] & (first + j < keys)[None, :])
    place = row[:, None] * D + d[None, :]
    tl.store(
        gradients.query + place,
        (acc * inputs.scale).to(gradients.query.dtype.element_ty),
        mask=inside[:, None] & (d < D)[None, :],
    )
    if gradients.alpha is not None:
        slope = tl.where(slope == 0.0, 1.0, slope)
        with_log, with_y = with_log - mean_log * with_one, with_y - mean_y * with_one
        da = alpha_gradient(with_log, with_y, mean_log, mean_y, slope, a, log_factor, reference)
        seen = placed[2] == placed[2]
        tl.store(gradients.alpha + row, tl.where(seen, da, float("nan")).to(tl.float32), mask=inside)
    if gradients.mask is not None and ONE_COLUMN:
        place = of_mask(gradients.mask, n, h) + i.to(tl.int64) * gradients.mask.query
        tl.atomic_add(place, sums, mask=inside)


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
    queries, keys = lengths.queries, inputs.keys
    tiles_m, tiles_n = tl.cdiv(queries, BLOCK_M), tl.cdiv(keys, BLOCK_N)
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
        head = n * inputs.heads + h
        q_start = of_head(inputs.query, n, h)
        a = head_a(inputs, h) + tl.zeros([BLOCK_M], tl.float64)
        line = head * tiles_n + tile_n
        for t in range(0, tl.load(kept.counts + line)):
            tile = tl.load(kept.lists + line * tiles_m + t)
            i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            inside = i < queries
            end = end_of_keys(i, queries, limit, lengths.offset, CAUSAL)
            row = head * queries + i
            q = load_tile(q_start, tile * BLOCK_M, inputs.query.row, inside, D, BLOCK_M, BLOCK_D)
            do = load_tile(kept.grad + head * queries * DV, tile * BLOCK_M, DV, inside, DV, BLOCK_M, BLOCK_DV)
            delta = tl.load(kept.delta + row, mask=inside, other=0.0)
            s = masked_scores(dot(k, q.T, UPCAST, PRECISION), i[None, :], j[:, None], end[None, :], inputs, n, h)
            p, u, _ = weigh(s, _load_rows(kept.statistics, row, inside, lengths.rows, MODE), a, 0, MODE)
            dp = dot(v, do.T, UPCAST, PRECISION)
            if inputs.mask is not None:
                dp = tl.where(s == float("-inf"), 0.0, dp)  # a hidden value may be NaN
            if inputs.seed is not None:
                factor = dropout(inputs, head, i[None, :], j[:, None], queries)
                p, dp = p * factor, dp * factor
            dvalue += dot(p.to(do.dtype), do, UPCAST, PRECISION)
            ds = u * (dp - delta[None, :])
            dk += dot(ds.to(q.dtype), q, UPCAST, PRECISION)
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
        _backward_queries, rows * tiles_m, inputs, lengths, kept, second, gradients, *compiled_queries, warps=plan.warps, stages=plan.stages
    )
    kept = Kept(grad, delta, statistics, *_lists(flags.transpose(1, 2)))
    programs = batch * key_heads * tiles_n
    launch(_backward_keys, programs, inputs, lengths, kept, grad_key, grad_value, *compiled, warps=plan.warps, stages=plan.stages)
    return grad_query, grad_key, grad_value, grad_alpha.sum((0, 2)) if with_alpha else grad_alpha, grad_mask


def _lists(flags: Tensor) -> tuple[Tensor, Tensor]:
    """The indices of the tiles that are set in the last dimension, packed at the front, and their number."""
    heads, lines, size = flags.shape
    lists = torch.empty((heads, lines, size), dtype=torch.int32, device=flags.device)
    counts = torch.empty((heads, lines), dtype=torch.int32, device=flags.device)
    block = min(triton.next_power_of_2(size), 1024)
    launch(_list_tiles, heads * lines, flags, lists, counts, lines, size, *flags.stride(), block)
    return lists, counts
