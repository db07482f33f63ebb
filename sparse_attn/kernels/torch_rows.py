"""The fall-back where no kernel is compiled: ``kernels.reference.entmax`` in fewer and cheaper operations.

Comparisons, ``where`` and ``masked_fill`` cost five times what arithmetic does on a CPU, so there are none in a sweep.
Newton's method begins at the root of a part of the row and goes most of the way in the plain form; the careful form of
the reference takes the last two steps. Not differentiable; α between 1 and 2, everything else goes to the reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sparse_attn.kernels.reference import entmax as reference
from sparse_attn.kernels.reference.entmax import norm_step

_MAX_SWEEPS = 100
_SHORT, _STRIDE = 256, 16  # rows that long begin at the root of the largest of every sixteen entries
_LONG, _CANDIDATES = 4096, 64  # in a row that long the support mostly is among so many of the largest entries
_NEAR = 1e-4  # of Σ p - 1, from where Newton's method lands on the root
_CHUNK = 2**17  # entries that are computed at once: buffers stay in the cache


def entmax_forward(scores: Tensor, a: float | Tensor, lowest: float) -> Tensor:
    """As :func:`sparse_attn.kernels.reference.entmax.entmax_forward`."""
    if not _between_one_and_two(a):
        return reference.entmax_forward(scores, a, lowest)
    size = scores.shape[-1]
    if size >= _LONG and not isinstance(a, Tensor) and a >= 0.5:
        largest, index = scores.topk(_CANDIDATES, -1)
        p = entmax_forward(largest, a, lowest)
        if bool((p[..., -1] == 0.0).all()):  # then no other entry has weight
            return torch.zeros_like(scores).scatter_(-1, index, p)
    rows = scores.reshape(-1, size)
    per_row = a.expand(*scores.shape[:-1], 1).reshape(-1, 1) if isinstance(a, Tensor) else None
    p = torch.empty_like(rows)
    for part in _chunks(rows):
        p[part] = _probabilities(rows[part], a if per_row is None else per_row[part], lowest)
    return p.view(scores.shape)


def topk_entmax_forward(scores: Tensor, k: int, a: float | Tensor, lowest: float) -> Tensor:
    """As :func:`sparse_attn.kernels.reference.entmax.topk_entmax_forward`, which sorts all scores."""
    largest, index = scores.topk(k, -1)
    last = largest[..., -1:]
    ties = ((scores >= last).sum(-1, keepdim=True) > k) & (last > lowest)
    if bool(ties.any()):  # torch.topk takes any of equal scores, not the first
        return reference.topk_entmax_forward(scores, k, a, lowest)
    return torch.zeros_like(scores).scatter_(-1, index, entmax_forward(largest, a, lowest))


def _chunks(rows: Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK // rows.shape[-1])
    return (slice(begin, begin + step) for begin in range(0, len(rows), step))


def _probabilities(scores: Tensor, a: float | Tensor, lowest: float) -> Tensor:
    scores, top, _ = reference.without_masked(scores, lowest)
    if isinstance(a, Tensor):
        a = reference.away_from_zero(a, scores.dtype)
    z, sigma = scores - top, torch.zeros_like(top)
    size = scores.shape[-1]
    if size >= _SHORT:
        maxima = z[..., : size // _STRIDE * _STRIDE].unflatten(-1, (_STRIDE, -1)).amax(-2)
        sigma = _approach(maxima, a, sigma, 1e-2).clamp_(min=0.0)  # all of them may lie below the largest score
    sigma = _approach(z, a, sigma, _NEAR)
    return reference.normalised(reference.climb(scores, top, a, sigma.double()))


def _between_one_and_two(a: float | Tensor) -> bool:
    if not isinstance(a, Tensor):
        return 0 < a <= 1
    least, most = a.aminmax()
    return bool(least >= 0) and bool(most <= 1)


def _approach(z: Tensor, a: float | Tensor, sigma: Tensor, error: float) -> Tensor:
    """σ of scores whose maximum is 0, such that Σ p is about 1 + ``error`` or less, and hardly below 1."""
    t, w, u = (torch.empty_like(z) for _ in range(3))
    error_before = math.inf
    for _ in range(_MAX_SWEEPS):
        if isinstance(a, float) and a == 1.0:
            total = torch.sub(z, sigma - 1, out=w).clamp_(min=0.0).sum(-1, keepdim=True)
            slope = w.sign_().sum(-1, keepdim=True)
        elif isinstance(a, float) and a == 0.5:
            torch.sub(z, sigma - 2, out=u).mul_(0.5).clamp_(min=0.0)
            total, slope = torch.linalg.vecdot(u, u).unsqueeze(-1), u.sum(-1, keepdim=True)
        else:
            torch.sub(z, sigma, out=t).mul_(a).clamp_(min=-1.0)
            torch.add(t, 1.0, out=w)
            t.clamp_(min=-0.999999).log1p_().mul_((1 / a - 1) / math.log(2)).exp2_()  # exp is slow where it underflows
            torch.sign(w, out=u).mul_(t)
            total, slope = torch.linalg.vecdot(w, u).unsqueeze(-1), u.sum(-1, keepdim=True)
        now = total.max().item() - 1
        if not error < now < error_before:  # nor where it is NaN
            break
        sigma = sigma + norm_step(total, slope, a)
        error_before = now
    return sigma


def entmax_backward(
    p: Tensor, a: float | Tensor, grad: Tensor, *, with_alpha: bool = False
) -> tuple[Tensor, Tensor | None]:
    """As :func:`sparse_attn.kernels.reference.entmax.entmax_backward`."""
    if isinstance(a, float) and not with_alpha and a in (0.5, 1.0):
        u = p.sign() if a == 1.0 else p.sqrt()
        return u.mul_(_centred(grad, u)), None
    if not with_alpha or p.dtype == torch.float64 or not _between_one_and_two(a):
        return reference.entmax_backward(p, a, grad, with_alpha=with_alpha)
    size = p.shape[-1]
    rows, grads = p.reshape(-1, size), grad.reshape(-1, size)
    per_row = torch.as_tensor(a, dtype=torch.float64, device=p.device).expand(*p.shape[:-1], 1).reshape(-1, 1)
    grad_scores, grad_alpha = torch.empty_like(rows), rows.new_empty(len(rows), 1)
    for part in _chunks(rows):
        grad_scores[part], grad_alpha[part] = _gradients(rows[part].double(), per_row[part], grads[part].double())
    return grad_scores.view(p.shape), grad_alpha.view(*p.shape[:-1], 1)


def _gradients(p: Tensor, a: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients in float64, in which the reference's formulas need no series: see there for the letters."""
    a = reference.away_from_zero(a, torch.float32)
    log_p = p.clamp(min=torch.finfo(torch.float32).tiny).log_()
    x = log_p * -a
    grown = x.expm1()
    u = torch.addcmul(p, p, grown)
    c = _centred(grad, u)
    x.clamp_(min=1e-7)
    y = x.expm1().sub_(x).div_(x.square_()).mul_(log_p).mul_(log_p)
    weighted = p * c
    total = _sum(u).clamp_(min=torch.finfo(u.dtype).tiny)
    d, a_sum, b = _sum(weighted), _dot(weighted, log_p), _dot(weighted, y)
    h, y_mean = _dot(p, log_p), _dot(p, y)
    return u.mul_(c), (y_mean * d - b - a * (y_mean * a_sum - h * b)) / total


def _centred(grad: Tensor, u: Tensor) -> Tensor:
    """``g - Σ u g / Σ u``; in two steps, for rows that are nearly one-hot, where what is left is small beside g."""
    total = _sum(u).clamp_(min=torch.finfo(u.dtype).tiny)
    c = grad - _dot(u, grad) / total
    return c.sub_(_dot(u, c) / total)


def _sum(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, y).unsqueeze(-1)
