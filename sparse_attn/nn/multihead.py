"""What every drop-in for ``nn.MultiheadAttention`` shares: all of it but the mapping from scores to weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sparse_attn.checks import check_dropout, check_floating
from sparse_attn.masks import causal_mask, check_mask_dtype, merge_multihead_masks
from sparse_attn.nn.cache import KVCache
from sparse_attn.ops.attention import ScoreMapping, attend


class SparseMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with the mapping left open; a subclass says what :meth:`mapping` is.

    Arguments, shapes, masks, state-dict names and return values are those of ``nn.MultiheadAttention``. What differs:

    - a mask is always honoured, whatever ``is_causal`` says; ``is_causal=True`` without a mask builds the causal one;
    - a query that sees nothing gets zero weights, and the out-projection's bias as its output;
    - ``cache`` keeps projected keys and values between calls;
    - wrong input raises ValueError or TypeError, never AssertionError.
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
    ) -> None:
        for name, count in (("embed_dim", embed_dim), ("num_heads", num_heads)):
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"{name} must be an int, got {count!r}")
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                "embed_dim must be a positive multiple of num_heads, "
                f"got embed_dim={embed_dim} and num_heads={num_heads}"
            )
        check_dropout(dropout)
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
        )
        # nn.TransformerEncoderLayer asks this attribute whether it may call its fused softmax kernel in eval mode
        # instead of our forward. Which projections there are, ``in_proj_weight`` itself tells.
        self._qkv_same_embed_dim = False

    def _reset_parameters(self) -> None:
        # torch's own asks ``_qkv_same_embed_dim``, which does not tell the truth here once construction is over.
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    def mapping(self) -> ScoreMapping:
        """The function from scores (N, H, L, S) to weights."""
        raise NotImplementedError

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; every argument but ``cache`` as in ``nn.MultiheadAttention.forward``.

        Args:
            query: (L, N, E), (N, L, E) with ``batch_first``, or unbatched (L, E).
            key: (S, N, kdim), (N, S, kdim) or (S, kdim).
            value: (S, N, vdim), (N, S, vdim) or (S, vdim).
            key_padding_mask: (N, S) or (S): True = ignore this key, or a float added to its scores.
            need_weights: Also return the weights.
            attn_mask: (L, S) or (N * num_heads, L, S): True = masked, or a float added to the scores.
            average_attn_weights: Weights averaged over the heads, or one map per head.
            is_causal: Without ``attn_mask``, query ``i`` sees keys up to ``i``; with a cache, up to its own position.
            cache: Past keys and values, extended in place by this call; masks then span all S keys, past ones included.

        Returns:
            The output, of the query's shape, and the weights, (N, L, S) or (N, H, L, S) (no N when unbatched), or None.

        Raises:
            TypeError: Inputs that are nested or not floating; a mask that is neither boolean nor floating.
            ValueError: Shapes that do not fit; ``is_causal`` with a static cache, which does not know where the
                query stands.
        """
        batched = self._check_inputs(query, key, value)
        if not batched:
            # One batch row, in front for what follows.
            packed = query is key and key is value
            query, key, value = (query[None],) * 3 if packed else (query[None], key[None], value[None])
            if key_padding_mask is not None:
                check_mask_dtype(key_padding_mask, "key_padding_mask")
                if key_padding_mask.dim() != 1:
                    shape = tuple(key_padding_mask.shape)
                    raise ValueError(f"key_padding_mask must be 1-D (S,) for unbatched input, got shape {shape}")
                key_padding_mask = key_padding_mask[None]
        q, k, v = self._project(query, key, value, batch_first=self.batch_first or not batched, cache=cache)
        (batch, heads, queries, _), keys = q.shape, k.shape[-2]
        mask = merge_multihead_masks(attn_mask, key_padding_mask, batch=batch, heads=heads, queries=queries, keys=keys)
        if cache is not None:
            if is_causal and cache.static:
                raise ValueError("is_causal must be False with a static cache, got True")
            cache.key, cache.value = k, v  # not before everything is checked: a refused call leaves the cache as it was
        if is_causal and attn_mask is None:
            causal = causal_mask(queries, keys, q.device, offset=0 if cache is None else keys - queries)
            mask = causal if mask is None else _both(causal, mask)
        k, v, mask = self._extend_keys(k, v, mask)

        dropout_p = self.dropout if self.training else 0.0
        output, weights = attend(q, k, v, self.mapping(), mask, dropout_p, need_weights=need_weights)
        output = self.out_proj(rearrange(output, "n h l d -> n l (h d)"))
        if batched and not self.batch_first:
            output = output.transpose(0, 1)
        if not batched:
            output = output[0]
        if weights is None or not need_weights:
            return output, None
        weights = weights if batched else weights[0]
        return output, weights.mean(-3) if average_attn_weights else weights

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether the input is batched; raises where shapes do not fit."""
        for name, x in (("query", query), ("key", key), ("value", value)):
            check_floating(x, name)
        if any(x.is_nested for x in (query, key, value)):
            raise TypeError("query, key and value must be dense tensors, got a nested tensor")
        shapes = f"got query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            raise ValueError(f"query, key and value must all be 3-D (batched) or all 2-D (unbatched); {shapes}")
        sizes = (self.embed_dim, self.kdim, self.vdim)
        if (query.shape[-1], key.shape[-1], value.shape[-1]) != sizes:
            raise ValueError(
                f"query, key and value must have the last sizes (embed_dim, kdim, vdim) = {sizes}; {shapes}"
            )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"key and value must have the same batch and length; {shapes}")
        batch_axis = 0 if self.batch_first else 1
        if query.dim() == 3 and query.shape[batch_axis] != key.shape[batch_axis]:
            raise ValueError(f"query and key must have the same batch size (axis {batch_axis}); {shapes}")
        return query.dim() == 3

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, *, batch_first: bool, cache: KVCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (N, H, length, D), the last two with the cached ones before them."""
        if self.in_proj_weight is None:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        else:
            weights = list(self.in_proj_weight.chunk(3))
        biases = [None] * 3 if self.in_proj_bias is None else list(self.in_proj_bias.chunk(3))
        batch = query.shape[0 if batch_first else 1]
        if cache is not None and cache.key is not None and cache.key.shape[:2] != (batch, self.num_heads):
            raise ValueError(
                f"cache must hold keys of (N, H) = {(batch, self.num_heads)}, got {tuple(cache.key.shape[:2])}; "
                "give each layer its own, and keep rows with KVCache.select"
            )
        pattern = ("n l" if batch_first else "l n") + " (h d) -> n h l d"

        def split(x: Tensor) -> Tensor:
            return rearrange(x, pattern, h=self.num_heads)

        if cache is not None and cache.complete and cache.key is not None and cache.value is not None:
            return split(F.linear(query, weights[0], biases[0])), cache.key, cache.value
        if self.in_proj_weight is not None and query is key and key is value:
            projected = F.linear(query, self.in_proj_weight, self.in_proj_bias)
            q, k, v = (split(x) for x in projected.chunk(3, -1))
        else:
            q = split(F.linear(query, weights[0], biases[0]))
            k, v = (split(F.linear(x, weights[i], biases[i])) for i, x in ((1, key), (2, value)))
        if cache is not None:
            k, v = cache.joined(k, v)
        return q, k, v

    def _extend_keys(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add the keys that belong to the layer, which every query sees: ``bias_k`` and the zero key."""
        extra = []
        if self.bias_k is not None and self.bias_v is not None:
            biases = (self.bias_k, self.bias_v)
            extra.append(
                [rearrange(b, "1 1 (h d) -> 1 h 1 d", h=self.num_heads).expand(len(k), -1, -1, -1) for b in biases]
            )
        if self.add_zero_attn:
            extra.append([torch.zeros_like(k[..., :1, :]), torch.zeros_like(v[..., :1, :])])
        for extra_k, extra_v in extra:
            k, v = torch.cat([k, extra_k], -2), torch.cat([v, extra_v], -2)
        if mask is not None and extra:
            mask = F.pad(mask, (0, len(extra)), value=True if mask.dtype == torch.bool else 0.0)
        return k, v, mask


def _both(visible: Tensor, mask: Tensor) -> Tensor:
    """An internal-form mask narrowed to the visible pairs."""
    return visible & mask if mask.dtype == torch.bool else mask.masked_fill(~visible, float("-inf"))
