r"""Cross-entropy with α-entmax in place of softmax.

Which loss to use:

- **Cross-entropy** (α = 1) when the probabilities matter: likelihood, perplexity, calibration, sampling, distillation.
  No class gets probability zero, and every example keeps a gradient.
- **The 1.5-entmax loss** for decisions among many classes, such as the words of a vocabulary. Almost all classes get
  exactly zero, so a search can enumerate the others. An example whose target leads by 2 (its score is at least 2 above
  all others) has loss zero and no gradient.
- **The sparsemax loss** (α = 2) when the support (the classes with non-zero probability) is the wanted result: which
  labels apply, which few continuations are possible. A lead of 1 is enough for loss zero, and wrong classes outside the
  support get no gradient. For sequences, published results are better with 1.5.
- **A learnt α** only if another term of the objective depends on α. The entropy ``H_α(p)`` decreases in α for every
  ``p`` that is not one-hot, and so does the loss: trained by the loss alone, α grows on any data, until it reaches the
  upper end of its range or the ``p`` of every example is one-hot. For the same reason losses at different α cannot be
  compared; choose α by a metric that does not contain α, such as accuracy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.checks import (
    check_alpha,
    check_dropout,
    check_floating,
    check_row_parameter,
    compute_dtype,
    described_type,
    is_int,
    rows_last,
)
from sparse_attn.kernels.functions.conjugate import conjugate_rows
from sparse_attn.transforms import readable
from sparse_attn.versions import autocast_enabled

_REDUCTIONS = ("none", "mean", "sum")


def entmax_loss(
    x: Tensor,
    target: Tensor,
    alpha: float | Tensor = 1.5,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""The α-entmax loss. At α = 1: cross-entropy; for α > 1: zero for an example with ``p_c = 1``.

    .. math:: \ell(x, c) = \Omega^*_\alpha(x) - x_c, \qquad
        \Omega^*_\alpha(x) = \max_{p \in \triangle} \langle p, x \rangle + \frac{1-\sum p_i^\alpha}{\alpha(\alpha-1)}

    The maximum is attained by ``p = entmax(x, alpha)``, and the gradient is ``p`` minus the target. At α = 1 the result
    is that of :func:`torch.nn.functional.cross_entropy` for the same arguments. All arguments but ``alpha`` have the
    same effect as in cross-entropy: with the smoothed target ``y``, the loss of an example is ``Σ w_c y_c ℓ(x, c)``.
    For a target of probabilities this is the Fenchel-Young loss plus the constant ``H_α(y)``, which cross-entropy
    contains too: the loss has its minimum at ``p = y``, and the minimum is ``H_α(y)``.

    Use α = 1 for probabilities (likelihood, calibration, sampling), 1.5 for decisions among many classes, 2 where the
    support is the wanted result. Do not learn α by this loss alone: on any data, the loss never grows with α.

    Args:
        x: Scores of any floating dtype. ``-inf`` is masked, as in cross-entropy. With class indices and without
            ``label_smoothing``, the loss is infinite if the target is a masked class, and does not depend on masked
            classes otherwise. With probabilities or ``label_smoothing``, every class is part of the target: a masked
            class makes the loss infinite, or NaN if its probability is zero.
        target: Class indices (int64 or uint8), or class probabilities.
        alpha: A number, or a tensor with size 1 along the classes that broadcasts against ``x``, in ``(0, inf)``.
            Differentiable.
        weight: One weight per class.
        ignore_index: Examples with this class index have loss zero and do not count in the mean.
        reduction: ``"mean"`` (for class indices, weighted by the weights of the target classes), ``"sum"`` or
            ``"none"``.
        label_smoothing: How much of the target, in ``[0, 1]``, is spread evenly over the classes.

    Returns:
        A scalar, or one loss per example with ``reduction="none"``. If targets and weights are not negative, no loss is
        negative. Half precision is computed in float32; the dtype is that of cross-entropy: float32 under autocast.

    Raises:
        TypeError: ``x`` or ``weight`` is not floating; ``target`` is neither indices nor probabilities.
        ValueError: A shape, device or number does not fit; ``ignore_index >= 0`` with probabilities.
        IndexError: A class index is out of range.

    Shape:
        - x: (C), (N, C) or (N, C, d1, ...).
        - target: (), (N) or (N, d1, ...) for indices; like ``x`` for probabilities.
        - weight: (C).
        - Output: (), or with ``reduction="none"`` the shape of a target of indices.

    Example:
        >>> x = torch.tensor([[3.0, 0.5, 0.0], [1.0, 0.5, 0.0]])
        >>> entmax_loss(x, torch.tensor([0, 1]), reduction="none")
        tensor([0.0000, 0.7033])
        >>> entmax_loss(x, torch.tensor([0, 1]), alpha=torch.tensor([[1.0], [2.0]]), reduction="none")
        tensor([0.1239, 0.5625])

    Reference:
        Peters, Niculae & Martins 2019 (ACL), "Sparse Sequence-to-Sequence Models"; Blondel, Martins & Niculae 2020
        (JMLR), "Learning with Fenchel-Young Losses"; Peters & Martins 2021 (NAACL), "Smoothing and Shrinking the Sparse
        Seq2Seq Search Space", for label smoothing.
    """
    check_target(x, target, ignore_index)
    check_loss_arguments(weight, ignore_index, reduction, label_smoothing)
    dim = min(x.dim() - 1, 1)
    if weight is not None:
        _check_weight(weight, x, dim)
    if isinstance(alpha, Tensor):
        check_row_parameter(alpha, x, dim, "alpha")  # conjugate_rows checks the values
        alpha = rows_last(alpha, x, dim)
    else:
        check_alpha(alpha)
    dtype = _result_dtype(x, target, weight)
    scores = x.to(compute_dtype(x)).movedim(dim, -1)
    weight = None if weight is None else weight.to(torch.promote_types(weight.dtype, scores.dtype))
    if x.numel() == 0:  # `not` would make an exported program of torch 2.6 keep this size
        # This keeps x and α in the graph: over an empty batch their gradients, of every order, are zero, not None.
        total: float | Tensor = 0.0
        losses = torch.softmax(scores, -1).sum(-1) * (1 + 0 * alpha.sum() if isinstance(alpha, Tensor) else 1.0)
    elif target.shape == x.shape:
        losses, total = _of_probabilities(scores, target.movedim(dim, -1), alpha, weight, label_smoothing)
    else:
        losses, total = _of_indices(scores, target, alpha, weight, ignore_index, label_smoothing)
    if reduction == "none":
        return losses.to(dtype)
    return (losses.sum() / total if reduction == "mean" else losses.sum()).to(dtype)


def sparsemax_loss(
    x: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""The sparsemax loss: :func:`entmax_loss` at α = 2, zero where the target leads by 1 or more.

    .. math:: \ell(x, c) = \max_{p \in \triangle} \langle p, x \rangle + \tfrac12 (1 - \lVert p \rVert^2) - x_c

    Args:
        x: Scores. This and all other arguments are those of :func:`entmax_loss`.
        target: Class indices, or class probabilities.
        weight: One weight per class.
        ignore_index: Examples with this class index do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: How much of the target is spread evenly over the classes.

    Returns:
        A scalar, or one loss per example with ``reduction="none"``.

    Raises:
        TypeError: As :func:`entmax_loss`.
        ValueError: As :func:`entmax_loss`.
        IndexError: A class index is out of range.

    Shape:
        - x: (C), (N, C) or (N, C, d1, ...).
        - target: (), (N) or (N, d1, ...) for indices; like ``x`` for probabilities.
        - Output: (), or with ``reduction="none"`` the shape of a target of indices.

    Example:
        >>> x = torch.tensor([[3.0, 0.5, 0.0], [1.0, 0.5, 0.0]])
        >>> sparsemax_loss(x, torch.tensor([0, 1]), reduction="none")
        tensor([0.0000, 0.5625])

    Reference:
        Martins & Astudillo 2016 (ICML), "From Softmax to Sparsemax", section 3.
    """
    return entmax_loss(
        x,
        target,
        2.0,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def entmax15_loss(
    x: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""The 1.5-entmax loss: :func:`entmax_loss` at α = 1.5, zero where the target leads by 2 or more.

    .. math:: \ell(x, c) = \max_{p \in \triangle} \langle p, x \rangle + \tfrac43 \left(1 - \sum p_i^{3/2}\right) - x_c

    Args:
        x: Scores. This and all other arguments are those of :func:`entmax_loss`.
        target: Class indices, or class probabilities.
        weight: One weight per class.
        ignore_index: Examples with this class index do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: How much of the target is spread evenly over the classes.

    Returns:
        A scalar, or one loss per example with ``reduction="none"``.

    Raises:
        TypeError: As :func:`entmax_loss`.
        ValueError: As :func:`entmax_loss`.
        IndexError: A class index is out of range.

    Shape:
        - x: (C), (N, C) or (N, C, d1, ...).
        - target: (), (N) or (N, d1, ...) for indices; like ``x`` for probabilities.
        - Output: (), or with ``reduction="none"`` the shape of a target of indices.

    Example:
        >>> x = torch.tensor([[3.0, 0.5, 0.0], [1.0, 0.5, 0.0]])
        >>> entmax15_loss(x, torch.tensor([0, 1]), reduction="none")
        tensor([0.0000, 0.7033])

    Reference:
        Peters, Niculae & Martins 2019 (ACL), "Sparse Sequence-to-Sequence Models".
    """
    return entmax_loss(
        x,
        target,
        1.5,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def _of_indices(
    scores: Tensor,
    target: Tensor,
    alpha: float | Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """The losses of the examples, and the divisor of their sum in the mean."""
    target = target.long()
    ignored = target == ignore_index
    index = target.masked_fill(ignored, 0).unsqueeze(-1)
    conjugate, score = conjugate_rows(scores, alpha, index)
    factor = torch.ones_like(conjugate) if weight is None else weight[index]
    losses = factor * (conjugate - score)
    if label_smoothing > 0:
        z, size = _below_top(scores), scores.shape[-1]
        if weight is None:
            spread = size * conjugate - z.sum(-1, keepdim=True)
        else:
            spread = weight.sum() * conjugate - (weight * z).sum(-1, keepdim=True)
        losses = (1 - label_smoothing) * losses + label_smoothing / size * spread
    losses, factor = (rows.squeeze(-1).masked_fill(ignored, 0.0) for rows in (losses, factor))
    return losses, factor.sum()


def _of_probabilities(
    scores: Tensor, target: Tensor, alpha: float | Tensor, weight: Tensor | None, label_smoothing: float
) -> tuple[Tensor, int]:
    """The losses of the examples, and their number."""
    target = target.to(torch.promote_types(target.dtype, scores.dtype))
    if label_smoothing > 0:
        target = target * (1 - label_smoothing) + label_smoothing / scores.shape[-1]
    if weight is not None:
        target = target * weight
    (conjugate,) = conjugate_rows(scores, alpha)
    losses = target.sum(-1) * conjugate.squeeze(-1) - (target * _below_top(scores)).sum(-1)
    return losses, losses.numel()


def _below_top(scores: Tensor) -> Tensor:
    """Scores minus their maximum, as in the conjugate: this constant cancels in the loss."""
    return scores - scores.detach().amax(-1, keepdim=True)


def _result_dtype(x: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype:
    """The dtype that cross-entropy returns."""
    dtype = x.dtype
    if autocast_enabled(x.device):
        dtype = torch.nn.functional.cross_entropy(x.new_zeros(1), x.new_zeros(1)).dtype
    if target.shape != x.shape:
        return dtype
    dtype = torch.promote_types(dtype, target.dtype)
    return dtype if weight is None else torch.promote_types(dtype, weight.dtype)


def check_loss_arguments(weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float) -> None:
    """Raise unless the arguments that do not depend on a batch are valid."""
    if weight is not None:
        check_floating(weight, "weight")
        if weight.dim() != 1:
            raise ValueError(f"weight must have shape (C), got shape {tuple(weight.shape)}")
    if not is_int(ignore_index):
        raise TypeError(f"ignore_index must be an int, got {described_type(ignore_index)}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    check_dropout(label_smoothing, "label_smoothing")


def check_target(x: Tensor, target: Tensor, ignore_index: int) -> None:
    """Raise unless the target has class indices in range, or probabilities. In a trace the range is not checked."""
    check_floating(x, "x")
    if not x.dim():
        raise ValueError("x must have shape (C), (N, C) or (N, C, d1, ...), got shape ()")
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a torch.Tensor, got {type(target).__name__}")
    if target.device != x.device:
        raise ValueError(f"target must be on the device of x, {x.device}, got {target.device}")
    if target.shape == x.shape:
        if not target.is_floating_point():
            raise TypeError(f"target must be floating where it has the shape of x (probabilities), got {target.dtype}")
        if ignore_index >= 0:
            raise ValueError(f"ignore_index must be negative for a target of probabilities, got {ignore_index}")
        return
    *batch, size = x.movedim(min(x.dim() - 1, 1), -1).shape
    if tuple(target.shape) != tuple(batch):  # tuples: Dynamo of torch 2.6 cannot compare a list with a shape
        raise ValueError(
            f"target must have shape {tuple(batch)} (class indices) or {tuple(x.shape)} (class probabilities) for x of "
            f"shape {tuple(x.shape)}, got shape {tuple(target.shape)}"
        )
    if target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"target must be int64 or uint8 where it has class indices, got {target.dtype}")
    values = readable(target)
    if values is not None:
        classes = values.long()
        wrong = ((classes < 0) | (classes >= size)) & (classes != ignore_index)
        if bool(wrong.any()):
            raise IndexError(
                f"target must be in [0, {size - 1}] or ignore_index ({ignore_index}), got {classes[wrong][0].item()}"
            )


def _check_weight(weight: Tensor, x: Tensor, dim: int) -> None:
    if tuple(weight.shape) != (x.shape[dim],):
        raise ValueError(f"weight must have shape ({x.shape[dim]},), one per class, got shape {tuple(weight.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on the device of x, {x.device}, got {weight.device}")
