"""Attention by the C kernel as one differentiable function, and as a custom operator for ``torch.compile``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_attn.checks import check_alpha
from sparse_attn.kernels import dispatch
from sparse_attn.kernels.alpha import split_alpha
from sparse_attn.kernels.functions.entmax import entmax_rows
from sparse_attn.kernels.setting import Setting
from sparse_attn.masks import causal_mask
from sparse_attn.transforms import values_known


def native_attention(
    query: Tensor, key: Tensor, value: Tensor, alpha: float | Tensor, mask: Tensor | None, setting: Setting
) -> Tensor:
    """Attention on CPU tensors without a matrix of scores.

    Args:
        query: (N, H, L, D).
        key: (N, Hk, S, D), Hk a divisor of H.
        value: (N, Hk, S, Dv).
        alpha: A number or (H,).
        mask: (N or 1, H or 1, L or 1, S or 1), boolean, ``True`` = take part, or floating, added to the scores.
        setting: Everything but ``a``.

    Returns:
        (N, H, L, Dv). A query that sees nothing gets zeros, and so do all gradients of it.
    """
    per_head, a = split_alpha(alpha)
    setting = setting._replace(a=a, scale=float(setting.scale), dropout_p=float(setting.dropout_p))
    seed = torch.randint(2**62, ()) if setting.dropout_p > 0.0 else None
    tensors = (query, key, value, per_head, mask, seed)
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if torch.compiler.is_compiling():
        return _attention(*tensors, *setting, training)[0]
    if training:
        return _Attention.apply(*tensors, setting)
    return _forward(query, key, value, per_head, mask, seed, setting, None)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    setting: Setting,
    kept: Tensor | None,
) -> Tensor:
    if alpha is not None:
        check_alpha(alpha)
    return dispatch.native_kernels().forward(query, key, value, _shifted(alpha), mask, setting, _number(seed), kept)


def _shifted(alpha: Tensor | None) -> Tensor | None:
    return None if alpha is None else alpha.to(torch.float64) - 1


def _number(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed)


def _backward(
    grad: Tensor,
    tensors: Sequence[Tensor | None],
    kept: Tensor | None,
    setting: Setting,
    with_alpha: bool,
    with_mask: bool,
) -> list[Tensor | None]:
    """Gradients of the first five tensors, each in the dtype of its own."""
    query, key, value, alpha, mask, seed = tensors
    arguments = (query, key, value, _shifted(alpha), mask, setting, _number(seed), kept)
    gradients = dispatch.native_kernels().backward(grad, *arguments, with_alpha, with_mask)
    pairs = zip(gradients, tensors, strict=False)
    return [None if x is None or of is None else x.to(of.dtype) for x, of in pairs]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        query, key, value, alpha, mask, seed, ctx.setting = arguments
        kept = dispatch.native_kernels().room_for_kept(query, key)
        output = _forward(query, key, value, alpha, mask, seed, ctx.setting, kept)
        ctx.save_for_backward(query, key, value, alpha, mask, seed, kept)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, kept = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled() or not values_known(grads[0]):
            gradients = _plain_gradients(grads[0], tensors, needed, ctx.setting)
        else:
            gradients = _backward(grads[0], tensors, kept, ctx.setting, needed[3], needed[4])
        return *(gradient if wanted else None for gradient, wanted in zip(gradients, needed, strict=False)), None, None


def _plain_gradients(
    grad: Tensor, tensors: list[Any], needed: tuple[bool, ...], setting: Setting
) -> list[Tensor | None]:
    """The gradients by plain torch, with a matrix of scores: they can be differentiated, and ``grad`` batched."""
    create_graph = torch.is_grad_enabled()
    inputs = [x for x, wanted in zip(tensors, needed, strict=False) if wanted]
    query, key, value, alpha, mask, seed = tensors
    with torch.enable_grad():
        output = plain_attention(query, key, value, alpha, mask, seed, setting)
    gradients = iter(torch.autograd.grad(output, inputs, grad, create_graph=create_graph, materialize_grads=True))
    return [next(gradients) if wanted else None for wanted in needed[:5]]


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    setting: Setting,
) -> Tensor:
    """The same in plain torch with a matrix of scores, the same weights dropped."""
    a, scale, dropout_p, right, k, left = setting
    wide = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query.to(wide) * scale) @ key.to(wide).transpose(-2, -1)
    queries, keys = scores.shape[-2:]
    hidden = torch.zeros((1, 1, queries, keys), dtype=torch.bool)
    if right is not None:
        hidden = hidden | ~causal_mask(queries, keys, offset=right)
    if left is not None:
        hidden = hidden | causal_mask(queries, keys, offset=-left - 1)
    if mask is not None and mask.is_floating_point():
        hidden = hidden | (mask <= torch.finfo(mask.dtype).min)
        scores = scores + mask.to(wide)
    elif mask is not None:
        hidden = hidden | ~mask
    scores = scores.masked_fill(hidden, float("-inf"))
    of_rows = a + 1 if alpha is None else alpha.view(-1, 1, 1)
    weights = entmax_rows(scores, of_rows, torch.finfo(wide).min, None if k is None or k >= keys else k)
    if seed is not None:
        weights = weights * dispatch.native_kernels().multipliers(weights.shape, int(seed), dropout_p).to(wide)
    return (weights @ value.to(wide)).to(query.dtype)


@torch.library.custom_op("sparse_attn::attention_cpu", mutates_args=(), device_types="cpu")
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    a: float,
    scale: float,
    dropout_p: float,
    offset: int | None,
    k: int | None,
    left: int | None,
    training: bool,
) -> tuple[Tensor, Tensor]:
    kept = _room(query, key, training)
    setting = Setting(a, scale, dropout_p, offset, k, left)
    return _forward(query, key, value, alpha, mask, seed, setting, kept if training else None), kept


def _room(query: Tensor, key: Tensor, training: bool) -> Tensor:
    """Memory for what is kept, all of it defined: two calls of the operator have to agree in every entry."""
    if training:
        return dispatch.native_kernels().room_for_kept(query, key).zero_()
    return query.new_empty(0, dtype=torch.int32)


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return dispatch.native_kernels().output_like(query, value.shape[3]), _room(query, key, rest[-1])


@torch.library.custom_op("sparse_attn::attention_cpu_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    kept: Tensor,
    a: float,
    scale: float,
    dropout_p: float,
    offset: int | None,
    k: int | None,
    left: int | None,
    with_alpha: bool,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (query, key, value, alpha, mask, seed)
    setting = Setting(a, scale, dropout_p, offset, k, left)
    gradients = _backward(grad, tensors, kept, setting, with_alpha, with_mask)
    for_query, for_key, for_value, for_alpha, for_mask = (query.new_empty(0) if x is None else x for x in gradients)
    return for_query, for_key, for_value, for_alpha, for_mask


@_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, alpha: Tensor | None, mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with_alpha, with_mask = rest[-2:]
    for_alpha = torch.empty_like(alpha) if with_alpha and alpha is not None else query.new_empty(0)
    for_mask = mask.new_empty(mask.shape) if with_mask and mask is not None else query.new_empty(0)
    like = dispatch.native_kernels().output_like
    for_query, for_key, for_value = (like(x, x.shape[3]) for x in (query, key, value))
    return for_query, for_key, for_value, for_alpha, for_mask


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, a, scale, dropout_p, offset, k, left, _ = inputs
    ctx.setting = (a, scale, dropout_p, offset, k, left)
    ctx.save_for_backward(*tensors, output[1])


def _of_operator(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    gradients = _attention_backward(grads[0], *ctx.saved_tensors, *ctx.setting, needed[3], needed[4])
    return *(x if wanted else None for x, wanted in zip(gradients, needed, strict=False)), *[None] * 8


_attention.register_autograd(_of_operator, setup_context=_setup_context)
