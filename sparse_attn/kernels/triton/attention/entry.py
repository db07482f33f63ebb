"""What the fused kernels offer to the rest of the library; the first call of one imports Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn.kernels.triton.attention.plan import LARGEST_HEAD, Plan, statistics_of

__all__ = ["LARGEST_HEAD", "backward", "dropout_multipliers", "forward", "kept"]


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, and three tensors for the backward; the arguments are those of ``forward.forward``."""
    from sparse_attn.kernels.triton.attention import decode, forward

    query, key, value, *others, training = arguments
    if not training and decode.pays(query, key):
        return decode.forward(query, key, value, *others), *kept(query, key, value, None, 0.0, False)
    return forward.forward(*arguments)


def backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, α and the mask; the arguments are those of ``backward.backward``."""
    from sparse_attn.kernels.triton.attention import backward

    return backward.backward(*arguments)


def dropout_multipliers(weights: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """The factors by which the kernels multiply weights (N, H, L, S) under dropout."""
    from sparse_attn.kernels.triton.attention import dropout

    return dropout.multipliers(weights, seed, dropout_p)


def kept(
    query: Tensor, key: Tensor, value: Tensor, alpha: Tensor | None, a: float, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors of the shapes that :func:`forward` keeps for the backward; empty ones where there is no backward."""
    if not training:
        return query.new_empty(0), query.new_empty(0, dtype=torch.float32), query.new_empty(0, dtype=torch.uint8)
    plan = Plan.of(query, value)
    batch, heads, queries, _ = query.shape
    tiles = -(-queries // plan.block_m), -(-key.shape[2] // plan.block_n)
    second = query.new_empty(batch, heads, queries, value.shape[3])
    statistics = query.new_empty(statistics_of(a, alpha), batch * heads * queries, dtype=torch.float32)
    return second, statistics, query.new_empty(batch * heads, *tiles, dtype=torch.uint8)
