"""Chooses the implementation of an attention call, and reshapes the tensors for it.

Before this module, only ``direct`` chooses: it runs the calls whose tensors the C kernel takes as they are.

fused        `functions.fused`: Triton kernels, no tensor of scores
native       `functions.native`: a C kernel for CPUs, no tensor of scores
in blocks    `functions.blockwise`: one block of queries at a time, for many scores
one matrix   `ops.attention`: all scores at once; works under every transform and returns weights
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from sparse_attn.checks import check_alpha, check_number_or_tensor, check_starts, compute_dtype
from sparse_attn.kernels import dispatch
from sparse_attn.kernels.alpha import split_alpha
from sparse_attn.kernels.functions.blockwise import blockwise_attention
from sparse_attn.kernels.functions.fused import fused_attention
from sparse_attn.kernels.functions.native import native_attention
from sparse_attn.kernels.setting import Setting
from sparse_attn.kernels.sinks import with_packed_sinks, with_sink
from sparse_attn.masks import (
    Bounds,
    causal_mask,
    check_mask,
    clear_padding,
    combine_masks,
    dense_mask,
    described_causal,
    with_bounds,
)
from sparse_attn.transforms import needs_plain_operations, values_known

# From about this number of scores per head, blocks of queries are faster than one matrix.
_LARGE = 2**18


class Call(NamedTuple):
    """The arguments of an attention call; shapes and meanings as in :func:`sparse_attn.entmax_attention`."""

    query: Tensor
    key: Tensor  # as many heads as the query, a divisor of that number, or heads that broadcast
    value: Tensor
    alpha: float | Tensor  # a number, or a tensor () or (H,)
    k: int | None  # how many keys a query keeps; None: all
    mask: Tensor | None
    dropout_p: float
    bounds: Bounds  # hide keys in addition to the mask
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None  # (H,)


def choose_attention(call: Call) -> Callable[[Call], Tensor | None] | None:
    """The function that computes the output (..., H, L, Dv) of a call without weights.

    If the choice is one matrix, None is returned, or a function that returns None.
    """
    if _is_native(call):
        return _native
    if _can_fuse(call):
        return _fused
    return _in_blocks if _can_block(call) else None


def attend_packed(call: Call, query_starts: Tensor, key_starts: Tensor) -> Tensor | None:
    """The output of packed sequences in one call of the C kernel; None if the kernel cannot compute them.

    The call has query (1, H, L, D), key (1, Hk, S, D), value (1, Hk, S, Dv) and no mask; the caller has checked the
    dtypes and sizes of the starts. Its bounds count positions within each sequence.
    """
    left, offset = call.bounds
    # A sink, as the first key, would be outside the window.
    if not _is_native(call) or (call.sinks is not None and left is not None):
        return None
    q, k, v, alpha, *_ = _in_heads(call)
    per_head, a = split_alpha(alpha)
    setting = Setting(a, float(call.scale), float(call.dropout_p), offset, call.k, left)
    starts = (query_starts.to(torch.int64).contiguous(), key_starts.to(torch.int64).contiguous())
    if call.sinks is None:
        return native_attention(q, k, v, per_head, None, setting, *starts)
    if not torch.compiler.is_compiling():
        check_starts(starts[1], k.shape[2], "cu_seqlens_k")
    wide = compute_dtype(q)
    longer, key_starts = with_packed_sinks(q.to(wide), k.to(wide), v.to(wide), call.sinks, call.scale, starts[1])
    # Dynamo before torch 2.9 cannot trace `_replace`. There is no window, as tested above.
    setting = Setting(a, 1.0, float(call.dropout_p), None if offset is None else offset + 1, call.k)
    tensors = (longer.query, longer.key, longer.value, per_head, None)
    return native_attention(*tensors, setting, starts[0], key_starts).to(q.dtype)


def one_per_head(alpha: float | Tensor) -> float | Tensor:
    """α of a :class:`Call` in a form that broadcasts to scores (..., H, L, S)."""
    return alpha.view(-1, 1, 1) if isinstance(alpha, Tensor) and alpha.dim() else alpha


def repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with their heads repeated to the number of query heads (grouped-query attention)."""
    if query.dim() < 3 or key.shape[-3] in (1, query.shape[-3]) or query.shape[-3] == 1:
        return key, value
    group = query.shape[-3] // key.shape[-3]
    # Torch before 2.13 exports ``repeat_interleave`` with a fixed length.
    repeated = (x.unsqueeze(-3).expand(*x.shape[:-2], group, *x.shape[-2:]).flatten(-4, -3) for x in (key, value))
    return next(repeated), next(repeated)


def _can_fuse(call: Call) -> bool:
    """Whether the fused kernels accept a call.

    They do not support ``k``, a soft-cap, sinks, float64 and large heads, nor exports, transforms and forward mode.
    """
    query, key, value = call.query, call.key, call.value  # Dynamo before torch 2.9 cannot slice a named tuple
    if call.k is not None or call.softcap is not None or call.sinks is not None:
        return False
    if not dispatch.by_triton(query, autocast_dtype(query)):
        return False
    if needs_plain_operations() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    plain = all(type(x) in (Tensor, torch.nn.Parameter) for x in (query, key, value)) or torch.compiler.is_compiling()
    fits = max(query.shape[-1], value.shape[-1]) <= dispatch.fused_plan().LARGEST_HEAD
    return plain and fits and min(*query.shape, *key.shape, *value.shape) > 0


def _is_native(call: Call) -> bool:
    """Whether the C kernel computes a call: without soft-cap, and not in an export, a transform or forward mode."""
    query, key, value = call.query, call.key, call.value
    if call.softcap is not None or not dispatch.by_c(query.device) or forward_ad._current_level >= 0:
        return False
    compiling = torch.compiler.is_compiling()
    if compiling:
        if needs_plain_operations() or torch._C._are_functorch_transforms_active():
            return False
    elif not values_known(query, key, value):
        return False
    # With one matrix of weights, torch draws the dropout: the same seed drops the same weights as in torch's layer.
    if call.dropout_p > 0 and (compiling or query.shape[-2] * key.shape[-2] < _LARGE):
        return False
    return query.numel() > 0 and key.numel() > 0 and value.numel() > 0


def _can_block(call: Call) -> bool:
    """Whether a call has many scores and is computed in blocks.

    This needs a call without transforms, autocast and empty tensors, a mask without gradient, and no soft-cap together
    with sinks.
    """
    if not values_known(call.query) or torch.is_autocast_enabled(call.query.device.type):
        return False
    # In torch 2.6, reading an attribute of a `CausalBias` fails, so `described_causal` recognises such a mask first.
    if call.mask is not None and described_causal(call.mask) is None and call.mask.requires_grad:
        return False
    if call.softcap is not None and call.sinks is not None:  # blocks would cap the sinks, too
        return False
    if not (call.query.numel() and call.key.numel() and call.value.numel()):
        return False
    return call.query.shape[-2] * call.key.shape[-2] >= _LARGE


class _Heads(NamedTuple):
    """A call in the form that fused and native kernels take; scores have the shape (N, H, L, S)."""

    query: Tensor  # (N, H, L, D)
    key: Tensor  # (N, Hk, S, D), Hk a divisor of H
    value: Tensor  # (N, Hk, S, Dv)
    alpha: float | Tensor  # a number or (H,)
    mask: Tensor | None  # (N or 1, H or 1, L or 1, S or 1)
    bounds: Bounds
    output: tuple[int, ...]  # the shape of the call's output


def _in_heads(call: Call) -> _Heads:
    query, key, value = call.query, call.key, call.value  # Dynamo before torch 2.9 cannot slice a named tuple
    dtype = autocast_dtype(query)
    if dtype is not None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    sizes, key_sizes, value_sizes = query.shape, key.shape, value.shape
    if len(sizes) == 4 and key_sizes[:2] == value_sizes[:2] and sizes[0] == key_sizes[0] and sizes[1] >= key_sizes[1]:
        batch, heads, key_heads = sizes[:1], sizes[1], key_sizes[1]
    else:
        batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
        heads, key_heads = (1, 1)
        if query.dim() > 2:
            key_heads = max(key.shape[-3], value.shape[-3])
            heads = max(query.shape[-3], key_heads)
    shape = (*batch, *(() if len(sizes) == 2 else (heads,)), sizes[-2], key_sizes[-2])
    mask, bounds = _mask_and_bounds(call.mask, call.bounds, shape, query.device)
    if mask is not None:
        mask = _four_dimensions(mask, shape)
    alpha = call.alpha
    if isinstance(alpha, Tensor):
        check_number_or_tensor(alpha, "alpha")
        alpha = alpha.to(query.device).expand(heads)
    else:
        check_alpha(alpha)
    output = (*shape[:-1], value_sizes[-1])
    if len(batch) == 1 and sizes[:2] == (*batch, heads) and key_sizes[:2] == value_sizes[:2] == (*batch, key_heads):
        return _Heads(query, key, value, alpha, mask, bounds, output)
    q, k, v = (
        x.expand(*batch, n, *x.shape[-2:]).reshape(-1, n, *x.shape[-2:])
        for x, n in ((query, heads), (key, key_heads), (value, key_heads))
    )
    return _Heads(q, k, v, alpha, mask, bounds, output)


def _fused(call: Call) -> Tensor | None:
    """Attention by the fused kernels, or by torch if α is the number 1. If a kernel fails: in blocks, or None."""
    q, k, v, alpha, mask, (left, offset), shape = _in_heads(call)
    padding = mask
    if left is not None:
        if mask is not None and mask.shape[1] == 1:
            k, v = clear_padding(k, v, mask)
        mask = _with_left(mask, left, q, k)
    if not isinstance(alpha, Tensor) and alpha == 1:
        return _softmax(q, k, v, mask, call.dropout_p, offset, call.scale).reshape(shape)
    lengths = None if padding is None else _lengths(padding, len(q), k.shape[2])
    tensors, numbers = (q, k, v, alpha, mask), (call.dropout_p, offset)
    if torch.compiler.is_compiling():
        return fused_attention(*tensors, *numbers, scale=call.scale, key_lengths=lengths).reshape(shape)
    with dispatch.kernels_may_fail():
        return fused_attention(*tensors, *numbers, scale=call.scale, key_lengths=lengths).reshape(shape)
    return _in_blocks(call) if _can_block(call) else None


def _native(call: Call) -> Tensor:
    """Attention by the C kernel, which also supports ``k`` and sinks."""
    q, k, v, alpha, mask, (left, offset), shape = _in_heads(call)
    per_head, a = split_alpha(alpha)
    dropout_p = float(call.dropout_p)
    if call.sinks is None:
        setting = Setting(a, float(call.scale), dropout_p, offset, call.k, left)
        output = native_attention(q, k, v, per_head, mask, setting)
    else:
        if left is not None:  # the sink, as the first key, would be outside the bound
            mask = _with_left(mask, left, q, k)
        wide, sinks = compute_dtype(q), call.sinks.expand(q.shape[1])
        longer = with_sink(q.to(wide), k.to(wide), v.to(wide), mask, offset, sinks, call.scale)
        tensors = (longer.query, longer.key, longer.value, per_head, longer.mask)
        output = native_attention(*tensors, Setting(a, 1.0, dropout_p, longer.offset, call.k)).to(q.dtype)
    return output if output.shape == shape else output.reshape(shape)


def _in_blocks(call: Call) -> Tensor:
    """Attention in blocks of queries: batch and heads are flattened to R, half precision is computed in float32."""
    query, key, value = (x.to(compute_dtype(x)) for x in call[:3])
    key, value = repeat_heads(query, key, value)
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    shape = (*batch, query.shape[-2], key.shape[-2])
    mask, (left, offset) = _mask_and_bounds(call.mask, call.bounds, shape, query.device)
    if mask is not None:
        key, value = clear_padding(key, value, mask)
    check_alpha(call.alpha)
    alpha, a = split_alpha(one_per_head(call.alpha))
    if alpha is not None:
        alpha = alpha.expand(*batch, 1, 1).reshape(-1)
    query, key, value = (x.expand(*batch, *x.shape[-2:]) for x in (query, key, value))
    scale = call.scale
    if call.sinks is not None:
        if left is not None:
            mask, left = with_bounds(mask, Bounds(left), shape[-2], shape[-1], query.device), None
        query, key, value, mask, offset = with_sink(query, key, value, mask, offset, call.sinks, scale)
        scale = 1.0
    if mask is not None:
        mask = mask.expand(*batch, query.shape[-2], key.shape[-2])
    setting = Setting(a, scale, call.dropout_p, offset, call.k, left)
    query, key, value = (x.reshape(-1, *x.shape[-2:]) for x in (query, key, value))
    output = blockwise_attention(query, key, value, alpha, mask, setting, call.softcap)
    return output.view(*shape[:-1], -1).to(call.query.dtype)


def _with_left(mask: Tensor | None, left: int, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask of four dimensions that also hides the keys before a left bound, for kernels without this bound."""
    mask = with_bounds(mask, Bounds(left), query.shape[2], key.shape[2], query.device)
    return None if mask is None else mask[(None,) * (4 - mask.dim())]


def _mask_and_bounds(
    mask: Tensor | None, bounds: Bounds, shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor | None, Bounds]:
    """The checked mask, and the bounds; a ``CausalBias`` of the scores' size becomes a bound."""
    described = described_causal(mask)
    if mask is None or (described is not None and bounds.right is None and described[:2] == shape[-2:]):
        return None, bounds if described is None else Bounds(bounds.left, described[2])
    mask = dense_mask(mask, device)
    check_mask(mask, shape)
    return mask, bounds


def _softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    offset: int | None,
    scale: float,
) -> Tensor:
    """Softmax attention, by torch's ``scaled_dot_product_attention``."""
    if mask is not None and mask.is_floating_point():
        lowest = torch.finfo(mask.dtype).min
        mask = mask.masked_fill(mask <= lowest, float("-inf")).to(query.dtype)
    grouped = query.shape[1] != key.shape[1]
    if mask is not None and mask.shape[1] == 1:
        key, value = clear_padding(key, value, mask)
    if offset is not None and (offset != 0 or mask is not None):
        causal = causal_mask(query.shape[-2], key.shape[-2], query.device, offset=offset)
        mask, offset = combine_masks(mask, causal), None
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout_p, offset == 0, scale=scale, enable_gqa=grouped
    )


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast converts the inputs of ``scaled_dot_product_attention``; None: no conversion."""
    # Torch raises an error if it is asked about autocast on the meta device, which has none.
    if x.is_meta or not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(x.device.type)


def _lengths(mask: Tensor, batch: int, keys: int) -> Tensor | None:
    """The position (N,) from which a mask hides all keys: kernels skip these keys.

    None for a mask with a dimension of heads or of queries.
    """
    if mask.shape[1] != 1 or mask.shape[2] != 1:
        return None
    seen = mask if mask.dtype == torch.bool else ~(mask.detach() <= torch.finfo(mask.dtype).min)
    ends = torch.arange(1, keys + 1, device=mask.device) * seen
    return ends.amax((1, 2, 3)).expand(batch).contiguous()


def _four_dimensions(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A view of a mask with four dimensions, each of full size or 1, without expanding those of size 1."""
    mask = mask[(None,) * (max(len(shape), 4) - mask.dim())]
    batch = mask.shape[:-3]
    if len(batch) > 1:
        mask = mask.expand(*(shape[:-3] if max(batch) > 1 else batch), *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])
    return mask
