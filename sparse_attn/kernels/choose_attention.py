"""Which attention the fused kernels compute, and how its tensors are brought into the shape that they take."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from sparse_attn.checks import check_alpha
from sparse_attn.kernels import dispatch
from sparse_attn.kernels.functions.fused import fused_attention
from sparse_attn.kernels.triton.attention.plan import LARGEST_HEAD
from sparse_attn.masks import check_mask, described_causal
from sparse_attn.versions import is_exporting


def can_fuse(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the fused kernels take these: not in an export, a transform or forward mode, and not in float64."""
    if is_exporting() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if not dispatch.by_triton(_cast(query)):
        return False
    plain = all(type(x) in (Tensor, torch.nn.Parameter) for x in (query, key, value)) or torch.compiler.is_compiling()
    sizes = (query.shape[-1], value.shape[-1])
    return plain and max(sizes) <= LARGEST_HEAD and min(*query.shape, *key.shape, *value.shape) > 0


def fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """Attention of any number of batch dimensions; key and value may have fewer heads, a divisor of the query's.

    ``alpha`` is a number or a tensor that broadcasts to (H, 1, 1).
    """
    query, key, value = _cast(query), _cast(key), _cast(value)
    shape = (*_batch(query, key, value), query.shape[-2], key.shape[-2])
    offset = 0 if is_causal else None
    if described := described_causal(attn_mask):
        *sizes, offset = described
        if tuple(sizes) != shape[-2:]:
            raise ValueError(f"attn_mask must broadcast to the scores {shape}, got shape {tuple(sizes)}")
        attn_mask = None
    if attn_mask is not None:
        check_mask(attn_mask, shape)
        attn_mask = _four_dimensions(attn_mask, shape)
    if not isinstance(alpha, Tensor):
        check_alpha(alpha)
    heads, key_heads = (1, 1) if query.dim() == 2 else (shape[-3], max(key.shape[-3], value.shape[-3]))
    q, k, v = (_heads(x, shape[:-3], n) for x, n in ((query, heads), (key, key_heads), (value, key_heads)))
    if not isinstance(alpha, Tensor) and alpha == 1:
        output = _softmax(q, k, v, attn_mask, dropout_p, offset, scale)
    else:
        if isinstance(alpha, Tensor):
            alpha = alpha.to(query.device).expand(heads, 1, 1).reshape(heads)
        lengths = None if attn_mask is None else _lengths(attn_mask, len(q), shape[-1])
        output = fused_attention(q, k, v, alpha, attn_mask, dropout_p, offset, scale=scale, key_lengths=lengths)
    return output.reshape(*shape[:-1], value.shape[-1])


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
    batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    if query.dim() == 2:
        return ()
    return *batch, max(x.shape[-3] for x in (query, key, value))


def _heads(x: Tensor, batch: tuple[int, ...], heads: int) -> Tensor:
    """(N, H, L, D) of a tensor whose batch dimensions and heads broadcast."""
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
