"""Attention sinks as one more key in front of the others, for implementations that do not know sinks.

A sink is one more score of each query, which takes weight and gives no value. Query and key vectors get one more
entry, so that the product of a query and the new key is the score of the sink; the value of the new key is zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Padded(NamedTuple):
    """Tensors of a call with one more key per sequence; the factor of the scores is 1 in this call."""

    query: Tensor  # (..., H, L, D + 1), multiplied by the factor of the scores
    key: Tensor  # (..., Hk, S + 1, D + 1); for packed sequences, S + the number of sequences
    value: Tensor  # (..., Hk, S + 1, Dv); S + 1 as in the key
    mask: Tensor | None
    offset: int | None


def with_sink(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, offset: int | None, sinks: Tensor, scale: float
) -> Padded:
    """A call with one more key in front, whose score is ``sinks[h]`` for every query of head ``h``.

    Args:
        query: (..., H, L, D), in the dtype of the computation: the scaled query would be rounded in half precision.
        key: (..., Hk, S, D).
        value: (..., Hk, S, Dv).
        mask: Broadcastable to (..., H, L, S), in the internal form.
        offset: As in :class:`kernels.setting.Setting`.
        sinks: (H,).
        scale: Factor of the scores.
    """
    key, value = F.pad(key, (0, 1, 1, 0)), F.pad(value, (0, 0, 1, 0))
    key[..., 0, -1] = 1
    if mask is not None:
        mask = F.pad(mask.expand(*mask.shape[:-1], key.shape[-2] - 1), (1, 0), value=mask.dtype == torch.bool)
    return Padded(_with_scores(query, sinks, scale), key, value, mask, None if offset is None else offset + 1)


def with_packed_sinks(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, scale: float, key_starts: Tensor
) -> tuple[Padded, Tensor]:
    """Packed sequences with the sink as one more key of each sequence, and the new starts of their keys; N is 1."""
    sequences, keys = len(key_starts) - 1, key.shape[2]
    old = torch.arange(keys, device=key.device)
    place = old + torch.bucketize(old, key_starts[:-1], right=True)
    starts = key_starts + torch.arange(sequences + 1, device=key.device)
    longer = key.new_zeros(*key.shape[:2], keys + sequences, key.shape[3] + 1).index_copy(2, place, F.pad(key, (0, 1)))
    longer[:, :, starts[:-1], -1] = 1
    values = value.new_zeros(*value.shape[:2], keys + sequences, value.shape[3]).index_copy(2, place, value)
    return Padded(_with_scores(query, sinks, scale), longer, values, None, None), starts


def sink_scores(sinks: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The score of the sink for each query: (..., H, L, 1) for ``shape`` (..., H, L), where H may be missing."""
    return sinks.view(-1, *(1, 1)[: len(shape)]).expand(*shape, 1)


def _with_scores(query: Tensor, sinks: Tensor, scale: float) -> Tensor:
    # Minus infinity times zero would be NaN; the lowest finite number counts as masked, too.
    sinks = sinks.to(query.dtype).clamp(min=torch.finfo(query.dtype).min)
    return torch.cat([query * scale, sink_scores(sinks, query.shape[:-1])], -1)
