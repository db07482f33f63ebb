"""Attention over blocks of queries: weights are made again in the backward, and memory is linear in the length.

In blocks the scores also stay in the cache, and the zeros of the weights are skipped: where a weight is zero, its value
is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_attn.checks import check_alpha, compute_dtype
from sparse_attn.kernels import dispatch
from sparse_attn.kernels.dropout import dropout_noise
from sparse_attn.kernels.functions.entmax import entmax_rows, shifted
from sparse_attn.kernels.plain import products as dense_products
from sparse_attn.masks import apply_mask

_QUERIES = 256


class Setting(NamedTuple):
    """What there is beside query, key, value and α: one α for all rows, where there is no tensor of them."""

    alpha: float
    k: int | None
    mask: Tensor | None  # (..., L, S), whose first dimensions make R; internal form, without gradient
    dropout_p: float
    is_causal: bool
    scale: float


def blockwise_attention(query: Tensor, key: Tensor, value: Tensor, alpha: Tensor | None, setting: Setting) -> Tensor:
    """Attention of R pairs of batch and head, each by itself.

    Args:
        query: (R, L, D).
        key: (R, S, D).
        value: (R, S, Dv).
        alpha: (R,), or None for the number in ``setting``.
        setting: Everything else.

    Returns:
        (R, L, Dv).
    """
    check_alpha(setting.alpha if alpha is None else alpha)
    return _Blockwise.apply(query, key, value, alpha, setting)


class _Block(NamedTuple):
    row: int
    queries: slice
    keys: slice


def _blocks(query: Tensor, key: Tensor, is_causal: bool) -> Iterator[_Block]:
    """Blocks of queries, with the keys that a causal one can see."""
    length, keys = query.shape[1], key.shape[1]
    for row in range(len(query)):
        for start in range(0, length, _QUERIES):
            stop = min(start + _QUERIES, length)
            yield _Block(row, slice(start, stop), slice(0, min(stop, keys) if is_causal else keys))


def _scores(query: Tensor, key: Tensor, block: _Block, setting: Setting, buffer: Tensor | None) -> Tensor:
    """Scores (queries, keys) of a block, in the buffer where there is one."""
    queries, keys = query[block.row, block.queries] * setting.scale, key[block.row, block.keys]
    if buffer is None:
        scores = queries @ keys.T
    else:
        scores = buffer[: len(queries) * len(keys)].view(len(queries), len(keys))
        torch.mm(queries, keys.T, out=scores)
    first = block.queries.start
    if setting.is_causal and first < block.keys.stop:
        future = torch.ones(scores.shape[0], block.keys.stop - first, dtype=torch.bool, device=scores.device).triu(1)
        scores[:, first:] = scores[:, first:].masked_fill(future, float("-inf"))
    if setting.mask is not None:
        mask, row = setting.mask, block.row
        while mask.dim() > 2:  # a view, where flattening an expanded mask would write it out
            rows = mask[0].numel() // (mask.shape[-2] * mask.shape[-1])
            mask, row = mask[row // rows], row % rows
        scores = apply_mask(scores, mask[block.queries, block.keys])
    return scores


def _buffer(query: Tensor, key: Tensor) -> Tensor | None:
    """Room for the scores of a block, for all blocks in turn; none where gradients are to flow through them."""
    if torch.is_grad_enabled():
        return None
    return query.new_empty(min(_QUERIES, query.shape[1]) * key.shape[1])


def _weights(scores: Tensor, alpha: float | Tensor, setting: Setting) -> Tensor:
    """Weights in float32 or wider; the scores are used up where no gradient flows through them."""
    k = None if setting.k is None or setting.k >= scores.shape[-1] else setting.k
    lowest = torch.finfo(scores.dtype).min
    scores = scores.to(compute_dtype(scores))
    if torch.is_grad_enabled():
        return entmax_rows(scores, alpha, lowest, k)
    return dispatch.entmax_forward(scores, _shift(alpha, scores), lowest, k, in_place=True)


def _alpha_of(alpha: Tensor | None, block: _Block, setting: Setting) -> float | Tensor:
    return setting.alpha if alpha is None else alpha[block.row].view(1, 1)


def _shift(alpha: float | Tensor, scores: Tensor) -> float | Tensor:
    return shifted(alpha, scores) if isinstance(alpha, Tensor) else float(alpha) - 1


def _attend(
    query: Tensor, key: Tensor, value: Tensor, alpha: Tensor | None, setting: Setting, seed: int
) -> Iterator[Tensor]:
    """The output of each block, differentiable where gradients are on."""
    generator, buffer = torch.Generator(query.device).manual_seed(seed), _buffer(query, key)
    for block in _blocks(query, key, setting.is_causal):
        weights = _weights(_scores(query, key, block, setting, buffer), _alpha_of(alpha, block, setting), setting)
        if setting.dropout_p > 0:
            weights = weights * dropout_noise(weights, setting.dropout_p, generator)
        weights, values = weights.to(value.dtype), value[block.row, block.keys]
        multiply = dense_products if torch.is_grad_enabled() else dispatch.products(weights, values)
        yield multiply.gathered(weights, values)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, alpha: Tensor | None, setting: Setting) -> Tensor:
        ctx.setting = setting
        ctx.seed = int(torch.randint(2**62, ())) if setting.dropout_p > 0 else 0
        ctx.save_for_backward(query, key, value, alpha)
        output = value.new_empty(*query.shape[:2], value.shape[-1])
        blocks = _blocks(query, key, setting.is_causal)
        for block, part in zip(blocks, _attend(query, key, value, alpha, setting, ctx.seed), strict=True):
            output[block.row, block.queries] = part
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, alpha = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _backward_once_more(ctx, grads[0])
        setting: Setting = ctx.setting
        grad = grads[0].contiguous()  # that of a sum is expanded
        generator, buffer = torch.Generator(query.device).manual_seed(ctx.seed), _buffer(query, key)
        grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
        grad_alpha = None if alpha is None else torch.zeros_like(alpha)
        for block in _blocks(query, key, setting.is_causal):
            row, queries, keys = block
            one_alpha = _alpha_of(alpha, block, setting)
            weights = _weights(_scores(query, key, block, setting, buffer), one_alpha, setting)
            grad_output, values, its_keys = grad[row, queries], value[row, keys], key[row, keys]
            multiply = dispatch.products(weights, grad_output, values, its_keys, query)
            grad_weights = multiply.sampled(weights, grad_output, values).to(weights.dtype)
            dropped = weights
            if setting.dropout_p > 0:
                dropout = dropout_noise(weights, setting.dropout_p, generator)
                grad_weights, dropped = grad_weights * dropout, weights * dropout
            multiply.scatter_(grad_value[row, keys], dropped.to(value.dtype), grad_output)
            a, with_alpha = _shift(one_alpha, weights), alpha is not None
            grad_scores, grad_a = dispatch.entmax_backward(weights, a, grad_weights, with_alpha=with_alpha)
            grad_scores = grad_scores.to(query.dtype) * setting.scale
            grad_query[row, queries] = multiply.gathered(grad_scores, its_keys)
            multiply.scatter_(grad_key[row, keys], grad_scores, query[row, queries])
            if grad_alpha is not None and grad_a is not None:
                grad_alpha[row] += grad_a.sum().to(grad_alpha.dtype)
        return grad_query, grad_key, grad_value, grad_alpha, None


def _backward_once_more(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as functions that have gradients themselves, of the same blocks."""
    query, key, value, alpha = ctx.saved_tensors
    inputs = [x for x in (query, key, value, alpha) if x is not None and x.requires_grad]
    output = torch.cat(list(_attend(query, key, value, alpha, ctx.setting, ctx.seed))).view(grad.shape)
    gradients = iter(torch.autograd.grad(output, inputs, grad, create_graph=True, materialize_grads=True))
    return *(next(gradients) if needed else None for needed in ctx.needs_input_grad[:4]), None
