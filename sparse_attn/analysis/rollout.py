"""Attention rollout: the share of each input in each position after all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_attn.checks import check_floating, check_number

__all__ = ["attention_rollout"]


def attention_rollout(weights: Sequence[Tensor], residual: float = 0.5) -> Tensor:
    """Product of the attention matrices of all layers, each mixed with the identity for the residual connection.

    R_l = (r I + (1 - r) mean_h A_l) R_{l-1}, R_0 = I. Rows sum to one if the rows of A_l do. With exact zeros in
    the weights, an input without a path to a position has a share of exactly zero in that position.

    Args:
        weights: the weights of each self-attention layer in order, (N, H, L, L) or (H, L, L); only H may differ.
        residual: r, the share of a position's own state, from 0 to 1.

    Returns:
        (N, L, L) or (L, L): row i holds the share of each input in position i of the last layer.

    Raises:
        TypeError: if `weights` is not a list of floating tensors, or `residual` not a number.
        ValueError: if there is no layer, the shapes do not fit or `residual` is out of range.

    Example:
        >>> attention_rollout([torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])] * 2)
        tensor([[1.0000, 0.0000],
                [0.7500, 0.2500]])

    Reference:
        Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers", section 3.
    """
    if not isinstance(weights, Sequence):
        got = f"a tensor of shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weights must be a list of one tensor per layer, got {got}")
    if not weights:
        raise ValueError("weights must be of at least one layer, got none")
    for layer in weights:
        check_floating(layer, "weights of a layer")
    check_number(residual, "residual")
    if not 0 <= residual <= 1:
        raise ValueError(f"residual must lie in [0, 1], got {residual}")
    first = weights[0]
    rolled: Tensor | None = None
    for layer in weights:
        square = layer.dim() in (3, 4) and layer.shape[-1] == layer.shape[-2]
        if not square or layer.shape[-1] != first.shape[-1] or layer.shape[:-3] != first.shape[:-3]:
            shapes = [tuple(each.shape) for each in weights]
            raise ValueError(f"weights must all be (N, H, L, L) or (H, L, L) with the same N and L, got {shapes}")
        identity = torch.eye(layer.shape[-1], dtype=layer.dtype, device=layer.device)
        mixed = residual * identity + (1 - residual) * layer.mean(-3)
        with torch.autocast(layer.device.type, enabled=False):  # rows of a product in bfloat16 do not sum to one
            rolled = mixed if rolled is None else mixed @ rolled
    assert rolled is not None
    return rolled
