"""torch's encoder with small layers, dense or with sparse attention."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparse_attn import replace_attention


def dense_encoder(width: int, heads: int, hidden: int, layers: int = 2, **kwargs: Any) -> nn.TransformerEncoder:
    """An encoder without dropout or nested tensors; further arguments are passed to its layers."""
    layer = nn.TransformerEncoderLayer(width, heads, hidden, dropout=0.0, **{"batch_first": True, **kwargs})
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def sparse_encoder(width: int, heads: int, hidden: int, layers: int = 2, **kwargs: Any) -> nn.TransformerEncoder:
    """The same encoder with our attention; further arguments are passed to :func:`replace_attention`."""
    model = dense_encoder(width, heads, hidden, layers)
    replace_attention(model, **kwargs)
    return model
