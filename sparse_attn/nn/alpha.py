"""α as a bounded parameter: α itself is learnt, and its gradient projected at the bounds.

A sigmoid reaches neither bound, and near one its gradient vanishes. Here the gradient is exact inside, and on a bound
lets pass whatever points back inside. An optimizer may still carry the parameter past a bound (by momentum, a large
step or weight decay) and then has to bring it back the same way: what the layer uses meanwhile is the clamped value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_attn.ops.checks import check_alpha


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(raw: Tensor, low: float, high: float) -> Tensor:
        return raw.clamp(low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, float], output: Tensor) -> None:
        raw, ctx.low, ctx.high = inputs
        ctx.save_for_backward(raw)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (raw,) = ctx.saved_tensors
        (grad,) = grads
        outwards = ((raw <= ctx.low) & (grad > 0)) | ((raw >= ctx.high) & (grad < 0))
        return grad.masked_fill(outwards, 0.0), None, None


def bounded_alpha(raw: Tensor, alpha_range: tuple[float, float]) -> Tensor:
    """``raw`` clamped to the range; at or past a bound its gradient never points further out.

    Example:
        >>> raw = torch.tensor([1.0, 1.0, 1.5], requires_grad=True)
        >>> bounded_alpha(raw, (1.0, 2.0)).backward(torch.tensor([-3.0, 3.0, 3.0]))
        >>> raw.grad
        tensor([-3.,  0.,  3.])

    Reference:
        Correia, Niculae & Martins 2019 (EMNLP), "Adaptively Sparse Transformers", for the sigmoid it replaces.
    """
    return _Bounded.apply(raw, *alpha_range)


def check_alpha_range(alpha_range: tuple[float, float]) -> tuple[float, float]:
    """The range as two floats, ``0 < low < high < inf``."""
    try:
        low, high = (float(bound) for bound in alpha_range)
    except (TypeError, ValueError):
        raise TypeError(f"alpha_range must be two numbers (low, high), got {alpha_range!r}") from None
    if not 0 < low < high < math.inf:
        raise ValueError(f"alpha_range must be (low, high) with 0 < low < high < inf, got {(low, high)}")
    return low, high


def initial_alpha(
    alpha_init: float | Sequence[float] | Tensor, alpha_range: tuple[float, float] | None, num_heads: int
) -> Tensor:
    """``(num_heads,)`` initial values in float64, checked against the range, or ``(0, inf)`` without one."""
    try:
        alpha = torch.as_tensor(alpha_init, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError):
        raise TypeError(f"alpha_init must be a number or one per head, got {alpha_init!r}") from None
    if tuple(alpha.shape) not in ((), (num_heads,)):
        raise ValueError(f"alpha_init must be a number or one per head ({num_heads},), got shape {tuple(alpha.shape)}")
    check_alpha(alpha, "alpha_init")
    low, high = alpha_range or (0.0, math.inf)
    wrong = ~((alpha >= low) & (alpha <= high))
    if bool(wrong.any()):
        raise ValueError(f"alpha_init must be in alpha_range [{low:g}, {high:g}], got {alpha[wrong][0].item():g}")
    return alpha.expand(num_heads).clone()
