"""``entmax.activations``: the mappings that the package computes by sorting."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparse_attn import ops
from sparse_attn.compat.entmax.arguments import check_hint


def sparsemax(X: Tensor, dim: int = -1, k: int | None = None, return_support_size: bool = False) -> Any:
    """:func:`sparse_attn.sparsemax` along ``dim``.

    Args:
        X: Scores; masked entries as in :func:`sparse_attn.entmax`.
        dim: The dimension that sums to one.
        k: The package sorts only the k largest scores first. No effect here.
        return_support_size: Return the number of non-zero entries as well. Only the package's development version has
            this argument.

    Returns:
        Probabilities; with ``return_support_size`` a pair with an int64 tensor of size 1 along ``dim``.

    Raises:
        TypeError: ``X`` is not floating or ``k`` is not an int.
        ValueError: ``k`` is below 1.
        IndexError: ``X`` has no dimension ``dim``.

    Example:
        >>> import torch
        >>> sparsemax(torch.tensor([-2, 0, 0.5]), dim=0)
        tensor([0.0000, 0.2500, 0.7500])
        >>> sparsemax(torch.tensor([-2, 0, 0.5]), dim=0, return_support_size=True)
        (tensor([0.0000, 0.2500, 0.7500]), tensor([2]))
    """
    check_hint(k, "k")
    p = ops.sparsemax(X, dim)
    return (p, _kept(p, dim)) if return_support_size else p


def entmax15(X: Tensor, dim: int = -1, k: int | None = None, return_support_size: bool = False) -> Any:
    """:func:`sparse_attn.entmax15` along ``dim``.

    Args:
        X: Scores, as in :func:`sparsemax`.
        dim: The dimension that sums to one.
        k: No effect.
        return_support_size: Return the number of non-zero entries as well.

    Returns:
        As :func:`sparsemax`.

    Raises:
        TypeError: ``X`` is not floating or ``k`` is not an int.
        ValueError: ``k`` is below 1.
        IndexError: ``X`` has no dimension ``dim``.

    Example:
        >>> import torch
        >>> entmax15(torch.tensor([-2, 0, 0.5]), dim=0)
        tensor([0.0000, 0.3260, 0.6740])
    """
    check_hint(k, "k")
    p = ops.entmax15(X, dim)
    return (p, _kept(p, dim)) if return_support_size else p


class Sparsemax(nn.Module):
    """:func:`sparsemax` as a module; same arguments.

    Example:
        >>> import torch
        >>> Sparsemax(dim=0, k=2)(torch.tensor([-2, 0, 0.5]))
        tensor([0.0000, 0.2500, 0.7500])
    """

    def __init__(self, dim: int = -1, k: int | None = None, return_support_size: bool = False) -> None:
        super().__init__()
        check_hint(k, "k")
        self.dim = dim
        self.k = k
        self.return_support_size = return_support_size

    def forward(self, X: Tensor) -> Any:
        """Map scores to probabilities."""
        return sparsemax(X, self.dim, self.k, self.return_support_size)


class Entmax15(nn.Module):
    """:func:`entmax15` as a module; same arguments.

    Example:
        >>> import torch
        >>> Entmax15(dim=0)(torch.tensor([-2, 0, 0.5]))
        tensor([0.0000, 0.3260, 0.6740])
    """

    def __init__(self, dim: int = -1, k: int | None = None, return_support_size: bool = False) -> None:
        super().__init__()
        check_hint(k, "k")
        self.dim = dim
        self.k = k
        self.return_support_size = return_support_size

    def forward(self, X: Tensor) -> Any:
        """Map scores to probabilities."""
        return entmax15(X, self.dim, self.k, self.return_support_size)


def _kept(p: Tensor, dim: int) -> Tensor:
    return ops.support_size(p, dim).unsqueeze(dim) if p.dim() else ops.support_size(p)


# The package's tests call these two private functions. Both return tensors of size 1 along `dim`.


def _sparsemax_threshold_and_support(X: Tensor, dim: int = -1, k: int | None = None) -> tuple[Tensor, Tensor]:
    """τ and the support size of ``sparsemax(X) = [X - τ]_+``."""
    check_hint(k, "k")
    return ops.tau(X, 2.0, dim), _kept(ops.sparsemax(X, dim), dim)


def _entmax_threshold_and_support(X: Tensor, dim: int = -1, k: int | None = None) -> tuple[Tensor, Tensor]:
    """τ and the support size of ``entmax15(2 X) = [X - τ]_+^2``: the package halves the scores before it calls this."""
    check_hint(k, "k")
    return ops.tau(2 * X, 1.5, dim), _kept(ops.entmax15(2 * X, dim), dim)
