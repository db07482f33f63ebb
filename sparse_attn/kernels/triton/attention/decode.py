"""Attention of few queries to many keys, as in decoding with a cache: the keys are split over programs.

There are three steps: scores, weights and output. The steps for scores and for the output split the keys over many
programs. Scores are written to memory: for few queries this takes little time compared with reading the keys. The keys
are then read only once, for any number of passes of the row kernel over the scores. Only values with weight are read.
The sums of the splits are added in a fixed order.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.kernels.setting import Setting
from sparse_attn.kernels.triton import rows
from sparse_attn.kernels.triton.attention.arguments import arguments_of
from sparse_attn.kernels.triton.attention.plan import Plan
from sparse_attn.kernels.triton.attention.tiles import (
    dot,
    end_of_keys,
    hide,
    keys_of,
    load_tile,
    of_head,
)
from sparse_attn.kernels.triton.launch import launch

_FEW = 16  # rows per head of the keys: the smallest tile of matrix units
_MANY = 2048  # keys
_KEYS = 64  # keys per tile
_SPLITS = 64


def pays(query: Tensor, key: Tensor) -> bool:
    """Whether this method is used: for few queries per head of the keys, and many keys."""
    return query.shape[2] * (query.shape[1] // key.shape[1]) <= _FEW and key.shape[2] >= _MANY


@triton.jit(do_not_specialize=("lengths",))
def _scores(
    inputs,
    lengths,
    scores,
    CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program computes the scores of a tile of keys, for all queries that share these keys."""
    queries, keys, group = lengths.queries, inputs.keys, inputs.group
    tiles = tl.cdiv(keys, BLOCK)
    first = (tl.program_id(0) % tiles) * BLOCK
    pair = tl.program_id(0) // tiles
    key_heads = inputs.heads // group
    n, key_head = (pair // key_heads).to(tl.int64), (pair % key_heads).to(tl.int64)
    row = tl.arange(0, ROWS)  # the queries of all heads that share these keys
    member, i = row // queries, row % queries
    inside = row < group * queries
    d, j = tl.arange(0, BLOCK_D), first + tl.arange(0, BLOCK)
    h = key_head * group + member
    place = h * inputs.query.h + i.to(tl.int64) * inputs.query.row
    mask = inside[:, None] & (d < D)[None, :]
    q = tl.load(inputs.query.start + n * inputs.query.n + place[:, None] + d[None, :], mask=mask, other=0.0)
    limit = keys_of(inputs, lengths, n, CAUSAL)
    end = end_of_keys(tl.where(inside, i, queries), queries, limit, lengths.offset, CAUSAL)
    # Rows after the last key, as in a cache that is not full, are not read.
    k = load_tile(of_head(inputs.key, n, key_head), first, inputs.key.row, j < limit, D, BLOCK, BLOCK_D)
    z = hide(dot(q, k.T, UPCAST, PRECISION), i[:, None], j[None, :], end[:, None], inputs, n, h[:, None])
    place = (pair.to(tl.int64) * group * queries + row)[:, None] * keys + j[None, :]
    tl.store(scores + place, z * inputs.scale, mask=inside[:, None] & (j < keys)[None, :])


@triton.jit(do_not_specialize=("lengths", "tiles_of_a_split", "splits"))
def _outputs(
    weights,
    inputs,
    lengths,
    partial,
    tiles_of_a_split,
    splits,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program computes the sums of weighted values over one split of the keys."""
    queries, keys, group = lengths.queries, inputs.keys, inputs.group
    split = tl.program_id(0) % splits
    pair = tl.program_id(0) // splits
    key_heads = inputs.heads // group
    n, key_head = (pair // key_heads).to(tl.int64), (pair % key_heads).to(tl.int64)
    v_start = of_head(inputs.value, n, key_head)
    row = tl.arange(0, ROWS)
    inside = row < group * queries
    place = pair.to(tl.int64) * group * queries + row
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for tile in range(split * tiles_of_a_split, (split + 1) * tiles_of_a_split):
        j = tile * BLOCK + tl.arange(0, BLOCK)
        p = tl.load(weights + place[:, None] * keys + j[None, :], mask=inside[:, None] & (j < keys)[None, :], other=0.0)
        used = tl.max((p != 0.0).to(tl.int32), 0) > 0  # values without weight may be NaN, and 0 · NaN is NaN
        if tl.max(used.to(tl.int32), 0) > 0:
            v = load_tile(v_start, tile * BLOCK, inputs.value.row, used, DV, BLOCK, BLOCK_DV)
            acc += dot(p.to(v.dtype), v, UPCAST, PRECISION)
    dv = tl.arange(0, BLOCK_DV)
    target = partial + (split.to(tl.int64) * lengths.rows + place)[:, None] * DV + dv[None, :]
    tl.store(target, acc, mask=inside[:, None] & (dv < DV)[None, :])


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    setting: Setting,
) -> Tensor:
    """The output (N, H, L, Dv) of ``forward.forward``, without the results for a backward."""
    batch, heads, queries, _ = query.shape
    key_heads, keys = key.shape[1:3]
    plan, device = Plan.of(query, value), query.device
    inputs, lengths, constants = arguments_of(query, key, value, alpha, mask, key_lengths, seed, setting)
    products = (constants.upcast, constants.precision)
    scores = torch.empty(batch, heads, queries, keys, dtype=torch.float32, device=device)
    tiles = triton.cdiv(keys, _KEYS)
    compiled = (constants.causal, *products, constants.head_size, plan.block_d, _FEW, _KEYS)
    launch(_scores, batch * key_heads * tiles, inputs, lengths, scores, *compiled)
    a = setting.a if alpha is None else (alpha.double() - 1).float().view(-1, 1, 1)
    weights = rows.entmax_forward(scores, a, torch.finfo(torch.float32).min, in_place=True)
    if seed is not None:
        from sparse_attn.kernels.triton.attention.dropout import multipliers

        weights *= multipliers(weights, seed, setting.dropout_p)
    splits = min(_SPLITS, tiles)
    partial = torch.empty(splits, batch, heads, queries, value.shape[3], dtype=torch.float32, device=device)
    split = (triton.cdiv(tiles, splits), splits)
    sizes = (constants.value_size, plan.block_dv, _FEW, _KEYS)
    launch(_outputs, batch * key_heads * splits, weights, inputs, lengths, partial, *split, *products, *sizes)
    return partial.sum(0).to(query.dtype)
