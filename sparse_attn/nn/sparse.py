"""Sparse attention without projections."""

from __future__ import annotations

from torch import Tensor, nn

from sparse_attn.checks import check_alpha, check_dropout, check_k
from sparse_attn.masks import visible_pairs
from sparse_attn.nn.alpha import hold, shown
from sparse_attn.observe import observed, tell
from sparse_attn.ops.attention import attend, entmax_mapping, topk_mapping


class SparseAttention(nn.Module):
    """Attention to the ``k`` best keys, with α-entmax weights, or both: α-entmax over the ``k`` best keys.

    Args:
        k: How many keys a query keeps, or None for all. Ties go to the lowest index.
        alpha: α of the weights, a number or a tensor (H,); softmax (1) by default when ``k`` is given. A parameter is
            learnt, unbounded: keep it in ``(0, inf)``. Any other tensor is copied into a buffer.
        scale: Factor of the scores; ``1 / sqrt(E)`` by default.
        dropout: Probability that a weight is dropped in training.

    Raises:
        TypeError: ``k`` is not an int, or ``alpha`` is neither a number nor a floating tensor.
        ValueError: Neither ``k`` nor ``alpha`` is given, or one of them or ``dropout`` is outside its range.

    Shape:
        ``query`` (N, L, E) or (N, H, L, D), ``key`` and ``value`` (N, S, E) or (N, H, S, D); the output is the query's.

    Example:
        >>> import torch
        >>> queries, keys, values = torch.randn(3, 2, 3, 5).unbind()
        >>> SparseAttention(k=2)(queries, keys, values).shape
        torch.Size([2, 3, 5])

    Reference:
        Zhao et al. 2019, "Explicit Sparse Transformer"; Peters, Niculae & Martins 2019 (ACL), "Sparse
        Sequence-to-Sequence Models".
    """

    alpha: float | Tensor

    def __init__(
        self,
        k: int | None = None,
        *,
        alpha: float | Tensor | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if k is None and alpha is None:
            raise ValueError("SparseAttention must be given k (an int of at least 1), alpha (in (0, inf)) or both")
        if k is not None:
            check_k(k)
        if alpha is not None:
            check_alpha(alpha)
        check_dropout(dropout)
        self.k = k
        self.scale = scale
        self.dropout = dropout
        hold(self, "alpha", 1.0 if alpha is None else alpha)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend.

        Args:
            query: (N, L, E) or (N, H, L, D).
            key: (N, S, E) or (N, H, S, D).
            value: (N, S, E) or (N, H, S, D).
            attn_mask: Broadcastable to the scores; True = take part (as in ``scaled_dot_product_attention``), or a
                float added to them.
            is_causal: Query ``i`` sees the keys up to ``i``. Not together with ``attn_mask``.

        Returns:
            (N, L, E) or (N, H, L, D).
        """
        if query.dim() not in (3, 4):
            raise ValueError(f"query must be (N, L, E) or (N, H, L, D), got shape {tuple(query.shape)}")
        heads = query.shape[-3] if query.dim() == 4 else 1
        alpha = self.alpha
        mapping = entmax_mapping(alpha, heads) if self.k is None else topk_mapping(self.k, alpha, heads)
        dropout_p = self.dropout if self.training else 0.0
        arguments = (attn_mask, dropout_p, is_causal)
        looked_at = observed()
        output, weights = attend(query, key, value, mapping, *arguments, scale=self.scale, need_weights=looked_at)
        if looked_at and weights is not None:
            visible = visible_pairs(attn_mask, is_causal, weights)
            if weights.dim() == 3:  # one head
                weights = weights.unsqueeze(1)
                visible = visible.unsqueeze(1) if visible is not None and visible.dim() == 3 else visible
            tell(self, weights, visible)
        return output

    def extra_repr(self) -> str:
        """The arguments; of a tensor α its values."""
        return f"k={self.k}, alpha={shown(self.alpha)}, scale={self.scale}, dropout={self.dropout}"
