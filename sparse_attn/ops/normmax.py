"""Normmax: the mapping regularised by a norm instead of an entropy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_attn.checks import (
    check_interval,
    check_number_or_tensor,
    check_row_parameter,
    check_scores,
    result_dtype,
)
from sparse_attn.kernels.functions.interval import in_interval
from sparse_attn.ops.entmax import entmax
from sparse_attn.transforms import double_noticing_changes


def normmax(x: Tensor, alpha: float | Tensor = 2.0, dim: int = -1) -> Tensor:
    r"""α-normmax along ``dim``: a sparse mapping whose non-zero probabilities become more equal as α grows.

    .. math:: \operatorname{argmax}_{p \in \triangle} \langle p, x \rangle - \lVert p \rVert_\alpha

    The result is computed in float64 from the α-entmax ``s`` of ``x α/(α-1)`` at ``2 - 1/α``:
    ``p = s^(1/α) / Σ s^(1/α)``.

    Args:
        x: Scores of any floating dtype; masked entries as in :func:`sparse_attn.entmax`.
        alpha: The norm's exponent: a number, or a tensor with size 1 along ``dim`` that broadcasts against ``x``, in
            ``(1, inf)``. Differentiable. For α towards 1 the result tends to the arg max; for α towards ∞, to the
            uniform distribution over the support of ``sparsemax(x)``.
        dim: The dimension that sums to one.

    Returns:
        Probabilities of ``x``'s shape and dtype.

    Raises:
        TypeError: ``x`` is not floating, or ``alpha`` neither a number nor a floating tensor.
        ValueError: α is outside ``(1, inf)`` or its shape does not fit.
        IndexError: ``x`` has no dimension ``dim``.

    Example:
        >>> normmax(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
        tensor([0.0000, 0.0239, 0.1746, 0.3254, 0.4761])

    Reference:
        Blondel, Martins & Niculae 2020 (JMLR), "Learning with Fenchel-Young Losses", on norm entropies.
    """
    check_scores(x, dim)
    check_number_or_tensor(alpha, "alpha")
    if isinstance(alpha, Tensor):
        check_row_parameter(alpha, x, dim, "alpha")
        alpha = double_noticing_changes(in_interval(alpha, "alpha", 1))
        alpha = torch.where(alpha > 1, alpha, math.nan)  # where values are not checked, a wrong α gives NaN
    else:
        check_interval(alpha, "alpha", above=1.0, below=math.inf)
    scores = x.double().masked_fill(x <= torch.finfo(x.dtype).min, -math.inf)
    if scores.numel() > 0:
        # The maximum is subtracted before the product: with a large offset, rounding would lose the differences.
        top = scores.detach().amax(dim, keepdim=True)
        scores = scores - torch.where(top == -math.inf, 0.0, top)
    support = entmax(scores * (alpha / (alpha - 1)), 2 - 1 / alpha, dim)
    outside = support == 0
    root = torch.where(outside, 0.0, torch.exp(torch.where(outside, 1.0, support).log() / alpha))
    total = root.sum(dim, keepdim=True)
    return (root / torch.where(total == 0, 1.0, total)).to(result_dtype(x))
