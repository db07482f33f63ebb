"""The functions of ``kernels.reference.entmax`` in few and cheap torch operations, used where no kernel computes.

On a CPU, an operation of plain torch costs its call, a pass over the data and, most of all, new memory. A pass with a
selection (``where``, ``masked_fill``), with a logarithm of 0 or in float64 takes ten times as long as arithmetic. So
the entries are computed in blocks of rows that reuse a few buffers; numbers of which there is one per row (σ, Σ p) are
computed for all rows at once. Scores far below the largest have weight zero: masked scores need no special treatment
if the largest score of each row is far above ``lowest``.

The notation is that of ``kernels.reference.entmax``.

Not differentiable. For α below 1 or above 2, and in a few other cases, these functions call the reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from sparse_attn.kernels.reference import entmax as reference
from sparse_attn.kernels.reference.entmax import away_from_zero, norm_step

_MAX_SWEEPS = 100
_SHORT, _LANES = 256, 16  # for rows of 256 entries or more, Newton starts at the root for the largest of each 16
_FIRST_SWEEPS = 5  # Newton steps on these largest entries, without a check for convergence
_NEAR = 1e-4  # if |Σ p - 1| is smaller, one Newton step reaches the root
_LONG, _FEW = 4096, 4  # rows of 4096 or more are shortened if at most one entry in 4 may have weight
_FAR = 1e3  # an entry this far below the largest score has weight zero for every α from 1 to 2
_SMALL = 2**15  # for fewer entries, a pass over all is faster than a selection of some
_BUFFERED = 2**17  # entries of all buffers together, so that they stay in the cache


def entmax_forward(scores: Tensor, a: float | Tensor, lowest: float) -> Tensor:
    """The same as :func:`sparse_attn.kernels.reference.entmax.entmax_forward`."""
    if scores.numel() == 0 or not _between_one_and_two(a) or (isinstance(a, float) and a == 0.0):
        return reference.entmax_forward(scores, a, lowest)
    if isinstance(a, Tensor):
        a = _per_row(away_from_zero(a, scores.dtype), scores)
    return _probabilities(scores.reshape(-1, scores.shape[-1]), a, lowest).view(scores.shape)


def topk_entmax_forward(scores: Tensor, k: int, a: float | Tensor, lowest: float) -> Tensor:
    """The same as :func:`sparse_attn.kernels.reference.entmax.topk_entmax_forward`; sorts all scores only for ties."""
    largest, index = scores.topk(k, -1)
    last = largest[..., -1:]
    p = torch.ge(scores, last, out=torch.empty_like(scores))  # as numbers: booleans take five times as long
    # Among tied scores, torch.topk may choose others than the reference.
    if bool(((p.sum(-1, keepdim=True) > k) & (last > lowest)).any()):
        return reference.topk_entmax_forward(scores, k, a, lowest)
    return p.zero_().scatter_(-1, index, entmax_forward(largest, a, lowest))


def _probabilities(scores: Tensor, a: float | Tensor, lowest: float) -> Tensor:
    """The probabilities of rows (n, size), with ``a`` a number or (n, 1).

    Newton's method uses a fast form of the equation, first on a part of the row, then on the whole row. ``p`` itself is
    written in a form that loses no digits. Rows whose sum is not yet close enough to 1 take further steps in that form.
    """
    maxima = _maxima(scores)
    top = maxima.amax(-1, keepdim=True)
    if not bool((top - lowest).amin() > _FAR):  # also true for NaN
        top = top.masked_fill(top <= lowest, 0.0)
        scores = scores.masked_fill(scores <= lowest, -math.inf)
        maxima = _maxima(scores)
    needed = 1 if _is_closed(a) else 3
    at = torch.zeros_like(top).sub_(_lift(a))
    buffers = _buffers(maxima, needed)
    for _ in range(0 if maxima is scores else _FIRST_SWEEPS):
        at += norm_step(*_sums(maxima, top, a, at, None, buffers), a)
    index, size = _where_there_may_be_weight(scores, maxima, top, a, at), scores.shape[-1]
    if index is not None:
        scores = scores.gather(-1, index)
    buffers = _buffers(scores, needed)
    sigma = _climb(scores, top, a, at, buffers) + _lift(a)
    p = torch.empty_like(scores)
    rows: Tensor | None = None
    error_before: float | Tensor = math.inf
    for _ in range(_MAX_SWEEPS):
        total, largest = _write(p, scores, top, a, sigma, rows, buffers)
        # After the division, the error of every entry is at most |Σ p - 1| max p. A max p below 0.1 counts as 0.1.
        error = (total - 1).abs_() * largest.clamp(min=0.1)
        late = _where((error > torch.finfo(p.dtype).eps) & (error < error_before))
        if not len(late):
            break
        rows, total, error_before = late if rows is None else rows[late], total[late], error[late]
        its_a = _of(a, rows)
        blocks = _blocks(buffers, p, rows, its_a)
        slope = _joined(_slopes(block, b, spare[0]).sum(-1, keepdim=True) for spare, block, b in blocks)
        # `p` is already divided by Σ p: the power of `total` gives the slope of the undivided p.
        sigma[rows] += norm_step(total, slope * total ** (1 - its_a), its_a)
    return p if index is None else p.new_zeros(len(p), size).scatter_(-1, index, p)


def _maxima(scores: Tensor) -> Tensor:
    """The largest of each group of 16 entries of a row, and the fewer than 16 entries left over.

    The entries of a group are ``size // 16`` apart. Rows of fewer than 256 entries are returned unchanged.

    The root of Σ p = 1 over these entries is a lower bound of the root for the whole row.
    """
    size = scores.shape[-1]
    if size < _SHORT:
        return scores
    whole = size // _LANES * _LANES
    maxima = scores[:, :whole].unflatten(-1, (_LANES, -1)).amax(-2)
    return torch.cat([maxima, scores[:, whole:]], -1) if whole < size else maxima


def _where_there_may_be_weight(
    scores: Tensor, maxima: Tensor, top: Tensor, a: float | Tensor, at: Tensor
) -> Tensor | None:
    """Indices (n, m) of the entries that may be in the support, from the maxima of :func:`_maxima`.

    ``at`` is a lower bound of the root. None if the rows are short, if there are too many such entries, or if the
    largest score of a row is not finite.
    """
    size = scores.shape[-1]
    if size < _LONG:
        return None
    width = size // _LANES
    edge = top + at if _is_closed(a) else top + at - 1 / a
    edge -= 1e-5 * (1 + edge.abs())  # more than its rounding error
    count = int((maxima[:, :width] > edge).sum(-1).amax())
    rest = size - _LANES * width
    if _FEW * (_LANES * count + rest) > size or not bool(top.isfinite().all()):
        return None
    first = maxima[:, :width].topk(count, -1, sorted=False).indices
    lanes = torch.arange(0, _LANES * width, width, device=scores.device).unsqueeze(-1)
    last = torch.arange(size - rest, size, device=scores.device).expand(len(scores), rest)
    return torch.cat([(first.unsqueeze(-2) + lanes).flatten(-2), last], -1)


def _climb(scores: Tensor, top: Tensor, a: float | Tensor, at: Tensor, buffers: list[Tensor]) -> Tensor:
    """``σ - _lift(a)`` in float64, relative to the largest score, by Newton's method from the lower bound ``at``.

    Converged rows are skipped if it is faster to select the others than to pass over all rows.
    """
    result = at.double()
    rows: Tensor | None = None
    total_before: float | Tensor = math.inf
    for _ in range(_MAX_SWEEPS):
        total, slope = _sums(scores, top, a, at, rows, buffers)
        step = norm_step(total, slope, a)
        late = (total > 1 + _NEAR) & (total < total_before)
        count, total_before = int(late.sum()), total
        is_small = len(late) * scores.shape[-1] < _SMALL
        if count > (0 if is_small else 0.75 * len(late)):
            at = at + step
            continue
        landed = at.double() + step
        if rows is None:
            result = landed
        else:
            result[rows] = landed
        if count == 0:
            break
        late = _where(late)
        rows = late if rows is None else rows[late]
        top, a, at, total_before = top[late], _of(a, late), landed[late].to(at.dtype), total[late]
    return result


def _sums(
    scores: Tensor, top: Tensor, a: float | Tensor, at: Tensor, rows: Tensor | None, buffers: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Σ p and Σ u in the fast form, with σ relative to the largest score and reduced by :func:`_lift`."""
    sums = [_plain_sums(*block, *spare) for spare, *block in _blocks(buffers, scores, rows, top, a, at)]
    total, slope = map(_joined, zip(*sums, strict=True))
    return total, slope


def _plain_sums(
    scores: Tensor, top: Tensor, a: float | Tensor, at: Tensor, w: Tensor, p: Tensor | None = None, *_: Tensor
) -> tuple[Tensor, Tensor]:
    if p is None:
        torch.sub(scores, top, out=w).sub_(at).relu_()
        if a == 1.0:
            return w.sum(-1, keepdim=True), w.sign_().sum(-1, keepdim=True)
        total = torch.linalg.vector_norm(w, dim=-1, keepdim=True).square_()
        return total.mul_(0.25), w.sum(-1, keepdim=True).mul_(0.5)
    torch.sub(scores, top, out=p).sub_(at).mul_(a).clamp_(min=-1.0)
    torch.add(p, 1.0, out=w).clamp_(min=1e-8)  # smaller than the distance between two float32 numbers near 1
    p.log1p_().mul_(1 / a / math.log(2)).clamp_(min=-120.0).exp2_()  # subnormal results are slow
    return p.sum(-1, keepdim=True), p.div_(w).sum(-1, keepdim=True)


def _write(
    p: Tensor,
    scores: Tensor,
    top: Tensor,
    a: float | Tensor,
    sigma: Tensor,
    rows: Tensor | None,
    buffers: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Write ``p`` at σ, divided by its sum, into some rows or all; returns the sum and the largest before the division.

    ``1 + a (z - σ)`` is computed as ``a (z - (σ - 1/a))``, with ``σ - 1/a`` as the sum of two numbers, so that small
    results keep their digits. If ``σ - 1/a`` were rounded to one number, many equal scores would all have the same
    rounding error, which can be as large as their weight.
    """
    if rows is not None:
        top, a, sigma = top[rows], _of(a, rows), sigma[rows]
    wide = a.double() if isinstance(a, Tensor) else a
    edge = sigma - 1 / wide
    high = (top + edge).to(p.dtype)
    low = ((top.double() - high) + edge).to(p.dtype)
    rise = 1.0 if _is_closed(a) else (wide / (1 - wide * sigma)).to(p.dtype)
    largest = torch.exp(torch.log1p(-wide * sigma) / wide)
    step = _step(buffers, scores)
    places: Iterable[Any] = p.split(step) if rows is None else rows.split(step)
    totals: list[Tensor] = []
    for place, (spare, *block) in zip(places, _blocks(buffers, scores, rows, top, a, high, low, rise), strict=True):
        part = place if rows is None else spare[0]
        totals.append(_exact(part, *block, *spare[1:]))
        if rows is not None:
            p[place] = part
    total = _joined(totals)
    return (total if _is_closed(a) else total * largest), largest


def _exact(
    p: Tensor,
    scores: Tensor,
    top: Tensor,
    a: float | Tensor,
    high: Tensor,
    low: Tensor,
    rise: float | Tensor,
    w: Tensor | None = None,
    log_w: Tensor | None = None,
) -> Tensor:
    """Write ``p`` (closed forms) or ``p / max p`` (other α), divided by its sum, into ``p``; returns the sum."""
    tiny = torch.finfo(p.dtype).tiny
    if w is None or log_w is None:
        torch.sub(scores, high, out=p).sub_(low).relu_()
        if a == 0.5:
            p.mul_(0.5).square_()
    else:
        # log w, with w = (p / max p)^a, in two forms: near the largest score, log1p of the scaled distance to that
        # score is more exact; near the edge of the support, log(w) is more exact.
        torch.sub(scores, high, out=w).sub_(low).mul_(rise).clamp_(min=tiny)
        torch.sub(scores, top, out=p).mul_(rise).clamp_(min=torch.finfo(p.dtype).eps - 1).log1p_()
        torch.lerp(torch.log(w, out=log_w), p, w, out=p)
        torch.threshold_(p.mul_(1 / a / math.log(2)).exp2_(), 1.001 * tiny, 0.0)
    total = reference.row_sums(p)
    p.div_(total.to(p.dtype).clamp_(min=tiny))
    return total


def entmax_backward(
    p: Tensor, a: float | Tensor, grad: Tensor, *, with_alpha: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The same as :func:`sparse_attn.kernels.reference.entmax.entmax_backward`."""
    if p.numel() == 0 or not _between_one_and_two(a) or (with_alpha and p.dtype == torch.float64):
        return reference.entmax_backward(p, a, grad, with_alpha=with_alpha)
    size = p.shape[-1]
    rows = p.reshape(-1, size)
    grad_scores = torch.empty_like(rows)
    if with_alpha:
        a = torch.as_tensor(a, dtype=torch.float64, device=p.device)
    if isinstance(a, Tensor):
        a = _per_row(away_from_zero(a, p.dtype), p)
    gradients = _gradients if with_alpha else _gradient
    blocks = _blocks(_buffers(rows, 2), rows, None, a, grad.reshape(-1, size), grad_scores)
    parts = [gradients(*block, *spare) for spare, *block in blocks]
    grad_alpha = _joined(parts).to(p.dtype).view(*p.shape[:-1], 1) if with_alpha else None
    return grad_scores.view(p.shape), grad_alpha


def _gradient(p: Tensor, a: float | Tensor, grad: Tensor, out: Tensor, c: Tensor, _: Tensor) -> None:
    """``u (g - Σ u g / Σ u)`` into ``out``."""
    u = _slopes(p, a, out)
    _centre(grad, u, c)
    u.mul_(c)


def _gradients(p: Tensor, a: Tensor, grad: Tensor, out: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """The same as :func:`_gradient`; also returns the gradient for α.

    The formula of the reference (with ``ℓ = log p`` and φ₂ of ``kernels.reference.series``) can be written with
    ``λ = log(p / max p) = ℓ - m``, ``m = log max p``. In float32, λ distinguishes nearly equal large entries:

        dα = [(1 - a m) (S D - B) - m (A - L D) - a (A S - B L)] / Σ p e^(-a λ)

    with ``s = λ² φ₂(-a λ)``, the sums ``D = Σ p c, A = Σ p λ c, B = Σ p s c, L = Σ p λ, S = Σ p s``, and the centred
    gradient ``c``. ``u`` is ``p e^(-a λ)`` times ``(max p)^(-a)``. φ₂ is computed in float64, where it needs no series.
    """
    tiny = torch.finfo(p.dtype).tiny
    largest = p.amax(-1, keepdim=True).clamp_(min=tiny)
    log_p = torch.div(p, largest).clamp_(min=tiny).log_()
    x = log_p.double().mul_(-a)
    grown = x.expm1()
    u = torch.addcmul(p, p, s.copy_(grown), out=out)
    s.copy_(grown.sub_(x))
    m, squared = largest.double().log_(), a.square()
    total = _centre(grad, u, c).double()
    u.mul_(torch.exp(-a * m).to(p.dtype)).mul_(c)
    log_sum, s_sum = _dot(p, log_p).double(), _dot(p, s).double() / squared
    weighted = c.mul_(p)
    d = weighted.sum(-1, keepdim=True).double()
    a_sum, b = _dot(weighted, log_p).double(), _dot(weighted, s).double() / squared
    return ((1 - a * m) * (s_sum * d - b) - m * (a_sum - log_sum * d) - a * (a_sum * s_sum - b * log_sum)) / total


def _slopes(p: Tensor, a: float | Tensor, out: Tensor) -> Tensor:
    """``u = p^(1 - a)``, and 0 where ``p`` is 0; ``out`` may be ``p`` itself."""
    if isinstance(a, float) and a in (0.0, 0.5, 1.0):
        return out.copy_(p) if a == 0.0 else torch.sqrt(p, out=out) if a == 0.5 else torch.sign(p, out=out)
    power = -a.to(p.dtype) if isinstance(a, Tensor) else -a
    return torch.clamp(p, min=torch.finfo(p.dtype).tiny, out=out).log2_().mul_(power).exp2_().mul_(p)


def _centre(grad: Tensor, u: Tensor, out: Tensor) -> Tensor:
    """``g - Σ u g / Σ u`` into ``out``; returns ``Σ u``.

    The mean is subtracted in two steps: in nearly one-hot rows, the result is small compared with ``g``.
    """
    total = u.sum(-1, keepdim=True).clamp_(min=torch.finfo(u.dtype).tiny)
    torch.sub(grad, _dot(u, grad).div_(total), out=out)
    out.sub_(_dot(u, out).div_(total))
    return total


def _buffers(rows: Tensor, count: int) -> list[Tensor]:
    """Flat buffers for :func:`_blocks`."""
    return list(rows.new_empty(count, min(rows.numel(), max(_BUFFERED // count, rows.shape[-1]))))


def _step(buffers: list[Tensor], rows: Tensor) -> int:
    """The number of rows that fit into a buffer."""
    return max(1, len(buffers[0]) // rows.shape[-1])


def _blocks(buffers: list[Tensor], x: Tensor, rows: Tensor | None, *per_row: Any) -> Iterator[tuple[Any, ...]]:
    """Blocks of the rows of ``x`` whose indices are in ``rows``; of all rows if ``rows`` is None.

    Yields for each block the buffers in the shape of the block, the rows of ``x`` in the block, and the matching part
    of every value in ``per_row``. Selected rows are copied into the last buffer.
    """
    step, picked = _step(buffers, x), x if rows is None else rows
    parts: Iterable[Any] = [(picked, *per_row)]
    if len(picked) > step:
        parts = zip(*(y.split(step) if isinstance(y, Tensor) else repeat(y) for y in (picked, *per_row)), strict=False)
    for part, *others in parts:
        spare = [buffer[: len(part) * x.shape[-1]].view(-1, x.shape[-1]) for buffer in buffers]
        yield spare, part if rows is None else torch.index_select(x, 0, part, out=spare[-1]), *others


def _joined(blocks: Iterable[Any]) -> Tensor:
    first, *others = blocks
    return torch.cat([first, *others]) if others else first


def _where(x: Tensor) -> Tensor:
    """Indices (m,) of the rows for which ``x`` (n, 1) is true."""
    return x.squeeze(-1).nonzero().squeeze(-1)


def _of(a: float | Tensor, rows: Tensor) -> float | Tensor:
    return a[rows] if isinstance(a, Tensor) else a


def _per_row(a: Tensor, x: Tensor) -> Tensor:
    return a.expand(*x.shape[:-1], 1).reshape(-1, 1)


def _is_closed(a: float | Tensor) -> bool:
    """Whether ``p = [a (z - (σ - 1/a))]^(1/a)`` needs neither exp nor log."""
    return isinstance(a, float) and a in (0.5, 1.0)


def _lift(a: float | Tensor) -> float:
    """``1/a`` for the closed forms, which subtract ``σ - 1/a`` from the scores; 0 for the others, which subtract σ."""
    return 1 / a if isinstance(a, float) and _is_closed(a) else 0.0


def _between_one_and_two(a: float | Tensor) -> bool:
    if not isinstance(a, Tensor):
        return 0 <= a <= 1
    least, most = a.aminmax()
    return bool(least >= 0) and bool(most <= 1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, y).unsqueeze(-1)
