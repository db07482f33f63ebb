"""Attention over blocks of queries. The backward recomputes the weights, so memory is linear in the length.

Second derivatives keep all weights. A block has few queries, so that the scores can stay in the processor's cache. This
function is used for calls with many scores that no kernel accepts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_attn.kernels import dispatch
from sparse_attn.kernels.alpha import shift_alpha
from sparse_attn.kernels.dropout import dropout_noise
from sparse_attn.kernels.functions.entmax import entmax_rows
from sparse_attn.kernels.setting import Setting
from sparse_attn.masks import apply_mask

_QUERIES = 256


def blockwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    setting: Setting,
    softcap: float | None = None,
) -> Tensor:
    """Attention for R pairs of a batch entry and a head.

    Args:
        query: (R, L, D), float32 or float64.
        key: (R, S, D).
        value: (R, S, Dv).
        alpha: (R,), or None for the number in ``setting``.
        mask: (..., L, S) in the internal form, without gradient. The product of its first dimensions is R.
        setting: The other arguments.
        softcap: Scores become ``softcap * tanh(score / softcap)`` before the mask; None: scores are not changed.

    Returns:
        (R, L, Dv).
    """
    return _Blockwise.apply(query, key, value, alpha, mask, setting, softcap)


class _Block(NamedTuple):
    row: int  # the pair of a batch entry and a head
    queries: slice
    keys: slice


def _blocks(query: Tensor, key: Tensor, setting: Setting) -> Iterator[_Block]:
    """Blocks of queries, each with the keys that at least one of its queries sees by position, and at least one key."""
    length, keys = query.shape[1], key.shape[1]
    for row in range(len(query)):
        for start in range(0, length, _QUERIES):
            stop = min(start + _QUERIES, length)
            end = keys if setting.offset is None else min(max(stop + setting.offset, 1), keys)
            begin = 0 if setting.left is None else min(max(start - setting.left, 0), end - 1)
            yield _Block(row, slice(start, stop), slice(begin, end))


def _hide(scores: Tensor, block: _Block, setting: Setting) -> None:
    """Set the scores outside the bounds to minus infinity, in place."""
    rows, columns = scores.shape
    first = block.queries.start - block.keys.start  # the column of the key at the position of the first query
    if setting.offset is not None:
        last = first + setting.offset  # the last column that the first query sees
        start = max(last, 0)
        if start < columns:
            future = torch.ones((rows, columns - start), dtype=torch.bool, device=scores.device).triu(last - start + 1)
            scores[:, start:] = scores[:, start:].masked_fill(future, float("-inf"))
    if setting.left is not None:
        stop = min(first + rows - 1 - setting.left, columns)  # the first column that the last query sees
        if stop > 0:
            past = torch.ones((rows, stop), dtype=torch.bool, device=scores.device).tril(first - setting.left - 1)
            scores[:, :stop] = scores[:, :stop].masked_fill(past, float("-inf"))


def _scores(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    block: _Block,
    setting: Setting,
    softcap: float | None,
    buffer: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Scores (queries, keys) of a block, and ``tanh(score / softcap)`` before the mask if there is a soft-cap.

    Products of queries and keys are written into the buffer, if there is one.
    """
    queries, keys = query[block.row, block.queries] * setting.scale, key[block.row, block.keys]
    if buffer is None:
        scores = queries @ keys.T
    else:
        scores = buffer[: len(queries) * len(keys)].view(len(queries), len(keys))
        torch.mm(queries, keys.T, out=scores)
    tanh = None
    if softcap is not None:
        tanh = torch.tanh(scores / softcap)
        scores = tanh * softcap
    _hide(scores, block, setting)
    if mask is not None:
        row = block.row
        while mask.dim() > 2:  # views: flattening an expanded mask would copy it
            rows = mask[0].numel() // (mask.shape[-2] * mask.shape[-1])
            mask, row = mask[row // rows], row % rows
        scores = apply_mask(scores, mask[block.queries, block.keys])
    return scores, tanh


def _buffer(query: Tensor, key: Tensor) -> Tensor | None:
    """Memory for the scores of one block, reused by all blocks; None if gradients are enabled."""
    if torch.is_grad_enabled():
        return None
    return query.new_empty(min(_QUERIES, query.shape[1]) * key.shape[1])


def _weights(scores: Tensor, alpha: Tensor | None, setting: Setting) -> Tensor:
    """The weights for scores; the scores may be overwritten unless gradients are enabled."""
    k = None if setting.k is None or setting.k >= scores.shape[-1] else setting.k
    lowest = torch.finfo(scores.dtype).min
    if torch.is_grad_enabled():
        return entmax_rows(scores, setting.a + 1 if alpha is None else alpha, lowest, k)
    return dispatch.entmax_forward(scores, shift_alpha(alpha, setting.a, scores), lowest, k, in_place=True)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    setting: Setting,
    softcap: float | None,
    seed: int,
) -> Iterator[Tensor]:
    """The output of each block, differentiable if gradients are enabled."""
    generator, buffer = torch.Generator(query.device).manual_seed(seed), _buffer(query, key)
    for block in _blocks(query, key, setting):
        scores, _ = _scores(query, key, mask, block, setting, softcap, buffer)
        weights = _weights(scores, None if alpha is None else alpha[block.row].view(1, 1), setting)
        if setting.dropout_p > 0:
            weights = weights * dropout_noise(weights, setting.dropout_p, generator)
        yield weights @ value[block.row, block.keys]


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        alpha: Tensor | None,
        mask: Tensor | None,
        setting: Setting,
        softcap: float | None,
    ) -> Tensor:
        ctx.setting, ctx.softcap, ctx.backend = setting, softcap, dispatch.forced_backend()
        ctx.seed = int(torch.randint(2**62, ())) if setting.dropout_p > 0 else 0
        ctx.save_for_backward(query, key, value, alpha, mask)  # a mask that is changed later raises an error
        output = value.new_empty(*query.shape[:2], value.shape[-1])
        blocks = _blocks(query, key, setting)
        parts = _attend(query, key, value, alpha, mask, setting, softcap, ctx.seed)
        for block, part in zip(blocks, parts, strict=True):
            output[block.row, block.queries] = part
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with dispatch.backend_of_forward(ctx.backend):
            return _backward_once_more(ctx, grads[0]) if torch.is_grad_enabled() else _backward(ctx, grads[0])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients one block at a time, not differentiable."""
    query, key, value, alpha, mask = ctx.saved_tensors
    setting: Setting = ctx.setting
    grad = grad.contiguous()  # the gradient of a sum is an expanded scalar
    generator, buffer = torch.Generator(query.device).manual_seed(ctx.seed), _buffer(query, key)
    grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
    grad_alpha = None if alpha is None else torch.zeros_like(alpha)
    for block in _blocks(query, key, setting):
        row, queries, keys = block
        one_alpha = None if alpha is None else alpha[row].view(1, 1)
        scores, tanh = _scores(query, key, mask, block, setting, ctx.softcap, buffer)
        weights = _weights(scores, one_alpha, setting)
        grad_output, values, its_keys = grad[row, queries], value[row, keys], key[row, keys]
        grad_weights = grad_output @ values.T
        dropped = weights
        if setting.dropout_p > 0:
            dropout = dropout_noise(weights, setting.dropout_p, generator)
            grad_weights, dropped = grad_weights * dropout, weights * dropout
        grad_value[row, keys].addmm_(dropped.T, grad_output)
        a, with_alpha = shift_alpha(one_alpha, setting.a, weights), alpha is not None
        grad_scores, grad_a = dispatch.entmax_backward(weights, a, grad_weights, with_alpha=with_alpha)
        grad_scores = grad_scores * setting.scale
        if tanh is not None:
            grad_scores = grad_scores * (1 - tanh * tanh)
        grad_query[row, queries] = grad_scores @ its_keys
        grad_key[row, keys].addmm_(grad_scores.T, query[row, queries])
        if grad_alpha is not None and grad_a is not None:
            grad_alpha[row] += grad_a.sum().to(grad_alpha.dtype)
    return grad_query, grad_key, grad_value, grad_alpha, None, None, None


def _backward_once_more(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiable gradients, by autograd through the same blocks."""
    query, key, value, alpha, mask = ctx.saved_tensors
    inputs = [x for x in (query, key, value, alpha) if x is not None and x.requires_grad]
    blocks = _attend(query, key, value, alpha, mask, ctx.setting, ctx.softcap, ctx.seed)
    output = torch.cat(list(blocks)).view(grad.shape)
    gradients = iter(torch.autograd.grad(output, inputs, grad, create_graph=True, materialize_grads=True))
    return *(next(gradients) if needed else None for needed in ctx.needs_input_grad[:4]), None, None, None
