"""Budget sparsemax: a relaxed choice of a given number of entries."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.checks import (
    check_interval,
    check_number_or_tensor,
    check_row_parameter,
    check_scores,
    result_dtype,
    rows_last,
)
from sparse_attn.kernels.functions.interval import in_interval
from sparse_attn.transforms import double_noticing_changes


def budget_sparsemax(x: Tensor, budget: float | Tensor = 2.0, dim: int = -1) -> Tensor:
    r"""Sparsemax that sums to ``budget`` along ``dim``, with entries up to 1: a relaxed choice of a subset.

    .. math:: \operatorname{argmax}_p \langle p, x \rangle - \tfrac12 \lVert p \rVert^2, \quad
        0 \le p \le 1, \; \sum p = \text{budget}

    The result is computed in float64 from a sort of each row.

    Args:
        x: Scores of any floating dtype; masked entries as in :func:`sparse_attn.entmax`. If fewer than ``budget``
            entries of a row are unmasked, each of these is 1.
        budget: The sum of a row: a number, or a tensor with size 1 along ``dim`` that broadcasts against ``x``, in
            ``(0, d]`` with d the size of ``dim``. Differentiable. At 1 the result is sparsemax.
        dim: The dimension that sums to ``budget``.

    Returns:
        Entries in [0, 1], of ``x``'s shape and dtype.

    Raises:
        TypeError: ``x`` is not floating, or ``budget`` neither a number nor a floating tensor.
        ValueError: ``budget`` is outside ``(0, d]`` or its shape does not fit.
        IndexError: ``x`` has no dimension ``dim``.

    Example:
        >>> budget_sparsemax(torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0]), budget=3)
        tensor([0.0000, 0.2500, 0.7500, 1.0000, 1.0000])

    Reference:
        Blondel, Martins & Niculae 2020 (JMLR), "Learning with Fenchel-Young Losses", on the k-subset polytope.
    """
    check_scores(x, dim)
    check_number_or_tensor(budget, "budget")
    size = x.shape[dim] if x.dim() else 1
    if isinstance(budget, Tensor):
        check_row_parameter(budget, x, dim, "budget")
        if size:
            budget = in_interval(budget, "budget", 0, size)
    elif size:
        check_interval(budget, "budget", above=0.0, below=size, closed=True)
    return spend(x, budget, dim)


def spend(x: Tensor, budget: float | Tensor, dim: int = -1) -> Tensor:
    """:func:`budget_sparsemax` without checks of the budget, which may also be 0 or NaN."""
    if x.numel() == 0:
        p = torch.softmax(x, dim)  # the gradients of an empty batch, of every order, are zero, not missing
        return p * (1 + 0 * budget.sum().to(x.dtype)) if isinstance(budget, Tensor) else p
    scores = x.double() if x.dim() else x.double().view(1)
    masked = scores <= torch.finfo(x.dtype).min
    if isinstance(budget, Tensor):
        budget = rows_last(double_noticing_changes(budget), x, dim)
    # Dimensions are counted from the front: ``torch.onnx.export(dynamo=False)`` writes negative ones unchanged.
    last, dim = scores.dim() - 1, dim % scores.dim()
    scores, masked = scores.movedim(dim, last), masked.movedim(dim, last)
    budget = torch.as_tensor(budget, dtype=torch.float64, device=x.device)
    budget = torch.minimum(budget, (~masked).sum(-1, keepdim=True))
    top = scores.amax(-1, keepdim=True).masked_fill(masked.all(-1, keepdim=True), 0.0)
    z = torch.where(masked, 0.0, scores - top)
    with torch.no_grad():
        tau = _threshold(z.detach(), masked, budget.detach())
    one, zero = ~masked & (z - tau >= 1), masked | (z <= tau)
    between = ~(one | zero)
    # This computes the threshold again, as a differentiable function of the entries strictly between 0 and 1.
    tau = (torch.where(between, z, 0.0).sum(-1, keepdim=True) + one.sum(-1, keepdim=True) - budget) / between.sum(
        -1, keepdim=True
    ).clamp(min=1)
    p = torch.where(between, (z - tau).clamp(0, 1), one.to(z.dtype)).movedim(last, dim)
    return p.view(x.shape).to(result_dtype(x)).contiguous()


def _threshold(z: Tensor, masked: Tensor, budget: Tensor) -> Tensor:
    """τ with ``Σ clip(z - τ, 0, 1) = budget``: piecewise linear in τ, with kinks at every ``z`` and ``z - 1``."""
    # As τ decreases, an entry grows while τ is between z and z - 1. So the number of growing entries rises by one at
    # each z, and falls by one at each z - 1.
    turns = torch.where(masked, 0, 1)
    kinks, order = torch.cat([z, z - 1], -1).sort(-1, descending=True)
    growing = torch.cat([turns, -turns], -1).gather(-1, order).cumsum(-1)
    gained = growing[..., :-1] * (kinks[..., :-1] - kinks[..., 1:])
    spent = torch.cat([torch.zeros_like(gained[..., :1]), gained.cumsum(-1)], -1)
    last = ((spent <= budget).sum(-1, keepdim=True) - 1).clamp(min=0)
    tau, spent, growing = (t.gather(-1, last) for t in (kinks, spent, growing))
    return tau - (budget - spent) / growing.clamp(min=1)
