"""α as kernels take it: ``a = α - 1``, subtracted before any rounding, since next to α = 1 its digits count."""

from __future__ import annotations

from torch import Tensor

from sparse_attn.checks import compute_dtype


def split_alpha(alpha: float | Tensor) -> tuple[Tensor | None, float]:
    """A tensor of α as it is, with 0.0 in the place of the number; or None and ``a = α - 1`` of a number.

    A tensor goes to autograd functions as the caller's own: a change in place before the backward is then noticed.
    """
    return (alpha, 0.0) if isinstance(alpha, Tensor) else (None, float(alpha) - 1)


def shift_alpha(alpha: Tensor | None, a: float, scores: Tensor) -> float | Tensor:
    """``a = α - 1`` of the two that :func:`split_alpha` gave: the number, or a tensor as in :func:`minus_one`."""
    return a if alpha is None else minus_one(alpha, scores)


def minus_one(alpha: Tensor, scores: Tensor) -> Tensor:
    """``α - 1`` in the dtype that ``scores`` are computed in."""
    a = alpha.to(compute_dtype(alpha)) - 1
    return a if a.dtype == scores.dtype else a.to(compute_dtype(scores))  # a call that changes nothing takes 1 µs
