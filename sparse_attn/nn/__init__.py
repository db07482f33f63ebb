"""Layers: drop-ins for ``nn.MultiheadAttention`` and attention without projections."""

from sparse_attn.nn.adaptive import AdaptiveSparseMultiheadAttention, alpha_per_head
from sparse_attn.nn.cache import KVCache
from sparse_attn.nn.multihead import SparseMultiheadAttention
from sparse_attn.nn.sparse import SparseAttention
from sparse_attn.nn.topk import TopKMultiheadAttention

__all__ = [
    "AdaptiveSparseMultiheadAttention",
    "KVCache",
    "SparseAttention",
    "SparseMultiheadAttention",
    "TopKMultiheadAttention",
    "alpha_per_head",
]
