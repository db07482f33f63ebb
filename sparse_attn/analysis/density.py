"""Density of attention: the share of the visible pairs to which a head gives weight."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["density", "full_visible", "support_counts"]


def full_visible(weights: Tensor, visible: Tensor | None) -> Tensor:
    """The mask of visible pairs in the shape of `weights`, after checking both.

    Args:
        weights: attention weights of each head, (N, H, L, S) or (H, L, S).
        visible: True where a query may see a key; broadcasts against `weights`. None: everywhere.

    Returns:
        A bool tensor with the shape of `weights`.

    Raises:
        TypeError: if `weights` is not floating point or `visible` is not bool.
        ValueError: if `weights` has another number of dimensions, or `visible` does not broadcast.
    """
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weights must be a floating-point tensor, got {got}")
    if weights.dim() not in (3, 4):
        raise ValueError(f"weights must have the shape (N, H, L, S) or (H, L, S), got {tuple(weights.shape)}")
    if visible is None:
        return torch.ones_like(weights, dtype=torch.bool)
    if not isinstance(visible, Tensor) or visible.dtype != torch.bool:
        got = visible.dtype if isinstance(visible, Tensor) else type(visible).__name__
        raise TypeError(f"visible must be a bool tensor, got {got}")
    try:
        return visible.expand(weights.shape)
    except RuntimeError as error:
        raise ValueError(
            f"visible must broadcast against the weights {tuple(weights.shape)}, got {tuple(visible.shape)}"
        ) from error


def support_counts(weights: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Count the visible pairs of each head, and those among them with a non-zero weight.

    To get the density of a whole data set, sum both counts over its batches.

    Args:
        weights: attention weights of each head, (N, H, L, S) or (H, L, S).
        visible: True where a query may see a key; broadcasts against `weights`. None: everywhere.

    Returns:
        Two long tensors (H,): pairs with a non-zero weight, visible pairs.

    Raises:
        TypeError: if `weights` is not floating point or `visible` is not bool.
        ValueError: if the shapes do not fit.

    Example:
        >>> weights = torch.tensor([[[1.0, 0.0], [0.25, 0.75]]])
        >>> support_counts(weights, visible=torch.ones(2, 2, dtype=torch.bool).tril())
        (tensor([3]), tensor([3]))
    """
    pairs = full_visible(weights, visible)
    other_dims = [dim for dim in range(weights.dim()) if dim != weights.dim() - 3]
    return ((weights != 0) & pairs).sum(other_dims), pairs.sum(other_dims)


def density(weights: Tensor, visible: Tensor | None = None) -> Tensor:
    """Share of the visible pairs of a query and a key that have a non-zero weight, per head.

    Softmax has density 1 (except for underflow); a head that gives all weight to one of S keys has 1 / S.

    Args:
        weights: attention weights of each head, (N, H, L, S) or (H, L, S).
        visible: True where a query may see a key (real queries and keys, causal order); broadcasts against
            `weights`. None: everywhere.

    Returns:
        (H,), float32, between 0 and 1; NaN when no pair is visible.

    Raises:
        TypeError: if `weights` is not floating point or `visible` is not bool.
        ValueError: if the shapes do not fit.

    Example:
        >>> weights = torch.tensor([[[1.0, 0.0], [0.25, 0.75]], [[0.5, 0.5], [0.5, 0.5]]])
        >>> density(weights)
        tensor([0.7500, 1.0000])
    """
    used, pairs = support_counts(weights, visible)
    return used / pairs
