"""α-entmax and top-k α-entmax of the last dimension, and the derivatives, in plain torch.

Everything is written in ``a = α - 1`` and in the form

    p_i = [1 + a (z_i - σ)]_+^(1/a),    Σ p_i = 1,

which tends to ``exp(z_i - σ)`` as ``a -> 0`` without cancellation. ``u = p^(1 - a)`` is ``-dp/dσ`` on the support.
Inputs are float32 or float64; ``a`` is a number or a tensor that broadcasts with size 1 in the last dimension.

Reference: Peters, Niculae & Martins 2019 (ACL) for the mapping and its Jacobian; Correia, Niculae &
Martins 2019 (EMNLP), Prop. 1 for the gradient in α, here in a form that does not divide by ``a``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_attn.kernels.reference.series import phi2
from sparse_attn.transforms import writes_onnx

_MAX_SWEEPS = 100
# A score with weight zero for α >= 1 and a negligible weight for α < 1, and not large enough to cause overflow.
_NOWHERE = -1e30


def entmax_forward(scores: Tensor, a: float | Tensor, lowest: float) -> Tensor:
    """The probabilities ``p``. Entries at or below ``lowest`` are masked; a fully masked row is all zeros."""
    steep = bool((a > 1).any()) if isinstance(a, Tensor) else a > 1  # some α > 2
    if steep and scores.dtype != torch.float64:
        # For α > 2 the slope at the edge of the support is infinite: a rounding error of σ causes a large error of p.
        wide = a.double() if isinstance(a, Tensor) else a
        return entmax_forward(scores.double(), wide, lowest).to(scores.dtype)
    scores, top, masked = without_masked(scores, lowest)
    if isinstance(a, Tensor):
        a = away_from_zero(a, scores.dtype)
    if isinstance(a, float) and a == 0.0:
        p = (scores - top).exp_()  # torch.softmax sums long rows less exactly
    else:
        p = _solve_bracketed(scores, top, a) if steep else climb(scores, top, a, torch.zeros_like(top).double())
    return normalised(p if masked is None else p.masked_fill_(masked, 0.0))


def without_masked(scores: Tensor, lowest: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores with masked entries replaced, the largest of each row (0 if all are masked), and the mask or None."""
    top = scores.amax(-1, keepdim=True)
    if bool((scores.amin(-1) > lowest).all()):  # false for NaN
        return scores, top, None
    masked = scores <= lowest
    top = top.masked_fill(top <= lowest, 0.0)
    far_below = (top - top.abs().clamp(min=-_NOWHERE)).clamp(min=torch.finfo(scores.dtype).min)
    return torch.where(masked, far_below, scores), top, masked


def away_from_zero(a: Tensor, dtype: torch.dtype) -> Tensor:
    """``a``, with 0 and numbers near 0 replaced by a number so small that log1p(a x) / a equals x to the last bit."""
    tiny = torch.finfo(dtype).eps * 1e-3
    return torch.where(a.abs() < tiny, tiny, a)


def normalised(p: Tensor) -> Tensor:
    """``p`` divided by its sum, in place; a row of zeros stays zero."""
    total = row_sums(p).to(p.dtype)
    return p.div_(total.masked_fill_(total == 0.0, 1.0))


def topk_entmax_forward(scores: Tensor, k: int, a: float | Tensor, lowest: float) -> Tensor:
    """:func:`entmax_forward` over the ``k`` largest scores of each row, zero elsewhere."""
    index = largest_first(scores)[..., :k]
    return torch.zeros_like(scores).scatter_(-1, index, entmax_forward(scores.gather(-1, index), a, lowest))


def largest_first(scores: Tensor) -> Tensor:
    """Indices from the largest score to the smallest; ties keep their order, which ``torch.topk`` does not promise."""
    if writes_onnx():
        return torch.sort(scores, dim=-1, descending=True).indices  # ONNX has only this sort; it is stable
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices


def climb(scores: Tensor, top: Tensor, a: float | Tensor, sigma: Tensor) -> Tensor:
    """``p`` before division by its sum, by Newton's method on the norm ``(Σ p)^a = 1``, for ``α <= 2``.

    ``sigma`` is the initial value, relative to the largest score: 0, or another lower bound of the root. The norm is
    convex (concave for α < 1) in σ, so the iterates increase to the root and exceed it only by rounding. At α = 1 the
    first step reaches ``logsumexp(z)``.
    """
    error_before = torch.full_like(sigma, math.inf)
    still_open = torch.ones_like(sigma, dtype=torch.bool)
    tolerance = torch.finfo(scores.dtype).eps / 2
    for _ in range(_MAX_SWEEPS):
        p, u = _power(scores, top, sigma, a)
        total = row_sums(p)
        error = (total - 1).abs()
        # Near the root, one step reaches it; later changes are rounding errors.
        landed = (error < 2 * tolerance) & (error_before < 1e-3)
        still_open &= (error > tolerance) & (error < error_before) & ~landed
        if not bool(still_open.any()):
            break
        sigma = sigma + norm_step(total, u.sum(-1, keepdim=True), a) * still_open
        error_before = error
    return p


def _solve_bracketed(scores: Tensor, top: Tensor, a: float | Tensor) -> Tensor:
    """``p`` by Newton's method within a bracket, for any α.

    Bisection replaces a step that leaves the bracket, and a step after one that did not halve the error. For α > 2 the
    slope at the edge of the support is infinite, so a short step is no sign of convergence. The iteration stops
    when the sum is 1 or the bracket is empty.
    """
    eps = torch.finfo(scores.dtype).eps
    low = torch.zeros_like(top)
    log_size = torch.full_like(low, math.log(scores.shape[-1]))
    high = -torch.expm1(-a * log_size) / a
    high = high + eps * high  # the root of a flat row is the bound itself
    sigma, error_before = low, torch.full_like(low, math.inf)
    for _ in range(_MAX_SWEEPS):
        p, u = _power(scores, top, sigma, a)
        total = p.sum(-1, keepdim=True)
        low, high = torch.where(total >= 1, sigma, low), torch.where(total < 1, sigma, high)
        error = (total - 1).abs()
        open_rows = (error > 2 * eps) & (high - low > eps * high)
        if not bool(open_rows.any()):
            break
        newton = sigma + norm_step(total, u.sum(-1, keepdim=True), a)
        good = (newton > low) & (newton < high) & (error <= error_before / 2)
        sigma = torch.where(open_rows, torch.where(good, newton, (low + high) / 2), sigma)
        error_before = error
    # At the upper end of an empty bracket, many equal scores may all be outside the support.
    outside = 1 - total > 2 * eps
    return torch.where(outside, _power(scores, top, low, a)[0], p) if bool(outside.any()) else p


def _power(scores: Tensor, top: Tensor, sigma: Tensor, a: float | Tensor) -> tuple[Tensor, Tensor]:
    """``p`` and ``u`` at a given σ; α = 2 and 1.5 need neither exp nor log.

    ``1 + a (z - σ)`` is computed as ``a (z - (σ - 1/a))``, so that small results keep their digits. If ``σ - 1/a`` were
    rounded to one number, many equal scores would all have the same rounding error, which can be as large as their
    weight.
    """
    from_edge = _count_from(scores, top, sigma - 1 / a)
    if isinstance(a, float) and a == 1.0:
        p = from_edge.clamp_(min=0.0)
        return p, p.sign()
    if isinstance(a, float) and a == 0.5:
        u = from_edge.mul_(0.5).clamp_(min=0.0)
        return u * u, u
    smallest = torch.finfo(scores.dtype).tiny
    if isinstance(a, float) and a >= 0.5:
        w = from_edge.mul_(a).clamp_(min=0.0)
        inside = w.sign()
        u = _exp(w.clamp_(min=smallest).log().mul_(1 / a - 1)).mul_(inside)
        return w.mul_(u), u
    # For α < 1.5, p / max p is computed first, as a power of 1 + a z / (1 - a σ): in a long flat row p is small, and
    # its logarithm has lost digits, which the logarithm of a number close to 1 keeps.
    wide = a.double() if isinstance(a, Tensor) else torch.as_tensor(a, dtype=torch.float64, device=scores.device)
    gentle = wide < 0.5
    most = torch.where(gentle, 1 - wide * sigma, 1.0)  # (max p)^a
    largest = torch.where(gentle, torch.exp(torch.log1p(-wide * sigma) / wide), 1.0)
    rise = (wide / most).to(scores.dtype)
    t = _count_from(scores, top, torch.where(gentle, 0.0, sigma)).mul_(rise)
    far = t < -0.5
    w = torch.where(far, from_edge.mul_(rise), t + 1).clamp_(min=0.0)
    inside = w.sign()
    log_w = w.clamp_(min=smallest).log()
    log_w += torch.where(far, 0.0, t.sub_(w - 1).div_(w))  # the rounding error of 1 + t
    u = _exp(log_w.mul_(1 / a - 1)).mul_(inside)
    return w.mul_(u).mul_(largest.to(u.dtype)), u.mul_((largest / most).to(u.dtype))


def _exp(x: Tensor) -> Tensor:
    """``exp_``, with 0 where the result would underflow, because underflow is thirty times slower."""
    lowest = math.log(torch.finfo(x.dtype).tiny) + 1
    return x.clamp_(min=lowest).exp_().sub_(1.0001 * math.exp(lowest)).clamp_(min=0.0)


def _count_from(scores: Tensor, top: Tensor, below: Tensor) -> Tensor:
    """``scores - (top + below)``, where the pair ``top + below`` has twice the digits of the scores."""
    place = top.double() + below
    high = place.to(scores.dtype)
    low = ((top.double() - high.double()) + below).to(scores.dtype)
    return (scores - high).sub_(low)


def row_sums(x: Tensor) -> Tensor:
    """Sums ``(..., 1)`` in float64. In long rows of float32, groups of four are first added in float32: faster."""
    whole = x.shape[-1] // 4 * 4
    if x.dtype == torch.float64 or x.shape[-1] < 256:
        return x.sum(-1, keepdim=True, dtype=torch.float64)
    parts = x[..., :whole].unflatten(-1, (4, -1)).sum(-2)
    if whole < x.shape[-1]:
        parts = torch.cat([parts, x[..., whole:]], -1)
    return parts.sum(-1, keepdim=True, dtype=torch.float64)


def norm_step(total: Tensor, slope: Tensor, a: float | Tensor) -> Tensor:
    """The Newton step ``(S - S^(1-a)) / (a U)``, accurate for small ``a``; 0 for rows without support or with NaN."""
    if isinstance(a, float) and a == 1.0:
        step = (total - 1) / slope
    elif isinstance(a, float) and a == 0.5:
        step = 2 * (total - total.sqrt()) / slope
    else:
        step = -total * torch.expm1(-a * total.log()) / (a * slope)
    return torch.nan_to_num_(step, nan=0.0, posinf=0.0, neginf=0.0)


def entmax_backward(
    p: Tensor, a: float | Tensor, grad: Tensor, *, with_alpha: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The gradient for the scores and, if wanted, for α per row ``(..., 1)``. Differentiable.

    ``dz = u ∘ (g - δ)``, ``δ = Σ u g / Σ u``; ``dα = [Y D - B - a (Y A - H B)] / U`` with ``D = Σ p g``,
    ``A = Σ p ℓ g``, ``B = Σ p y g``, ``H = Σ p ℓ``, ``Y = Σ p y``, ``ℓ = log p`` and ``y = ℓ² φ₂(-a ℓ)``.
    """
    if with_alpha and p.dtype == torch.float32:
        # In float32, logarithms of nearly equal entries would differ only in their last digits.
        wide = a.double() if isinstance(a, Tensor) else a
        grad_scores, grad_alpha = entmax_backward(p.double(), wide, grad.double(), with_alpha=True)
        return grad_scores.to(p.dtype), None if grad_alpha is None else grad_alpha.to(p.dtype)
    log_p, u, total = _support(p, a)
    # A constant in the upstream gradient has no effect. The gradient of the largest entry is subtracted, so that a
    # large constant does not cost digits.
    grad = grad - grad.gather(-1, p.argmax(-1, keepdim=True))
    centred = grad - (u * grad).sum(-1, keepdim=True) / total
    grad_scores = u * centred
    if not with_alpha:
        return grad_scores, None
    y = log_p.square() * phi2(-a * log_p)
    weighted = p * centred  # Σ dp/dα = 0, so the centred gradient gives the same sum and loses fewer digits
    d = weighted.sum(-1, keepdim=True)
    a_sum = (weighted * log_p).sum(-1, keepdim=True)
    b = (weighted * y).sum(-1, keepdim=True)
    h = (p * log_p).sum(-1, keepdim=True)
    y_mean = (p * y).sum(-1, keepdim=True)
    return grad_scores, (y_mean * d - b - a * (y_mean * a_sum - h * b)) / total


def entmax_tangent(p: Tensor, a: float | Tensor, scores_tangent: Tensor | None, alpha_tangent: Tensor | None) -> Tensor:
    """The forward-mode derivative of :func:`entmax_forward`: the tangent of ``p`` from the tangents of scores and α.

    ``dp = u ∘ (dz - Σ u dz / Σ u) + p/U ∘ [(Y - y) - a (ℓ Y - y H)] dα``, letters as in :func:`entmax_backward`.
    """
    log_p, u, total = _support(p, a)
    tangent = torch.zeros_like(p)
    if scores_tangent is not None:
        tangent = tangent + u * (scores_tangent - (u * scores_tangent).sum(-1, keepdim=True) / total)
    if alpha_tangent is not None:
        y = log_p.square() * phi2(-a * log_p)
        h = (p * log_p).sum(-1, keepdim=True)
        y_mean = (p * y).sum(-1, keepdim=True)
        tangent = tangent + p / total * (y_mean - y - a * (log_p * y_mean - y * h)) * alpha_tangent
    return tangent


def _support(p: Tensor, a: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``ℓ = log p`` and ``u = p^(1-a)`` on the support, 0 elsewhere, and ``U = Σ u``."""
    outside = p == 0  # not ``~(p > 0)``: a row of NaN keeps its NaN
    log_p = torch.where(outside, 1.0, p).log()
    u = p if isinstance(a, float) and a == 0.0 else torch.where(outside, 0.0, torch.exp((1 - a) * log_p))
    return log_p, u, u.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
