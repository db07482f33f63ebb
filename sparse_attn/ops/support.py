"""Support size and threshold of a sparse mapping."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_attn.checks import check_number_or_tensor, check_scores, compute_dtype, result_dtype
from sparse_attn.masks import with_infinities
from sparse_attn.ops.entmax import entmax


def support_size(p: Tensor, dim: int = -1) -> Tensor:
    """The number of non-zero entries of ``p`` along ``dim``.

    Args:
        p: Probabilities, as any of the mappings returns them.
        dim: The dimension of the mapping.

    Returns:
        An int64 tensor of ``p``'s shape without ``dim``.

    Raises:
        TypeError: ``p`` is not floating.
        IndexError: ``p`` has no dimension ``dim``.

    Example:
        >>> from sparse_attn import sparsemax
        >>> support_size(sparsemax(torch.tensor([[-2.0, 0.0, 0.5], [3.0, 0.0, 0.0]])))
        tensor([2, 1])
    """
    check_scores(p, dim, "p")
    return (p != 0).sum(dim)


def tau(x: Tensor, alpha: float | Tensor = 1.5, dim: int = -1) -> Tensor:
    r"""The threshold of α-entmax: ``p = [(α-1) x - τ]_+^(1/(α-1))``.

    Args:
        x: Scores, as in :func:`sparse_attn.entmax`.
        alpha: A number or a tensor, as in :func:`sparse_attn.entmax`. For α > 1, scores at or below ``τ/(α-1)`` get
            probability zero; at α = 1, τ is -1.
        dim: The dimension that sums to one.

    Returns:
        A tensor of ``x``'s shape with size 1 along ``dim``; differentiable. A fully masked or empty row
        gets ``inf``. Half precision is computed in float32.

    Raises:
        TypeError: ``x`` is not floating, or ``alpha`` neither a number nor a floating tensor.
        ValueError: α is outside ``(0, inf)`` or its shape does not fit.
        IndexError: ``x`` has no dimension ``dim``.

    Example:
        >>> x = torch.tensor([-2.0, 0.0, 0.5])
        >>> tau(x, alpha=2.0)
        tensor([-0.2500])
        >>> (x - tau(x, alpha=2.0)).clamp(min=0)
        tensor([0.0000, 0.2500, 0.7500])

    Reference:
        Peters, Niculae & Martins 2019 (ACL), "Sparse Sequence-to-Sequence Models".
    """
    check_scores(x, dim)
    check_number_or_tensor(alpha, "alpha")
    dtype = result_dtype(x)
    if x.dim() and not x.shape[dim]:
        return (x.sum(dim, keepdim=True) + 0 * alpha + math.inf).to(dtype)  # as for a row of masked scores
    if x.dtype != compute_dtype(x):
        x = with_infinities(x).to(compute_dtype(x))
    p = entmax(x, alpha, dim)
    top = x.amax(dim, keepdim=True) if x.dim() else x
    largest = p.amax(dim, keepdim=True) if x.dim() else p
    empty = largest == 0
    a = alpha - 1
    # The largest entry is always in the support, so its probability determines τ.
    # largest ** a is computed by exp and log: torch's own power has second derivatives of zero if the exponent is 0.
    power = torch.exp(a * torch.where(empty, 1.0, largest).log())
    threshold = a * torch.where(empty, 0.0, top) - power
    return torch.where(empty, math.inf, threshold).to(dtype)
