"""α-entmax of the last dimension as a fixed number of plain operations, for tracing and export.

Slower than ``reference.entmax``, which reads the data to decide when to stop. Bisection finds σ of

    p_i = [1 + a (z_i - σ)]_+^(1/a),    Σ p_i = 1,    a = α - 1,

up to rounding errors, without gradient. Two Newton steps follow, which change the value by rounding at most; autograd
through these steps gives the first and second derivatives.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._higher_order_ops import while_loop

from sparse_attn.versions import is_exporting, loops_export


def entmax_unrolled(scores: Tensor, a: float | Tensor, lowest: float) -> Tensor:
    """The probabilities; arguments and result are those of ``reference.entmax.entmax_forward``."""
    dtype = scores.dtype
    if isinstance(a, Tensor) or a not in (0.0, 0.5, 1.0):
        # Near α = 1, a runtime without log1p loses digits in log(1 + t) / t. Above α = 2 the slope at the edge of the
        # support is infinite, and σ needs many more digits than p.
        scores, a = scores.double(), a.double() if isinstance(a, Tensor) else a
    masked = scores <= lowest
    top = scores.amax(-1, keepdim=True)
    empty = top <= lowest
    if not isinstance(a, Tensor) and a == 0:
        # The scores of an empty row are replaced before softmax, and its result afterwards: softmax of -inf alone is
        # NaN, and its gradient would be NaN even if the result were replaced.
        return torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0).to(dtype)
    # A masked entry gets a finite score, and its weight is set to 0 afterwards: -inf times a zero gradient is NaN.
    z = torch.where(masked, 0.0, scores - torch.where(empty, 0.0, top))
    with torch.no_grad():
        sigma = _bisect(z.detach(), a.detach() if isinstance(a, Tensor) else a, masked)
    for _ in range(2):
        p, u = _power(z, sigma, a, masked)
        slope = u.sum(-1, keepdim=True)
        sigma = sigma + (p.sum(-1, keepdim=True) - 1) / torch.where(slope == 0, 1.0, slope)
    p, _ = _power(z, sigma, a, masked)
    total = p.sum(-1, keepdim=True)
    return (p / torch.where(total == 0, 1.0, total)).to(dtype)


def _bisect(z: Tensor, a: float | Tensor, masked: Tensor) -> Tensor:
    """σ by bisection between 0, the root for one entry, and ``(1 - d^(-a)) / a``, the root for ``d`` equal scores."""
    shape = (*z.shape[:-1], 1)
    in_loop = is_exporting() and loops_export()
    if in_loop:  # With leading dimensions, a loop computes strides from symbolic lengths, which ONNX cannot do.
        z, masked = _as_rows(z), _as_rows(masked)
        a = _as_rows(a.expand(shape)) if isinstance(a, Tensor) else a
    if isinstance(a, Tensor):
        a = torch.where(a.abs() < 1e-9, 1e-9, a)  # avoids a division by 0; Newton steps with the given `a` correct σ
    log_count = (~masked).sum(-1, keepdim=True).clamp(min=1).to(z.dtype).log()
    low = torch.zeros_like(log_count)
    high = (1 - torch.exp(-a * log_count)) / a * (1 + 1e-6)  # 1e-6 covers the rounding error of the difference

    def halve(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        sigma = (low + high) / 2
        t = (a * (z - sigma)).clamp(min=-1)
        p = t + 1 if not isinstance(a, Tensor) and a == 1 else torch.exp(torch.log1p(t) / a)
        enough = torch.where(masked, 0.0, p).sum(-1, keepdim=True) >= 1
        return torch.where(enough, sigma, low), torch.where(enough, high, sigma)

    times = 4 - round(math.log2(torch.finfo(z.dtype).eps))
    if in_loop:  # one loop in the graph instead of a thousand nodes
        begin = (torch.zeros((), dtype=torch.int64, device=low.device), low, high)
        return while_loop(lambda n, *_: n < times, lambda n, *ends: (n + 1, *halve(*ends)), begin)[1].reshape(shape)
    for _ in range(times):
        low, high = halve(low, high)
    return low


def _as_rows(x: Tensor) -> Tensor:
    """(..., n) as (rows, n).

    Returns a copy. The strides of a view would be computed as the minimum of two products of symbolic lengths, and
    torch would export only for lengths for which it can decide which product is smaller.
    """
    return torch.view_copy(x.contiguous(), (math.prod(x.shape[:-1]), x.shape[-1]))


def _power(z: Tensor, sigma: Tensor, a: float | Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """``p`` and ``u = -dp/dσ``, zero for masked entries and outside the support; NaN scores give NaN."""
    t = a * (z - sigma)
    outside = masked | (t <= -1)
    t = torch.where(outside, 0.0, t)
    if not isinstance(a, Tensor) and a in (0.5, 1.0):
        root = torch.where(outside, 0.0, 1 + t)
        return (root, (root > 0).to(z.dtype)) if a == 1.0 else (root * root, root)
    p = torch.where(outside, 0.0, torch.exp((z - sigma) * _log1p_over(t)))
    return p, p / (1 + t)


def _log1p_over(t: Tensor) -> Tensor:
    """``log(1 + t) / t``, by its series for small t: at α = 1 every t is 0, where the derivatives must exist too."""
    small = t.abs() < 0.03
    near = torch.where(small, t, 0.0)
    series = torch.zeros_like(t)
    for n in range(11, 0, -1):
        series = 1 / n - near * series
    far = torch.where(small, 1.0, t)
    return torch.where(small, series, torch.log1p(far) / far)
