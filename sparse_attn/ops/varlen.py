"""Attention of packed sequences: the sequences of a batch concatenated, without padding."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_attn.checks import check_dropout, check_floating, check_starts
from sparse_attn.kernels.choose_attention import Call, attend_packed
from sparse_attn.masks import Bounds
from sparse_attn.ops.attention import (
    Options,
    ScoreMapping,
    attend,
    default_scale,
    entmax_mapping,
)
from sparse_attn.ops.attention_checks import check_options, check_shapes, check_softcap_and_sinks

if TYPE_CHECKING:
    from typing_extensions import Unpack


def entmax_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alpha: float | Tensor = 1.5,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """α-entmax attention within each of N packed sequences.

    Sequence ``n`` has the queries ``cu_seqlens_q[n]`` to ``cu_seqlens_q[n + 1] - 1`` and the keys and values
    ``cu_seqlens_k[n]`` to ``cu_seqlens_k[n + 1] - 1``. The result is that of one :func:`entmax_attention` per sequence.

    Args:
        query: (total_q, H, D).
        key: (total_k, H, D).
        value: (total_k, H, Dv).
        cu_seqlens_q: (N + 1,), int32 or int64: cumulative lengths, from 0 to total_q. A sequence may be empty.
        cu_seqlens_k: (N + 1,), int32 or int64: cumulative lengths, from 0 to total_k.
        alpha: A number or (H,), in ``(0, inf)``; 1 is softmax attention.
        is_causal: Query ``i`` of a sequence sees the keys of the sequence up to ``i`` (aligned top-left).
        scale: As in :func:`entmax_attention`.
        dropout_p: Probability that a weight is dropped; applied whenever it is above 0.
        enable_gqa: Key and value may have fewer heads than the query, if their number of heads divides the query's.
        softcap: As in :func:`entmax_attention`.
        sinks: As in :func:`entmax_attention`, for every query of every sequence.

    Returns:
        (total_q, H, Dv). A query with no visible key gets zeros.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: Shapes do not fit; α, ``dropout_p``, ``scale`` or ``softcap`` is outside its range; cumulative
            lengths decrease, do not begin with 0 or do not end with the total.
        RuntimeError: ``torch.jit.trace`` traces the call.

    Example:
        >>> query, key, value = torch.randn(3, 7, 4, 8).unbind()
        >>> lengths = torch.tensor([0, 2, 7])  # two sequences, of 2 and 5 entries
        >>> output = entmax_attention_varlen(query, key, value, lengths, lengths)
        >>> output.shape
        torch.Size([7, 4, 8])

    Reference:
        The layout of ``torch.nn.attention.varlen.varlen_attn``; the mapping of :func:`entmax_attention`.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_floating(x, name)
        if x.dim() != 3:
            raise ValueError(f"{name} must have the shape (total, H, D), got {tuple(x.shape)}")
    _check_cumulative(cu_seqlens_q, "cu_seqlens_q", query)
    _check_cumulative(cu_seqlens_k, "cu_seqlens_k", query)
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        sizes = f"{len(cu_seqlens_q)} and {len(cu_seqlens_k)}"
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must have the same length N + 1, got {sizes}")
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    check_shapes(query, key, value, enable_gqa)
    check_options(is_causal, scale, enable_gqa)
    check_dropout(dropout_p, "dropout_p")
    mapping = entmax_mapping(alpha, query.shape[1])
    options: Options = {"scale": scale, "enable_gqa": enable_gqa, "softcap": softcap, "sinks": sinks}
    output = attend_varlen(query, key, value, mapping, cu_seqlens_q, cu_seqlens_k, is_causal, dropout_p, **options)
    return output[0].transpose(0, 1)


def attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mapping: ScoreMapping,
    query_starts: Tensor,
    key_starts: Tensor,
    is_causal: bool,
    dropout_p: float,
    left: int | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """The output (1, H, L, Dv) of packed sequences; the tensors have a batch dimension of 1 and fit each other.

    A query sees no key more than ``left`` positions before its own position; None means no limit.
    """
    check_softcap_and_sinks(options["softcap"], options["sinks"], query, query.shape[1])
    scale = default_scale(query) if options["scale"] is None else options["scale"]
    bounds = Bounds(left, 0 if is_causal else None)
    arguments = (mapping.alpha, mapping.k, None, dropout_p, bounds, scale, options["softcap"], options["sinks"])
    output = attend_packed(Call(query, key, value, *arguments), query_starts, key_starts)
    if output is not None:
        return output
    if torch._C._is_tracing():
        raise RuntimeError("packed sequences cannot be traced by torch.jit: the lengths would become constants")
    check_starts(query_starts, query.shape[2], "cu_seqlens_q")
    check_starts(key_starts, key.shape[2], "cu_seqlens_k")
    spans = list(zip(pairwise(query_starts.tolist()), pairwise(key_starts.tolist()), strict=True))
    outputs = []
    # A batch without sequences is computed as one empty sequence, so that its output has a gradient.
    for queries, keys in spans or [((0, 0), (0, 0))]:
        one = query[:, :, slice(*queries)], key[:, :, slice(*keys)], value[:, :, slice(*keys)]
        outputs.append(attend(*one, mapping, None, dropout_p, bounds=bounds, **options, need_weights=False)[0])
    return torch.cat(outputs, 2)


def _check_cumulative(lengths: Tensor, name: str, query: Tensor) -> None:
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(lengths).__name__}")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must have the dtype int32 or int64, got {lengths.dtype}")
    if lengths.dim() != 1 or not len(lengths):
        raise ValueError(f"{name} must have the shape (N + 1,), got {tuple(lengths.shape)}")
    if lengths.device != query.device:
        raise ValueError(f"{name} must be on the query's device, {query.device}, got {lengths.device}")
