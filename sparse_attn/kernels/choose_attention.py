"""The one place that says what runs an attention call, and brings its tensors into shape for that.

fused        `functions.fused`: without a tensor of scores, in Triton
native       `functions.native`: likewise on a CPU, in C
in blocks    `functions.blockwise`: over blocks of queries, where scores are many
one matrix   `ops.attention`: all scores at once, under every transform, and where the weights are asked for
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from sparse_attn.checks import check_alpha
from sparse_attn.kernels import dispatch
from sparse_attn.kernels.alpha import split_alpha
from sparse_attn.kernels.functions.blockwise import blockwise_attention
from sparse_attn.kernels.functions.fused import fused_attention
from sparse_attn.kernels.functions.native import native_attention
from sparse_attn.kernels.setting import Setting
from sparse_attn.masks import check_mask, dense_mask, described_causal
from sparse_attn.transforms import values_known

# Blocks of queries are faster than one matrix from about this size of the matrix of a head.
_LARGE = 2**18


class Call(NamedTuple):
    """The arguments of an attention call; shapes and meanings as in :func:`sparse_attn.entmax_attention`."""

    query: Tensor
    key: Tensor  # as many heads as the query, or a divisor of them
    value: Tensor
    alpha: float | Tensor  # a number, or a tensor that broadcasts to (H, 1, 1)
    k: int | None  # how many keys a query keeps; None: all
    mask: Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float


def attend_without_weights(call: Call) -> Tensor | None:
    """The output (..., H, L, Dv) of a call that does not need its weights; None where one matrix has to do."""
    if _can_fuse(call):
        return _fused(call)
    if _is_native(call):
        return _native(call)
    if _can_block(call):
        return _in_blocks(call)
    return None


def repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with a head for each head of the query, where one of theirs serves several."""
    if query.dim() < 3 or key.shape[-3] in (1, query.shape[-3]) or query.shape[-3] == 1:
        return key, value
    group = query.shape[-3] // key.shape[-3]
    return key.repeat_interleave(group, -3), value.repeat_interleave(group, -3)


def _can_fuse(call: Call) -> bool:
    """Whether the fused kernels take a call: not in an export, a transform or forward mode, and not in float64."""
    query, key, value = call[:3]
    if call.k is not None or not dispatch.by_triton(_cast(query)):
        return False
    if torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    plain = all(type(x) in (Tensor, torch.nn.Parameter) for x in (query, key, value)) or torch.compiler.is_compiling()
    fits = max(query.shape[-1], value.shape[-1]) <= dispatch.fused_kernels().LARGEST_HEAD
    return plain and fits and min(*query.shape, *key.shape, *value.shape) > 0


def _is_native(call: Call) -> bool:
    """Whether the kernel in C takes a call: not in an export, a transform or forward mode."""
    query, key, value = tensors = call[:3]
    if not dispatch.by_c(query.device) or forward_ad._current_level >= 0:
        return False
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active():
            return False
    elif not all(values_known(x) for x in tensors):
        return False
    return min(*query.shape, *key.shape, *value.shape) > 0


def _can_block(call: Call) -> bool:
    """Whether a call has many scores, no transform is at work, and no gradient is wanted for a mask of their size."""
    if not values_known(call.query) or torch.is_autocast_enabled(call.query.device.type):
        return False
    if call.mask is not None and call.mask.requires_grad:
        return False
    return call.query.shape[-2] * call.key.shape[-2] >= _LARGE


def _fused(call: Call) -> Tensor:
    """By the fused kernels, which take (N, H, L, D), fewer heads of keys and values, and a mask of four dimensions."""
    query, key, value = (_cast(x) for x in call[:3])
    alpha, dropout_p, scale = call.alpha, call.dropout_p, call.scale
    shape = (*_batch(query, key, value), query.shape[-2], key.shape[-2])
    mask, offset = _mask_and_offset(call, shape)
    if mask is not None:
        mask = _four_dimensions(mask, shape)
    if not isinstance(alpha, Tensor):
        check_alpha(alpha)
    heads, key_heads = (1, 1) if query.dim() == 2 else (shape[-3], max(key.shape[-3], value.shape[-3]))
    q, k, v = (_heads(x, shape[:-3], n) for x, n in ((query, heads), (key, key_heads), (value, key_heads)))
    if not isinstance(alpha, Tensor) and alpha == 1:
        output = _softmax(q, k, v, mask, dropout_p, offset, scale)
    else:
        if isinstance(alpha, Tensor):
            alpha = alpha.to(query.device).expand(heads, 1, 1).reshape(heads)
        lengths = None if mask is None else _lengths(mask, len(q), shape[-1])
        output = fused_attention(q, k, v, alpha, mask, dropout_p, offset, scale=scale, key_lengths=lengths)
    return output.reshape(*shape[:-1], value.shape[-1])


def _native(call: Call) -> Tensor:
    """By the kernel in C, which takes what the fused kernels take, and ``k``."""
    query, key, value = (_cast(x) for x in call[:3])
    alpha = call.alpha
    shape = (*_batch(query, key, value), query.shape[-2], key.shape[-2])
    mask, offset = _mask_and_offset(call, shape)
    if mask is not None:
        mask = _four_dimensions(mask, shape)
    heads, key_heads = (1, 1) if query.dim() == 2 else (shape[-3], max(key.shape[-3], value.shape[-3]))
    q, k, v = (_heads(x, shape[:-3], n) for x, n in ((query, heads), (key, key_heads), (value, key_heads)))
    if isinstance(alpha, Tensor):
        alpha = alpha.expand(heads, 1, 1).reshape(heads)
    else:
        check_alpha(alpha)
    setting = Setting(0.0, call.scale, call.dropout_p, offset, call.k)
    output = native_attention(q, k, v, alpha, mask, setting)
    return output if query.dim() == 4 else output.reshape(*shape[:-1], value.shape[-1])


def _in_blocks(call: Call) -> Tensor:
    """In blocks of queries, which take (R, L, D): batch and heads one by one."""
    query, (key, value) = call.query, repeat_heads(*call[:3])
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    shape = (*batch, query.shape[-2], key.shape[-2])
    mask, offset = _mask_and_offset(call, shape)
    if mask is not None:
        mask = mask.expand(shape)
    check_alpha(call.alpha)
    alpha, a = split_alpha(call.alpha)
    if alpha is not None:
        alpha = alpha.expand(*batch, 1, 1).reshape(-1)
    setting = Setting(a, call.scale, call.dropout_p, offset, call.k)
    query, key, value = (x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (query, key, value))
    return blockwise_attention(query, key, value, alpha, mask, setting).view(*shape[:-1], -1)


def _mask_and_offset(call: Call, shape: tuple[int, ...]) -> tuple[Tensor | None, int | None]:
    """The mask, checked against scores of that shape; a causal one as the offset of ``Setting`` in its place."""
    mask = call.mask
    if mask is None:
        return None, 0 if call.is_causal else None
    described = described_causal(mask)
    if described is not None and described[:2] == shape[-2:]:
        return None, described[2]
    mask = dense_mask(mask, call.query.device)
    check_mask(mask, shape)
    return mask, None


def _softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    offset: int | None,
    scale: float,
) -> Tensor:
    """Softmax attention is torch's."""
    if mask is not None and mask.is_floating_point():
        lowest = torch.finfo(mask.dtype).min
        mask = mask.masked_fill(mask <= lowest, float("-inf")).to(query.dtype)
    if offset:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril(offset)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout_p, offset == 0, scale=scale, enable_gqa=grouped
    )


def _cast(x: Tensor) -> Tensor:
    """In the dtype that autocast asks of ``scaled_dot_product_attention``."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    """The batch dimensions and the query's heads, if there are any."""
    if query.dim() == 2:
        return ()
    batch = query.shape[:-3]
    if not batch == key.shape[:-3] == value.shape[:-3]:
        batch = torch.broadcast_shapes(batch, key.shape[:-3], value.shape[:-3])
    return *batch, max(x.shape[-3] for x in (query, key, value))


def _heads(x: Tensor, batch: tuple[int, ...], heads: int) -> Tensor:
    """(N, H, L, D) of a tensor whose batch dimensions and heads broadcast."""
    if x.dim() == 4 and x.shape[:2] == (*batch, heads):
        return x
    return x.expand(*batch, heads, *x.shape[-2:]).reshape(-1, heads, *x.shape[-2:])


def _lengths(mask: Tensor, batch: int, keys: int) -> Tensor | None:
    """Where padding begins, (N,), under a mask that is the same for all heads and queries: nobody looks beyond."""
    if mask.shape[1] != 1 or mask.shape[2] != 1:
        return None
    seen = mask if mask.dtype == torch.bool else ~(mask.detach() <= torch.finfo(mask.dtype).min)
    ends = torch.arange(1, keys + 1, device=mask.device) * seen
    return ends.amax((1, 2, 3)).expand(batch).contiguous()


def _four_dimensions(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask with four dimensions, each of full size or 1: what it broadcasts over stays unwritten."""
    mask = mask[(None,) * (max(len(shape), 4) - mask.dim())]
    batch = mask.shape[:-3]
    if len(batch) > 1:
        mask = mask.expand(*(shape[:-3] if max(batch) > 1 else batch), *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])
    return mask
