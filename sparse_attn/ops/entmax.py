"""The α-entmax family: softmax (α = 1), 1.5-entmax, sparsemax (α = 2) and everything between and beyond."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn.kernels.reference.entmax import entmax_backward, entmax_forward
from sparse_attn.ops.checks import check_alpha, check_alpha_shape, check_scores, compute_dtype, result_dtype


class _Entmax(torch.autograd.Function):
    """Both gradients are functions of ``p``, ``a`` and the upstream gradient: the scores are not kept."""

    @staticmethod
    def forward(scores: Tensor, a: float | Tensor, lowest: float) -> Tensor:
        return entmax_forward(scores, a, lowest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float | Tensor, float], output: Tensor) -> None:
        a = inputs[1]
        ctx.number = None if isinstance(a, Tensor) else a
        ctx.save_for_backward(output, a if isinstance(a, Tensor) else None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        p, per_row = ctx.saved_tensors
        a = ctx.number if per_row is None else per_row
        grad_scores, grad_a = entmax_backward(p, a, grads[0], with_alpha=ctx.needs_input_grad[1])
        return grad_scores, None if grad_a is None else grad_a.sum_to_size(per_row.shape), None


def entmax(x: Tensor, alpha: float | Tensor = 1.5, dim: int = -1) -> Tensor:
    r"""α-entmax along ``dim``: dense below α = 1, softmax at 1, sparse above, sparsemax at 2.

    .. math:: \operatorname{argmax}_{p \in \triangle} \langle p, x \rangle + \frac{1-\sum p_i^\alpha}{\alpha(\alpha-1)}

    Args:
        x: Scores of any floating dtype. ``-inf`` and the smallest finite number of the dtype are masked; a row with
            nothing else gives zeros, and zero gradients.
        alpha: A number, or a tensor that broadcasts against ``x`` with size 1 along ``dim``, in ``(0, inf)``. Scores of
            shape (N, H, L, S) take one α per head as ``alpha.view(-1, 1, 1)``. Differentiable. Up to α = 4 the result
            is right to rounding; far beyond, the mapping is nearly a step function and the problem ill-conditioned.
        dim: The dimension that sums to one.

    Returns:
        Probabilities of ``x``'s shape and dtype. Half precision is computed in float32.

    Raises:
        TypeError: ``x`` or ``alpha`` is not floating.
        ValueError: α is outside ``(0, inf)`` or its shape does not fit.
        IndexError: ``x`` has no dimension ``dim``.

    Example:
        >>> x = torch.tensor([[-1.0, 0.0, 0.5], [1.0, 2.0, 3.5]])
        >>> entmax(x, alpha=1.33)
        tensor([[0.0460, 0.3276, 0.6264],
                [0.0026, 0.1012, 0.8963]])
        >>> entmax(x, alpha=torch.tensor([[1.0], [2.0]]))
        tensor([[0.1220, 0.3315, 0.5465],
                [0.0000, 0.0000, 1.0000]])

    Reference:
        Peters, Niculae & Martins 2019 (ACL), "Sparse Sequence-to-Sequence Models"; Correia, Niculae & Martins
        2019 (EMNLP), "Adaptively Sparse Transformers", Prop. 1, for the gradient in α.
    """
    check_scores(x, dim)
    check_alpha(alpha)
    a: float | Tensor
    if isinstance(alpha, Tensor):
        check_alpha_shape(alpha, x, dim)
        # α - 1 before any rounding to x's dtype: near 1 the difference is what counts.
        a = (alpha.to(compute_dtype(alpha)) - 1).to(compute_dtype(x))
        a = a.reshape([1] * (x.dim() - a.dim()) + list(a.shape)).movedim(dim, -1) if x.dim() else a
    else:
        a = float(alpha) - 1
    if x.numel() == 0:
        # An empty batch still reaches α: its gradient is zero, not missing.
        return x + 0 * a.sum() if isinstance(a, Tensor) else x.clone()
    scores = x.to(compute_dtype(x))
    if not x.dim():
        return _Entmax.apply(scores.view(1), a, torch.finfo(x.dtype).min).view(()).to(result_dtype(x))
    p = _Entmax.apply(scores.movedim(dim, -1), a, torch.finfo(x.dtype).min)
    return p.movedim(-1, dim).to(result_dtype(x)).contiguous()


def sparsemax(x: Tensor, dim: int = -1) -> Tensor:
    r"""Sparsemax along ``dim``: the Euclidean projection of the scores on the simplex, α-entmax at α = 2.

    .. math:: \operatorname{argmin}_{p \in \triangle} \lVert p - x \rVert^2

    Args:
        x: Scores of any floating dtype; masked entries as in :func:`entmax`.
        dim: The dimension that sums to one.

    Returns:
        Probabilities of ``x``'s shape and dtype.

    Raises:
        TypeError: ``x`` is not floating.
        IndexError: ``x`` has no dimension ``dim``.

    Example:
        >>> sparsemax(torch.tensor([-2.0, 0.0, 0.5]))
        tensor([0.0000, 0.2500, 0.7500])

    Reference:
        Martins & Astudillo 2016 (ICML), "From Softmax to Sparsemax", eq. 2.
    """
    return entmax(x, 2.0, dim)


def entmax15(x: Tensor, dim: int = -1) -> Tensor:
    """1.5-entmax along ``dim``, half-way between softmax and sparsemax: α-entmax at α = 1.5.

    Args:
        x: Scores of any floating dtype; masked entries as in :func:`entmax`.
        dim: The dimension that sums to one.

    Returns:
        Probabilities of ``x``'s shape and dtype.

    Raises:
        TypeError: ``x`` is not floating.
        IndexError: ``x`` has no dimension ``dim``.

    Example:
        >>> entmax15(torch.tensor([-2.0, 0.0, 0.5]))
        tensor([0.0000, 0.3260, 0.6740])

    Reference:
        Peters, Niculae & Martins 2019 (ACL), "Sparse Sequence-to-Sequence Models", section 3.
    """
    return entmax(x, 1.5, dim)
