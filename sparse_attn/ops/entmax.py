"""The α-entmax family: softmax (α = 1), 1.5-entmax, sparsemax (α = 2) and every other α > 0."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.checks import check_alpha, check_row_parameter, check_scores, result_dtype, rows_last
from sparse_attn.kernels.functions.entmax import entmax_rows, widened


def entmax(x: Tensor, alpha: float | Tensor = 1.5, dim: int = -1) -> Tensor:
    r"""α-entmax along ``dim``: dense below α = 1, softmax at 1, sparse above, sparsemax at 2.

    .. math:: \operatorname{argmax}_{p \in \triangle} \langle p, x \rangle + \frac{1-\sum p_i^\alpha}{\alpha(\alpha-1)}

    Args:
        x: Scores of any floating dtype. ``-inf`` and the smallest finite number of the dtype are masked. A row in
            which every score is masked gets zeros, and zero gradients.
        alpha: A number, or a tensor with size 1 along ``dim`` that broadcasts against ``x``, in ``(0, inf)``. Scores of
            shape (N, H, L, S) take one α per head as ``alpha.view(-1, 1, 1)``. Differentiable. Up to α = 4 the result
            is exact up to rounding; for much larger α the mapping is close to a step function and ill-conditioned.
        dim: The dimension that sums to one.

    Returns:
        Probabilities of ``x``'s shape and dtype. Half precision is computed in float32.

    Raises:
        TypeError: ``x`` is not floating, or ``alpha`` neither a number nor a floating tensor.
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
    return entmax_along(x, alpha, dim)


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
    return entmax_along(x, 2.0, dim)


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
    return entmax_along(x, 1.5, dim)


def entmax_along(x: Tensor, alpha: float | Tensor, dim: int, k: int | None = None) -> Tensor:
    """:func:`entmax` along ``dim``, over the ``k`` largest scores if ``k`` is given."""
    check_scores(x, dim)
    if isinstance(alpha, Tensor):
        check_row_parameter(alpha, x, dim, "alpha")  # entmax_rows checks the values
        alpha = rows_last(alpha, x, dim)
    else:
        check_alpha(alpha)
    if x.numel() == 0:
        # This keeps x and α in the graph: over an empty batch their gradients, of every order, are zero, not None.
        p = torch.softmax(x, dim)
        return p * (1 + 0 * alpha.sum().to(x.dtype)) if isinstance(alpha, Tensor) else p
    scores = widened(x, alpha)
    lowest = torch.finfo(x.dtype).min
    if not x.dim():
        return entmax_rows(scores.view(1), alpha, lowest).view(()).to(result_dtype(x))
    if dim in (-1, x.dim() - 1):  # the usual case: skips two views, which autograd would record
        p = entmax_rows(scores, alpha, lowest, k)
    else:
        # Dimensions are counted from the front: ``torch.onnx.export(dynamo=False)`` writes negative ones unchanged.
        last, dim = x.dim() - 1, dim % x.dim()
        p = entmax_rows(scores.movedim(dim, last), alpha, lowest, k).movedim(last, dim)
    return p.to(result_dtype(x)).contiguous()
