"""Sparse attention for PyTorch: mappings to sparse probabilities, attention layers that learn how sparse to be."""

from sparse_attn.nn import (
    AdaptiveSparseMultiheadAttention,
    KVCache,
    SparseAttention,
    TopKMultiheadAttention,
    alpha_per_head,
)
from sparse_attn.ops import (
    entmax,
    entmax15,
    entmax_attention,
    sparse_softmax,
    sparsemax,
    topk_attention,
    topk_softmax,
)
from sparse_attn.swap import replace_attention

__version__ = "0.1.0"

__all__ = [
    "AdaptiveSparseMultiheadAttention",
    "KVCache",
    "SparseAttention",
    "TopKMultiheadAttention",
    "alpha_per_head",
    "entmax",
    "entmax15",
    "entmax_attention",
    "replace_attention",
    "sparse_softmax",
    "sparsemax",
    "topk_attention",
    "topk_softmax",
]
