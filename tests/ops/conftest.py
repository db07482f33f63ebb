"""An α-entmax that shares nothing with ours: bisection on τ, in float64, in the form the papers print."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def _bisect(x: Tensor, alpha: float) -> Tensor:
    z = (x - x.amax(-1, keepdim=True)).double()
    if alpha == 1:
        return torch.softmax(z, -1)
    a = alpha - 1
    # p = [a z - tau]_+^(1/a); the largest entry alone sums to one at the lower end, a flat row at the upper.
    low = torch.full_like(z[..., :1], -1.0)
    high = -(z.shape[-1] ** -a) + torch.zeros_like(low)
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    for _ in range(200):
        tau = (low + high) / 2
        p = (a * z - tau).clamp(min=0) ** (1 / a)
        too_much = (p.sum(-1, keepdim=True) >= 1) == (a > 0)
        low, high = torch.where(too_much, tau, low), torch.where(too_much, high, tau)
    return p / p.sum(-1, keepdim=True)


@pytest.fixture
def oracle() -> Callable[[Tensor, float], Tensor]:
    return _bisect
