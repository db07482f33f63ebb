"""Multi-head attention of every query to the k keys with the largest scores."""

from __future__ import annotations

from typing import Any

import torch

from sparse_attn.checks import check_k
from sparse_attn.masks import Window
from sparse_attn.nn.multihead import SparseMultiheadAttention
from sparse_attn.nn.positions import Positions
from sparse_attn.ops.attention import Normalizer, ScoreMapping, normalizer_alpha, topk_mapping


class TopKMultiheadAttention(SparseMultiheadAttention):
    """``nn.MultiheadAttention`` in which each query attends only to the ``k`` visible keys with the largest scores.

    Args:
        embed_dim: Embedding size E. This and all arguments up to ``dtype`` are those of ``nn.MultiheadAttention``.
        num_heads: Number of heads H, a divisor of ``embed_dim``.
        dropout: Probability that a weight is dropped in training.
        bias: Biases on the projections.
        add_bias_kv: A learnt extra key and value.
        add_zero_attn: An extra key and value of zeros.
        kdim: Size of the keys; ``embed_dim`` by default.
        vdim: Size of the values; ``embed_dim`` by default.
        batch_first: (N, L, E) instead of (L, N, E).
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        k: How many keys a query keeps, at least 1. Ties go to the lowest index.
        normalizer: The mapping from the kept scores to weights: "softmax" or "sparsemax".
        num_kv_heads: Number of heads of keys and values, a divisor of ``num_heads``; query heads share them.
        window: (left, right): how many keys a query sees before and after its own position; one int for both sides.
        qk_norm: RMSNorm on the queries and keys of every head.
        positions: ``RotaryPositions``, ``ALiBi``, ``NAPE`` or another subclass of ``Positions``.
        length_scaling: Scale queries by a learnt function of the number of visible keys. This argument and the four
            before are described in :class:`SparseMultiheadAttention`.

    Raises:
        TypeError: ``k`` is not an int.
        ValueError: ``k`` is below 1, ``normalizer`` is unknown, or ``embed_dim`` is not a multiple of ``num_heads``.

    Shape:
        As in ``nn.MultiheadAttention``; see :meth:`forward`.

    Example:
        >>> layer = TopKMultiheadAttention(16, num_heads=2, k=2, batch_first=True)
        >>> x = torch.randn(3, 5, 16)
        >>> (layer(x, x, x, average_attn_weights=False)[1] > 0).sum(-1).unique()
        tensor([2])

    Reference:
        Zhao et al. 2019, "Explicit Sparse Transformer".
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        k: int,
        normalizer: Normalizer = "softmax",
        num_kv_heads: int | None = None,
        window: Window | None = None,
        qk_norm: bool = False,
        positions: Positions | None = None,
        length_scaling: bool = False,
    ) -> None:
        check_k(k)
        normalizer_alpha(normalizer)
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
            num_kv_heads=num_kv_heads,
            window=window,
            qk_norm=qk_norm,
            positions=positions,
            length_scaling=length_scaling,
        )
        self.k = k
        self.normalizer = normalizer

    def mapping(self) -> ScoreMapping:
        """Softmax or sparsemax over the k keys with the largest scores."""
        return topk_mapping(self.k, normalizer_alpha(self.normalizer))

    def extra_repr(self) -> str:
        """The top-k arguments as given, and those of the base class."""
        return ", ".join(filter(None, (f"k={self.k}, normalizer={self.normalizer!r}", super().extra_repr())))
