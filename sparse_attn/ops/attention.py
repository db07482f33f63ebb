"""Attention with a sparse mapping in place of softmax; signatures like ``scaled_dot_product_attention``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn.checks import check_dropout, check_floating, check_k, compute_dtype, result_dtype
from sparse_attn.kernels.choose_attention import Call, autocast_dtype, choose_attention, one_per_head, repeat_heads
from sparse_attn.kernels.direct import attend_directly
from sparse_attn.kernels.sinks import sink_scores
from sparse_attn.masks import (
    CAUSAL,
    NO_BOUNDS,
    Bounds,
    apply_mask,
    check_mask,
    check_mask_dtype,
    clear_padding,
    dense_mask,
    described_causal,
    with_bounds,
)
from sparse_attn.ops.attention_checks import check_options, check_shapes, check_softcap_and_sinks
from sparse_attn.ops.entmax import entmax_along
from sparse_attn.transforms import values_known
from sparse_attn.versions import is_exporting

Normalizer = Literal["softmax", "sparsemax"]


@dataclass(eq=False)  # with eq, Dynamo before torch 2.13 would compute a hash before the fields exist
class ScoreMapping:
    """Maps scores (..., H, L, S) to weights: α-entmax over the ``k`` largest scores of each query, or over all."""

    alpha: float | Tensor  # a number, or a tensor () or (H,)
    k: int | None = None

    def __call__(self, scores: Tensor) -> Tensor:
        """Weights of the scores."""
        # Only the kernels test whether there are more than k keys: a branch here would restrict the lengths that an
        # exported program accepts.
        return entmax_along(scores, one_per_head(self.alpha), -1, self.k)


class Options(TypedDict):
    """Keyword arguments that the public functions pass on to :func:`attend`."""

    scale: float | None
    enable_gqa: bool
    softcap: float | None
    sinks: Tensor | None


_ALPHA_OF = {"softmax": 1.0, "sparsemax": 2.0}


def entmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor = 1.5,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """α-entmax attention: ``entmax(scale * query @ key^T + mask, alpha) @ value``.

    Args:
        query: (..., H, L, D). Dimensions before the last two broadcast, also where a tensor has fewer of them.
        key: (..., H, S, D).
        value: (..., H, S, Dv).
        alpha: A number or (H,), in ``(0, inf)``; 1 is softmax attention.
        attn_mask: Broadcastable to (..., H, L, S): boolean, ``True`` = visible, or floating, added to the scores.
        dropout_p: Probability that a weight is dropped; applied whenever it is above 0, as in torch's function.
        is_causal: Query ``i`` sees the keys up to ``i`` (aligned top-left). Not together with ``attn_mask``.
        scale: Factor of the scores, a finite number; ``1 / sqrt(D)`` by default. For a learnt factor, multiply the
            query by it and pass 1.
        enable_gqa: Key and value may have fewer heads than the query, if their number of heads divides the query's.
        softcap: Scores become ``softcap * tanh(score / softcap)`` before the mask, as in Gemma 2. Above 0.
        sinks: (H,), one more score for every query of a head, as in GPT-OSS. The sink takes part in the mapping, takes
            weight and gives no value. Neither ``softcap`` nor a mask applies to it.

    Returns:
        (..., H, L, Dv). A query with no visible key gets zeros.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: Shapes do not fit; α, ``dropout_p``, ``scale`` or ``softcap`` is outside its range.

    Example:
        >>> query, key, value = torch.randn(3, 2, 4, 5, 8).unbind()
        >>> entmax_attention(query, key, value, alpha=torch.tensor([1.0, 1.5, 2.0, 1.2])).shape
        torch.Size([2, 4, 5, 8])

    Reference:
        Correia, Niculae & Martins 2019 (EMNLP), "Adaptively Sparse Transformers".
    """
    check_options(is_causal, scale, enable_gqa)
    # A number needs no check here, and without the check a call on a short sequence is noticeably faster.
    mapping = ScoreMapping(alpha) if type(alpha) is float else _mapping_of(alpha, query, key)
    return attend(
        *(query, key, value, mapping, attn_mask, dropout_p, is_causal),
        scale=scale,
        enable_gqa=enable_gqa,
        softcap=softcap,
        sinks=sinks,
        need_weights=False,
    )[0]


def _mapping_of(alpha: float | Tensor, query: Tensor, key: Tensor) -> ScoreMapping:
    check_floating(query, "query")
    check_floating(key, "key")
    return entmax_mapping(alpha, max(_heads(query), _heads(key)))


def topk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k: int,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    normalizer: Normalizer = "softmax",
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of every query to the ``k`` visible keys with the largest scores, or to all if fewer are visible.

    Args:
        query: (..., H, L, D).
        key: (..., H, S, D).
        value: (..., H, S, Dv).
        k: How many keys a query keeps, at least 1. Ties go to the lowest index.
        attn_mask: As in :func:`entmax_attention`.
        dropout_p: As in :func:`entmax_attention`.
        is_causal: As in :func:`entmax_attention`.
        scale: As in :func:`entmax_attention`.
        enable_gqa: As in :func:`entmax_attention`.
        normalizer: The mapping from the kept scores to weights.
        softcap: As in :func:`entmax_attention`.
        sinks: As in :func:`entmax_attention`. The score of the sink competes with those of the keys to be among the
            ``k`` largest.

    Returns:
        (..., H, L, Dv). A query with no visible key gets zeros.

    Raises:
        TypeError: An argument has a wrong type or dtype, or ``k`` is not an int.
        ValueError: Shapes do not fit; ``k``, ``dropout_p``, ``softcap`` or ``scale`` is outside its range; or
            ``normalizer`` is unknown.

    Example:
        >>> query, key, value = torch.randn(3, 2, 4, 5, 8).unbind()
        >>> topk_attention(query, key, value, k=2).shape
        torch.Size([2, 4, 5, 8])

    Reference:
        Zhao et al. 2019, "Explicit Sparse Transformer".
    """
    check_options(is_causal, scale, enable_gqa)
    mapping = topk_mapping(k, normalizer_alpha(normalizer))
    return attend(
        *(query, key, value, mapping, attn_mask, dropout_p, is_causal),
        scale=scale,
        enable_gqa=enable_gqa,
        softcap=softcap,
        sinks=sinks,
        need_weights=False,
    )[0]


def entmax_mapping(alpha: float | Tensor, heads: int, k: int | None = None) -> ScoreMapping:
    """α-entmax with one α or one per head, over all keys or the ``k`` with the largest scores."""
    if not isinstance(alpha, Tensor) or alpha.dim() == 0:
        return ScoreMapping(alpha, k)
    if tuple(alpha.shape) != (heads,):
        raise ValueError(f"alpha must be a number or have shape (H,) = ({heads},), got {tuple(alpha.shape)}")
    return ScoreMapping(alpha, k)


def topk_mapping(k: int, alpha: float | Tensor = 1.0, heads: int = 1) -> ScoreMapping:
    """α-entmax over the ``k`` keys with the largest scores, or over all keys if there are fewer."""
    check_k(k)
    if isinstance(k, Tensor) and values_known(k):
        k = int(k)  # the C kernel stores its plans by k, and a tensor could change in place
    return entmax_mapping(alpha, heads, k)


def normalizer_alpha(normalizer: str) -> float:
    """The α of a top-k normalizer: 1 for softmax, 2 for sparsemax."""
    if not isinstance(normalizer, str) or normalizer not in _ALPHA_OF:
        raise ValueError(f"normalizer must be one of {', '.join(_ALPHA_OF)}, got {normalizer!r}")
    return _ALPHA_OF[normalizer]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mapping: Callable[[Tensor], Tensor],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bounds: Bounds = NO_BOUNDS,
    need_weights: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The output of attention with any mapping, and the weights (after dropout).

    The weights (..., H, L, S) are those of the keys, without the weight of a sink. Without ``need_weights`` they may be
    None. ``bounds`` hide keys in addition to a mask. The other arguments are those of the public functions.
    """
    apart = need_weights and computes_weights_apart(dropout_p)
    known = mapping if isinstance(mapping, ScoreMapping) and (apart or not need_weights) else None
    if is_causal and attn_mask is None:
        bounds = CAUSAL
    plain = dropout_p == 0.0 and softcap is None and sinks is None and not (is_causal and attn_mask is not None)
    if known and plain and not torch.compiler.is_compiling():
        output = attend_directly(query, key, value, known.alpha, known.k, attn_mask, bounds, scale, enable_gqa)
        if output is not None:
            return output, None
    check_shapes(query, key, value, enable_gqa)
    check_dropout(dropout_p, "dropout_p")
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask must be None when is_causal=True, got both; combine them into one mask")
    if attn_mask is not None and described_causal(attn_mask) is None:
        check_mask_dtype(attn_mask, "attn_mask")
        if attn_mask.device != query.device:
            raise ValueError(f"attn_mask must be on the query's device, {query.device}, got {attn_mask.device}")
    check_softcap_and_sinks(softcap, sinks, query, max(_heads(query), _heads(key)))
    query, key, value = _of_one_rank(query, key, value)
    scale = default_scale(query) if scale is None else scale
    output_of_kernel = None
    if known:
        call = Call(query, key, value, known.alpha, known.k, attn_mask, dropout_p, bounds, scale, softcap, sinks)
        compute = choose_attention(call)
        output_of_kernel = None if compute is None else compute(call)
        if output_of_kernel is not None and not apart:
            return output_of_kernel, None
    arguments = (mapping, attn_mask, bounds, dropout_p, scale, softcap, sinks)
    dtype = autocast_dtype(query)
    if dtype is None:
        output, weights = _by_one_matrix(query, key, value, *arguments)
    else:
        # Autocast chooses the dtypes of the inputs and of the weights; it would also round the scores.
        weights_dtype = result_dtype(query)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        with torch.autocast(query.device.type, enabled=False):
            output, weights = _by_one_matrix(query, key, value, *arguments)
        weights = weights.to(weights_dtype)
    return output if output_of_kernel is None else output_of_kernel, weights


def computes_weights_apart(dropout_p: float) -> bool:
    """Whether the output is computed without the matrix of weights, even if the weights are requested.

    Compiled code contains only what its caller uses. If the caller drops the weights, no matrix of them is computed.
    """
    return dropout_p == 0.0 and torch.compiler.is_compiling() and not is_exporting()


def _by_one_matrix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mapping: Callable[[Tensor], Tensor],
    attn_mask: Tensor | None,
    bounds: Bounds,
    dropout_p: float,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and weights by a matrix of all scores, in the query's dtype; half precision is computed in float32.

    Rounded to bfloat16, a score of 10 is off by up to 0.03, and so would be the weights of a sparse mapping.
    """
    dtype, wide = query.dtype, compute_dtype(query)
    query, key, value = query.to(wide), key.to(wide), value.to(wide)
    key, value = repeat_heads(query, key, value)
    if attn_mask is not None:
        attn_mask = dense_mask(attn_mask, query.device)
        batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
        check_mask(attn_mask, (*batch, query.shape[-2], key.shape[-2]))
        key, value = clear_padding(key, value, attn_mask)
    attn_mask = with_bounds(attn_mask, bounds, query.shape[-2], key.shape[-2], query.device)
    scores = (query * scale) @ key.transpose(-2, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = apply_mask(scores, attn_mask)
    if sinks is None:
        weights = mapping(scores)
    else:
        weights = mapping(torch.cat([sink_scores(sinks.to(wide), scores.shape[:-1]), scores], -1))[..., 1:]
    if dropout_p > 0.0:
        weights = F.dropout(weights, dropout_p)
    return (weights @ value).to(dtype), weights.to(dtype)


def default_scale(query: Tensor) -> float:
    """``1 / sqrt(D)``; heads of size 0 have scores of 0, whatever the factor is."""
    return 1 / math.sqrt(query.shape[-1] or 1)


def _of_one_rank(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with the same number of dimensions: leading dimensions of size 1 are added."""
    rank = max(x.dim() for x in tensors)
    return tuple(x if x.dim() == rank else x[(None,) * (rank - x.dim())] for x in tensors)


def _heads(x: Tensor) -> int:
    return x.shape[-3] if x.dim() > 2 else 1
