"""Mappings with at most k non-zero entries: only the k largest scores are normalised."""

from __future__ import annotations

from torch import Tensor

from sparse_attn.checks import check_k, check_scores
from sparse_attn.ops.entmax import entmax_along


def topk_softmax(x: Tensor, k: int, dim: int = -1) -> Tensor:
    """Softmax over the ``k`` largest scores along ``dim``, zero elsewhere.

    Args:
        x: Scores of any floating dtype; masked entries as in :func:`sparse_attn.entmax`.
        k: How many scores to keep, from 1 to the size of ``dim``. Ties go to the lowest index: never more than ``k``
            scores are kept.
        dim: The dimension that sums to one.

    Returns:
        Probabilities of ``x``'s shape and dtype.

    Raises:
        TypeError: ``x`` is not floating or ``k`` is not an int.
        ValueError: ``k`` is below 1 or above the size of ``dim``.
        IndexError: ``x`` has no dimension ``dim``.

    Example:
        >>> import torch
        >>> topk_softmax(torch.tensor([1.0, 3.0, 2.0, 3.0]), k=2)
        tensor([0.0000, 0.5000, 0.0000, 0.5000])

    Reference:
        Zhao et al. 2019, "Explicit Sparse Transformer". There, all scores tied with the k-th are kept.
    """
    return topk_entmax(x, k, 1.0, dim)


def sparse_softmax(x: Tensor, k: int = 3, dim: int = -1) -> Tensor:
    r"""The projection on the simplex with at most ``k`` non-zero entries: sparsemax of the ``k`` largest scores.

    .. math:: \operatorname{argmin}_{p \in \triangle, \lVert p \rVert_0 \le k} \lVert p - x \rVert^2

    Args:
        x: Scores of any floating dtype; masked entries as in :func:`sparse_attn.entmax`.
        k: How many scores to keep, from 1 to the size of ``dim``. Ties go to the lowest index.
        dim: The dimension that sums to one.

    Returns:
        Probabilities of ``x``'s shape and dtype: those of sparsemax where sparsemax has at most ``k`` non-zero entries.

    Raises:
        TypeError: ``x`` is not floating or ``k`` is not an int.
        ValueError: ``k`` is below 1 or above the size of ``dim``.
        IndexError: ``x`` has no dimension ``dim``.

    Example:
        >>> import torch
        >>> sparse_softmax(torch.tensor([2.0, 1.5, 0.1, -1.0, 3.2, 2.9]), k=2)
        tensor([0.0000, 0.0000, 0.0000, 0.0000, 0.6500, 0.3500])

    Reference:
        Kyrillidis et al. 2013 (ICML), "Sparse projections onto the simplex", algorithm 1.
    """
    return topk_entmax(x, k, 2.0, dim)


def topk_entmax(x: Tensor, k: int, alpha: float | Tensor, dim: int = -1) -> Tensor:
    """α-entmax of the ``k`` largest scores along ``dim``; arguments and errors as in :func:`topk_softmax`."""
    check_scores(x, dim)
    size = x.shape[dim] if x.dim() else 1
    check_k(k, size)
    return entmax_along(x, alpha, dim, None if k == size else k)
