"""The public names of the package, which ``sparse_attn`` re-exports."""

# ruff: noqa: F403, F405

# Imported first, so that an old version of torch gets a clear error before another module fails on a missing name.
import sparse_attn.versions  # noqa: F401  # isort: split
from sparse_attn.analysis.record import record_attention
from sparse_attn.calibration import calibrate
from sparse_attn.kernels.dispatch import backends, use_backend
from sparse_attn.nn import *
from sparse_attn.ops import *
from sparse_attn.swap import replace_attention, restore_attention

# Type checkers read this list, but not a list computed from the lists of `nn` and `ops`.
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
    "SparseSoftmax",
    "Sparsemax",
    "SparsemaxLoss",
    "TopKMultiheadAttention",
    "TopkSoftmax",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "alpha_per_head",
    "backends",
    "budget_sparsemax",
    "calibrate",
    "entmax",
    "entmax15",
    "entmax15_loss",
    "entmax_attention",
    "entmax_attention_varlen",
    "entmax_loss",
    "normmax",
    "record_attention",
    "replace_attention",
    "restore_attention",
    "sparse_softmax",
    "sparsemax",
    "sparsemax_loss",
    "support_size",
    "tau",
    "topk_attention",
    "topk_softmax",
    "use_backend",
]
