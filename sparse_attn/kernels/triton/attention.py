"""Fused attention, forward: no scores or weights are ever written down.

A program has a tile of queries of one head and goes over the keys a few times: once for the largest score of each
strided lane, which bound σ from below and nearly are the answer; a few times with Newton's method; and once for the
output. The list of key tiles that may hold weight shrinks on the way, and what it is in the end, the backward goes by.
Up to 1,024 keys all scores of a query stay on the chip, and there is one pass.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.kernels.triton import interpreted
from sparse_attn.kernels.triton.family import (
    GENERAL,
    MODES,
    TINY,
    bound_from_lanes,
    deviation_of_y,
    place_rows,
    reference_of,
    solve_on_chip,
    start_of,
    step,
    weigh,
)
from sparse_attn.kernels.triton.launch import launch
from sparse_attn.kernels.triton.plan import STATISTICS, Plan, Setting

# Places among the statistics of a row; those before are what `place_rows` gives.
SLOPE, MEAN_LOG, MEAN_Y = tl.constexpr(8), tl.constexpr(9), tl.constexpr(10)


@triton.jit
def head_a(Alpha, head, stride, number):
    """``a = α - 1`` of a head, subtracted in float64 and never quite 0."""
    if Alpha is None:
        a = number + tl.zeros([1], tl.float64)
    else:
        a = tl.load(Alpha + head * stride + tl.arange(0, 1)).to(tl.float64) - 1.0
    return tl.where(tl.abs(a) < TINY, TINY, a)


@triton.jit
def dot(x, y, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """A matrix product in float32; the interpreter cannot multiply bfloat16."""
    if UPCAST:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision=PRECISION)
    else:
        return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def masked_scores(
    product, i, j, scale, Mask, stride_i, stride_j, lowest, queries, keys, limit, offset, CAUSAL: tl.constexpr
):
    """Scores from products of queries ``i`` and keys ``j``, which broadcast; ``-inf`` where a query does not see.

    Every kernel goes through here: an entry at the edge of the support must not be in it here and out of it there.
    """
    s = product * scale
    seen = (i < queries) & (j < limit)
    if CAUSAL:
        seen = seen & (j <= i + offset)
    if Mask is not None:
        place = i.to(tl.int64) * stride_i + j.to(tl.int64) * stride_j
        mask = tl.load(Mask + place, mask=(i < queries) & (j < keys), other=0)
        if mask.dtype.is_int():
            seen = seen & (mask != 0)
        else:
            mask = mask.to(tl.float32)
            s += mask
            seen = seen & ~(mask <= lowest)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def load_tile(X, first, stride, size, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows from ``first`` on; zeros beyond the last."""
    row, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    X += tl.cast(first, tl.int64) * stride
    mask = (first + row < size)[:, None] & (d < D)[None, :]
    return tl.load(X + row[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def dropout(Seed, head, i, j, queries, keys, dropout_p, kept_scale):
    """What weights are multiplied by, a function of the seed and the place alone: every kernel makes it again."""
    place = (head.to(tl.int64) * queries + i) * keys + j
    return tl.where(tl.rand(tl.load(Seed), place) >= dropout_p, kept_scale, 0.0)


@triton.jit
def _store_rows(
    Out,
    Second,
    Stats,
    acc,
    acc2,
    total,
    slope,
    mean_log,
    mean_y,
    placed,
    top,
    sigma,
    a,
    head,
    i,
    d,
    queries,
    rows,
    DV: tl.constexpr,
    MODE: tl.constexpr,
):
    inside = i < queries
    divisor = tl.where(total == 0.0, 1.0, total)
    final = place_rows(top, sigma, total, a, MODE)
    factor = (1.0 / divisor).to(tl.float32) + (final[2] - final[2])  # NaN where the row or α is
    row = head.to(tl.int64) * queries + i
    place = row[:, None] * DV + d[None, :]
    within = inside[:, None] & (d < DV)[None, :]
    tl.store(Out + place, (acc * factor[:, None]).to(Out.dtype.element_ty), mask=within)
    if Second is not None:
        slope = tl.where(slope == 0.0, 1.0, slope)
        acc2 = acc2 * (1.0 / slope).to(tl.float32)[:, None]
        tl.store(Second + place, acc2.to(Second.dtype.element_ty), mask=within)
        for n in tl.static_range(len(final)):
            tl.store(Stats + n * rows + row, final[n], mask=inside)
        tl.store(Stats + SLOPE * rows + row, (slope * (final[3] / placed[3])).to(tl.float32), mask=inside)
        tl.store(Stats + MEAN_LOG * rows + row, (mean_log / divisor).to(tl.float32), mask=inside)
        tl.store(Stats + MEAN_Y * rows + row, (mean_y / divisor).to(tl.float32), mask=inside)


@triton.jit
def _forward(
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
    Tiles,
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
    WITH_ALPHA: tl.constexpr,
    MODE: tl.constexpr,
    TOLERANCE: tl.constexpr,
    LOOSE: tl.constexpr,
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
    tile_m = tiles_m - 1 - tl.program_id(0) % tiles_m  # under a causal mask the last ones have most to do
    head = tl.program_id(0) // tiles_m
    n, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    i = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    dv = tl.arange(0, BLOCK_DV)
    j = tl.arange(0, BLOCK_N)
    Q += n * stride_qn + h * stride_qh
    K += n * stride_kn + (h // group) * stride_kh
    V += n * stride_vn + (h // group) * stride_vh
    if Mask is not None:
        Mask += n * stride_mn + h * stride_mh
    Tiles += (head.to(tl.int64) * tiles_m + tile_m) * tiles_n
    if Flags is not None:
        Flags += (head.to(tl.int64) * tiles_m + tile_m) * tiles_n
    q = load_tile(Q, tile_m * BLOCK_M, stride_ql, queries, D, BLOCK_M, BLOCK_D)
    limit = keys
    if Lengths is not None:
        limit = tl.minimum(limit, tl.load(Lengths + n).to(tl.int32))
    last = limit
    if CAUSAL:
        last = tl.minimum(limit, (tile_m + 1) * BLOCK_M + offset)
    count = tl.cdiv(tl.maximum(last, 0), BLOCK_N)

    lanes = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
    for tile in range(0, count):
        first = tile * BLOCK_N
        k = load_tile(K, first, stride_ks, keys, D, BLOCK_N, BLOCK_D)
        s = masked_scores(
            dot(q, k.T, UPCAST, PRECISION),
            i[:, None],
            (first + j)[None, :],
            scale,
            Mask,
            stride_ml,
            stride_ms,
            lowest,
            queries,
            keys,
            limit,
            offset,
            CAUSAL,
        )
        lanes = tl.maximum(lanes, s, propagate_nan=tl.PropagateNan.ALL)
    broken = tl.max((lanes != lanes).to(tl.int32), 1) > 0
    top = tl.where(broken, float("nan"), tl.max(lanes, 1))
    a = head_a(Alpha, h, stride_alpha, number) + tl.zeros([BLOCK_M], tl.float64)
    low = bound_from_lanes(lanes, top, keys, a, MODE)
    high, error, sigma = start_of(low, keys, a)

    sweeps = 0
    go = count > 0
    while go:
        placed = place_rows(top, sigma, 1.0, a, MODE)
        # σ only climbs from its lower bound: a tile below that edge never comes back.
        edge = tl.where(a > 0.0, top + low - 1.0 / a - 1e-6 * tl.abs(top), float("-inf")).to(tl.float32)
        total = tl.zeros([BLOCK_M], tl.float64)
        slope = tl.zeros([BLOCK_M], tl.float64)
        kept = 0
        for t in range(0, count):
            tile = tl.where(sweeps > 0, tl.load(Tiles + t), t)
            first = tile * BLOCK_N
            k = load_tile(K, first, stride_ks, keys, D, BLOCK_N, BLOCK_D)
            s = masked_scores(
                dot(q, k.T, UPCAST, PRECISION),
                i[:, None],
                (first + j)[None, :],
                scale,
                Mask,
                stride_ml,
                stride_ms,
                lowest,
                queries,
                keys,
                limit,
                offset,
                CAUSAL,
            )
            p, u, _ = weigh(s, placed, a, 1, MODE)
            total += tl.sum(p, 1).to(tl.float64)
            slope += tl.sum(u, 1).to(tl.float64)
            # The list is packed in place: it is never written beyond where it is read.
            tl.store(Tiles + kept, tile)
            kept += tl.max(tl.max((s > edge[:, None]).to(tl.int32), 1), 0)
        tl.debug_barrier()
        count = kept
        total = tl.where(top == float("-inf"), 1.0, total)
        sigma, low, high, error, still_open = step(sigma, low, high, error, total, slope, a, TOLERANCE)
        sweeps += 1
        go = (sweeps < 100) & (tl.max((still_open & (error > LOOSE)).to(tl.int32), 0) > 0)

    # One of Newton's steps from close by lands, and the sum of what the output is made of says so.
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    acc2 = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float64)
    slope = tl.zeros([BLOCK_M], tl.float64)
    mean_log = tl.zeros([BLOCK_M], tl.float64)
    mean_y = tl.zeros([BLOCK_M], tl.float64)
    go = count > 0
    while go:
        placed = place_rows(top, sigma, 1.0, a, MODE)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        acc2 = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float64)
        slope = tl.zeros([BLOCK_M], tl.float64)
        mean_log = tl.zeros([BLOCK_M], tl.float64)
        mean_y = tl.zeros([BLOCK_M], tl.float64)
        for t in range(0, count):
            tile = tl.load(Tiles + t)
            first = tile * BLOCK_N
            k = load_tile(K, first, stride_ks, keys, D, BLOCK_N, BLOCK_D)
            s = masked_scores(
                dot(q, k.T, UPCAST, PRECISION),
                i[:, None],
                (first + j)[None, :],
                scale,
                Mask,
                stride_ml,
                stride_ms,
                lowest,
                queries,
                keys,
                limit,
                offset,
                CAUSAL,
            )
            p, u, deviation = weigh(s, placed, a, 1, MODE)
            total += tl.sum(p, 1).to(tl.float64)
            slope += tl.sum(u, 1).to(tl.float64)
            if Flags is not None:
                tl.store(Flags + tile, tl.max(tl.max((p > 0.0).to(tl.int32), 1), 0).to(tl.uint8))
            if WITH_ALPHA:
                y = deviation_of_y(p, u, deviation, a, reference_of(placed[7].to(tl.float64), a), 1)
                mean_log += tl.sum(p * deviation, 1).to(tl.float64)
                mean_y += tl.sum(y, 1).to(tl.float64)
            if Seed is not None:
                kept = dropout(Seed, head, i[:, None], (first + j)[None, :], queries, keys, dropout_p, kept_scale)
                p, u = p * kept, u * kept
            v = load_tile(V, first, stride_vs, keys, DV, BLOCK_N, BLOCK_DV)
            acc += dot(p.to(v.dtype), v, UPCAST, PRECISION)
            if Second is not None:
                acc2 += dot(u.to(v.dtype), v, UPCAST, PRECISION)
        final_total = tl.where(top == float("-inf"), 1.0, total)
        moved, low, high, error, still_open = step(sigma, low, high, error, final_total, slope, a, TOLERANCE)
        sweeps += 1
        go = (sweeps < 100) & (tl.max(still_open.to(tl.int32), 0) > 0)
        sigma = tl.where(go, moved, sigma)
    placed = place_rows(top, sigma, 1.0, a, MODE)
    _store_rows(
        Out,
        Second,
        Stats,
        acc,
        acc2,
        total,
        slope,
        mean_log,
        mean_y,
        placed,
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


@triton.jit
def _forward_short(
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
    Tiles,
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
    WITH_ALPHA: tl.constexpr,
    MODE: tl.constexpr,
    TOLERANCE: tl.constexpr,
    LOOSE: tl.constexpr,
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
    """As :func:`_forward`, with the scores of all keys on the chip.

    The tiles that the backward goes by are ``BACKWARD_M`` by ``BLOCK_N``.
    """
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
    s = masked_scores(
        dot(q, k.T, UPCAST, PRECISION),
        i[:, None],
        j[None, :],
        scale,
        Mask,
        stride_ml,
        stride_ms,
        lowest,
        queries,
        keys,
        limit,
        offset,
        CAUSAL,
    )
    broken = tl.max((s != s).to(tl.int32), 1) > 0
    top = tl.where(broken, float("nan"), tl.max(s, 1))
    a = head_a(Alpha, h, stride_alpha, number) + tl.zeros([BLOCK_M], tl.float64)
    start = 0.0 * a
    if TILES_N >= 4:
        start = bound_from_lanes(tl.max(tl.reshape(s, [BLOCK_M, TILES_N, BLOCK_N]), 1), top, keys, a, MODE)
    sigma, _ = solve_on_chip(s, top, start, keys, a, TOLERANCE, MODE)
    placed = place_rows(top, sigma, 1.0, a, MODE)
    p, u, deviation = weigh(s, placed, a, 1, MODE)
    total, slope = tl.sum(p, 1).to(tl.float64), tl.sum(u, 1).to(tl.float64)
    mean_log, mean_y = 0.0 * total, 0.0 * total
    if Flags is not None:
        # A tile of queries of the backward may be several of ours.
        active = tl.max(tl.max(tl.reshape((p > 0.0).to(tl.int32), [BLOCK_M, TILES_N, BLOCK_N]), 2), 0)
        tile = tl.arange(0, TILES_N)
        tiles_n = tl.cdiv(keys, BLOCK_N)
        Flags += (head.to(tl.int64) * tl.cdiv(queries, BACKWARD_M) + tile_m * BLOCK_M // BACKWARD_M) * tiles_n
        tl.store(Flags + tile, tl.full([TILES_N], 1, tl.uint8), mask=(tile < tiles_n) & (active > 0))
    if WITH_ALPHA:
        y = deviation_of_y(p, u, deviation, a, reference_of(placed[7].to(tl.float64), a), 1)
        mean_log, mean_y = tl.sum(p * deviation, 1).to(tl.float64), tl.sum(y, 1).to(tl.float64)
    if Seed is not None:
        kept = dropout(Seed, head, i[:, None], j[None, :], queries, keys, dropout_p, kept_scale)
        p, u = p * kept, u * kept
    v = load_tile(V, 0, stride_vs, keys, DV, ALL, BLOCK_DV)
    acc = dot(p.to(v.dtype), v, UPCAST, PRECISION)
    acc2 = acc
    if Second is not None:
        acc2 = dot(u.to(v.dtype), v, UPCAST, PRECISION)
    _store_rows(
        Out,
        Second,
        Stats,
        acc,
        acc2,
        total,
        slope,
        mean_log,
        mean_y,
        placed,
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


def common_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    setting: Setting,
) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """What all kernels take: numbers, sizes and strides; then how the kernel is to be compiled."""
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    kept_scale = 0.0 if setting.dropout_p >= 1 else 1 / (1 - setting.dropout_p)
    lowest = float("-inf") if mask is None or not mask.is_floating_point() else torch.finfo(mask.dtype).min
    mask_strides = (
        (0,) * 4
        if mask is None
        else tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
    )
    numbers = (
        *(setting.a, setting.scale, setting.dropout_p, kept_scale, max(lowest, torch.finfo(torch.float32).min)),
        *(setting.offset or 0, heads, heads // key.shape[1], queries, keys, query.shape[0] * heads * queries),
        *(*query.stride()[:3], *key.stride()[:3], *value.stride()[:3]),
        *(0 if alpha is None else alpha.stride(0), *mask_strides),
    )
    half = query.dtype != torch.float32
    tensor_cores = half or torch.get_float32_matmul_precision() != "highest"
    compiled = (
        setting.offset is not None,
        GENERAL if alpha is not None else MODES.get(setting.a, GENERAL),
        interpreted() and query.dtype == torch.bfloat16,
        "tf32" if tensor_cores else "ieee",
        query.shape[3],
        value.shape[3],
    )
    return numbers, compiled


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    setting: Setting,
    training: bool,
    with_alpha: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output (N, H, L, Dv) and, for the backward, ``Σ u v / Σ u``, statistics of rows and which tiles have weight.

    Args:
        query: (N, H, L, D), its last dimension contiguous, as in ``key`` and ``value``.
        key: (N, Hk, S, D), Hk a divisor of H.
        value: (N, Hk, S, Dv).
        alpha: (H,), or None for the number in ``setting``.
        mask: (N or 1, H or 1, L or 1, S or 1), floating, or uint8 where 0 is masked.
        lengths: (N,), how many keys there are, at most S; int32 or int64.
        seed: (1,), int64, of the dropout.
        setting: Everything else.
        training: Whether the last three results are wanted; they are empty otherwise.
        with_alpha: Whether they have to serve a gradient for α.
    """
    plan = Plan.of(query, value)
    batch, heads, queries, _ = query.shape
    keys, device = key.shape[2], query.device
    tiles_m, tiles_n = triton.cdiv(queries, plan.block_m), triton.cdiv(keys, plan.block_n)
    rows = batch * heads
    output = torch.empty(batch, heads, queries, value.shape[3], dtype=query.dtype, device=device)
    second = torch.empty(output.shape if training else (0,), dtype=query.dtype, device=device)
    statistics = torch.empty((STATISTICS, rows * queries) if training else (0,), dtype=torch.float32, device=device)
    flags = torch.zeros((rows, tiles_m, tiles_n) if training else (0,), dtype=torch.uint8, device=device)
    numbers, (causal, mode, upcast, precision, *sizes) = common_arguments(query, key, value, alpha, mask, setting)
    half = query.dtype != torch.float32
    tolerances = (2.0**-12, 1e-2) if half else (2.4e-7, 3e-4)
    wanted = (second, statistics, flags) if training else (None, None, None)
    short = plan.short(keys, query.itemsize)
    # Nothing on the chip is as large as the scores of a tile with all keys; the list of the others is.
    tiles = None if short else torch.empty((rows, tiles_m, tiles_n), dtype=torch.int32, device=device)
    block_m, warps = short or (plan.block_m, plan.warps)
    arguments = (
        *(query, key, value, alpha, mask, lengths, seed, output, *wanted, tiles, *numbers),
        *(causal, with_alpha, mode, *tolerances, upcast, precision, *sizes),
        *(plan.block_d, plan.block_dv, block_m, plan.block_n),
    )
    programs = triton.cdiv(queries, block_m) * rows
    if short:
        tiles_n = triton.next_power_of_2(tiles_n)
        launch(_forward_short, programs, *arguments, tiles_n, plan.block_m, warps=warps)
    else:
        launch(_forward, programs, *arguments, warps=warps)
    return output, second, statistics, flags
