"""Attention by the C kernel as one differentiable function, and as a custom operator for ``torch.compile``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn.checks import check_starts
from sparse_attn.kernels import dispatch
from sparse_attn.kernels.functions.entmax import entmax_rows
from sparse_attn.kernels.setting import Setting, Tensors
from sparse_attn.transforms import values_known


def native_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    setting: Setting,
    query_starts: Tensor | None = None,
    key_starts: Tensor | None = None,
) -> Tensor:
    """Attention on CPU tensors without a matrix of scores.

    Args:
        query: (N, H, L, D).
        key: (N, Hk, S, D), Hk a divisor of H.
        value: (N, Hk, S, Dv).
        alpha: (H,); None for the number in ``setting``.
        mask: (N or 1, H or 1, L or 1, S or 1), boolean, ``True`` = visible, or floating, added to the scores.
        setting: The other arguments.
        query_starts: Starts of packed sequences along L, followed by L: integers; N must be 1 then.
        key_starts: Starts of packed sequences along S, followed by S.

    Returns:
        (N, H, L, Dv). A query with no visible key gets zeros and zero gradients.
    """
    seed = torch.randint(2**62, (), device=query.device) if setting.dropout_p > 0.0 else None
    tensors = Tensors(query, key, value, alpha, mask, seed, query_starts, key_starts)
    if torch.compiler.is_compiling():
        return _attention(*tensors, *setting, _needs_gradients(query, key, value, alpha, mask))[0]
    _check_starts(tensors)
    plan = dispatch.native_kernels().plan_of(tensors, setting)
    return planned_attention(*tensors, plan)


def planned_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    plan: Any,
) -> Tensor:
    """:func:`native_attention` with a given plan of the kernel; must not be called in a transform."""
    if _needs_gradients(query, key, value, alpha, mask):
        # The same as `_Attention.apply`, which would test again whether a transform is active.
        return _apply(query, key, value, alpha, mask, seed, query_starts, key_starts, plan)
    tensors = Tensors(query, key, value, alpha, mask, seed, query_starts, key_starts)
    output: Tensor = dispatch.native_kernels().forward(tensors, plan, None)
    return output


def _needs_gradients(query: Tensor, key: Tensor, value: Tensor, alpha: Tensor | None, mask: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or (alpha is not None and alpha.requires_grad)
        or (mask is not None and mask.requires_grad)
    )


def _check_starts(tensors: Tensors) -> None:
    if tensors.query_starts is not None and tensors.key_starts is not None:
        check_starts(tensors.query_starts, tensors.query.shape[2], "cu_seqlens_q")
        check_starts(tensors.key_starts, tensors.key.shape[2], "cu_seqlens_k")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        tensors, ctx.plan = arguments[:-1], arguments[-1]
        kept = arguments[0].new_empty(ctx.plan.room, dtype=torch.int32)
        output: Tensor = dispatch.native_kernels().forward(tensors, ctx.plan, kept)
        ctx.save_for_backward(*tensors, kept)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad
        tensors, kept = Tensors(*saved[:-1]), saved[-1]
        if torch.is_grad_enabled() or not values_known(grads[0]):
            with dispatch.backend_of_forward("compiled"):  # this class computes only by the C kernels
                gradients = _plain_gradients(grads[0], tensors, needed, ctx.plan.setting)
        else:
            gradients = _backward(grads[0], tensors, ctx.plan, kept, needed[3], needed[4])
        if not (needed[0] and needed[1] and needed[2]):
            gradients = tuple(x if wanted else None for x, wanted in zip(gradients, needed, strict=False))
        return *gradients, None, None, None, None


_apply = super(torch.autograd.Function, _Attention).apply


def _backward(
    grad: Tensor, tensors: Tensors, plan: Any, kept: Tensor | None, with_alpha: bool, with_mask: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of the first five tensors, each in the dtype of its tensor."""
    gradients: tuple[Tensor | None, ...]
    gradients = dispatch.native_kernels().backward(grad, tensors, plan, kept, with_alpha, with_mask)
    if gradients[4] is None or tensors.mask is None:
        return gradients
    return *gradients[:4], gradients[4].to(tensors.mask.dtype)


def _plain_gradients(
    grad: Tensor, tensors: Tensors, needed: tuple[bool, ...], setting: Setting
) -> tuple[Tensor | None, ...]:
    """The gradients by plain torch, with a matrix of scores: differentiable, and ``grad`` may be batched."""
    create_graph = torch.is_grad_enabled()
    inputs = [x for x, wanted in zip(tensors, needed, strict=False) if wanted and x is not None]
    with torch.enable_grad():
        output = plain_attention(tensors, setting)
    gradients = iter(torch.autograd.grad(output, inputs, grad, create_graph=create_graph, materialize_grads=True))
    return tuple(next(gradients) if wanted else None for wanted in needed[:5])


def plain_attention(tensors: Tensors, setting: Setting) -> Tensor:
    """The kernel's result in plain torch, with a matrix of scores; dropout drops the same weights."""
    query, key, value, alpha, mask, seed, query_starts, key_starts = tensors
    a, scale, dropout_p, right, k, left = setting
    wide = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query.to(wide) * scale) @ key.to(wide).transpose(-2, -1)
    queries, keys = scores.shape[-2:]
    place = torch.arange(queries, device=query.device)[:, None]
    key_place = torch.arange(keys, device=query.device)
    hidden = torch.zeros((1, 1, queries, keys), dtype=torch.bool, device=query.device)
    if query_starts is not None and key_starts is not None:
        sequence = torch.bucketize(place, query_starts, right=True)
        hidden = hidden | (sequence != torch.bucketize(key_place, key_starts, right=True))
        place, key_place = place - query_starts[sequence - 1], key_place - key_starts[sequence - 1]
    if right is not None:
        hidden = hidden | (key_place > place + right)
    if left is not None:
        hidden = hidden | (key_place < place - left)
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
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    a: float,
    scale: float,
    dropout_p: float,
    offset: int | None,
    k: int | None,
    left: int | None,
    training: bool,
) -> tuple[Tensor, Tensor]:
    tensors = Tensors(query, key, value, alpha, mask, seed, query_starts, key_starts)
    _check_starts(tensors)
    kept = _room(tensors, training)
    plan = dispatch.native_kernels().plan_of(tensors, Setting(a, scale, dropout_p, offset, k, left))
    return dispatch.native_kernels().forward(tensors, plan, kept if training else None), kept


def _room(tensors: Tensors, training: bool) -> Tensor:
    """Memory for the kept weights, set to zero: the kernel writes only a part, but two calls must return the same."""
    if training:
        return dispatch.native_kernels().room_for_kept(tensors).zero_()
    return tensors.query.new_empty(0, dtype=torch.int32)


@_attention.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    tensors = Tensors(*arguments[:8])
    output = dispatch.native_kernels().output_like(tensors.query, tensors.value.shape[3])
    return output, _room(tensors, arguments[-1])


@torch.library.custom_op("sparse_attn::attention_cpu_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
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
    tensors = Tensors(query, key, value, alpha, mask, seed, query_starts, key_starts)
    plan = dispatch.native_kernels().plan_of(tensors, Setting(a, scale, dropout_p, offset, k, left))
    gradients = _backward(grad, tensors, plan, kept, with_alpha, with_mask)
    for_query, for_key, for_value, for_alpha, for_mask = (query.new_empty(0) if x is None else x for x in gradients)
    return for_query, for_key, for_value, for_alpha, for_mask


@_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, alpha: Tensor | None, mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with_alpha, with_mask = rest[-2:]
    for_alpha = alpha.new_empty(alpha.shape) if with_alpha and alpha is not None else query.new_empty(0)
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
    return *(x if wanted else None for x, wanted in zip(gradients, needed, strict=False)), *[None] * 10


_attention.register_autograd(_of_operator, setup_context=_setup_context)
