"""Attention in C on CPU tensors, one call for all batch entries and heads.

Half precision is computed in float32 and rounded once. Nothing here is differentiable.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from ctypes import c_char_p, c_int
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_attn.kernels.cpu import rows

_ELEMENTS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3, torch.bool: 4}
_FAR = 2**40  # more than there are keys

# The members of `attention` in attention.h.
_CALL = struct.Struct("=13q2d4q" + 5 * "6q" + "3q" + 5 * "6q" + "q")
_NO_TENSOR = (0,) * 6


class Bounds(NamedTuple):
    """Which keys a query sees by its place: query ``i`` those from ``i - left`` to ``i + right``; None for all."""

    left: int | None = None
    right: int | None = None


class Kept(NamedTuple):
    """The weights that are not zero, kept for the backward by tiles of queries."""

    counts: Tensor
    places: Tensor
    weights: Tensor


class Setting(NamedTuple):
    """Numbers that a call is made of."""

    scale: float
    bounds: Bounds = Bounds()
    k: int | None = None
    dropout_p: float = 0.0
    seed: int = 0
    variant: str | None = None


def tile_rows(queries: int, keys: int) -> int:
    """How many queries are computed together: their scores stay in the second-level cache."""
    fitting = 48 if keys <= 2048 else 24 if keys <= 4096 else 12
    return max(1, min(fitting, queries))


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    a: Tensor,
    mask: Tensor | None,
    setting: Setting,
    training: bool,
) -> tuple[Tensor, Kept | None]:
    """The output, and what the backward needs where there is to be one.

    Args:
        query: (N, H, L, D).
        key: (N, Hk, S, D), Hk a divisor of H.
        value: (N, Hk, S, Dv).
        a: α - 1 in float64: one number, or (H,).
        mask: (N or 1, H or 1, L or 1, S or 1): boolean, ``True`` = take part, or floating, added to the scores.
        setting: Everything else.
        training: Whether the weights are kept.
    """
    output = torch.empty_strided(
        (*query.shape[:3], value.shape[3]), _like(query, value.shape[3]), dtype=query.dtype
    )
    kept = _room(query, key) if training else None
    _run(False, query, key, value, a, mask, setting, output, kept)
    return output, kept


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    a: Tensor,
    mask: Tensor | None,
    setting: Setting,
    kept: Kept | None,
    with_alpha: bool,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients for query, key, value, α in float64, and the mask in float32 or wider."""
    grads = tuple(torch.empty_strided(x.shape, _like(x, x.shape[3]), dtype=x.dtype) for x in (query, key, value))
    grad_alpha = torch.zeros_like(a) if with_alpha else None
    grad_mask = None
    if with_mask and mask is not None:
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        grad_mask = torch.zeros(mask.shape, dtype=wide)
    _run(True, query, key, value, a, mask, setting, None, kept, grad, *grads, grad_mask, grad_alpha)
    return *grads, grad_alpha, grad_mask


def _like(x: Tensor, width: int) -> tuple[int, ...]:
    """Strides in the order of those of ``x``: a sequence that comes first stays first."""
    _, heads, length, _ = x.shape
    batch_step, head_step, row_step, _ = x.stride()
    if head_step < row_step:
        if batch_step < row_step:
            return heads * width, width, x.shape[0] * heads * width, 1
        return length * heads * width, width, heads * width, 1
    return heads * length * width, length * width, width, 1


def _room(query: Tensor, key: Tensor) -> Kept:
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    of_tile = tile_rows(queries, keys)
    tiles = batch * heads * -(-queries // of_tile)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    size = (tiles, of_tile * min(keys, 64))
    counts = torch.empty(tiles, of_tile, dtype=torch.int32)
    return Kept(counts, torch.empty(size, dtype=torch.int32), torch.empty(size, dtype=wide))


def _run(
    is_backward: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    a: Tensor,
    mask: Tensor | None,
    setting: Setting,
    output: Tensor | None,
    kept: Kept | None,
    grad: Tensor | None = None,
    grad_query: Tensor | None = None,
    grad_key: Tensor | None = None,
    grad_value: Tensor | None = None,
    grad_mask: Tensor | None = None,
    grad_alpha: Tensor | None = None,
) -> None:
    library = rows.library()
    batch, heads, queries, depth = query.shape
    _, kv_heads, keys, width = value.shape
    of_tile = tile_rows(queries, keys)
    (left, right), k = setting.bounds, setting.k
    call = _CALL.pack(
        *(batch, heads, kv_heads, queries, keys, depth, width),
        *(of_tile, min(keys, 64), k or 0),
        *(_FAR if left is None else left, _FAR if right is None else right, setting.seed),
        *(setting.scale, setting.dropout_p),
        *(a.data_ptr(), a.stride(0) if a.dim() else 0),
        *(0, 0),
        *_described(query),
        *_described(key),
        *_described(value),
        *_described(mask),
        *_described(output),
        *((0, 0, 0) if kept is None else [x.data_ptr() for x in kept]),
        *_described(grad),
        *_described(grad_query),
        *_described(grad_key),
        *_described(grad_value),
        *_described(grad_mask),
        0 if grad_alpha is None else grad_alpha.data_ptr(),
    )
    variant = library.variants[setting.variant]
    rows.check(library.attention(variant, torch.get_num_threads(), is_backward, call))


def _described(x: Tensor | None) -> tuple[int, ...]:
    """The members of `tensor` in attention.h; a dimension of size 1 is broadcast."""
    if x is None:
        return _NO_TENSOR
    return x.data_ptr(), _ELEMENTS[x.dtype], *(0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))
