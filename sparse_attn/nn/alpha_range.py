"""The range of a learnt α: the parameter is clamped to the range where it is used.

A sigmoid cannot represent the bounds, and its gradient vanishes near them. Here α itself is the parameter, and it is
clamped where it is used. Three simpler gradients fail:

- The gradient of ``clamp`` is zero past a bound: α could never return into the range.
- The identity lets the parameter move away from the range without limit.
- Projecting every gradient at the bound is wrong for sums over micro-batches or processes: from noise that points to
  both sides, only the part that points inside would remain.

Therefore the gradient passes unchanged inside the range, on its bounds and up to a margin past them. Beyond the margin
a gradient whose descent step would go further out is set to zero. In a plain training loop the parameter ends at most
one optimizer step past the margin (further with momentum).

Optionally, a call of ``sparse_attn.optim.project_alpha`` after each step moves the parameter back to the bound. Then
the margin is never used.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparse_attn.transforms import needs_plain_operations

# The margin is a share of the range. It is several optimizer steps wide, so that noise does not cross it, but
# narrow, so that α returns soon.
MARGIN = 0.02


class _BoundedInGraphs(torch.autograd.Function):
    """For :func:`bounded_alpha` under ``torch.compile``, which supports no autograd functions with forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(raw: Tensor, alpha: Tensor, below: Tensor, above: Tensor) -> Tensor:
        return alpha.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (below, above), (grad,) = ctx.saved_tensors, grads
        outwards = (below & (grad > 0)) | (above & (grad < 0))
        return grad.masked_fill(outwards, 0.0), None, None, None


class _Bounded(_BoundedInGraphs):
    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0].clone()


def bounded_alpha(raw: Tensor, alpha_range: tuple[float, float]) -> Tensor:
    """``raw`` clamped to the range, with the gradient of the identity up to 2 % of the range past a bound.

    Beyond that margin, a gradient whose descent step would go further out becomes zero. An export, or another graph of
    plain operations, never changes the gradient. In forward mode the tangent is never changed.

    Example:
        >>> raw = torch.tensor([0.5, 1.0, 1.0, 1.5], requires_grad=True)
        >>> alpha = bounded_alpha(raw, (1.0, 2.0))
        >>> alpha.detach()
        tensor([1.0000, 1.0000, 1.0000, 1.5000])
        >>> alpha.backward(torch.tensor([3.0, 3.0, -3.0, 3.0]))
        >>> raw.grad
        tensor([ 0.,  3., -3.,  3.])

    Reference:
        Correia, Niculae & Martins 2019 (EMNLP), "Adaptively Sparse Transformers", which uses a sigmoid instead.
    """
    if needs_plain_operations():
        return raw.clamp(*alpha_range).detach() + (raw - raw.detach())
    route = _BoundedInGraphs if torch.compiler.is_compiling() else _Bounded
    # Only tensors are arguments: with dynamic shapes the compiler turns numbers into symbols, which this call rejects.
    low, high = alpha_range
    margin, now = MARGIN * (high - low), raw.detach()
    return route.apply(raw, now.clamp(low, high), now <= low - margin, now >= high + margin)


def check_alpha_range(alpha_range: tuple[float, float]) -> tuple[float, float]:
    """The range as two floats, ``0 < low < high < inf``."""
    try:
        low, high = (float(bound) for bound in alpha_range)
    except (TypeError, ValueError):
        raise TypeError(f"alpha_range must be two numbers (low, high), got {alpha_range!r}") from None
    if not 0 < low < high < math.inf:
        raise ValueError(f"alpha_range must be (low, high) with 0 < low < high < inf, got {(low, high)}")
    return low, high


def check_inside(alpha: Tensor, alpha_range: tuple[float, float], name: str) -> None:
    """Raise unless every α lies in the closed range."""
    low, high = alpha_range
    wrong = ~((alpha >= low) & (alpha <= high))
    if bool(wrong.any()):
        raise ValueError(f"{name} must be in alpha_range [{low:g}, {high:g}], got {alpha[wrong].flatten()[0].item():g}")
