"""Checks of the arguments of the attention functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_attn.checks import check_bool, check_floating, check_interval, check_number, check_scale


def check_options(is_causal: bool, scale: float | None, enable_gqa: bool) -> None:
    """Raise unless both flags are bools, and the factor of the scores is a finite number or None."""
    if type(is_causal) is not bool:  # this comparison is faster than the call
        check_bool(is_causal, "is_causal")
    if type(enable_gqa) is not bool:
        check_bool(enable_gqa, "enable_gqa")
    if scale is not None:
        check_scale(scale)


def check_softcap_and_sinks(softcap: float | None, sinks: Tensor | None, query: Tensor, heads: int) -> None:
    """Raise unless the soft-cap is a finite number above 0, and the sinks are one floating number per head."""
    if softcap is not None:
        check_number(softcap, "softcap")
        check_interval(softcap, "softcap", above=0.0, below=math.inf)
    if sinks is None:
        return
    check_floating(sinks, "sinks")
    if tuple(sinks.shape) != (heads,):
        raise ValueError(f"sinks must have shape (H,) = ({heads},), got {tuple(sinks.shape)}")
    if sinks.device != query.device:
        raise ValueError(f"sinks must be on the query's device, {query.device}, got {sinks.device}")


def check_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Raise unless query, key and value have one dtype (except under autocast), one device and shapes that fit."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_floating(x, name)
    if not (query.dtype == key.dtype == value.dtype or torch.is_autocast_enabled(query.device.type)):
        dtypes = ", ".join(str(x.dtype) for x in (query, key, value))
        raise TypeError(f"query, key and value must have one dtype, got {dtypes}")
    if not query.device == key.device == value.device:
        devices = f"{query.device}, {key.device} and {value.device}"
        raise ValueError(f"query, key and value must be on one device, got {devices}")
    if wrong := _wrong_sizes(query.shape, key.shape, value.shape, enable_gqa):
        shapes = f"got query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        raise ValueError(f"{wrong}; {shapes}")


def _wrong_sizes(query: torch.Size, key: torch.Size, value: torch.Size, enable_gqa: bool) -> str | None:
    """The mismatch of the shapes, as the beginning of an error message."""
    least = min(len(query), len(key), len(value))
    if least < 2:
        return "query, key and value must have at least 2 dimensions"
    if query[-1] != key[-1]:
        return "query and key must have the same last size D"
    if key[-2] != value[-2]:
        return "key and value must have the same length S"
    if enable_gqa and (least < 3 or not key[-3] or query[-3] % key[-3] or key[-3] != value[-3]):
        return "key and value must have the same number of heads (dimension -3), a divisor of the query's"
    axes = -3 if enable_gqa else -2
    if not query[:axes] == key[:axes] == value[:axes]:
        try:
            torch.broadcast_shapes(query[:axes], key[:axes], value[:axes])
        except RuntimeError:
            return "batch and head sizes must broadcast"
    return None
