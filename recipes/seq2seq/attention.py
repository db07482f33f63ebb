"""The kinds of attention a recipe can choose from, by name."""

from __future__ import annotations

from sparse_attn import AdaptiveSparseMultiheadAttention, TopKMultiheadAttention
from sparse_attn.nn import SparseMultiheadAttention

ATTENTION_KINDS = ("softmax", "entmax15", "sparsemax", "entmax", "adaptive", "topk")

_NAMED_ALPHA = {"softmax": 1.0, "entmax15": 1.5, "sparsemax": 2.0}


def make_attention(
    kind: str, dim: int, num_heads: int, *, dropout: float = 0.0, alpha: float = 1.5, k: int = 4
) -> SparseMultiheadAttention:
    """A batch-first multi-head layer of the given kind.

    Args:
        kind: "softmax", "entmax15", "sparsemax", "entmax" (fixed ``alpha``), "adaptive" (α learnt per head from
            ``alpha``, within [1, 2]) or "topk" (softmax over the ``k`` best keys).
        dim: Embedding size, a multiple of ``num_heads``.
        num_heads: Number of heads.
        dropout: Probability that an attention weight is dropped in training.
        alpha: For "entmax" and "adaptive".
        k: For "topk".

    Raises:
        ValueError: An unknown kind, or an argument outside its range.
    """
    if kind not in ATTENTION_KINDS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTION_KINDS)}, got {kind!r}")
    if kind == "topk":
        return TopKMultiheadAttention(dim, num_heads, dropout, batch_first=True, k=k)
    return AdaptiveSparseMultiheadAttention(
        dim,
        num_heads,
        dropout,
        batch_first=True,
        alpha_init=_NAMED_ALPHA.get(kind, alpha),
        learn_alpha=kind == "adaptive",
    )
