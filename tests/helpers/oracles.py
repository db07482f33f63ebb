"""Mappings by bisection in float64, in the form of the papers, without code of this library.

Each mapping takes scores of any floating dtype along the last dimension, and converts scores and α to float64. If a
test has rounded scores or α before, the result is that of the rounded numbers. Scores of ``-inf`` and of the lowest
finite number of their dtype are masked.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_HALVINGS = 64  # number of bisection steps; for α > 1 the bracket is at most 1 wide


def _shifted(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scores in float64 with maximum 0 and ``-inf`` for masked scores; and the mask of rows with a visible score."""
    z = x.double().masked_fill(x <= torch.finfo(x.dtype).min, -math.inf)
    top = z.amax(-1, keepdim=True)
    seen = top > -math.inf
    return z - top.masked_fill(~seen, 0.0), seen


def bisect_entmax(x: Tensor, alpha: float | Tensor) -> Tensor:
    """α-entmax (Peters, Niculae & Martins 2019, algorithm 1); ``alpha`` is a number or has shape (..., 1)."""
    z, seen = _shifted(x)
    if not isinstance(alpha, Tensor) and alpha == 1:
        return torch.softmax(z.masked_fill(~seen, 0.0), -1) * seen
    a = alpha - 1 if not isinstance(alpha, Tensor) else alpha.double() - 1
    # p = [a z - tau]_+^(1/a). At tau = -1 the largest entry of p is 1. At tau = -n^-a it is 1 / n: the n entries of p
    # sum to at most 1.
    low = torch.full_like(z[..., :1], -1.0)
    high = -(z.shape[-1] ** -a) + torch.zeros_like(low)
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    scaled, masked = a * z, z == -math.inf
    for _ in range(_HALVINGS):
        tau = (low + high) / 2
        p = ((scaled - tau).clamp(min=0) ** (1 / a)).masked_fill(masked, 0.0)
        too_much = (p.sum(-1, keepdim=True) >= 1) == (torch.as_tensor(a) > 0)
        low, high = torch.where(too_much, tau, low), torch.where(too_much, high, tau)
    return torch.where(seen, p / p.sum(-1, keepdim=True), 0.0)


def bisect_normmax(x: Tensor, alpha: float) -> Tensor:
    """α-normmax (Blondel, Martins & Niculae 2020): ``q = [z - tau]_+^(1/(α-1))`` with ``Σ q^α = 1``, normalised."""
    z, seen = _shifted(x)
    low = torch.full_like(z[..., :1], -1.0)
    high = torch.zeros_like(low)
    for _ in range(_HALVINGS):
        tau = (low + high) / 2
        q = (z - tau).clamp(min=0) ** (1 / (alpha - 1))
        too_much = (q**alpha).sum(-1, keepdim=True) >= 1
        low, high = torch.where(too_much, tau, low), torch.where(too_much, high, tau)
    return torch.where(seen, q / q.sum(-1, keepdim=True), 0.0)


def bisect_budget(x: Tensor, budget: float | Tensor) -> Tensor:
    """Budget sparsemax: ``clip(z - tau, 0, 1)``, or 1 at all visible entries if these are at most ``budget``."""
    z, _ = _shifted(x)
    visible = z > -math.inf
    low = z.masked_fill(~visible, 0.0).amin(-1, keepdim=True) - 1
    high = torch.zeros_like(low)
    for _ in range(100):  # more steps than `_HALVINGS`: the bracket is as wide as the scores
        tau = (low + high) / 2
        too_much = (z - tau).clamp(0, 1).sum(-1, keepdim=True) >= budget
        low, high = torch.where(too_much, tau, low), torch.where(too_much, high, tau)
    enough = visible.sum(-1, keepdim=True) > budget
    return torch.where(enough, (z - low).clamp(0, 1), visible.double())
