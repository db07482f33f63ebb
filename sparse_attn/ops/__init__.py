"""Pure functions: mappings from scores to probabilities, losses, and attention."""

from sparse_attn.ops.attention import entmax_attention, topk_attention
from sparse_attn.ops.budget import budget_sparsemax
from sparse_attn.ops.entmax import entmax, entmax15, sparsemax
from sparse_attn.ops.losses import entmax15_loss, entmax_loss, sparsemax_loss
from sparse_attn.ops.normmax import normmax
from sparse_attn.ops.support import support_size, tau
from sparse_attn.ops.topk import sparse_softmax, topk_softmax
from sparse_attn.ops.varlen import entmax_attention_varlen

__all__ = [
    "budget_sparsemax",
    "entmax",
    "entmax15",
    "entmax15_loss",
    "entmax_attention",
    "entmax_attention_varlen",
    "entmax_loss",
    "normmax",
    "sparse_softmax",
    "sparsemax",
    "sparsemax_loss",
    "support_size",
    "tau",
    "topk_attention",
    "topk_softmax",
]
