"""The three products of attention weights with matrices, as dense products."""

from __future__ import annotations

from torch import Tensor


def gathered(p: Tensor, x: Tensor) -> Tensor:
    """``p @ x``: (rows, size) and (size, width) to (rows, width)."""
    return p @ x


def scatter_(out: Tensor, p: Tensor, x: Tensor) -> None:
    """``out += p.T @ x``: (rows, size) and (rows, width) into (size, width)."""
    out.addmm_(p.T, x)


def sampled(p: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``x @ y.T``. The caller reads only entries with non-zero ``p``, so sparse backends compute no others."""
    return x @ y.T
