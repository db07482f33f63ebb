"""What the attention kernels share: tiles of rows, of scores and of dropout, and the arguments they all take."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.kernels.setting import Setting
from sparse_attn.kernels.triton import interpreted
from sparse_attn.kernels.triton.family import GENERAL, MODES, TINY, place_rows
from sparse_attn.versions import tf32_allowed

# What changes with the length alone, and makes no kernel faster where it is known: that 16 divides it compiles nothing.
LENGTHS = ("offset", "queries", "rows")


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
def end_of_keys(i, queries, limit, offset, CAUSAL: tl.constexpr):
    """How many keys each of the queries ``i`` sees, masks apart; none where there is no such query."""
    end = tl.zeros_like(i) + limit
    if CAUSAL:
        end = tl.minimum(end, i + offset + 1)
    return tl.where(i < queries, end, 0)


@triton.jit
def masked_scores(product, i, j, end, scale, Mask, stride_i, stride_j, lowest, keys):
    """Scores from products of queries ``i`` and keys ``j``, which broadcast; ``-inf`` where a query does not see.

    Every kernel goes through here: an entry at the edge of the support must not be in it here and out of it there.
    ``end`` is of :func:`end_of_keys`, for each query. ``stride_i`` is None where the mask is the same for all queries:
    it is loaded once for all of them then.
    """
    s = product * scale
    seen = j < end
    if Mask is not None:
        if stride_i is None:
            mask = tl.load(Mask + j.to(tl.int64) * stride_j, mask=j < keys, other=0)
        else:
            mask = tl.load(Mask + i.to(tl.int64) * stride_i + j.to(tl.int64) * stride_j, mask=seen, other=0)
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
def store_rows(
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
    d,
    queries,
    rows,
    DV: tl.constexpr,
    MODE: tl.constexpr,
):
    """Write the output and, for the backward, what it is told of these rows."""
    inside = i < queries
    divisor = tl.where(total == 0.0, 1.0, total)
    final = place_rows(top, sigma, total, a, MODE)
    factor = (1.0 / divisor).to(tl.float32) + (final[2] - final[2])  # NaN where the row or α is
    row = head.to(tl.int64) * queries + i
    rows = tl.cast(rows, tl.int64)  # eight times as many statistics may be more than 2³¹
    place = row[:, None] * DV + d[None, :]
    within = inside[:, None] & (d < DV)[None, :]
    tl.store(Out + place, (acc * factor[:, None]).to(Out.dtype.element_ty), mask=within)
    if Second is not None:
        slope = tl.where(slope == 0.0, 1.0, slope)
        acc2 = acc2 * (1.0 / slope).to(tl.float32)[:, None]
        tl.store(Second + place, acc2.to(Second.dtype.element_ty), mask=within)
        for n in tl.static_range(len(final)):
            tl.store(Stats + n * rows + row, final[n], mask=inside)


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
    mask_strides: tuple[int | None, ...] = (0,) * 4
    if mask is not None:
        n, h, i, j = (0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True))
        mask_strides = n, h, i or None, j
    numbers = (
        *(setting.a, setting.scale, setting.dropout_p, kept_scale, max(lowest, torch.finfo(torch.float32).min)),
        *(setting.offset or 0, heads, heads // key.shape[1], queries, keys, query.shape[0] * heads * queries),
        *(*query.stride()[:3], *key.stride()[:3], *value.stride()[:3]),
        *(0 if alpha is None else alpha.stride(0), *mask_strides),
    )
    half = query.dtype != torch.float32
    tensor_cores = half or tf32_allowed()
    compiled = (
        setting.offset is not None,
        GENERAL if alpha is not None else MODES.get(setting.a, GENERAL),
        interpreted() and query.dtype == torch.bfloat16,
        "tf32" if tensor_cores else "ieee",
        query.shape[3],
        value.shape[3],
    )
    return numbers, compiled
