"""Attention by the C kernel as one differentiable function, and as a custom operator for ``torch.compile``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn.checks import check_alpha
from sparse_attn.kernels.cpu import attention
from sparse_attn.kernels.cpu.attention import Kept, Setting
from sparse_attn.kernels.functions.entmax import entmax_rows
from sparse_attn.masks import causal_mask
from sparse_attn.transforms import values_known


def native_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    scale: float,
    k: int | None = None,
    left: int | None = None,
    right: int | None = None,
) -> Tensor:
    """Attention on CPU tensors without a matrix of scores.

    Args:
        query: (N, H, L, D).
        key: (N, Hk, S, D), Hk a divisor of H.
        value: (N, Hk, S, Dv).
        alpha: A number or (H,).
        mask: (N or 1, H or 1, L or 1, S or 1), boolean, ``True`` = take part, or floating, added to the scores.
        dropout_p: Probability that a weight is dropped.
        scale: Factor of the scores.
        k: Each query keeps its ``k`` best keys; None for all.
        left: Query ``i`` sees no key before ``i - left``.
        right: Query ``i`` sees no key after ``i + right``.

    Returns:
        (N, H, L, Dv). A query that sees nothing gets zeros, and so do all gradients of it.
    """
    per_head, a = (alpha, 0.0) if isinstance(alpha, Tensor) else (None, float(alpha) - 1)
    seed = torch.randint(2**62, ()) if dropout_p > 0.0 else None
    tensors = (query, key, value, per_head, mask, seed)
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    setting = (a, float(scale), k, left, right, float(dropout_p))
    if torch.compiler.is_compiling():
        return _attention(*tensors, *setting, training)[0]
    if training:
        return _Attention.apply(*tensors, setting)
    return _forward(*tensors, setting, None)


_Numbers = tuple[float, float, int | None, int | None, int | None, float]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    numbers: _Numbers,
    kept: Kept | None,
) -> Tensor:
    if alpha is not None:
        check_alpha(alpha)
    return attention.forward(query, key, value, _shifted(alpha), mask, _setting(numbers, seed), kept)


def _shifted(alpha: Tensor | None) -> Tensor | None:
    return None if alpha is None else alpha.to(torch.float64) - 1


def _setting(numbers: _Numbers, seed: Tensor | None) -> Setting:
    return Setting(*numbers, 0 if seed is None else int(seed))


def _backward(
    grad: Tensor, tensors: tuple[Any, ...], kept: Kept, numbers: _Numbers, with_alpha: bool, with_mask: bool
) -> list[Tensor | None]:
    """Gradients of the first five tensors, each in the dtype of its own."""
    query, key, value, alpha, mask, seed = tensors
    arguments = (query, key, value, _shifted(alpha), mask, _setting(numbers, seed), kept)
    gradients = attention.backward(grad, *arguments, with_alpha, with_mask)
    pairs = zip(gradients, tensors[:5], strict=True)
    return [None if gradient is None else gradient.to(tensor.dtype) for gradient, tensor in pairs]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.numbers = arguments
        kept = attention.room_for_kept(tensors[0], tensors[1])
        output = _forward(*tensors, ctx.numbers, kept)
        ctx.save_for_backward(*tensors, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, counts, places, weights = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled() or not values_known(grads[0]):
            gradients = _plain_gradients(grads[0], tensors, needed, ctx.numbers)
        else:
            kept = Kept(counts, places, weights)
            gradients = _backward(grads[0], tensors, kept, ctx.numbers, needed[3], needed[4])
        return *(gradient if wanted else None for gradient, wanted in zip(gradients, needed, strict=False)), None, None


def _plain_gradients(
    grad: Tensor, tensors: list[Any], needed: tuple[bool, ...], numbers: _Numbers
) -> list[Tensor | None]:
    """The gradients by plain torch, with a matrix of scores: they can be differentiated, and ``grad`` batched."""
    create_graph = torch.is_grad_enabled()
    inputs = [x for x, wanted in zip(tensors, needed, strict=False) if wanted]
    with torch.enable_grad():
        output = plain_attention(*tensors, numbers)
    gradients = iter(torch.autograd.grad(output, inputs, grad, create_graph=create_graph, materialize_grads=True))
    return [next(gradients) if wanted else None for wanted in needed[:5]]


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    numbers: _Numbers,
) -> Tensor:
    """The same in plain torch with a matrix of scores, the same weights dropped."""
    a, scale, k, left, right, dropout_p = numbers
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
        weights = weights * attention.multipliers(weights.shape, int(seed), dropout_p).to(wide)
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
    k: int | None,
    left: int | None,
    right: int | None,
    dropout_p: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept = attention.room_for_kept(query, key) if training else _no_room(query)
    numbers = (a, scale, k, left, right, dropout_p)
    return _forward(query, key, value, alpha, mask, seed, numbers, kept if training else None), *kept


def _no_room(query: Tensor) -> Kept:
    return Kept(query.new_empty(0, dtype=torch.int32), query.new_empty(0, dtype=torch.int32), query.new_empty(0))


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept = attention.room_for_kept(query, key) if rest[-1] else _no_room(query)
    return attention.output_like(query, value.shape[3]), *kept


@torch.library.custom_op("sparse_attn::attention_cpu_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    counts: Tensor,
    places: Tensor,
    weights: Tensor,
    a: float,
    scale: float,
    k: int | None,
    left: int | None,
    right: int | None,
    dropout_p: float,
    with_alpha: bool,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (query, key, value, alpha, mask, seed)
    kept = Kept(counts, places, weights)
    gradients = _backward(grad, tensors, kept, (a, scale, k, left, right, dropout_p), with_alpha, with_mask)
    for_query, for_key, for_value, for_alpha, for_mask = (query.new_empty(0) if x is None else x for x in gradients)
    return for_query, for_key, for_value, for_alpha, for_mask


@_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, alpha: Tensor | None, mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with_alpha, with_mask = rest[-2:]
    for_alpha = torch.empty_like(alpha) if with_alpha and alpha is not None else query.new_empty(0)
    for_mask = mask.new_empty(mask.shape) if with_mask and mask is not None else query.new_empty(0)
    for_query, for_key, for_value = (attention.output_like(x, x.shape[3]) for x in (query, key, value))
    return for_query, for_key, for_value, for_alpha, for_mask


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.a, ctx.scale, ctx.k, ctx.left, ctx.right, ctx.dropout_p, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _of_operator(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    numbers = (ctx.a, ctx.scale, ctx.k, ctx.left, ctx.right, ctx.dropout_p)
    gradients = _attention_backward(grads[0], *ctx.saved_tensors, *numbers, needed[3], needed[4])
    return *(x if wanted else None for x, wanted in zip(gradients, needed, strict=False)), *[None] * 8


_attention.register_autograd(_of_operator, setup_context=_setup_context)
