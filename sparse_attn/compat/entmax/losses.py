"""``entmax.losses``: Fenchel-Young losses of class scores."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparse_attn.checks import described_type, is_int, result_dtype
from sparse_attn.compat.entmax.arguments import check_hint, floating
from sparse_attn.compat.entmax.root_finding import normmax_bisect
from sparse_attn.ops.losses import check_target, entmax_loss

_REDUCTIONS = {"elementwise_mean": "mean", "mean": "mean", "sum": "sum", "none": "none"}


def sparsemax_loss(X: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    """:func:`sparse_attn.sparsemax_loss` of each sample.

    Args:
        X: Scores (n, C), or any other shape that :func:`sparse_attn.sparsemax_loss` accepts.
        target: Classes (n,). A sample whose target is -100 is ignored; its loss is 0.
        k: The package sorts only the k largest scores first. No effect here.

    Returns:
        (n,) losses, never negative.

    Raises:
        TypeError: ``X`` is not floating, ``target`` not int64 or uint8, ``k`` not an int.
        ValueError: The shapes do not fit or ``k`` is below 1.
        IndexError: A target is neither a class nor -100.

    Example:
        >>> sparsemax_loss(torch.tensor([[-2, 0, 0.5]]), torch.tensor([1]))
        tensor([0.5625])
    """
    check_hint(k, "k")
    return entmax_loss(X, target, 2.0, reduction="none")


def entmax15_loss(X: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    """:func:`sparse_attn.entmax15_loss` of each sample.

    Args:
        X: Scores, as in :func:`sparsemax_loss`.
        target: Classes, as in :func:`sparsemax_loss`.
        k: No effect.

    Returns:
        (n,) losses, never negative.

    Raises:
        TypeError: ``X`` is not floating, ``target`` not int64 or uint8, ``k`` not an int.
        ValueError: The shapes do not fit or ``k`` is below 1.
        IndexError: A target is neither a class nor -100.

    Example:
        >>> entmax15_loss(torch.tensor([[-2, 0, 0.5]]), torch.tensor([1]))
        tensor([0.6844])
    """
    check_hint(k, "k")
    return entmax_loss(X, target, 1.5, reduction="none")


def sparsemax_bisect_loss(X: Tensor, target: Tensor, n_iter: int | None = 50) -> Tensor:
    """The same as :func:`sparsemax_loss`.

    Args:
        X: Scores, as in :func:`sparsemax_loss`.
        target: Classes, as in :func:`sparsemax_loss`.
        n_iter: The package's number of bisection steps. No effect here.

    Returns:
        (n,) losses, never negative.

    Raises:
        TypeError: ``X`` is not floating, ``target`` not int64 or uint8, ``n_iter`` not an int.
        ValueError: The shapes do not fit or ``n_iter`` is below 1.
        IndexError: A target is neither a class nor -100.
    """
    check_hint(n_iter, "n_iter")
    return entmax_loss(X, target, 2.0, reduction="none")


def entmax_bisect_loss(X: Tensor, target: Tensor, alpha: float | Tensor = 1.5, n_iter: int | None = 50) -> Tensor:
    """:func:`sparse_attn.entmax_loss` of each sample; α = 1 is the cross-entropy.

    Args:
        X: Scores, as in :func:`sparsemax_loss`.
        target: Classes, as in :func:`sparsemax_loss`.
        alpha: A number or a tensor in ``(0, inf)``, of shape (n, 1) for one α per sample. Differentiable.
        n_iter: The package's number of bisection steps. No effect here.

    Returns:
        (n,) losses, never negative.

    Raises:
        TypeError: ``X`` is not floating, ``target`` not int64 or uint8, ``n_iter`` not an int.
        ValueError: The shapes do not fit, ``n_iter`` is below 1, or α is outside ``(0, inf)``.
        IndexError: A target is neither a class nor -100.

    Example:
        >>> entmax_bisect_loss(torch.tensor([[-2, 0, 0.5]]), torch.tensor([1]), alpha=1.33)
        tensor([0.7548])
    """
    check_hint(n_iter, "n_iter")
    return entmax_loss(X, target, floating(alpha, X), reduction="none")


def normmax_bisect_loss(X: Tensor, target: Tensor, alpha: float | Tensor = 2, n_iter: int | None = 50) -> Tensor:
    r"""The Fenchel-Young loss of :func:`normmax_bisect`, for each sample.

    .. math:: L(x, y) = \max_{p \in \triangle} \langle p, x \rangle - \lVert p \rVert_\alpha - (x_y - 1)

    Its gradient in the scores is ``p - e_y``, where ``e_y`` is the one-hot target. The loss is computed in float64.

    Args:
        X: Scores (n, C).
        target: Classes (n,). A sample whose target is -100 is ignored; its loss is 0.
        alpha: As in :func:`normmax_bisect`, of shape (n, 1) for one α per sample. Differentiable.
        n_iter: The package's number of bisection steps. No effect here.

    Returns:
        (n,) losses, never negative.

    Raises:
        TypeError: ``X`` is not floating, ``target`` not int64 or uint8, ``n_iter`` not an int.
        ValueError: The shapes do not fit, ``n_iter`` is below 1, or α is outside ``(0, inf)``.
        IndexError: A target is neither a class nor -100.

    Example:
        >>> normmax_bisect_loss(torch.tensor([[-2, 0, 0.5]]), torch.tensor([1]), alpha=2)
        tensor([0.5886])

    Reference:
        Blondel, Martins & Niculae 2020 (JMLR), "Learning with Fenchel-Young Losses", on norm entropies.
    """
    check_hint(n_iter, "n_iter")
    return _normmax_loss(X, target, alpha, reduction="none")


def _normmax_loss(
    X: Tensor, target: Tensor, alpha: float | Tensor, *, ignore_index: int = -100, reduction: str
) -> Tensor:
    check_target(X, target, ignore_index)
    if X.dim() != 2 or target.dim() != 1:
        raise ValueError(f"X must be (n, C) and target (n,), got {tuple(X.shape)} and {tuple(target.shape)}")
    kept = target != ignore_index
    index = target.long().masked_fill(~kept, 0)[:, None]
    scores = X.masked_fill(~kept[:, None], 0.0)
    scores = scores.double().masked_fill(scores <= torch.finfo(X.dtype).min, -math.inf)
    losses = _norm_loss(scores, normmax_bisect(scores, alpha), alpha, index).squeeze(-1).masked_fill(~kept, 0.0)
    if reduction == "none":
        return losses.to(result_dtype(X))
    total = losses.sum()
    return (total if reduction == "sum" else total / kept.sum()).to(result_dtype(X))


def _norm_loss(scores: Tensor, p: Tensor, alpha: float | Tensor, index: Tensor) -> Tensor:
    """``⟨p - e_y, x⟩ + 1 - ‖p‖_α`` of each row.

    ``p`` maximises the value, so the first derivative through ``p`` is zero: ``p`` contributes to second derivatives
    only.
    """
    inside = p > 0
    shift, largest = scores.detach().amax(-1, keepdim=True), p.detach().amax(-1, keepdim=True)
    x = torch.where(inside, scores - shift, 0.0)
    ratio = torch.where(inside, p / largest, 1.0)  # the powers of p itself would underflow at a large α
    norm = largest * torch.where(inside, ratio**alpha, 0.0).sum(-1, keepdim=True) ** (1 / alpha)
    loss = (p * x).sum(-1, keepdim=True) - (scores.gather(-1, index) - shift) + 1 - norm
    return loss - loss.detach().clamp(max=0.0)  # a clamp would have no gradient where rounding gives less than 0


class _Loss(nn.Module):
    """Base class of the loss modules, which leaves out ignored targets and reduces."""

    def __init__(self, ignore_index: int, reduction: str) -> None:
        super().__init__()
        if reduction not in _REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
        if not is_int(ignore_index):
            raise TypeError(f"ignore_index must be an int, got {described_type(ignore_index)}")
        self.ignore_index = int(ignore_index)
        self.reduction = reduction

    def _reduced(self, loss: Callable[..., Tensor], X: Tensor, target: Tensor, alpha: float | Tensor) -> Tensor:
        alpha = floating(alpha, X)
        return loss(X, target, alpha, ignore_index=self.ignore_index, reduction=_REDUCTIONS[self.reduction])


class SparsemaxLoss(_Loss):
    """:func:`sparsemax_loss` as a module.

    Args:
        k: No effect.
        ignore_index: Samples with this target are ignored. Any int, also a negative one.
        reduction: ``"elementwise_mean"`` or ``"mean"``, over the samples that are not ignored; ``"sum"``; ``"none"``.

    Raises:
        TypeError: ``k`` or ``ignore_index`` is not an int.
        ValueError: ``reduction`` is unknown, or ``k`` is below 1.

    Example:
        >>> SparsemaxLoss()(torch.tensor([[-2, 0, 0.5], [1, 0, 0]]), torch.tensor([1, -100]))
        tensor(0.5625)
    """

    def __init__(self, k: int | None = None, ignore_index: int = -100, reduction: str = "elementwise_mean") -> None:
        super().__init__(ignore_index, reduction)
        check_hint(k, "k")
        self.k = k

    def forward(self, X: Tensor, target: Tensor) -> Tensor:
        """The loss of scores (n, C) and classes (n,)."""
        return self._reduced(entmax_loss, X, target, 2.0)


class Entmax15Loss(_Loss):
    """:func:`entmax15_loss` as a module; arguments of :class:`SparsemaxLoss`."""

    def __init__(self, k: int | None = 100, ignore_index: int = -100, reduction: str = "elementwise_mean") -> None:
        super().__init__(ignore_index, reduction)
        check_hint(k, "k")
        self.k = k

    def forward(self, X: Tensor, target: Tensor) -> Tensor:
        """The loss of scores (n, C) and classes (n,)."""
        return self._reduced(entmax_loss, X, target, 1.5)


class SparsemaxBisectLoss(_Loss):
    """:func:`sparsemax_bisect_loss` as a module; arguments of :class:`SparsemaxLoss`, with ``n_iter`` for ``k``."""

    def __init__(self, n_iter: int | None = 50, ignore_index: int = -100, reduction: str = "elementwise_mean") -> None:
        super().__init__(ignore_index, reduction)
        check_hint(n_iter, "n_iter")
        self.n_iter = n_iter

    def forward(self, X: Tensor, target: Tensor) -> Tensor:
        """The loss of scores (n, C) and classes (n,)."""
        return self._reduced(entmax_loss, X, target, 2.0)


class EntmaxBisectLoss(_Loss):
    """:func:`entmax_bisect_loss` as a module; arguments of :class:`SparsemaxBisectLoss`, and ``alpha`` before them.

    If ``alpha`` is an ``nn.Parameter``, it is learnt, without bounds.
    """

    alpha: float | Tensor

    def __init__(
        self,
        alpha: float | Tensor = 1.5,
        n_iter: int | None = 50,
        ignore_index: int = -100,
        reduction: str = "elementwise_mean",
    ) -> None:
        super().__init__(ignore_index, reduction)
        check_hint(n_iter, "n_iter")
        self.alpha = alpha
        self.n_iter = n_iter

    def forward(self, X: Tensor, target: Tensor) -> Tensor:
        """The loss of scores (n, C) and classes (n,)."""
        return self._reduced(entmax_loss, X, target, self.alpha)


class NormmaxBisectLoss(_Loss):
    """:func:`normmax_bisect_loss` as a module; arguments of :class:`SparsemaxBisectLoss`, and ``alpha`` before them.

    If ``alpha`` is an ``nn.Parameter``, it is learnt, without bounds.
    """

    alpha: float | Tensor

    def __init__(
        self,
        alpha: float | Tensor = 2,
        n_iter: int | None = 50,
        ignore_index: int = -100,
        reduction: str = "elementwise_mean",
    ) -> None:
        super().__init__(ignore_index, reduction)
        check_hint(n_iter, "n_iter")
        self.alpha = alpha
        self.n_iter = n_iter

    def forward(self, X: Tensor, target: Tensor) -> Tensor:
        """The loss of scores (n, C) and classes (n,)."""
        return self._reduced(_normmax_loss, X, target, self.alpha)
