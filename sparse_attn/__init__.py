"""Sparse attention for PyTorch: mappings to sparse probabilities, attention layers that learn how sparse to be."""

from sparse_attn.nn import (
    AdaptiveSparseMultiheadAttention,
    BudgetSparsemax,
    Entmax,
    Entmax15,
    KVCache,
    Normmax,
    SparseAttention,
    Sparsemax,
    SparseSoftmax,
    TopKMultiheadAttention,
    TopkSoftmax,
    alpha_per_head,
)
from sparse_attn.ops import (
    budget_sparsemax,
    entmax,
    entmax15,
    entmax_attention,
    normmax,
    sparse_softmax,
    sparsemax,
    support_size,
    tau,
    topk_attention,
    topk_softmax,
)
from sparse_attn.swap import replace_attention

__version__ = "0.1.0"

__all__ = [
    "AdaptiveSparseMultiheadAttention",
    "BudgetSparsemax",
    "Entmax",
    "Entmax15",
    "KVCache",
    "Normmax",
    "SparseAttention",
    "SparseSoftmax",
    "Sparsemax",
    "TopKMultiheadAttention",
    "TopkSoftmax",
    "alpha_per_head",
    "budget_sparsemax",
    "entmax",
    "entmax15",
    "entmax_attention",
    "normmax",
    "replace_attention",
    "sparse_softmax",
    "sparsemax",
    "support_size",
    "tau",
    "topk_attention",
    "topk_softmax",
]
