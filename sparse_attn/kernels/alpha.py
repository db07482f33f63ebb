"""α in the form that kernels take, ``a = α - 1``: subtracted before rounding, to keep all digits for α close to 1."""

from __future__ import annotations

from torch import Tensor

from sparse_attn.checks import compute_dtype


def split_alpha(alpha: float | Tensor) -> tuple[Tensor | None, float]:
    """The pair (tensor of α, 0.0) if α is a tensor, or (None, ``α - 1``) if α is a number.

    The tensor is the caller's own, not a copy, so that autograd detects if the caller changes the tensor in place
    between forward and backward.
    """
    return (alpha, 0.0) if isinstance(alpha, Tensor) else (None, float(alpha) - 1)


def shift_alpha(alpha: Tensor | None, a: float, scores: Tensor) -> float | Tensor:
    """``a = α - 1`` from the result of :func:`split_alpha`: the number, or a tensor as in :func:`minus_one`."""
    return a if alpha is None else minus_one(alpha, scores)


def minus_one(alpha: Tensor, scores: Tensor) -> Tensor:
    """``α - 1`` in the dtype that ``scores`` are computed in."""
    a = alpha.to(compute_dtype(alpha)) - 1
    return a if a.dtype == scores.dtype else a.to(compute_dtype(scores))  # `to` takes 1 µs even without effect
