"""``entmax.root_finding``: the mappings that the package computes by bisection."""

from __future__ import annotations

from torch import Tensor, nn

from sparse_attn.checks import check_alpha, check_number_or_tensor
from sparse_attn.compat.entmax.arguments import check_hint, floating
from sparse_attn.ops.budget import budget_sparsemax
from sparse_attn.ops.entmax import entmax, sparsemax
from sparse_attn.ops.normmax import normmax
from sparse_attn.ops.topk import topk_softmax
from sparse_attn.transforms import readable


def entmax_bisect(
    X: Tensor, alpha: float | Tensor = 1.5, dim: int = -1, n_iter: int | None = 50, ensure_sum_one: bool = True
) -> Tensor:
    """:func:`sparse_attn.entmax` along ``dim``; α = 1 is softmax, and α below 1 dense.

    Args:
        X: Scores; masked entries as in :func:`sparse_attn.entmax`.
        alpha: A number or a tensor in ``(0, inf)``, as in :func:`sparse_attn.entmax`. Differentiable.
        dim: The dimension that sums to one.
        n_iter: The package's number of bisection steps. No effect here.
        ensure_sum_one: No effect: a row that is not fully masked always sums to one.

    Returns:
        Probabilities of ``X``'s shape and dtype.

    Raises:
        TypeError: ``X`` is not floating, ``alpha`` not a number or tensor, ``n_iter`` not an int.
        ValueError: α is outside ``(0, inf)`` or its shape does not fit; ``n_iter`` is below 1.
        IndexError: ``X`` has no dimension ``dim``.

    Example:
        >>> import torch
        >>> x = torch.tensor([[-1, 0, 0.5], [1, 2, 3.5]])
        >>> alpha = torch.tensor(1.33, requires_grad=True)
        >>> p = entmax_bisect(x, alpha)
        >>> p.detach()
        tensor([[0.0460, 0.3276, 0.6264],
                [0.0026, 0.1012, 0.8963]])
        >>> torch.autograd.grad(p[0, 0], alpha)
        (tensor(-0.2562),)
    """
    check_hint(n_iter, "n_iter")
    return entmax(X, floating(alpha, X), dim)


def sparsemax_bisect(X: Tensor, dim: int = -1, n_iter: int | None = 50, ensure_sum_one: bool = True) -> Tensor:
    """:func:`sparse_attn.sparsemax` along ``dim``.

    Args:
        X: Scores, as in :func:`entmax_bisect`.
        dim: The dimension that sums to one.
        n_iter: No effect.
        ensure_sum_one: No effect.

    Returns:
        Probabilities of ``X``'s shape and dtype.

    Raises:
        TypeError: ``X`` is not floating or ``n_iter`` is not an int.
        ValueError: ``n_iter`` is below 1.
        IndexError: ``X`` has no dimension ``dim``.

    Example:
        >>> import torch
        >>> sparsemax_bisect(torch.tensor([-2, 0, 0.5]), dim=0)
        tensor([0.0000, 0.2500, 0.7500])
    """
    check_hint(n_iter, "n_iter")
    return sparsemax(X, dim)


def normmax_bisect(X: Tensor, alpha: float | Tensor = 2, dim: int = -1, n_iter: int | None = 50) -> Tensor:
    r"""α-normmax along ``dim``: :func:`sparse_attn.normmax`, extended to α at or below 1.

    .. math:: \operatorname{argmax}_{p \in \triangle} \langle p, x \rangle - \lVert p \rVert_\alpha

    At α = 1 the norm is 1 on the whole simplex; below 1 it is concave and smallest at the corners. For α ≤ 1 the
    solution is the corner of the largest score (the lowest index among equal scores), and the gradients are zero.

    Args:
        X: Scores, as in :func:`entmax_bisect`.
        alpha: The norm's exponent in ``(0, inf)``, a number or a tensor as in :func:`entmax_bisect`. Differentiable.
        dim: The dimension that sums to one.
        n_iter: No effect.

    Returns:
        Probabilities of ``X``'s shape and dtype.

    Raises:
        TypeError: ``X`` is not floating, ``alpha`` not a number or tensor, ``n_iter`` not an int.
        ValueError: α is outside ``(0, inf)`` or its shape does not fit; ``n_iter`` is below 1.
        IndexError: ``X`` has no dimension ``dim``.

    Example:
        >>> import torch
        >>> x = torch.tensor([-2, 0, 0.5])
        >>> normmax_bisect(x, alpha=2, dim=0)
        tensor([0.0000, 0.3110, 0.6890])
        >>> normmax_bisect(x, alpha=1000, dim=0)
        tensor([0.0000, 0.4997, 0.5003])
        >>> normmax_bisect(x, alpha=1, dim=0)
        tensor([0., 0., 1.])
    """
    check_hint(n_iter, "n_iter")
    alpha = floating(alpha, X)
    check_number_or_tensor(alpha, "alpha")
    if not isinstance(alpha, Tensor):
        check_alpha(alpha)
        return normmax(X, alpha, dim) if alpha > 1 else topk_softmax(X, 1, dim)
    corner = alpha <= 1
    values = readable(alpha)
    if values is not None:
        check_alpha(values)
        if not bool((values <= 1).any()):
            return normmax(X, alpha, dim)
    return topk_softmax(X, 1, dim).where(corner, normmax(X, alpha.masked_fill(corner, 2.0), dim))


def budget_bisect(X: Tensor, budget: float | Tensor = 2, dim: int = -1, n_iter: int | None = 50) -> Tensor:
    """:func:`sparse_attn.budget_sparsemax` along ``dim``, extended to a budget of 0, for which every entry is 0.

    Args:
        X: Scores, as in :func:`entmax_bisect`.
        budget: The sum of each row, in ``[0, d]`` with d the size of ``dim``: a number or a tensor, as α in
            :func:`entmax_bisect`. Differentiable.
        dim: The dimension that sums to the budget.
        n_iter: No effect.

    Returns:
        Entries in [0, 1], of ``X``'s shape and dtype.

    Raises:
        TypeError: ``X`` is not floating, ``budget`` not a number or tensor, ``n_iter`` not an int.
        ValueError: ``budget`` is outside ``[0, d]`` or its shape does not fit; ``n_iter`` is below 1.
        IndexError: ``X`` has no dimension ``dim``.

    Example:
        >>> import torch
        >>> budget_bisect(torch.tensor([-2, 0, 0.5]), budget=2, dim=0)
        tensor([0., 1., 1.])
    """
    check_hint(n_iter, "n_iter")
    budget = floating(budget, X)
    if isinstance(budget, Tensor):
        nothing = budget == 0
        return budget_sparsemax(X, budget.masked_fill(nothing, 1.0), dim).masked_fill(nothing, 0.0)
    return 0.0 * budget_sparsemax(X, 1.0, dim) if budget == 0 else budget_sparsemax(X, budget, dim)


class EntmaxBisect(nn.Module):
    """:func:`entmax_bisect` as a module without ``ensure_sum_one``. An ``nn.Parameter`` ``alpha`` is learnt, unbounded.

    Example:
        >>> import torch
        >>> layer = EntmaxBisect(alpha=torch.nn.Parameter(torch.tensor(1.33)))
        >>> layer(torch.tensor([-1, 0, 0.5])).detach()
        tensor([0.0460, 0.3276, 0.6264])
        >>> len(list(layer.parameters()))
        1
    """

    alpha: float | Tensor

    def __init__(self, alpha: float | Tensor = 1.5, dim: int = -1, n_iter: int | None = 50) -> None:
        super().__init__()
        check_hint(n_iter, "n_iter")
        self.dim = dim
        self.n_iter = n_iter
        self.alpha = alpha

    def forward(self, X: Tensor) -> Tensor:
        """Map scores to probabilities."""
        return entmax_bisect(X, self.alpha, self.dim, self.n_iter)


class SparsemaxBisect(nn.Module):
    """:func:`sparsemax_bisect` as a module; same arguments, but without ``ensure_sum_one``.

    Example:
        >>> import torch
        >>> SparsemaxBisect(dim=0)(torch.tensor([-2, 0, 0.5]))
        tensor([0.0000, 0.2500, 0.7500])
    """

    def __init__(self, dim: int = -1, n_iter: int | None = None) -> None:
        super().__init__()
        check_hint(n_iter, "n_iter")
        self.dim = dim
        self.n_iter = n_iter

    def forward(self, X: Tensor) -> Tensor:
        """Map scores to probabilities."""
        return sparsemax_bisect(X, self.dim, self.n_iter)


class NormmaxBisect(nn.Module):
    """:func:`normmax_bisect` as a module; same arguments. An ``nn.Parameter`` as ``alpha`` is learnt, without bounds.

    Example:
        >>> import torch
        >>> NormmaxBisect(alpha=2, dim=0)(torch.tensor([-2, 0, 0.5]))
        tensor([0.0000, 0.3110, 0.6890])
    """

    alpha: float | Tensor

    def __init__(self, alpha: float | Tensor = 2, dim: int = -1, n_iter: int | None = 50) -> None:
        super().__init__()
        check_hint(n_iter, "n_iter")
        self.dim = dim
        self.n_iter = n_iter
        self.alpha = alpha

    def forward(self, X: Tensor) -> Tensor:
        """Map scores to probabilities."""
        return normmax_bisect(X, self.alpha, self.dim, self.n_iter)


class BudgetBisect(nn.Module):
    """:func:`budget_bisect` as a module; same arguments. An ``nn.Parameter`` as ``budget`` is learnt, without bounds.

    Example:
        >>> import torch
        >>> BudgetBisect(budget=2, dim=0)(torch.tensor([-2, 0, 0.5]))
        tensor([0., 1., 1.])
    """

    budget: float | Tensor

    def __init__(self, budget: float | Tensor = 2, dim: int = -1, n_iter: int | None = 50) -> None:
        super().__init__()
        check_hint(n_iter, "n_iter")
        self.dim = dim
        self.n_iter = n_iter
        self.budget = budget

    def forward(self, X: Tensor) -> Tensor:
        """Map scores to entries of [0, 1] that sum to the budget."""
        return budget_bisect(X, self.budget, self.dim, self.n_iter)
