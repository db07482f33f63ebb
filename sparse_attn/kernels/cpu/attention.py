"""Attention in C on CPU tensors, one call for all batch entries and heads.

Half precision is computed in float32 and rounded once. Not differentiable: ``functions.native`` adds gradients.
"""

from __future__ import annotations

import functools
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_attn.checks import check_alpha
from sparse_attn.kernels.cpu import rows
from sparse_attn.kernels.setting import Setting, Tensors

_ELEMENTS = {**rows.ELEMENTS, torch.bool: 4}
_FAR = 2**40  # larger than any number of keys

# The structs of attention.h: `attention` without the tensors of the backward, these tensors, and `attention_data`.
_CALL = struct.Struct("=13q3d2q" + 5 * "6q")
_GRADIENTS = struct.Struct("=" + 5 * "6q")
_DATA = struct.Struct("=16q")
_NO_TENSOR = (0,) * 6
_NO_GRADIENTS = bytes(_GRADIENTS.size)
_WRONG_ALPHA = 2


class Layout(NamedTuple):
    """Everything about a tensor except its entries."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Plan(NamedTuple):
    """Everything about a call except its tensors: the same for all calls with tensors of these layouts."""

    setting: Setting
    layouts: tuple[Layout, Layout, Layout]  # of query, key and value
    output: Layout
    room: int  # the number of int32 in the memory for kept weights
    forward: bytes  # the struct `attention`
    grads: tuple[Layout, Layout, Layout]  # of the gradients of query, key and value
    backward: bytes  # the struct `attention` if the upstream gradient is laid out as the output and no mask needs one


def plan_of(tensors: Tensors, setting: Setting) -> Plan:
    """The plan of a call."""
    query, key, value, alpha, mask, _, starts, _ = tensors
    of_alpha = None if alpha is None else layout_of(alpha)
    of_mask = None if mask is None else layout_of(mask)
    sequences = None if starts is None else len(starts) - 1
    return make_plan(layout_of(query), layout_of(key), layout_of(value), of_alpha, of_mask, setting, sequences)


def layout_of(x: Tensor) -> Layout:
    """Shape, strides and dtype of a tensor."""
    return Layout(x.shape, x.stride(), x.dtype)


@functools.lru_cache(maxsize=1024)  # lengths may vary from call to call
def make_plan(
    query: Layout,
    key: Layout,
    value: Layout,
    alpha: Layout | None,
    mask: Layout | None,
    setting: Setting,
    sequences: int | None,
) -> Plan:
    """The plan of calls with tensors of these layouts; ``sequences`` is the number of packed sequences, if any."""
    batch, heads, queries, depth = query.shape
    _, kv_heads, keys, width = value.shape
    output = _layout_like(query, width)
    places, weights = _room(query.shape, keys, sequences)
    a, scale, dropout_p, right, k, left = setting
    forward = _CALL.pack(
        *(batch if sequences is None else sequences, heads, kv_heads, queries, keys, depth, width),
        *(tile_rows(queries, keys), _kept_per_query(keys), places, k or 0),
        *(_FAR if left is None else left, _FAR if right is None else right),
        *(scale, dropout_p, a),
        *((0, 0) if alpha is None else (_ELEMENTS[alpha.dtype], alpha.strides[0])),
        *(_described(query) + _described(key) + _described(value) + _broadcast(mask) + _described(output)),
    )
    layouts = (query, key, value)
    grads = (_layout_like(query, depth), _layout_like(key, depth), _layout_like(value, width))
    backward = forward + _gradients(output, grads, None)
    room = _words(query.dtype, places, weights)
    return Plan(setting, layouts, output, room, forward + _NO_GRADIENTS, grads, backward)


def tile_rows(queries: int, keys: int) -> int:
    """How many queries are computed together, so that their scores stay in the second-level cache."""
    return _least(12 * _most(1, _least(4, 8192 // keys)), queries)


def _kept_per_query(keys: int) -> int:
    """How many weights are kept per query, on average over a tile: all of up to 128 keys, or 64 of more keys."""
    return _least(keys, _most(64, 128 * (128 // keys)))


def _least(x: int, y: int) -> int:
    """The smaller number. In a traced call these are symbols, and a branch would limit the graph to some lengths."""
    return min(x, y) if type(x) is type(y) is int else torch.sym_min(x, y)


def _most(x: int, y: int) -> int:
    """The larger number; see :func:`_least`."""
    return max(x, y) if type(x) is type(y) is int else torch.sym_max(x, y)


def _room(query_shape: tuple[int, ...], keys: int, sequences: int | None) -> tuple[int, int]:
    """The number of queries and of kept weights for which all tiles together have room."""
    batch, heads, queries, _ = query_shape
    size = tile_rows(queries, keys)
    # Each packed sequence may end with a tile that is not full.
    tiles = batch * -(-queries // size) if sequences is None else queries // size + sequences
    places = heads * tiles * size
    return places, places * _kept_per_query(keys)


def _words(dtype: torch.dtype, places: int, weights: int) -> int:
    return (3 if dtype == torch.float64 else 2) * weights + places


def room_for_kept(tensors: Tensors) -> Tensor:
    """Memory for the non-zero weights kept for the backward, see :func:`_kept_per_query`.

    The weights of all tiles of queries come first, then how many weights each query has, then the keys of the weights.
    """
    query, starts = tensors.query, tensors.query_starts
    places, weights = _room(query.shape, tensors.key.shape[2], None if starts is None else len(starts) - 1)
    return query.new_empty(_words(query.dtype, places, weights), dtype=torch.int32)


def output_like(query: Tensor, width: int) -> Tensor:
    """An empty (N, H, L, width) with the query's order of dimensions in memory, such as sequence first."""
    shape, strides, _ = _layout_like(Layout(query.shape, query.stride(), query.dtype), width)
    return query.new_empty_strided(shape, strides)


def _layout_like(x: Layout, width: int) -> Layout:
    batch, heads, length, _ = x.shape
    batch_step, head_step, row_step, _ = x.strides
    if head_step >= row_step:
        strides = (heads * length * width, length * width, width, 1)
    elif batch_step >= row_step:
        strides = (length * heads * width, width, heads * width, 1)
    else:
        strides = (heads * width, width, batch * heads * width, 1)
    return Layout((batch, heads, length, width), strides, x.dtype)


def _empty(layout: Layout, like: Tensor, of: Layout) -> Tensor:
    """An empty tensor of a layout; ``like``, with the layout ``of``, gives the device."""
    if layout.strides == of.strides and layout.shape == of.shape:
        return torch.empty_like(like)  # much faster than the function below
    return like.new_empty_strided(layout.shape, layout.strides)


def forward(tensors: Tensors, plan: Plan, kept: Tensor | None, *, variant: str | None = None) -> Tensor:
    """The output (N, H, L, Dv).

    Args:
        tensors: The tensors of the call.
        plan: The plan of the call.
        kept: Memory in which the weights are kept for the backward; None if no backward follows.
        variant: One of :func:`rows.variants`; None for the last of these.
    """
    output = _empty(plan.output, tensors[0], plan.layouts[0])
    _run(False, tensors, plan.forward, output.data_ptr(), kept, (0, 0, 0, 0, 0, 0), variant)
    return output


def backward(
    grad: Tensor,
    tensors: Tensors,
    plan: Plan,
    kept: Tensor | None,
    with_alpha: bool,
    with_mask: bool,
    *,
    variant: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients for query, key, value and α, each in the dtype of its tensor, and for the mask in float32 or wider."""
    query, key, value, alpha, mask, *_ = tensors
    layouts, grads = plan.layouts, plan.grads
    grad_query = _empty(grads[0], query, layouts[0])
    grad_key, grad_value = _empty(grads[1], key, layouts[1]), _empty(grads[2], value, layouts[2])
    grad_alpha = alpha.new_empty(alpha.shape) if with_alpha and alpha is not None else None
    grad_mask, call = None, plan.backward
    if with_mask and mask is not None:
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        grad_mask = query.new_zeros(mask.shape, dtype=wide)
    if grad_mask is not None or grad.stride() != plan.output.strides:
        of_mask = None if grad_mask is None else layout_of(grad_mask)
        call = plan.forward[: _CALL.size] + _gradients(layout_of(grad), grads, of_mask)
    gradients = (
        grad.data_ptr(),
        grad_query.data_ptr(),
        grad_key.data_ptr(),
        grad_value.data_ptr(),
        0 if grad_mask is None else grad_mask.data_ptr(),
        0 if grad_alpha is None else grad_alpha.data_ptr(),
    )
    _run(True, tensors, call, 0, kept, gradients, variant)
    return grad_query, grad_key, grad_value, grad_alpha, grad_mask


def _run(
    is_backward: bool,
    tensors: Tensors,
    call: bytes,
    output: int,
    kept: Tensor | None,
    gradients: tuple[int, ...],
    variant: str | None,
) -> None:
    library = rows.library()
    query, key, value, alpha, mask, seed, query_starts, key_starts = tensors
    data = _DATA.pack(
        0 if seed is None else int(seed),
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        output,
        0 if alpha is None else alpha.data_ptr(),
        0 if query_starts is None else query_starts.data_ptr(),
        0 if key_starts is None else key_starts.data_ptr(),
        0 if kept is None else kept.data_ptr(),
        *gradients,
    )
    failed = library.attention(library.variants[variant], torch.get_num_threads(), is_backward, call, data)
    if failed:
        if failed == _WRONG_ALPHA and alpha is not None:
            check_alpha(alpha)
        rows.check(failed)


def _gradients(grad: Layout, grads: tuple[Layout, ...], grad_mask: Layout | None) -> bytes:
    """The last members of the struct `attention`."""
    return _GRADIENTS.pack(*sum((_described(x) for x in (grad, *grads)), ()), *_broadcast(grad_mask))


def _described(x: Layout) -> tuple[int, ...]:
    """The members of the C struct `tensor` in attention.h, without an address."""
    return 0, _ELEMENTS[x.dtype], *x.strides


def _broadcast(x: Layout | None) -> tuple[int, ...]:
    """The members of the C struct `tensor`, with stride 0 for dimensions of size 1."""
    if x is None:
        return _NO_TENSOR
    strides = (0 if size == 1 else step for size, step in zip(x.shape, x.strides, strict=True))
    return 0, _ELEMENTS[x.dtype], *strides


def multipliers(shape: torch.Size, seed: int, dropout_p: float) -> Tensor:
    """The dropout factors of weights (N, H, L, S): 0 or ``1 / (1 - dropout_p)``, in float64."""
    batch, heads, queries, keys = shape
    output = torch.empty((batch, queries, heads, keys), dtype=torch.float64, device="cpu")
    rows.library().multipliers(seed, dropout_p, 0, batch * queries * heads, keys, output.data_ptr())
    return output.transpose(1, 2)
