"""Scores to probabilities to attention: pure functions."""

from sparse_attn.ops.attention import entmax_attention, topk_attention
from sparse_attn.ops.entmax import entmax, entmax15, sparsemax
from sparse_attn.ops.topk import sparse_softmax, topk_softmax

__all__ = [
    "entmax",
    "entmax15",
    "entmax_attention",
    "sparse_softmax",
    "sparsemax",
    "topk_attention",
    "topk_softmax",
]
