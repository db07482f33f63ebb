"""Small layers and encoders: torch's encoder, dense or with sparse attention, and a layer with four different α."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparse_attn import AdaptiveSparseMultiheadAttention, replace_attention


def dense_encoder(width: int, heads: int, hidden: int, layers: int = 2, **kwargs: Any) -> nn.TransformerEncoder:
    """An encoder without dropout or nested tensors; further arguments are passed to its layers."""
    layer = nn.TransformerEncoderLayer(width, heads, hidden, dropout=0.0, **{"batch_first": True, **kwargs})
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def sparse_encoder(width: int, heads: int, hidden: int, layers: int = 2, **kwargs: Any) -> nn.TransformerEncoder:
    """The encoder of `dense_encoder` with our attention; further arguments are passed to :func:`replace_attention`."""
    model = dense_encoder(width, heads, hidden, layers)
    replace_attention(model, **kwargs)
    return model


def layer_of_four_heads(width: int, **kwargs: Any) -> AdaptiveSparseMultiheadAttention:
    """A layer whose four heads have different α from 1 to 2; further arguments are passed to the layer."""
    return AdaptiveSparseMultiheadAttention(width, 4, batch_first=True, alpha_init=[1.0, 1.25, 1.5, 2.0], **kwargs)
