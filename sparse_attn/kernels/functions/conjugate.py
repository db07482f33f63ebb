"""The convex conjugate of the negative α-entropy along the last dimension, with derivatives by the envelope theorem.

    Ω*(z) = max_p ⟨p, z⟩ + H(p),    H(p) = (1 - Σ p^α) / (α a),    a = α - 1

The probabilities ``p`` that attain the maximum are an input. Since ``p`` is optimal, the value does not depend on it to
first order (the envelope theorem), so ``∂Ω*/∂z = p`` and ``∂Ω*/∂α = ∂H/∂α`` at fixed ``p``. Both are functions of
``p``, which is part of the graph, so second derivatives follow from the derivatives of the mapping.

Reference: Blondel, Martins & Niculae 2020 (JMLR), "Learning with Fenchel-Young Losses".
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from sparse_attn.kernels.alpha import minus_one, shift_alpha, split_alpha
from sparse_attn.kernels.functions.entmax import entmax_rows
from sparse_attn.kernels.reference.series import phi1, phi2
from sparse_attn.transforms import batch_in_front, needs_plain_operations, values_known


def conjugate_rows(scores: Tensor, alpha: float | Tensor, index: Tensor | None = None) -> tuple[Tensor, ...]:
    """``Ω*`` of each row, and the score at ``index`` if that is given, both of shape ``(..., 1)``.

    The largest score of the row is subtracted from both.

    Args:
        scores: (..., C), float32 or float64; ``-inf`` has probability zero.
        alpha: A number, or a tensor that broadcasts with size 1 in the last dimension.
        index: (..., 1), int64. The score is returned here, instead of by a ``gather`` of the caller, so that the
            backward can write ``p - e_index`` into one tensor.
    """
    p = entmax_rows(scores, alpha, -math.inf)
    per_row, number = split_alpha(alpha)
    if needs_plain_operations():
        return _conjugate(scores, p, shift_alpha(per_row, number, p), index)
    # Dynamo does not support autograd functions with a ``jvp``.
    function = _Conjugate if torch.compiler.is_compiling() else _ConjugateForwards
    return function.apply(scores, p, per_row, number, index)


def _conjugate(scores: Tensor, p: Tensor, a: float | Tensor, index: Tensor | None) -> tuple[Tensor, ...]:
    """``Ω* = [σ + a ⟨p, z⟩] / α`` where ``p = [1 + a (z - σ)]^(1/a)`` and the largest z is 0.

    Near a one-hot ``p``, both terms are of the order of ``q = 1 - max p``, and Ω* may be of the order of ``q²``. ``q``
    is computed as the sum of the other probabilities, since the difference ``1 - max p`` would lose the digits of a
    small ``q``.
    """
    top, largest = scores.amax(-1, keepdim=True), p.amax(-1, keepdim=True)
    shift = top.detach()  # no gradient: the largest score counts as 0 for the caller
    picked = () if index is None else (scores.gather(-1, index) - shift,)
    p, scores = _where_there_is_weight(p, scores)
    above_half = largest > 0.5
    q = torch.where(above_half, -hardshrink(p, 0.5).sub_(p).sum(-1, keepdim=True), 0.0)
    log_largest = torch.where(above_half, torch.log1p(-q), largest.log())
    if isinstance(a, float) and a == 0.0:
        return top - shift - log_largest, *picked
    sigma = -log_largest * phi1(a * log_largest)
    value = (sigma + a * _mean_score(p, scores, top)) / (1 + a)
    return top - shift + value.clamp(min=0.0), *picked


def _mean_score(p: Tensor, scores: Tensor, top: Tensor) -> Tensor:
    """``⟨p, z⟩``, with masked scores replaced by finite ones, since 0 times ``-inf`` is NaN."""
    lowest = torch.finfo(p.dtype).min
    if needs_plain_operations():
        return (p * (scores - top).clamp(min=lowest)).sum(-1, keepdim=True)
    # In place, since allocation takes longer than arithmetic.
    return (scores - top).clamp_(min=lowest).mul_(p).sum(-1, keepdim=True)


def _entropy_slope(p: Tensor, a: Tensor) -> Tensor:
    """``∂H/∂α`` at fixed ``p``, per row: ``-[H + Σ p ℓ² (φ₁ - φ₂)(aℓ)] / α`` with ``ℓ = log p``; never positive.

    ``H = -Σ p ℓ φ₁(aℓ) / α``, ``φ₁(x) = (eˣ - 1) / x = 1 + x φ₂(x)``: nothing is divided by ``a``.
    """
    log_p = torch.where(p == 0, 1.0, p).log()
    x = a * log_p
    second = phi2(x)
    first = 1 + x * second
    weighted = p * log_p
    entropy = -(weighted * first).sum(-1, keepdim=True) / (1 + a)
    return -(entropy + (weighted * log_p * (first - second)).sum(-1, keepdim=True)) / (1 + a)


def _entropy_slope_in_blocks(p: Tensor, a: Tensor) -> Tensor:
    """:func:`_entropy_slope`, a few rows at a time: each call needs ten temporaries, as large as its input."""
    # Blocks are not used if gradients are needed, since autograd would save the temporaries of all blocks, or when
    # compiling, since the compiler fuses the operations.
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _entropy_slope(p, a)
    shape, size = p.shape[:-1], p.shape[-1]
    rows = max(1, (2**18 if p.device.type == "cpu" else 2**24) // size)
    blocks = zip(p.reshape(-1, size).split(rows), a.expand(*shape, 1).reshape(-1, 1).split(rows), strict=True)
    slopes = [_entropy_slope(_where_there_is_weight(part)[0], of_rows) for part, of_rows in blocks]
    return torch.cat(slopes).view(*shape, 1)


def _where_there_is_weight(p: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The arguments without the columns in which ``p`` is 0 in every row: in a vocabulary, these are nearly all.

    The arguments are returned unchanged if ``p`` is not on a CPU, if the values of ``p`` are unknown, or if less than
    half of the columns could be left out.
    """
    # Reading values would break a trace, or make the host wait for a device.
    if p.device.type != "cpu" or not values_known(p):
        return p, *others
    used = p.reshape(-1, p.shape[-1]).sum(0).nonzero().squeeze(1)  # NaN counts as non-zero
    if 2 * len(used) > p.shape[-1]:
        return p, *others
    return tuple(x.index_select(-1, used) for x in (p, *others))


class _Conjugate(torch.autograd.Function):
    @staticmethod
    def forward(
        scores: Tensor, p: Tensor, per_row: Tensor | None, number: float, index: Tensor | None
    ) -> tuple[Tensor, ...]:
        return _conjugate(scores, p, shift_alpha(per_row, number, p), index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, p, per_row, ctx.number, index = inputs
        ctx.save_for_backward(p, per_row, index)
        ctx.save_for_forward(p, per_row, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor | None, None, None]:
        p, per_row, index = ctx.saved_tensors
        grad_alpha = None
        if ctx.needs_input_grad[2]:
            grad_alpha = grads[0] * _entropy_slope_in_blocks(p, minus_one(per_row, p))
            grad_alpha = grad_alpha.sum_to_size(per_row.shape).to(per_row.dtype)
        grad_scores = p * grads[0]
        if index is not None:
            # In place saves memory, but torch 2.6 warns about it in vmap.
            in_transforms = torch._C._are_functorch_transforms_active()
            add = Tensor.scatter_add if in_transforms else Tensor.scatter_add_
            grad_scores = add(grad_scores, -1, index, grads[1])
        return grad_scores, None, grad_alpha, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        scores: Tensor,
        p: Tensor,
        per_row: Tensor | None,
        number: float,
        index: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        rank = p.dim() - (in_dims[1] is not None)
        tensors = [
            None if tensor is None else batch_in_front(tensor, dim, info.batch_size, rank)
            for tensor, dim in zip((scores, p, per_row, index), (*in_dims[:3], in_dims[4]), strict=True)
        ]
        output = _ConjugateForwards.apply(*tensors[:3], number, tensors[3])
        return output, (0,) * len(output)


class _ConjugateForwards(_Conjugate):
    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        p, per_row, index = ctx.saved_tensors
        scores_tangent, _, alpha_tangent = tangents[:3]
        if scores_tangent is None:
            scores_tangent = torch.zeros_like(p)
        value = (p * scores_tangent).sum(-1, keepdim=True)
        if alpha_tangent is not None:
            value = value + _entropy_slope(p, minus_one(per_row, p)) * alpha_tangent.to(p.dtype)
        return (value,) if index is None else (value, scores_tangent.gather(-1, index))
