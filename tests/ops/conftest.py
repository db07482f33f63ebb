"""Oracles that share nothing with ours: bisection in float64 in the form the papers print, and sums of eighty digits.

Each takes scores of any floating dtype, along the last dimension, as they are: a score that float32 has rounded, or an
α that it has, is taken rounded. ``-inf`` and the smallest finite number are masked.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable, Iterator
from decimal import Decimal

import pytest
import torch
from torch import Tensor

from sparse_attn.kernels.dispatch import backends, use_backend

_HALVINGS = 64  # of a bracket at most 1 wide


def _shifted(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scores in float64 with the maximum at 0, those that are masked at ``-inf``; and which rows have any."""
    z = x.double().masked_fill(x <= torch.finfo(x.dtype).min, -math.inf)
    top = z.amax(-1, keepdim=True)
    seen = top > -math.inf
    return z - top.masked_fill(~seen, 0.0), seen


def _bisect(x: Tensor, alpha: float | Tensor) -> Tensor:
    """α-entmax (Peters, Niculae & Martins 2019, algorithm 1); ``alpha`` a number or (..., 1)."""
    z, seen = _shifted(x)
    if not isinstance(alpha, Tensor) and alpha == 1:
        return torch.softmax(z.masked_fill(~seen, 0.0), -1) * seen
    a = alpha - 1 if not isinstance(alpha, Tensor) else alpha.double() - 1
    # p = [a z - tau]_+^(1/a); the largest entry alone sums to one at the lower end, a flat row at the upper.
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


def _bisect_normmax(x: Tensor, alpha: float) -> Tensor:
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


def _bisect_budget(x: Tensor, budget: float | Tensor) -> Tensor:
    """Budget sparsemax: ``clip(z - tau, 0, 1)``, or all ones where no more entries than that are visible."""
    z, _ = _shifted(x)
    visible = z > -math.inf
    low = z.masked_fill(~visible, 0.0).amin(-1, keepdim=True) - 1
    high = torch.zeros_like(low)
    for _ in range(100):
        tau = (low + high) / 2
        too_much = (z - tau).clamp(0, 1).sum(-1, keepdim=True) >= budget
        low, high = torch.where(too_much, tau, low), torch.where(too_much, high, tau)
    enough = visible.sum(-1, keepdim=True) > budget
    return torch.where(enough, (z - low).clamp(0, 1), visible.double())


def _eighty_digits(x: Tensor, alpha: float, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """α-entmax of rows (n, d) for 1 ≤ α ≤ 2, its gradient for the scores, and the one for α, (n, 1).

    The published formulas, division by ``(α - 1)²`` included, in so many digits that nothing is lost; α = 1 is taken as
    ``1 + 1e-15``.
    """
    with decimal.localcontext(decimal.Context(prec=80)):
        a = Decimal(alpha) - 1 or Decimal(10) ** -15
        rows = [_published(a, z, g) for z, g in zip(x.tolist(), upstream.tolist(), strict=True)]
    p, grad_scores, grad_alpha = (torch.tensor(values, dtype=torch.float64) for values in zip(*rows, strict=True))
    return p, grad_scores, grad_alpha


def _published(a: Decimal, scores: list[float], upstream: list[float]) -> tuple[list[float], list[float], list[float]]:
    z, g = [Decimal(value) for value in scores], [Decimal(value) for value in upstream]
    top = max(z)
    z = [a * (value - top) for value in z]
    tau = Decimal(-1)  # Newton's method on Σ p - 1 climbs from here
    for _ in range(200):
        base = [max(value - tau, Decimal(0)) for value in z]
        p = [value ** (1 / a) if value else value for value in base]
        u = [value / b if b else b for value, b in zip(p, base, strict=True)]  # p^(2-α)
        total = sum(u)
        step = (sum(p) - 1) / total * a
        tau += step
        if abs(step) < Decimal(10) ** -55 * a:
            break
    else:
        raise AssertionError("the oracle did not converge")
    # Peters, Niculae & Martins 2019
    mean = sum(v * y for v, y in zip(u, g, strict=True)) / total
    grad_scores = [v * (y - mean) for v, y in zip(u, g, strict=True)]
    # Correia, Niculae & Martins 2019, Prop. 1
    entropies = [value * value.ln() if value else value for value in p]
    grad_alpha = sum(
        y * ((value - v / total) / a**2 - (h - v / total * sum(entropies)) / a)
        for value, v, h, y in zip(p, u, entropies, g, strict=True)
    )
    return [float(value) for value in p], [float(value) for value in grad_scores], [float(grad_alpha)]


@pytest.fixture(scope="session")
def oracle() -> Callable[[Tensor, float | Tensor], Tensor]:
    return _bisect


@pytest.fixture(scope="session")
def normmax_oracle() -> Callable[[Tensor, float], Tensor]:
    return _bisect_normmax


@pytest.fixture(scope="session")
def budget_oracle() -> Callable[[Tensor, float | Tensor], Tensor]:
    return _bisect_budget


@pytest.fixture(scope="session")
def eighty_digits() -> Callable[[Tensor, float, Tensor], tuple[Tensor, Tensor, Tensor]]:
    return _eighty_digits


@pytest.fixture(params=["torch", "compiled"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way to compute the mappings, by turns."""
    if backends()[request.param].startswith("not available"):
        pytest.skip(backends()[request.param])
    with use_backend(request.param):
        yield request.param
