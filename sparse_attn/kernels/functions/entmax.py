"""α-entmax of the last dimension as one differentiable function, for autograd, torch.func, torch.compile and export.

Eager code calls an autograd function, which supports reverse mode, forward mode and ``vmap``. ``torch.compile`` calls a
custom operator, which it does not trace, since the solver's number of iterations depends on the data. Export traces a
fixed number of plain operations, so that the exported program runs without this library.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparse_attn.checks import check_alpha, compute_dtype, result_dtype
from sparse_attn.kernels import dispatch
from sparse_attn.kernels.alpha import shift_alpha, split_alpha
from sparse_attn.kernels.reference.entmax import entmax_backward, entmax_tangent, largest_first
from sparse_attn.kernels.reference.unrolled import entmax_unrolled
from sparse_attn.transforms import batch_in_front, needs_plain_operations, values_known


def entmax_rows(scores: Tensor, alpha: float | Tensor, lowest: float, k: int | None = None) -> Tensor:
    """Probabilities along the last dimension.

    Args:
        scores: (..., d), float32 or float64; also half precision if no gradient is needed and Triton's kernels compute.
        alpha: A number, or a tensor that broadcasts with size 1 in the last dimension.
        lowest: Scores at or below this value are masked.
        k: Only the k largest scores of a row take part, if given; ties go to the lowest index.
    """
    per_row, number = split_alpha(alpha)
    if needs_plain_operations():
        a = shift_alpha(per_row, number, scores)
        return entmax_unrolled(scores if k is None else _largest_alone(scores, k), a, lowest)
    if torch.compiler.is_compiling():
        return _entmax(scores, per_row, number, lowest, k)
    route = _EntmaxInTransforms if torch._C._are_functorch_transforms_active() else _Entmax
    return route.apply(scores, per_row, number, lowest, k)


def _largest_alone(scores: Tensor, k: int) -> Tensor:
    """The scores with ``-inf`` for all but the k largest.

    A slice of the k first sorted scores would restrict the lengths that an exported program accepts.
    """
    index = largest_first(scores.detach())
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(index)
    return scores.masked_fill(torch.zeros_like(index).scatter(-1, index, places) >= k, -math.inf)


def widened(x: Tensor, alpha: float | Tensor) -> Tensor:
    """Scores in the dtype that :func:`entmax_rows` takes: half precision becomes float32, unless a kernel converts it.

    A kernel that reads and writes half precision moves a fifth of the bytes that two conversions and a float32
    kernel move. The backward and torch's transforms need the probabilities in float32.
    """
    if dispatch.by_triton(x) and values_known(x) and forward_ad._current_level < 0:
        learnt = torch.is_grad_enabled() and (x.requires_grad or (isinstance(alpha, Tensor) and alpha.requires_grad))
        if not learnt and result_dtype(x) == x.dtype:
            return x
    return x.to(compute_dtype(x))


# The autograd function and the custom operator take the same arguments: α as `split_alpha` returns it.
_Arguments = tuple[Tensor, Tensor | None, float, float, int | None]


def _forward(scores: Tensor, per_row: Tensor | None, number: float, lowest: float, k: int | None) -> Tensor:
    if per_row is not None and not dispatch.by_triton(scores):
        check_alpha(per_row)
    return dispatch.entmax_forward(scores, shift_alpha(per_row, number, scores), lowest, k)


def _setup_context(ctx: Any, inputs: _Arguments, output: Tensor) -> None:
    _, per_row, ctx.number, _, _ = inputs
    ctx.save_for_backward(output, per_row)
    ctx.backend = dispatch.forced_backend()


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    p, per_row = ctx.saved_tensors  # both gradients depend only on p and α, so the scores are not saved
    if grad is None:
        return None, None, None, None, None
    a = shift_alpha(per_row, ctx.number, p)
    # Second derivatives and traces need plain operations.
    if torch.is_grad_enabled() or not values_known(p) or not values_known(grad):
        grad_scores, grad_alpha = entmax_backward(p, a, grad, with_alpha=ctx.needs_input_grad[1])
    else:
        with dispatch.backend_of_forward(ctx.backend):
            grad_scores, grad_alpha = dispatch.entmax_backward(p, a, grad, with_alpha=ctx.needs_input_grad[1])
    if grad_alpha is not None:
        grad_alpha = grad_alpha.sum_to_size(per_row.shape).to(per_row.dtype)
    return grad_scores, grad_alpha, None, None, None


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        p = _with_or_without_data(*arguments)
        _setup_contexts(ctx, arguments, p)
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        return _backward(ctx, grads[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        p, per_row = ctx.saved_tensors
        scores_tangent, alpha_tangent = tangents[:2]
        a = shift_alpha(per_row, ctx.number, p)
        if alpha_tangent is not None:
            alpha_tangent = alpha_tangent.to(p.dtype)
        return entmax_tangent(p, a, scores_tangent, alpha_tangent)


class _EntmaxInTransforms(_Entmax):
    """The form that ``torch.func`` needs. Elsewhere :class:`_Entmax` takes half the time for a small call."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return _with_or_without_data(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: _Arguments, output: Tensor) -> None:
        _setup_contexts(ctx, inputs, output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        return _EntmaxInTransforms.apply(*_rows_in_front(info, in_dims, *arguments[:2]), *arguments[2:]), 0


def _with_or_without_data(scores: Tensor, *arguments: Any) -> Tensor:
    return _forward(scores, *arguments) if values_known(scores) else _entmax(scores, *arguments)


def _setup_contexts(ctx: Any, inputs: _Arguments, output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_forward(output, inputs[1])
    _setup_context(ctx, inputs, output)


def _rows_in_front(
    info: Any, in_dims: tuple[int | None, ...], scores: Tensor, per_row: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    rank = scores.dim() - (in_dims[0] is not None)
    in_front = partial(batch_in_front, size=info.batch_size, rank=rank)
    return in_front(scores, in_dims[0]), None if per_row is None else in_front(per_row, in_dims[1])


@torch.library.custom_op("sparse_attn::entmax", mutates_args=())
def _entmax(scores: Tensor, per_row: Tensor | None, number: float, lowest: float, k: int | None = None) -> Tensor:
    return _forward(scores, per_row, number, lowest, k).contiguous()  # as the fake function below returns it


@_entmax.register_fake
def _(scores: Tensor, per_row: Tensor | None, number: float, lowest: float, k: int | None = None) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


_entmax.register_autograd(_backward, setup_context=_setup_context)


@_entmax.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    return _entmax(*_rows_in_front(info, in_dims, *arguments[:2]), *arguments[2:]), 0
