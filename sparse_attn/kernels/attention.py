"""Attention over blocks of queries: weights are made again in the backward, and memory is linear in the length.

In blocks the scores also stay in the cache, which makes long sequences faster than one large matrix would be.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_attn.checks import check_alpha, compute_dtype
from sparse_attn.kernels import dispatch
from sparse_attn.kernels.entmax import entmax_rows, shifted
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


def _scores(query: Tensor, key: Tensor, block: _Block, setting: Setting) -> Tensor:
    scores = (query[block.row, block.queries] * setting.scale) @ key[block.row, block.keys].T
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


def _alpha_of(alpha: Tensor | None, block: _Block, setting: Setting) -> float | Tensor:
    return setting.alpha if alpha is None else alpha[block.row].view(1, 1)


def _weights(scores: Tensor, alpha: float | Tensor, setting: Setting) -> Tensor:
    """Weights in float32 or wider."""
    k = None if setting.k is None or setting.k >= scores.shape[-1] else setting.k
    lowest = torch.finfo(scores.dtype).min
    return entmax_rows(scores.to(compute_dtype(scores)), alpha, lowest, k)


def _dropout(weights: Tensor, setting: Setting, generator: torch.Generator) -> Tensor:
    """What the weights are multiplied by, the same in the forward and the backward of one call."""
    kept = torch.empty_like(weights).bernoulli_(1 - setting.dropout_p, generator=generator)
    return kept.div_(1 - setting.dropout_p) if setting.dropout_p < 1 else kept


def _attend(
    query: Tensor, key: Tensor, value: Tensor, alpha: Tensor | None, setting: Setting, seed: int
) -> Iterator[Tensor]:
    """The output of each block, differentiable where gradients are on."""
    generator = torch.Generator(query.device).manual_seed(seed)
    for block in _blocks(query, key, setting.is_causal):
        weights = _weights(_scores(query, key, block, setting), _alpha_of(alpha, block, setting), setting)
        if setting.dropout_p > 0:
            weights = weights * _dropout(weights, setting, generator)
        yield weights.to(value.dtype) @ value[block.row, block.keys]


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
        generator = torch.Generator(query.device).manual_seed(ctx.seed)
        grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
        grad_alpha = None if alpha is None else torch.zeros_like(alpha)
        for block in _blocks(query, key, setting.is_causal):
            row, queries, keys = block
            one_alpha = _alpha_of(alpha, block, setting)
            weights = _weights(_scores(query, key, block, setting), one_alpha, setting)
            grad_output = grads[0][row, queries]
            grad_weights = (grad_output @ value[row, keys].T).to(weights.dtype)
            if setting.dropout_p > 0:
                dropout = _dropout(weights, setting, generator)
                grad_weights *= dropout
                grad_value[row, keys].addmm_((weights * dropout).to(value.dtype).T, grad_output)
            else:
                grad_value[row, keys].addmm_(weights.to(value.dtype).T, grad_output)
            a = shifted(one_alpha, weights) if isinstance(one_alpha, Tensor) else one_alpha - 1
            grad_scores, grad_a = dispatch.entmax_backward(weights, a, grad_weights, with_alpha=alpha is not None)
            grad_scores = grad_scores.to(query.dtype) * setting.scale
            grad_query[row, queries] = grad_scores @ key[row, keys]
            grad_key[row, keys].addmm_(grad_scores.T, query[row, queries])
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
