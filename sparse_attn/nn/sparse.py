"""Sparse attention without projections."""

from __future__ import annotations

from torch import Tensor

from sparse_attn.checks import check_bool, check_dropout, check_floating, check_k, check_scale
from sparse_attn.masks import visible_pairs
from sparse_attn.nn.alpha import HoldsAlpha
from sparse_attn.observe import report_weights, weights_are_observed
from sparse_attn.ops.attention import attend, entmax_mapping, topk_mapping
from sparse_attn.transforms import leaf


class SparseAttention(HoldsAlpha):
    """α-entmax attention to all keys, or to the ``k`` keys with the largest scores.

    Args:
        k: How many keys a query keeps, or None for all. Ties go to the lowest index.
        alpha: α of the weights, a number or a tensor (H,); 1 (softmax) by default when ``k`` is given. An
            ``nn.Parameter`` is learnt, and becomes float32 in place if it is in half precision; any other tensor is
            copied into a buffer.
        scale: Factor of the scores; ``1 / sqrt(E)`` or, with heads, ``1 / sqrt(D)`` by default.
        dropout: Probability that a weight is dropped in training.
        learn_alpha: Learn α, also if ``alpha`` is a number (one α for all heads) or a plain tensor.
        alpha_range: The closed interval that a learnt α stays in. The initial α may be equal to a
            bound; training can still change it.

    Attributes:
        alpha: The current α, a number or a tensor.
        raw_alpha: The parameter or buffer behind ``alpha``, which the state dict contains; None if α is a number.

    Raises:
        TypeError: ``k`` is not an int, ``scale`` or ``dropout`` not a number, ``learn_alpha`` not a bool, or ``alpha``
            neither a number nor a floating tensor.
        ValueError: Neither ``k`` nor ``alpha`` is given; one of them, ``scale`` or ``dropout`` is outside its range; or
            a learnt α is outside ``alpha_range``.

    Shape:
        ``query`` (N, L, E) or (N, H, L, D), ``key`` and ``value`` (N, S, E) or (N, H, S, D); output like ``query``.

    Example:
        >>> import torch
        >>> queries, keys, values = torch.randn(3, 2, 3, 5).unbind()
        >>> SparseAttention(k=2)(queries, keys, values).shape
        torch.Size([2, 3, 5])

    Reference:
        Zhao et al. 2019, "Explicit Sparse Transformer"; Peters, Niculae & Martins 2019 (ACL), "Sparse
        Sequence-to-Sequence Models".
    """

    def __init__(
        self,
        k: int | None = None,
        *,
        alpha: float | Tensor | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        learn_alpha: bool = False,
        alpha_range: tuple[float, float] = (1.0, 2.0),
    ) -> None:
        if k is None and alpha is None:
            raise ValueError("SparseAttention must be given k (an int of at least 1), alpha (in (0, inf)) or both")
        if k is not None:
            check_k(k)
        check_scale(scale)
        check_dropout(dropout)
        super().__init__(1.0 if alpha is None else alpha, learn_alpha=learn_alpha, alpha_range=alpha_range)
        self.k = k
        self.scale = scale
        self.dropout = dropout

    @leaf
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
            attn_mask: Broadcastable to the scores: True = visible (as in ``scaled_dot_product_attention``), or a float
                added to the scores.
            is_causal: Query ``i`` sees the keys up to ``i``. Not together with ``attn_mask``.

        Returns:
            (N, L, E) or (N, H, L, D).
        """
        check_floating(query, "query")
        check_bool(is_causal, "is_causal")
        if query.dim() not in (3, 4):
            raise ValueError(f"query must be (N, L, E) or (N, H, L, D), got shape {tuple(query.shape)}")
        heads = query.shape[-3] if query.dim() == 4 else 1
        alpha = self.alpha
        mapping = entmax_mapping(alpha, heads) if self.k is None else topk_mapping(self.k, alpha, heads)
        dropout_p = self.dropout if self.training else 0.0
        arguments = (attn_mask, dropout_p, is_causal)
        observed = weights_are_observed()
        output, weights = attend(query, key, value, mapping, *arguments, scale=self.scale, need_weights=observed)
        if observed and weights is not None:
            visible = visible_pairs(attn_mask, is_causal, weights)
            if weights.dim() == 3:  # one head
                weights = weights.unsqueeze(1)
                visible = visible.unsqueeze(1) if visible is not None and visible.dim() == 3 else visible
            report_weights(self, weights, visible)
        return output

    def extra_repr(self) -> str:
        """The arguments; a tensor α is shown by its values."""
        return f"k={self.k}, {super().extra_repr()}, scale={self.scale}, dropout={self.dropout}"
