"""The short way to the C kernel, for an attention call whose tensors the kernel takes as they are.

For short sequences, the checks and the preparation of a call take longer than the kernel. Most of this work
depends only on shapes, strides, dtypes and numbers, so its result is kept for later calls in which these are the same.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from sparse_attn.kernels import dispatch
from sparse_attn.kernels.functions.native import planned_attention
from sparse_attn.kernels.setting import Setting
from sparse_attn.masks import Bounds
from sparse_attn.transforms import is_traced

_CLASSES = (Tensor, torch.nn.Parameter)  # other classes may change the meaning of an operation
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def attend_directly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor,
    k: int | None,
    mask: Tensor | None,
    bounds: Bounds,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor | None:
    """The output of a call of ``ops.attention.attend`` without dropout, soft-cap and sinks; not for compiled code.

    None means that the call must go the ordinary way, which also raises the errors for wrong arguments.
    """
    if not (_is_plain(query) and _is_plain(key) and _is_plain(value) and (mask is None or _is_plain(mask))):
        return None
    per_head = alpha if isinstance(alpha, Tensor) else None
    if type(alpha) is not float and not _is_plain(alpha):
        return None
    if not (scale is None or type(scale) is float) or not (k is None or type(k) is int):
        return None
    if (
        is_traced()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
        or not dispatch.c_computes("cpu")
    ):
        return None
    plan = _plan(
        *(query.shape, query.stride(), query.dtype),
        *(key.shape, key.stride(), key.dtype),
        *(value.shape, value.stride(), value.dtype),
        None if per_head is None else (per_head.shape, per_head.stride(), per_head.dtype),
        None if mask is None else (mask.shape, mask.stride(), mask.dtype),
        *(1.0 if per_head is not None else alpha, k, bounds, scale, bool(enable_gqa)),
    )
    if plan is None:
        return None
    return planned_attention(query, key, value, per_head, mask, None, None, None, plan)


def _is_plain(x: Any) -> bool:
    return type(x) in _CLASSES and x.is_cpu and not is_legacy_batchedtensor(x)


_Sizes = tuple[int, ...]


@functools.lru_cache(maxsize=1024)  # bounded, since lengths may differ from call to call
def _plan(
    query: _Sizes,
    query_strides: _Sizes,
    dtype: torch.dtype,
    key: _Sizes,
    key_strides: _Sizes,
    key_dtype: torch.dtype,
    value: _Sizes,
    value_strides: _Sizes,
    value_dtype: torch.dtype,
    alpha: tuple[_Sizes, _Sizes, torch.dtype] | None,
    mask: tuple[_Sizes, _Sizes, torch.dtype] | None,
    number: float,
    k: int | None,
    bounds: Bounds,
    scale: float | None,
    enable_gqa: bool,
) -> Any:
    """The kernel's plan for tensors of these shapes, strides and dtypes; None if an argument does not fit."""
    if not len(query) == len(key) == len(value) == 4 or not dtype == key_dtype == value_dtype or dtype not in _DTYPES:
        return None
    batch, heads, queries, depth = query
    kv_heads, keys = key[1:3]
    if key != (batch, kv_heads, keys, depth) or value[:3] != key[:3] or 0 in (*query, *key, *value):
        return None
    if heads != kv_heads and (not enable_gqa or heads % kv_heads):
        return None
    if not 0 < number < math.inf or (k is not None and k < 1):
        return None
    if alpha is not None and (alpha[0] != (heads,) or alpha[2] not in _DTYPES):
        return None
    if mask is not None:
        full = (batch, heads, queries, keys)
        fits = len(mask[0]) == 4 and all(size in (1, most) for size, most in zip(mask[0], full, strict=True))
        if not fits or mask[2] not in (torch.bool, *_DTYPES):
            return None
    kernels = dispatch.native_kernels()
    scale = 1 / math.sqrt(depth) if scale is None else scale
    setting = Setting(number - 1, scale, 0.0, bounds.right, k, bounds.left)
    layouts = ((query, query_strides, dtype), (key, key_strides, key_dtype), (value, value_strides, value_dtype))
    of_alpha, of_mask = (None if x is None else kernels.Layout(*x) for x in (alpha, mask))
    return kernels.make_plan(*(kernels.Layout(*x) for x in layouts), of_alpha, of_mask, setting, None)
