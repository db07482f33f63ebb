"""Fused attention, backward: one pass for the queries and α, one for the keys and values, over tiles that have weight.

With ``Z`` the dropout's multiplier, ``dP = Z ∘ (dO Vᵀ)`` and ``δ = dO · (Σ u Z v / Σ u)``: ``dS = u ∘ (dP - δ)``.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.kernels.setting import Setting
from sparse_attn.kernels.triton.attention.plan import Plan
from sparse_attn.kernels.triton.attention.tiles import (
    LENGTHS,
    common_arguments,
    dot,
    dropout,
    end_of_keys,
    head_a,
    load_tile,
    masked_scores,
)
from sparse_attn.kernels.triton.family import alpha_gradient, deviation_from_scores, reference_of, weigh
from sparse_attn.kernels.triton.launch import launch


@triton.jit(do_not_specialize=("lines", "size", "stride_head", "stride_line"))
def _list_tiles(Flags, Lists, Counts, lines, size, stride_head, stride_line, stride_tile, BLOCK: tl.constexpr):
    """The tiles of a line of flags that are set: of a tile of queries, or of one of keys."""
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
    """What ``place_rows`` gave for these rows."""
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


@triton.jit(do_not_specialize=LENGTHS)
def _backward_queries(
    Q,
    K,
    V,
    Alpha,
    Mask,
    Lengths,
    Seed,
    Second,
    Stats,
    Lists,
    Counts,
    DO,
    Delta,
    DQ,
    DAlpha,
    DMask,
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
    stride_dn,
    stride_dh,
    stride_dl,
    stride_ds,
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
    tiles_m, tiles_n = tl.cdiv(queries, BLOCK_M), tl.cdiv(keys, BLOCK_N)
    tile_m = tiles_m - 1 - tl.program_id(0) % tiles_m
    head = tl.program_id(0) // tiles_m
    n, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    i = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = i < queries
    d, j = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    K += n * stride_kn + (h // group) * stride_kh
    V += n * stride_vn + (h // group) * stride_vh
    if Mask is not None:
        Mask += n * stride_mn + h * stride_mh
    line = head.to(tl.int64) * tiles_m + tile_m
    limit = keys
    if Lengths is not None:
        limit = tl.minimum(limit, tl.load(Lengths + n).to(tl.int32))
    end = end_of_keys(i, queries, limit, offset, CAUSAL)
    row = head.to(tl.int64) * queries + i
    rows = tl.cast(rows, tl.int64)
    q = load_tile(Q + n * stride_qn + h * stride_qh, tile_m * BLOCK_M, stride_ql, queries, D, BLOCK_M, BLOCK_D)
    start = head.to(tl.int64) * queries * DV
    do = load_tile(DO + start, tile_m * BLOCK_M, DV, queries, DV, BLOCK_M, BLOCK_DV)
    second = load_tile(Second + start, tile_m * BLOCK_M, DV, queries, DV, BLOCK_M, BLOCK_DV)
    delta = tl.sum(do.to(tl.float32) * second.to(tl.float32), 1)
    tl.store(Delta + row, delta, mask=inside)
    placed = _load_rows(Stats, row, inside, rows, MODE)
    a = head_a(Alpha, h, stride_alpha, number) + tl.zeros([BLOCK_M], tl.float64)
    if DAlpha is not None:
        log_factor = placed[7].to(tl.float64)
        reference = reference_of(log_factor, a)
    # Sums of u, of ℓ and y counted from ℓ₀, and of these and 1 with the upstream gradient: what α's is made of.
    slope = tl.zeros([BLOCK_M], tl.float64)
    mean_log = tl.zeros([BLOCK_M], tl.float64)
    mean_y = tl.zeros([BLOCK_M], tl.float64)
    with_one = tl.zeros([BLOCK_M], tl.float64)
    with_log = tl.zeros([BLOCK_M], tl.float64)
    with_y = tl.zeros([BLOCK_M], tl.float64)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    for t in range(0, tl.load(Counts + line)):
        tile = tl.load(Lists + line * tiles_n + t)
        first = tile * BLOCK_N
        k = load_tile(K, first, stride_ks, keys, D, BLOCK_N, BLOCK_D)
        s = masked_scores(
            dot(q, k.T, UPCAST, PRECISION),
            i[:, None],
            (first + j)[None, :],
            end[:, None],
            scale,
            Mask,
            stride_ml,
            stride_ms,
            lowest,
            keys,
        )
        p, u, deviation = weigh(s, placed, a, 1, MODE)
        v = load_tile(V, first, stride_vs, keys, DV, BLOCK_N, BLOCK_DV)
        dp = dot(do, v.T, UPCAST, PRECISION)
        if Seed is not None:
            dp *= dropout(Seed, head, i[:, None], (first + j)[None, :], queries, keys, dropout_p, kept_scale)
        dp -= delta[:, None]
        ds = u * dp
        acc += dot(ds.to(k.dtype), k, UPCAST, PRECISION)
        if DAlpha is not None:
            log, y = p * deviation, deviation_from_scores(s, p, u, deviation, placed, a, reference, 1)
            slope += tl.sum(u, 1).to(tl.float64)
            mean_log += tl.sum(log, 1).to(tl.float64)
            mean_y += tl.sum(y, 1).to(tl.float64)
            with_one += tl.sum(p * dp, 1).to(tl.float64)
            with_log += tl.sum(log * dp, 1).to(tl.float64)
            with_y += tl.sum(y * dp, 1).to(tl.float64)
        if DMask is not None:
            place = DMask + n * stride_dn + h * stride_dh
            if ONE_COLUMN:
                sums += tl.sum(ds, 1)
            elif ONE_ROW:
                tl.atomic_add(place + (first + j) * stride_ds, tl.sum(ds, 0), mask=first + j < keys)
            else:
                place += i.to(tl.int64)[:, None] * stride_dl + (first + j)[None, :] * stride_ds
                tl.atomic_add(place, ds, mask=inside[:, None] & (first + j < keys)[None, :])
    place = row[:, None] * D + d[None, :]
    tl.store(DQ + place, (acc * scale).to(DQ.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])
    if DAlpha is not None:
        slope = tl.where(slope == 0.0, 1.0, slope)
        with_log, with_y = with_log - mean_log * with_one, with_y - mean_y * with_one
        da = alpha_gradient(with_log, with_y, mean_log, mean_y, slope, a, log_factor, reference)
        seen = placed[2] == placed[2]
        tl.store(DAlpha + row, tl.where(seen, da, float("nan")).to(tl.float32), mask=inside)
    if DMask is not None and ONE_COLUMN:
        place = DMask + n * stride_dn + h * stride_dh + i.to(tl.int64) * stride_dl
        tl.atomic_add(place, sums, mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def _backward_keys(
    Q,
    K,
    V,
    Alpha,
    Mask,
    Lengths,
    Seed,
    Stats,
    Lists,
    Counts,
    DO,
    Delta,
    DK,
    DV_,
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
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(queries, BLOCK_M), tl.cdiv(keys, BLOCK_N)
    tile_n = tl.program_id(0) % tiles_n  # under a causal mask the first ones have most to do
    pair = tl.program_id(0) // tiles_n  # batch and head of the keys
    key_heads = heads // group
    n = (pair // key_heads).to(tl.int64)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    first = tile_n * BLOCK_N
    j = first + tl.arange(0, BLOCK_N)
    key_head = (pair % key_heads).to(tl.int64)
    k = load_tile(K + n * stride_kn + key_head * stride_kh, first, stride_ks, keys, D, BLOCK_N, BLOCK_D)
    v = load_tile(V + n * stride_vn + key_head * stride_vh, first, stride_vs, keys, DV, BLOCK_N, BLOCK_DV)
    limit = keys
    if Lengths is not None:
        limit = tl.minimum(limit, tl.load(Lengths + n).to(tl.int32))
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dvalue = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(0, group):
        h = key_head * group + member
        head = n * heads + h
        a = head_a(Alpha, h, stride_alpha, number) + tl.zeros([BLOCK_M], tl.float64)
        line = head * tiles_n + tile_n
        mask = Mask
        if Mask is not None:
            mask = Mask + n * stride_mn + h * stride_mh
        for t in range(0, tl.load(Counts + line)):
            tile = tl.load(Lists + line * tiles_m + t)
            i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            inside = i < queries
            end = end_of_keys(i, queries, limit, offset, CAUSAL)
            row = head * queries + i
            q = load_tile(Q + n * stride_qn + h * stride_qh, tile * BLOCK_M, stride_ql, queries, D, BLOCK_M, BLOCK_D)
            do = load_tile(DO + head * queries * DV, tile * BLOCK_M, DV, queries, DV, BLOCK_M, BLOCK_DV)
            delta = tl.load(Delta + row, mask=inside, other=0.0)
            s = masked_scores(
                dot(k, q.T, UPCAST, PRECISION),
                i[None, :],
                j[:, None],
                end[None, :],
                scale,
                mask,
                stride_ml,
                stride_ms,
                lowest,
                keys,
            )
            p, u, _ = weigh(s, _load_rows(Stats, row, inside, rows, MODE), a, 0, MODE)
            dp = dot(v, do.T, UPCAST, PRECISION)
            if Seed is not None:
                kept = dropout(Seed, head, i[None, :], j[:, None], queries, keys, dropout_p, kept_scale)
                p, dp = p * kept, dp * kept
            dvalue += dot(p.to(do.dtype), do, UPCAST, PRECISION)
            ds = u * (dp - delta[None, :])
            dk += dot(ds.to(q.dtype), q, UPCAST, PRECISION)
    row = (pair.to(tl.int64) * keys + j)[:, None]
    within = (j < keys)[:, None]
    tl.store(DK + row * D + d[None, :], (dk * scale).to(DK.dtype.element_ty), mask=within & (d < D)[None, :])
    tl.store(DV_ + row * DV + dv[None, :], dvalue.to(DV_.dtype.element_ty), mask=within & (dv < DV)[None, :])


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    second: Tensor,
    statistics: Tensor,
    flags: Tensor,
    setting: Setting,
    with_alpha: bool,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for query, key, value, α and a float mask, the last two empty where they are not wanted."""
    plan = Plan.of(query, value)
    device, (batch, heads, queries), key_heads = query.device, query.shape[:3], key.shape[1]
    rows, (tiles_m, tiles_n) = batch * heads, flags.shape[1:]
    grad = grad.contiguous()
    numbers, compiled = common_arguments(query, key, value, alpha, mask, setting)
    compiled = (*compiled, plan.block_d, plan.block_dv, plan.block_m, plan.block_n)
    delta = torch.empty(rows * queries, dtype=torch.float32, device=device)
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=device)
    grad_key = torch.empty(key.shape, dtype=key.dtype, device=device)
    grad_value = torch.empty(value.shape, dtype=value.dtype, device=device)
    grad_alpha = torch.empty((batch, heads, queries) if with_alpha else (0,), dtype=torch.float32, device=device)
    grad_mask = torch.zeros(mask.shape if with_mask and mask is not None else (0,), device=device)
    mask_strides: tuple[int, ...] = (0,) * 4
    one_row = one_column = False
    if mask is not None and with_mask:
        mask_strides = tuple(0 if n == 1 else step for n, step in zip(mask.shape, grad_mask.stride(), strict=True))
        one_row, one_column = mask.shape[2] == 1, mask.shape[3] == 1
    lists, counts = _lists(flags)
    launch(
        _backward_queries,
        rows * tiles_m,
        *(query, key, value, alpha, mask, lengths, seed, second, statistics, lists, counts, grad, delta, grad_query),
        *(grad_alpha if with_alpha else None, grad_mask if with_mask else None),
        *(*numbers, *mask_strides, *compiled, one_row, one_column),
        warps=plan.warps,
    )
    lists, counts = _lists(flags.transpose(1, 2))
    launch(
        _backward_keys,
        batch * key_heads * tiles_n,
        *(query, key, value, alpha, mask, lengths, seed, statistics, lists, counts, grad, delta, grad_key, grad_value),
        *(*numbers, *compiled),
        warps=plan.warps,
    )
    return grad_query, grad_key, grad_value, grad_alpha.sum((0, 2)) if with_alpha else grad_alpha, grad_mask


def _lists(flags: Tensor) -> tuple[Tensor, Tensor]:
    """The tiles that are set in the last dimension, packed in front, and how many they are."""
    heads, lines, size = flags.shape
    lists = torch.empty((heads, lines, size), dtype=torch.int32, device=flags.device)
    counts = torch.empty((heads, lines), dtype=torch.int32, device=flags.device)
    block = min(triton.next_power_of_2(size), 1024)
    launch(_list_tiles, heads * lines, flags, lists, counts, lines, size, *flags.stride(), block)
    return lists, counts
