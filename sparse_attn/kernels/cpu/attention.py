"""Attention in C on CPU tensors, one call for all batch entries and heads.

Half precision is computed in float32 and rounded once. Not differentiable: ``functions.native`` adds gradients.
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
_FAR = 2**40  # larger than any number of keys
_KEPT_PER_ROW = 64  # kept weights per query, on average over a tile

# The members of `attention` in attention.h.
_CALL = struct.Struct("=13q3d3q" + 5 * "6q" + "3q" + 5 * "6q" + "q")
_NO_TENSOR = (0,) * 6
_NOTHING = 5 * _NO_TENSOR


class Starts(NamedTuple):
    """The starts of packed sequences, followed by the total length: (N + 1,) contiguous int64, already checked."""

    query: Tensor
    key: Tensor


def tile_rows(queries: int, keys: int) -> int:
    """How many queries are computed together, so that their scores stay in the second-level cache."""
    return _least(12 * _most(1, _least(4, 8192 // keys)), queries)


def _least(x: int, y: int) -> int:
    """``min``, also of the symbols of a traced call: a branch on them would limit a graph to some of the lengths."""
    return min(x, y) if type(x) is type(y) is int else torch.sym_min(x, y)


def _most(x: int, y: int) -> int:
    """``max``, likewise."""
    return max(x, y) if type(x) is type(y) is int else torch.sym_max(x, y)


def _tiles(query: Tensor, key: Tensor, starts: Starts | None) -> tuple[int, int]:
    """The number of queries and of kept weights for which all tiles together have room."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    size = tile_rows(queries, keys)
    # Each packed sequence may end with a tile that is not full.
    tiles = batch * -(-queries // size) if starts is None else queries // size + len(starts.query) - 1
    places = heads * tiles * size
    return places, places * _least(keys, _KEPT_PER_ROW)


def room_for_kept(query: Tensor, key: Tensor, starts: Starts | None) -> Tensor:
    """Memory for the non-zero weights kept for the backward: at most 64 per query on average.

    The weights are stored consecutively by tiles of queries, followed by the number and the position of each query's
    weights.
    """
    queries, weights = _tiles(query, key, starts)
    words = 2 if query.dtype == torch.float64 else 1
    return query.new_empty((words + 1) * weights + queries, dtype=torch.int32)


def output_like(query: Tensor, width: int) -> Tensor:
    """An empty (N, H, L, width) with the query's order of dimensions in memory, such as sequence first."""
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
    kept: Tensor | None,
    starts: Starts | None = None,
    *,
    variant: str | None = None,
) -> Tensor:
    """The output.

    Args:
        query: (N, H, L, D).
        key: (N, Hk, S, D), Hk a divisor of H.
        value: (N, Hk, S, Dv).
        a: α - 1 of each head, (H,) in float64.
        mask: (N or 1, H or 1, L or 1, S or 1): boolean, ``True`` = visible, or floating, added to the scores.
        setting: The other arguments.
        seed: The seed of the dropout.
        kept: Memory in which the weights are kept for the backward.
        starts: The starts of packed sequences; N is 1 then.
        variant: One of :func:`rows.variants`; None for the widest.
    """
    output = output_like(query, value.shape[3])
    results = (*_described(output), *_addresses(kept, query, key, starts), *_NOTHING, 0)
    _run(False, query, key, value, a, mask, setting, seed, starts, results, variant)
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
    kept: Tensor | None,
    with_alpha: bool,
    with_mask: bool,
    starts: Starts | None = None,
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
    tensors = sum((_described(x) for x in (grad, *grads)), ())
    results = (*_NO_TENSOR, *_addresses(kept, query, key, starts), *tensors, *_broadcast(grad_mask), address)
    _run(True, query, key, value, a, mask, setting, seed, starts, results, variant)
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
    starts: Starts | None,
    results: tuple[int, ...],
    variant: str | None,
) -> None:
    library = rows.library()
    batch, heads, queries, depth = query.shape
    _, kv_heads, keys, width = value.shape
    a_of_all, scale, dropout_p, right, k, left = setting
    sequences = (0, 0)
    if starts is not None:
        batch, sequences = len(starts.query) - 1, (starts.query.data_ptr(), starts.key.data_ptr())
    call = _CALL.pack(
        *(batch, heads, kv_heads, queries, keys, depth, width),
        *(tile_rows(queries, keys), min(keys, _KEPT_PER_ROW), k or 0),
        *(_FAR if left is None else left, _FAR if right is None else right, seed),
        *(scale, dropout_p, a_of_all),
        *(0 if a is None else a.data_ptr(), *sequences),
        *(_described(query) + _described(key) + _described(value) + _broadcast(mask)),
        *results,
    )
    rows.check(library.attention(library.variants[variant], torch.get_num_threads(), is_backward, call))


def _described(x: Tensor | None) -> tuple[int, ...]:
    """The members of the C struct `tensor` in attention.h."""
    return _NO_TENSOR if x is None else (x.data_ptr(), _ELEMENTS[x.dtype], *x.stride())


def _broadcast(x: Tensor | None) -> tuple[int, ...]:
    """The members of the C struct `tensor`, with stride 0 for dimensions of size 1."""
    if x is None:
        return _NO_TENSOR
    strides = (0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), _ELEMENTS[x.dtype], *strides


def _addresses(kept: Tensor | None, query: Tensor, key: Tensor, starts: Starts | None) -> tuple[int, int, int]:
    """The addresses of the number of each query's kept weights, of their positions, and of the weights."""
    if kept is None:
        return 0, 0, 0
    queries, weights = _tiles(query, key, starts)
    start = kept.data_ptr()
    counts = start + weights * (8 if query.dtype == torch.float64 else 4)
    return counts, counts + 4 * queries, start


def multipliers(shape: torch.Size, seed: int, dropout_p: float) -> Tensor:
    """The dropout factors of weights (N, H, L, S): 0 or ``1 / (1 - dropout_p)``, in float64."""
    batch, heads, queries, keys = shape
    output = torch.empty((batch, queries, heads, keys), dtype=torch.float64)
    rows.library().multipliers(seed, dropout_p, 0, batch * queries * heads, keys, output.data_ptr())
    return output.transpose(1, 2)
