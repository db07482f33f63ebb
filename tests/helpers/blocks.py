"""Layers with grouped heads, windows, norms, positions and scaling: the cases, and a layer for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparse_attn import (
    NAPE,
    AdaptiveSparseMultiheadAttention,
    ALiBi,
    Positions,
    RotaryPositions,
    TopKMultiheadAttention,
)
from sparse_attn.nn import SparseMultiheadAttention

N, T, S, H, D = 2, 7, 5, 6, 10
E = H * D
MAKE_POSITIONS: dict[str, Callable[[], Positions | None]] = {
    "none": lambda: None,
    "rotary": lambda: RotaryPositions(D),
    "alibi": lambda: ALiBi(H),
    "nape": lambda: NAPE(H),
}
ALONE: list[dict[str, Any]] = [
    {"num_kv_heads": 2},
    {"num_kv_heads": 1},
    {"window": 2},
    {"qk_norm": True},
    {"positions": "rotary"},
    {"positions": "alibi"},
    {"positions": "nape"},
    {"length_scaling": True},
]
TOGETHER = {"num_kv_heads": 3, "window": (3, 1), "qk_norm": True, "positions": "nape", "length_scaling": True}


def short(options: dict[str, Any]) -> str:
    """A short name of a case."""
    return " ".join(f"{name}={value}" for name, value in options.items() if value not in (None, False, "none", H))


def layer_of(
    options: dict[str, Any], kind: type[SparseMultiheadAttention] = AdaptiveSparseMultiheadAttention, **kwargs: Any
) -> Any:
    """The layer of a case. All parameters except α are random: the initial values one and zero could hide errors."""
    options = {**options, "positions": MAKE_POSITIONS[options.get("positions", "none")]()}
    if kind is TopKMultiheadAttention:
        options["k"] = 3
    layer = kind(E, H, **{"batch_first": True, "dtype": torch.float64, **options, **kwargs})
    for name, parameter in layer.named_parameters():
        if name != "raw_alpha":
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return layer
