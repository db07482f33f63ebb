"""Fused attention, forward: scores and weights are never written to memory.

A program computes a tile of queries of one head and passes over the keys several times: once for the largest score of
each strided lane, from which follows a lower bound of σ close to the root; a few times with Newton's method; and once
for the output. The list of key tiles that may have weight becomes shorter with each pass. The backward uses the final
list.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.kernels.setting import Setting
from sparse_attn.kernels.triton.attention import decode
from sparse_attn.kernels.triton.attention.arguments import arguments_of
from sparse_attn.kernels.triton.attention.plan import Plan, kept, shared_memory, statistics_of
from sparse_attn.kernels.triton.attention.short import forward_short
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
    start_of,
    step,
    weigh,
)
from sparse_attn.kernels.triton.launch import launch


class Results(NamedTuple):
    """Tensors that a forward kernel writes; all but the output are None if no backward follows."""

    output: Tensor
    second: Tensor | None  # Σ u v / Σ u
    statistics: Tensor | None  # numbers per row from which the backward recomputes the weights
    flags: Tensor | None  # 1 for tiles of scores that have weight


@triton.jit(do_not_specialize=("lengths",))
def _forward(
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
    queries, keys = lengths.queries, inputs.keys
    tiles_m, tile_m, head, n, h, i = queries_of_program(inputs, lengths, BLOCK_M)
    tiles_n = tl.cdiv(keys, BLOCK_N)
    j = tl.arange(0, BLOCK_N)
    k_start = of_head(inputs.key, n, h // inputs.group)
    v_start = of_head(inputs.value, n, h // inputs.group)
    line = (head.to(tl.int64) * tiles_m + tile_m) * tiles_n
    listed = tiles + line
    q = load_tile(of_head(inputs.query, n, h), tile_m * BLOCK_M, inputs.query.row, i < queries, D, BLOCK_M, BLOCK_D)
    limit = keys_of(inputs, lengths, n, CAUSAL)
    end = end_of_keys(i, queries, limit, lengths.offset, CAUSAL)
    last = limit
    if CAUSAL:
        last = tl.minimum(limit, (tile_m + 1) * BLOCK_M + lengths.offset)
    count = tl.cdiv(tl.maximum(last, 0), BLOCK_N)

    lanes = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
    for tile in range(0, count):
        first = tile * BLOCK_N
        k = load_tile(k_start, first, inputs.key.row, first + j < limit, D, BLOCK_N, BLOCK_D)
        s = masked_scores(dot(q, k.T, UPCAST, PRECISION), i[:, None], first + j[None, :], end[:, None], inputs, n, h)
        lanes = tl.maximum(lanes, s, propagate_nan=tl.PropagateNan.ALL)
    broken = tl.max((lanes != lanes).to(tl.int32), 1) > 0
    top = tl.where(broken, float("nan"), tl.max(lanes, 1))
    a = head_a(inputs, h) + tl.zeros([BLOCK_M], tl.float64)
    low = bound_from_lanes(lanes, top, keys, a, MODE)
    high, error, sigma = start_of(low, keys, a)

    sweeps = 0
    go = count > 0
    while go:
        placed = place_rows(top, sigma, 1.0, a, MODE)
        # σ only increases from its lower bound, so a tile below that edge never gets weight later.
        edge = tl.where(a > 0.0, top + low - 1.0 / a - 1e-6 * tl.abs(top), float("-inf")).to(tl.float32)
        total = tl.zeros([BLOCK_M], tl.float64)
        slope = tl.zeros([BLOCK_M], tl.float64)
        kept = 0
        for t in range(0, count):
            tile = tl.where(sweeps > 0, tl.load(listed + t), t)
            first = tile * BLOCK_N
            k = load_tile(k_start, first, inputs.key.row, first + j < limit, D, BLOCK_N, BLOCK_D)
            s = masked_scores(
                dot(q, k.T, UPCAST, PRECISION), i[:, None], (first + j)[None, :], end[:, None], inputs, n, h
            )
            p, u, _ = weigh(s, placed, a, 1, MODE)
            total += tl.sum(p, 1).to(tl.float64)
            slope += tl.sum(u, 1).to(tl.float64)
            # The list is packed in place: the write position never passes the read position.
            tl.store(listed + kept, tile)
            # A row with NaN keeps all of its tiles, so that all of its gradients become NaN.
            kept += tl.max((~(tl.max(s, 1) <= edge)).to(tl.int32), 0)
        tl.debug_barrier()
        count = kept
        total = tl.where(top == float("-inf"), 1.0, total)
        sigma, low, high, error, still_open = step(sigma, low, high, error, total, slope, a, TOLERANCE, MODE)
        sweeps += 1
        far = still_open & (error > tl.where(a > 1.0, TOLERANCE, LOOSE))
        go = (sweeps < 100) & (tl.max(far.to(tl.int32), 0) > 0)

    # After the last Newton step the sum is close to 1; dividing by the sum removes the remaining error.
    placed = place_rows(top, sigma, 1.0, a, MODE)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    acc2 = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float64)
    slope = tl.zeros([BLOCK_M], tl.float64)
    for t in range(0, count):
        tile = tl.load(listed + t)
        first = tile * BLOCK_N
        k = load_tile(k_start, first, inputs.key.row, first + j < limit, D, BLOCK_N, BLOCK_D)
        s = masked_scores(dot(q, k.T, UPCAST, PRECISION), i[:, None], first + j[None, :], end[:, None], inputs, n, h)
        p, u, _ = weigh(s, placed, a, 1, MODE)
        total += tl.sum(p, 1).to(tl.float64)
        slope += tl.sum(u, 1).to(tl.float64)
        if results.flags is not None:
            tl.store(results.flags + line + tile, tl.max((tl.max(p, 1) != 0.0).to(tl.int32), 0).to(tl.uint8))
        if inputs.seed is not None:
            kept = dropout(inputs, head, i[:, None], (first + j)[None, :], queries)
            p, u = p * kept, u * kept
        seen = keys_seen(inputs, n, h, first + j, limit)
        v = load_tile(v_start, first, inputs.value.row, seen, DV, BLOCK_N, BLOCK_DV)
        acc += dot(p.to(v.dtype), v, UPCAST, PRECISION)
        if results.second is not None:
            acc2 += dot(u.to(v.dtype), v, UPCAST, PRECISION)
    store_rows(results, acc, acc2, total, slope, top, sigma, a, head, i, lengths, DV, BLOCK_DV, MODE)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    setting: Setting,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output (N, H, L, Dv) and, for the backward, ``Σ u v / Σ u``, statistics of rows and which tiles have weight.

    Args:
        query: (N, H, L, D), its last dimension contiguous, as in ``key`` and ``value``.
        key: (N, Hk, S, D), Hk a divisor of H.
        value: (N, Hk, S, Dv).
        alpha: (H,), or None for the number in ``setting``.
        mask: (N or 1, H or 1, L or 1, S or 1), floating, or uint8 where 0 is masked.
        key_lengths: (N,), the number of keys without padding, at most S; int32 or int64.
        seed: (1,), int64, the seed of the dropout.
        setting: The other arguments.
        training: Whether to compute the last three results; otherwise they are empty.
    """
    if not training and decode.pays(query, key):
        output = decode.forward(query, key, value, alpha, mask, key_lengths, seed, setting)
        return output, *kept(query, key, value, alpha, setting.a, False)
    plan = Plan.of(query, value)
    batch, heads, queries, _ = query.shape
    keys, device = key.shape[2], query.device
    tiles_m, tiles_n = triton.cdiv(queries, plan.block_m), triton.cdiv(keys, plan.block_n)
    rows = batch * heads
    output = torch.empty(batch, heads, queries, value.shape[3], dtype=query.dtype, device=device)
    second = torch.empty(output.shape if training else (0,), dtype=query.dtype, device=device)
    told = (statistics_of(setting.a, alpha), rows * queries)
    statistics = torch.empty(told if training else (0,), dtype=torch.float32, device=device)
    flags = torch.zeros((rows, tiles_m, tiles_n) if training else (0,), dtype=torch.uint8, device=device)
    inputs, lengths, constants = arguments_of(query, key, value, alpha, mask, key_lengths, seed, setting)
    # Tolerances of a row's sum. With an error below `loose` one last step follows; below `tolerance` none is needed.
    loose, tolerance = (2.4e-7, 2.4e-7) if query.dtype == torch.float32 else (2.0**-10, 2.0**-12)
    results = Results(output, *((second, statistics, flags) if training else (None, None, None)))
    sizes = (plan.block_d, plan.block_dv)
    if short := plan.short(keys, query.itemsize, shared_memory(device)):
        block_m, warps = short
        compiled = (*constants, *sizes, block_m, plan.block_n, tolerance, triton.next_power_of_2(tiles_n), plan.block_m)
        launch(forward_short, triton.cdiv(queries, block_m) * rows, inputs, lengths, results, *compiled, warps=warps)
    else:
        tiles = torch.empty((rows, tiles_m, tiles_n), dtype=torch.int32, device=device)
        several = (*constants, *sizes, plan.block_m, plan.block_n, tolerance, loose)
        launch(_forward, tiles_m * rows, inputs, lengths, results, tiles, *several, warps=plan.warps, stages=plan.stages)
    return output, second, statistics, flags
