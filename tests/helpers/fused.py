"""Comparison of fused attention with a matrix of weights in float64: inputs, expected output, errors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparse_attn.kernels.functions.entmax import entmax_rows
from sparse_attn.kernels.functions.fused import fused_attention

ALPHAS = (1.0, 1.0001, 1.01, 1.3, 1.5, 2.0)


def tensors(
    device: torch.device, *, batch: int = 1, heads: int = 2, groups: int = 1, queries: int = 37, keys: int = 53
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value. Query and key have another head size than value; neither size is a power of two."""
    shapes = (batch, heads, queries, 19), (batch, heads // groups, keys, 19), (batch, heads // groups, keys, 23)
    return tuple(torch.randn(shape, device=device, requires_grad=True) for shape in shapes)


def expected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor,
    mask: Tensor | None = None,
    *,
    offset: int | None = None,
    scale: float = 0.3,
    key_lengths: Tensor | None = None,
    multiplier: Tensor | None = None,
) -> Tensor:
    """Attention computed with the matrix of weights."""
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(-2, -1) * scale
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device)
    if offset is not None:
        seen = seen.tril(offset)
    if key_lengths is not None:
        seen = seen & (torch.arange(key.shape[2], device=query.device) < key_lengths.view(-1, 1, 1, 1))
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        scores = scores + mask
    scores = scores.masked_fill(~seen, -math.inf)
    weights = entmax_rows(scores, alpha.view(-1, 1, 1) if isinstance(alpha, Tensor) else alpha, -1e300)
    weights = weights if multiplier is None else weights * multiplier
    return weights @ value.repeat_interleave(group, 1)


def compare(inputs: tuple[Tensor, ...], alpha: float | Tensor, bound: float = 2e-6, **how: Any) -> list[Tensor]:
    """Compare output and gradients with float64, relative to the largest entry; return the results of the kernels."""
    mask = how.pop("mask", None)
    multiplier = how.pop("multiplier", None)
    scale = how.setdefault("scale", 0.3)
    output = fused_attention(*inputs, alpha, mask, **how)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    wide_alpha = alpha.detach().double().requires_grad_() if isinstance(alpha, Tensor) else alpha
    learnt = mask is not None and mask.requires_grad
    wide_mask = mask.detach().double().requires_grad_() if learnt else mask
    how = {name: value for name, value in how.items() if name not in ("dropout_p", "scale")}
    wanted = expected(*wide, wide_alpha, wide_mask, scale=scale, multiplier=multiplier, **how)
    pairs = [*zip(inputs, wide, strict=True)]
    pairs += [(alpha, wide_alpha)] if isinstance(alpha, Tensor) and alpha.requires_grad else []
    pairs += [(mask, wide_mask)] if learnt else []
    upstream = torch.randn_like(output)
    got = [output, *torch.autograd.grad(output, [pair[0] for pair in pairs], upstream)]
    right = [wanted, *torch.autograd.grad(wanted, [pair[1] for pair in pairs], upstream.double())]
    for actual, reference in zip(got, right, strict=True):
        assert actual.shape == reference.shape
        worst = (actual.double() - reference).abs().max() / reference.abs().max()
        assert worst <= bound, worst
    return got
