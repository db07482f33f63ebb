"""``φ₁`` and ``φ₂``: the exponential series without its first terms, accurate also near 0."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def phi1(x: Tensor) -> Tensor:
    """``(eˣ - 1) / x``, in a form that is differentiable at 0."""
    small = x.abs() < 0.5
    return torch.where(small, 1 + x * phi2(x), torch.expm1(x) / torch.where(small, 1.0, x))


def phi2(x: Tensor) -> Tensor:
    """``(eˣ - 1 - x) / x²``, by its series near 0, where the differences would cancel."""
    small = x.abs() < 0.5
    near = torch.where(small, x, 0.0)
    terms = 9 if x.dtype == torch.float32 else 15
    series = torch.full_like(x, 1.0 / math.factorial(terms + 2))
    for n in range(terms - 1, -1, -1):
        series = series * near + 1.0 / math.factorial(n + 2)
    far = torch.where(small, 1.0, x)
    return torch.where(small, series, (torch.expm1(far) - far) / far.square())
