"""Attention in C on CPU tensors, one call for all batch entries and heads.

Half precision is computed in float32 and rounded once. Nothing here is differentiable.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_attn.kernels.cpu import rows
from sparse_attn.kernels.setting import Setting

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_ELEMENTS = {**DTYPES, torch.bool: 4}
_FAR = 2**40  # more than there are keys
_KEPT_PER_ROW = 64  # weights, on average over a tile

# The members of `attention` in attention.h.
_CALL = struct.Struct("=13q3d3q" + 5 * "6q" + "3q" + 5 * "6q" + "q")
_NO_TENSOR = (0,) * 6
_NOTHING = 5 * _NO_TENSOR


class Kept(NamedTuple):
    """Weights that are not zero, kept for the backward by tiles of queries: how many each query has, where, which."""

    counts: Tensor
    places: Tensor
    weights: Tensor


def tile_rows(queries: int, keys: int) -> int:
    """How many queries are computed together: their scores stay in the second-level cache."""
    fitting = 48 if keys <= 2048 else 24 if keys <= 4096 else 12
    return max(1, min(fitting, queries))


def room_for_kept(query: Tensor, key: Tensor) -> Kept:
    """Memory for the weights of one call, not more than 64 for a query on average."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    rows_of_tile = tile_rows(queries, keys)
    tiles = batch * heads * -(-queries // rows_of_tile)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    size = (tiles, rows_of_tile * min(keys, _KEPT_PER_ROW))
    counts = query.new_empty((tiles, rows_of_tile), dtype=torch.int32)
    return Kept(counts, query.new_empty(size, dtype=torch.int32), query.new_empty(size, dtype=wide))


def output_like(query: Tensor, width: int) -> Tensor:
    """An empty (N, H, L, width) whose dimensions lie in memory in the order of the query's: sequence first stays so."""
    batch, heads, length, _ = query.shape
    batch_step, head_step, row_step, _ = query.stride()
    if head_step >= row_step:
        strides = (heads * length * width, length * width, width, 1)
    elif batch_step >= row_step:
        strides = (length * heads * width, width, heads * width, 1)
    else:
        strides = (heads * width, width, batch * heads * width, 1)
    return query.new_empty_strided((batch, heads, length, width), strides)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    a: Tensor | None,
    mask: Tensor | None,
    setting: Setting,
    seed: int,
    kept: tuple[Tensor, ...] | None,
    *,
    variant: str | None = None,
) -> Tensor:
    """The output.

    Args:
        query: (N, H, L, D).
        key: (N, Hk, S, D), Hk a divisor of H.
        value: (N, Hk, S, Dv).
        a: α - 1 of each head, (H,) in float64.
        mask: (N or 1, H or 1, L or 1, S or 1): boolean, ``True`` = take part, or floating, added to the scores.
        setting: The numbers that the call is made of.
        seed: Of dropout.
        kept: Where to keep the weights for the backward.
        variant: One of :func:`rows.variants`; None for the widest.
    """
    output = output_like(query, value.shape[3])
    results = (*_described(output), *_addresses(kept), *_NOTHING, 0)
    _run(False, query, key, value, a, mask, setting, seed, results, variant)
    return output


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    a: Tensor | None,
    mask: Tensor | None,
    setting: Setting,
    seed: int,
    kept: tuple[Tensor, ...] | None,
    with_alpha: bool,
    with_mask: bool,
    *,
    variant: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients for query, key, value, α in float64, and the mask in float32 or wider."""
    grad_query, grad_key, grad_value = grads = [output_like(x, x.shape[3]) for x in (query, key, value)]
    grad_alpha = torch.empty_like(a) if with_alpha and a is not None else None
    grad_mask = None
    if with_mask and mask is not None:
        grad_mask = torch.zeros(mask.shape, dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)
    address = 0 if grad_alpha is None else grad_alpha.data_ptr()
    tensors = (number for x in (grad, *grads, grad_mask) for number in _described(x))
    results = (*_NO_TENSOR, *_addresses(kept), *tensors, address)
    _run(True, query, key, value, a, mask, setting, seed, results, variant)
    return grad_query, grad_key, grad_value, grad_alpha, grad_mask


def _run(
    is_backward: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    a: Tensor | None,
    mask: Tensor | None,
    setting: Setting,
    seed: int,
    results: tuple[int, ...],
    variant: str | None,
) -> None:
    library = rows.library()
    batch, heads, queries, depth = query.shape
    _, kv_heads, keys, width = value.shape
    a_of_all, scale, dropout_p, right, k, left = setting
    call = _CALL.pack(
        *(batch, heads, kv_heads, queries, keys, depth, width),
        *(tile_rows(queries, keys), min(keys, _KEPT_PER_ROW), k or 0),
        *(_FAR if left is None else left, _FAR if right is None else right, seed),
        *(scale, dropout_p, a_of_all),
        *(0 if a is None else a.data_ptr(), 0, 0),
        *(_described(query) + _described(key) + _described(value) + _described(mask)),
        *results,
    )
    rows.check(library.attention(library.variants[variant], torch.get_num_threads(), is_backward, call))


def _described(x: Tensor | None) -> tuple[int, ...]:
    """The members of `tensor` in attention.h; a dimension of size 1 is broadcast."""
    if x is None:
        return _NO_TENSOR
    sizes, strides = x.shape, x.stride()
    if 1 in sizes:
        strides = tuple(0 if size == 1 else step for size, step in zip(sizes, strides, strict=True))
    return x.data_ptr(), _ELEMENTS[x.dtype], *strides


def _addresses(kept: tuple[Tensor, ...] | None) -> tuple[int, ...]:
    return (0, 0, 0) if kept is None else tuple(x.data_ptr() for x in kept)


def multipliers(shape: torch.Size, seed: int, dropout_p: float) -> Tensor:
    """What dropout multiplies weights of a shape (N, H, L, S) by: 0 or ``1 / (1 - dropout_p)``, in float64."""
    batch, heads, queries, keys = shape
    output = torch.empty((batch, queries, heads, keys), dtype=torch.float64)
    rows.library().multipliers(seed, dropout_p, 0, batch * queries * heads, keys, output.data_ptr())
    return output.transpose(1, 2)
