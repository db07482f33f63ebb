"""Layers: drop-ins for ``nn.MultiheadAttention`` and their parts, transformer layers, mappings, losses."""

from sparse_attn.nn.activations import (
    BudgetSparsemax,
    Entmax,
    Entmax15,
    Normmax,
    Sparsemax,
    SparseSoftmax,
    TopkSoftmax,
)
from sparse_attn.nn.adaptive import AdaptiveSparseMultiheadAttention
from sparse_attn.nn.cache import DecoderCache, KVCache
from sparse_attn.nn.losses import Entmax15Loss, EntmaxLoss, SparsemaxLoss
from sparse_attn.nn.model_alpha import alpha_per_head
from sparse_attn.nn.multihead import SparseMultiheadAttention
from sparse_attn.nn.positions import NAPE, ALiBi, Positions, RotaryPositions
from sparse_attn.nn.scaling import LengthScaling
from sparse_attn.nn.sparse import SparseAttention
from sparse_attn.nn.topk import TopKMultiheadAttention
from sparse_attn.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "NAPE",
    "ALiBi",
    "AdaptiveSparseMultiheadAttention",
    "BudgetSparsemax",
    "DecoderCache",
    "Entmax",
    "Entmax15",
    "Entmax15Loss",
    "EntmaxLoss",
    "KVCache",
    "LengthScaling",
    "Normmax",
    "Positions",
    "RotaryPositions",
    "SparseAttention",
    "SparseMultiheadAttention",
    "SparseSoftmax",
    "Sparsemax",
    "SparsemaxLoss",
    "TopKMultiheadAttention",
    "TopkSoftmax",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "alpha_per_head",
]
