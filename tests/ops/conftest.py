"""Oracles without code of this library (bisection, arithmetic with eighty digits), and the fixture ``backend``."""

from __future__ import annotations

import decimal
from collections.abc import Callable, Iterator
from decimal import Decimal

import pytest
import torch
from oracles import bisect_budget, bisect_entmax, bisect_normmax
from torch import Tensor

from sparse_attn.kernels.dispatch import backends, use_backend


def _eighty_digits(x: Tensor, alpha: float, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """α-entmax of rows (n, d) for 1 ≤ α ≤ 2, its gradient for the scores, and its gradient for α, (n, 1).

    The published formulas divide by ``(α - 1)²``, which loses digits: they are computed with eighty digits. α = 1 is
    replaced by ``1 + 1e-15``.
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
    tau = Decimal(-1)  # a lower bound: from here, Newton's method on Σ p - 1 increases tau to the root
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
    return bisect_entmax


@pytest.fixture(scope="session")
def normmax_oracle() -> Callable[[Tensor, float], Tensor]:
    return bisect_normmax


@pytest.fixture(scope="session")
def budget_oracle() -> Callable[[Tensor, float | Tensor], Tensor]:
    return bisect_budget


@pytest.fixture(scope="session")
def eighty_digits() -> Callable[[Tensor, float, Tensor], tuple[Tensor, Tensor, Tensor]]:
    return _eighty_digits


@pytest.fixture(params=["torch", "compiled"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test once with each of the two backends; skip a backend that is not available."""
    if backends()[request.param].startswith("not available"):
        pytest.skip(backends()[request.param])
    with use_backend(request.param):
        yield request.param
