"""The three products of attention weights with matrices, dense."""

from __future__ import annotations

from torch import Tensor


def gathered(p: Tensor, x: Tensor) -> Tensor:
    """``p @ x``: (rows, size) and (size, width) to (rows, width)."""
    return p @ x


def scatter_(out: Tensor, p: Tensor, x: Tensor) -> None:
    """``out += p.T @ x``: (rows, size) and (rows, width) into (size, width)."""
    out.addmm_(p.T, x)


def sampled(p: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``x @ y.T``; the caller reads only the entries where ``p`` is not zero."""
    return x @ y.T
