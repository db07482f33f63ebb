"""Fused attention as one differentiable function, and as a custom operator for ``torch.compile``.

Triton is imported only when a kernel is called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn.kernels import dispatch
from sparse_attn.kernels.alpha import split_alpha
from sparse_attn.kernels.functions.entmax import entmax_rows
from sparse_attn.kernels.setting import Setting
from sparse_attn.masks import clear_padding
from sparse_attn.transforms import values_known

# Above about this α - 1, ``p^(2-α)`` of a small weight, and the gradient of its score, would overflow in float16.
_STEEP = 3.0


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    offset: int | None = None,
    *,
    scale: float,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """α-entmax attention without a tensor of scores.

    Args:
        query: (N, H, L, D).
        key: (N, Hk, S, D), Hk a divisor of H.
        value: (N, Hk, S, Dv).
        alpha: A number or (H,). A value out of range gives NaN: a check would make the host wait for the device.
        mask: (N or 1, H or 1, L or 1, S or 1), boolean, ``True`` = visible, or floating, added to the scores.
        dropout_p: Probability that a weight is dropped.
        offset: Query ``i`` sees the keys up to ``i + offset`` (causal). None: all keys.
        scale: Factor of the scores.
        key_lengths: (N,), the number of keys without the padding at the end; integers on the query's device.

    Returns:
        (N, H, L, Dv). A query with no visible key gets zeros and zero gradients.
    """
    per_head, a = split_alpha(alpha)
    if query.dtype == torch.float16 and per_head is None and a > _STEEP:
        wide = (query.float(), key.float(), value.float())
        how: dict[str, Any] = {"scale": scale, "key_lengths": key_lengths}
        return fused_attention(*wide, alpha, mask, dropout_p, offset, **how).to(query.dtype)
    if scale <= 0:  # the kernels compare products before scaling, which needs a positive scale
        query, scale = (query * 0, 1.0) if scale == 0 else (-query, -scale)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    seed = None
    if dropout_p > 0.0:  # on the device, so that a captured graph draws a new seed at every replay
        seed = torch.randint(2**31 - 1, (1,), device=query.device)
    tensors = (query, key, value, per_head, mask, key_lengths, seed)
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    setting = Setting(a, float(scale), float(dropout_p), offset)  # Triton would compile separate kernels for an int
    if torch.compiler.is_compiling():
        return _attention(*tensors, a, setting.scale, setting.dropout_p, offset, training)[0]
    if training:
        return _Attention.apply(*tensors, setting)
    return dispatch.fused_kernels().forward(*tensors, setting, False)[0]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.setting = arguments
        ctx.backend = dispatch.forced_backend()
        output, *kept = dispatch.fused_kernels().forward(*tensors, ctx.setting, True)
        ctx.save_for_backward(*tensors, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, second, statistics, flags = ctx.saved_tensors
        gradients = None
        with dispatch.backend_of_forward(ctx.backend):
            if not torch.is_grad_enabled() and values_known(grads[0]):
                arguments = (*tensors, second, statistics, flags, ctx.setting, *ctx.needs_input_grad[3:5])
                with dispatch.kernels_may_fail():
                    gradients = _to_inputs(dispatch.fused_kernels().backward(grads[0], *arguments), tensors)
            if gradients is None:
                gradients = _plain_gradients(grads[0], tensors, ctx.setting)
        needed = zip(gradients, ctx.needs_input_grad[:5], strict=True)
        return *(gradient if wanted else None for gradient, wanted in needed), None, None, None


def _to_inputs(gradients: tuple[Tensor, ...], tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients in the dtypes of their inputs: the kernels return the gradients of α and of a mask in float32."""
    pairs = zip(gradients, tensors[:5], strict=True)
    return [None if tensor is None else gradient.to(tensor.dtype) for gradient, tensor in pairs]


def _plain_gradients(grad: Tensor, tensors: list[Any], setting: Setting) -> list[Tensor | None]:
    """The gradients by plain torch, with a matrix of scores: differentiable, and ``grad`` may be batched."""
    inputs = [x for x in tensors[:5] if x is not None and x.requires_grad]
    query, key, value, alpha, mask, lengths, seed = tensors
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        output = plain_attention(query, key, value, alpha, mask, lengths, seed, setting)
    how = {"create_graph": create_graph, "materialize_grads": True}
    gradients = iter(torch.autograd.grad(output, inputs, grad, **how))
    return [None if x is None or not x.requires_grad else next(gradients) for x in tensors[:5]]


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    setting: Setting,
) -> Tensor:
    """The kernels' result in plain torch, with a matrix of scores; dropout drops the same weights."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    queries, keys = query.shape[2], key.shape[2]
    visible = []
    if lengths is not None:
        visible.append(torch.arange(keys, device=query.device) < lengths.view(-1, 1, 1, 1))
    if mask is not None:
        visible.append(~(mask <= torch.finfo(mask.dtype).min) if mask.is_floating_point() else mask != 0)
    for one in visible:
        key, value = clear_padding(key, value, one)
    if setting.offset is not None:
        visible.append(torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device).tril(setting.offset))
    scores = (query.float() @ key.float().transpose(-2, -1)) * setting.scale
    if mask is not None and mask.is_floating_point():
        scores = scores + mask
    for one in visible:
        scores = scores.masked_fill(~one, float("-inf"))
    of_rows = setting.a + 1 if alpha is None else alpha.view(-1, 1, 1)
    weights = entmax_rows(scores, of_rows, torch.finfo(scores.dtype).min)
    if seed is not None:
        weights = weights * dispatch.fused_kernels().multipliers(weights, seed, setting.dropout_p)
    return (weights @ value.float()).to(query.dtype)


@torch.library.custom_op("sparse_attn::attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    a: float,
    scale: float,
    dropout_p: float,
    offset: int | None,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    setting = Setting(a, scale, dropout_p, offset)
    return dispatch.fused_kernels().forward(query, key, value, alpha, mask, lengths, seed, setting, training)


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    alpha, a, training = rest[0], rest[4], rest[-1]
    output = query.new_empty(*query.shape[:-1], value.shape[-1])
    return output, *dispatch.fused_plan().kept(query, key, value, alpha, a, training)


@torch.library.custom_op("sparse_attn::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    second: Tensor,
    statistics: Tensor,
    flags: Tensor,
    a: float,
    scale: float,
    dropout_p: float,
    offset: int | None,
    with_alpha: bool,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (query, key, value, alpha, mask, lengths, seed, second, statistics, flags)
    return dispatch.fused_kernels().backward(
        grad, *tensors, Setting(a, scale, dropout_p, offset), with_alpha, with_mask
    )


@_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, alpha: Tensor | None, mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with_alpha, with_mask = rest[-2:]
    for_alpha = query.new_empty(query.shape[1] if with_alpha else 0, dtype=torch.float32)
    for_mask = query.new_empty(mask.shape if with_mask and mask is not None else 0, dtype=torch.float32)
    for_query, for_key, for_value = (x.new_empty(x.shape) for x in (query, key, value))
    return for_query, for_key, for_value, for_alpha, for_mask


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.a, ctx.scale, ctx.dropout_p, ctx.offset, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _of_operator(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, second, statistics, flags = ctx.saved_tensors
    setting = (ctx.a, ctx.scale, ctx.dropout_p, ctx.offset)
    arguments = (*tensors, second, statistics, flags, *setting, *ctx.needs_input_grad[3:5])
    gradients = _to_inputs(_attention_backward(grads[0], *arguments), tensors)
    needed = zip(gradients, ctx.needs_input_grad[:5], strict=True)
    return *(gradient if wanted else None for gradient, wanted in needed), *[None] * 7


_attention.register_autograd(_of_operator, setup_context=_setup_context)
