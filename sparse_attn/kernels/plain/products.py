"""What attention multiplies its weights with, as dense products."""

from __future__ import annotations

from torch import Tensor


def gathered(p: Tensor, x: Tensor) -> Tensor:
    """``p @ x``: (rows, size) and (size, width) to (rows, width)."""
    return p @ x


def scatter_(out: Tensor, p: Tensor, x: Tensor) -> None:
    """``out += p.T @ x``: (rows, size) and (rows, width) into (size, width)."""
    out.addmm_(p.T, x)


def sampled(p: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``x @ y.T``, of which only what lies where ``p`` is not zero will be looked at."""
    return x @ y.T
