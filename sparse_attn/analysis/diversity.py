"""Disagreement between the heads of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.analysis.density import full_visible

__all__ = ["head_diversity"]


def head_diversity(weights: Tensor, visible: Tensor | None = None) -> Tensor:
    """Jensen-Shannon divergence between the heads of a layer, for each query.

    JS = E(1/H Σ_h p_h) - 1/H Σ_h E(p_h), with E the Shannon entropy and p_h the weights of head h: 0 if all heads
    have the same weights, log H if no two heads give weight to the same key.

    Args:
        weights: attention weights of each head, (N, H, L, S) or (H, L, S).
        visible: True where a query may see a key; broadcasts against `weights`. None: everywhere.

    Returns:
        (N, L) or (L,), in nats; NaN for a query with a head that gives no weight to any visible key.

    Raises:
        TypeError: if `weights` is not floating point or `visible` is not bool.
        ValueError: if the shapes do not fit.

    Example:
        >>> head_diversity(torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]]))
        tensor([0.6931, 0.0000])

    Reference:
        Correia, Niculae & Martins 2019, "Adaptively Sparse Transformers", section 5.1.
    """
    pairs = full_visible(weights, visible)
    used = weights.masked_fill(~pairs, 0.0)
    # In half precision, the difference of two entropies would be small beside their rounding errors.
    used = used.to(torch.promote_types(weights.dtype, torch.float32))
    entropy_of_mean = torch.special.entr(used.mean(-3)).sum(-1)
    mean_of_entropies = torch.special.entr(used).sum(-1).mean(-2)
    attends: Tensor = (used != 0).any(-1).all(-2)
    # Rounding may give a negative value for equal heads.
    divergence = (entropy_of_mean - mean_of_entropies).clamp(min=0.0).masked_fill(~attends, torch.nan)
    return divergence.to(weights.dtype)
