"""Base class of the layers that replace ``nn.MultiheadAttention``: everything except the mapping to weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sparse_attn.checks import check_bool, check_dropout, check_flag, check_floating, check_int
from sparse_attn.masks import (
    Bounds,
    ScoreShape,
    Window,
    check_mask_dtype,
    check_window,
    multihead_mask,
    visible_keys,
    visible_pairs,
)
from sparse_attn.nn.cache import KVCache
from sparse_attn.nn.positions import Positions, Rotary, places, turn
from sparse_attn.nn.scaling import LengthScaling
from sparse_attn.observe import report_weights, weights_are_observed
from sparse_attn.ops.attention import ScoreMapping, attend, computes_weights_apart
from sparse_attn.transforms import leaf


class SparseMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with an abstract :meth:`mapping`, which subclasses define.

    Arguments, shapes, masks, state-dict names and return values are those of ``nn.MultiheadAttention``. The
    differences are:

    - a mask is always applied, for any ``is_causal``; ``is_causal=True`` without a mask builds the causal mask;
    - a query with no visible key gets zero weights, and the out-projection's bias as its output;
    - ``cache`` keeps projected keys and values between calls;
    - wrong input raises ValueError or TypeError, never AssertionError.

    The keyword arguments beyond torch's are:

    Args:
        num_kv_heads: Number of heads of keys and values, a divisor of ``num_heads``. Each is shared by
            ``num_heads / num_kv_heads`` consecutive query heads: grouped-query attention, or multi-query attention
            with 1 (Ainslie et al. 2023). With fewer than ``num_heads``, there are three projections, as with ``kdim``
            and ``vdim``: ``q_proj_weight`` (E, E), and ``k_proj_weight`` and ``v_proj_weight`` with
            ``num_kv_heads * D`` rows. ``in_proj_bias`` concatenates their biases in this order; ``bias_k`` and
            ``bias_v`` are (1, 1, num_kv_heads * D).
        window: (left, right): a query sees at most ``left`` keys before its own position and ``right`` after; None for
            no limit on that side. One int sets both. Mistral's ``sliding_window=w`` is ``(w - 1, 0)``.
        qk_norm: RMSNorm on the queries and keys of each head, with weights ``q_norm.weight`` and ``k_norm.weight``
            (D,) that all heads share (Henry et al. 2020; Dehghani et al. 2023).
        positions: Position encoding: ``RotaryPositions``, ``ALiBi``, ``NAPE`` or another subclass of
            :class:`Positions`. The extra keys of ``add_bias_kv`` and ``add_zero_attn`` have no position: no rotary
            turn, bias or window applies to them.
        length_scaling: Multiply queries by a learnt function of the number of visible keys, see
            :class:`LengthScaling` (its parameters are ``length_scaling.beta_weight``, ``beta_bias``, ``gamma_weight``
            and ``gamma_bias``).
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
        num_kv_heads: int | None = None,
        window: Window | None = None,
        qk_norm: bool = False,
        positions: Positions | None = None,
        length_scaling: bool = False,
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, count in (("embed_dim", embed_dim), ("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            check_int(count, name)
        embed_dim, num_heads, num_kv_heads = int(embed_dim), int(num_heads), int(num_kv_heads)  # also NumPy's ints
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                "embed_dim must be a positive multiple of num_heads, "
                f"got embed_dim={embed_dim} and num_heads={num_heads}"
            )
        check_dropout(dropout)
        flags = {"bias": bias, "add_bias_kv": add_bias_kv, "add_zero_attn": add_zero_attn, "batch_first": batch_first}
        for name, flag in flags.items():
            check_flag(flag, name)
        for name, size in (("kdim", kdim), ("vdim", vdim)):
            if size is not None:
                check_int(size, name)
                if size < 1:
                    raise ValueError(f"{name} must be at least 1 or None, got {size}")
        check_bool(qk_norm, "qk_norm")
        check_bool(length_scaling, "length_scaling")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must be a divisor of num_heads, {num_heads}, got {num_kv_heads}")
        if positions is not None:
            if not isinstance(positions, Positions):
                raise TypeError(f"positions must be a sparse_attn.nn.Positions, got {type(positions).__name__}")
            positions.check(num_heads, embed_dim // num_heads)
        sides = None if window is None else check_window(window)
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
        # With False, nn.TransformerEncoderLayer in eval mode calls the forward of this class, not torch's fused softmax
        # kernel. The attribute therefore does not say which projections exist: this class tests `in_proj_weight`.
        self._qkv_same_embed_dim = False
        factory: Any = {"device": device, "dtype": dtype}
        self.num_kv_heads = num_kv_heads
        self.window = sides
        self.positions = positions
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6, **factory) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6, **factory) if qk_norm else None
        unscaled = 0 if positions is None else positions.unscaled_heads
        self.length_scaling = LengthScaling(embed_dim, num_heads, unscaled, **factory) if length_scaling else None
        if num_kv_heads < num_heads:
            self._share_heads(factory)

    def _share_heads(self, factory: Any) -> None:
        """Replace torch's parameters by those for ``num_kv_heads`` heads of keys and values."""
        kv_dim = self.num_kv_heads * self.head_dim
        self.register_parameter("in_proj_weight", None)
        self.q_proj_weight = nn.Parameter(torch.empty(self.embed_dim, self.embed_dim, **factory))
        self.k_proj_weight = nn.Parameter(torch.empty(kv_dim, self.kdim, **factory))
        self.v_proj_weight = nn.Parameter(torch.empty(kv_dim, self.vdim, **factory))
        if self.in_proj_bias is not None:
            self.in_proj_bias = nn.Parameter(torch.empty(self.embed_dim + 2 * kv_dim, **factory))
        if self.bias_k is not None:
            self.bias_k = nn.Parameter(torch.empty(1, 1, kv_dim, **factory))
            self.bias_v = nn.Parameter(torch.empty(1, 1, kv_dim, **factory))
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        # torch's method reads `_qkv_same_embed_dim` to find the projections. The attribute is always False after
        # construction (see __init__), so it is set to the true value during the call.
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    def extra_repr(self) -> str:
        """The arguments beyond torch's that are not submodules."""
        shown = [f"num_kv_heads={self.num_kv_heads}"] if self.num_kv_heads < self.num_heads else []
        return ", ".join(shown if self.window is None else [*shown, f"window={self.window}"])

    def mapping(self) -> ScoreMapping:
        """The function from scores (N, H, L, S) to weights."""
        raise NotImplementedError

    @leaf
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
        rotary: Rotary | None = None,
        position_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend. The arguments up to ``is_causal`` are those of ``nn.MultiheadAttention.forward``.

        Args:
            query: (L, N, E), (N, L, E) with ``batch_first``, or unbatched (L, E).
            key: (S, N, kdim), (N, S, kdim) or (S, kdim).
            value: (S, N, vdim), (N, S, vdim) or (S, vdim).
            key_padding_mask: (N, S) or (S): True = ignore this key, or a float added to its scores.
            need_weights: Also return the weights.
            attn_mask: (L, S) or (N * num_heads, L, S): True = masked, or a float added to the scores.
            average_attn_weights: Whether the returned weights are averaged over the heads.
            is_causal: Without ``attn_mask``, query ``i`` sees keys up to ``i``; with a cache, up to its own position.
            cache: Keys and values of earlier calls, to which this call appends its own; a static cache is filled by the
                first call only. Masks cover all S keys, including those of earlier calls.
            rotary: Cosines and sines that rotate the queries and keys of this call, each (L, D / 2) or (N, L, D / 2),
                as ``RotaryPositions.rotary`` returns them. The last size may also be D, with both halves equal, as in
                Hugging Face's models.
            position_bias: A float added to the scores, broadcastable to (N, H, L, S).

        Returns:
            The output, of the query's shape, and the weights, (N, L, S) or (N, H, L, S) (no N when unbatched), or None.

        Raises:
            TypeError: An input is nested or not floating; a mask is neither boolean nor floating; a flag is a string or
                a tensor of several entries.
            ValueError: Shapes do not fit; ``is_causal``, ``rotary``, positions or a window is used with a static cache,
                for which queries have no position; ``rotary`` is given although the layer's ``positions`` rotate.
        """
        flags = {"need_weights": need_weights, "average_attn_weights": average_attn_weights, "is_causal": is_causal}
        for name, flag in flags.items():
            if type(flag) is not bool:
                check_flag(flag, name)
        batched = self._check_inputs(query, key, value)
        if not batched:
            query, key, value, key_padding_mask = _as_batch(query, key, value, key_padding_mask)
        batch_first = self.batch_first or not batched
        if cache is not None:
            self._check_cache(cache, query.shape[0 if batch_first else 1], is_causal, rotary)
        q, k, v = self._project(query, key, value, batch_first=batch_first, cache=cache, rotary=rotary)
        to_keep, offset = (k, v), 0 if cache is None else k.shape[-2] - q.shape[-2]
        own_bias = None if self.positions is None else self.positions.bias(places(offset, q), places(0, k))
        dropout_p = self.dropout if self.training else 0.0
        in_one_matrix = weights_are_observed() or (need_weights and not computes_weights_apart(dropout_p))
        mask, bounds = multihead_mask(
            attn_mask,
            key_padding_mask,
            position_bias,
            own_bias,
            self.window,
            is_causal,
            shape=ScoreShape(q.shape[0], self.num_heads, q.shape[-2], k.shape[-2]),
            offset=offset,
            device=q.device,
            # The bounds become part of the mask where the whole mask is needed: to report the visible pairs with the
            # weights, to append keys (which the bounds would hide), and to count visible keys for `length_scaling`.
            with_bounds_apart=not (
                in_one_matrix or self.bias_k is not None or self.add_zero_attn or self.length_scaling is not None
            ),
        )
        k, v, mask = self._extend_keys(k, v, mask)
        if self.length_scaling is not None:
            rows = query if batch_first else query.transpose(0, 1)
            q = q * self.length_scaling(rows, visible_keys(mask, k.shape[-2], q.device)).to(q.dtype)
        output, weights = self._attend(q, k, v, mask, bounds, dropout_p, need_weights=need_weights, batched=batched)
        output = self.out_proj(rearrange(output, "n h l d -> n l (h d)"))
        if cache is not None:
            cache.key, cache.value = to_keep  # last, so that a call that raises leaves the cache unchanged
        if not batched:
            output, weights = output[0], None if weights is None else weights[0]
        elif not self.batch_first:
            output = output.transpose(0, 1)
        if weights is None or not need_weights:
            return output, None
        return output, weights.mean(-3) if average_attn_weights else weights

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether the input is batched; raises if shapes do not fit."""
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

    def _check_cache(self, cache: KVCache, batch: int, is_causal: bool, rotary: Rotary | None) -> None:
        """Raise if a cache does not fit this layer and batch, or is static in a call that needs positions."""
        if not isinstance(cache, KVCache):
            raise TypeError(f"cache must be a sparse_attn.KVCache, got {type(cache).__name__}")
        if cache.static:
            given = {"is_causal": is_causal, "rotary": rotary is not None}
            given |= {"positions": self.positions is not None, "window": self.window is not None}
            for name, is_given in given.items():
                if is_given:
                    unset = "False" if name == "is_causal" else "None"
                    raise ValueError(f"{name} must be {unset} with a static cache, for which queries have no position")
        if cache.key is not None:
            expected, (n, h, _, d) = (batch, self.num_kv_heads, self.head_dim), cache.key.shape
            if (n, h, d) != expected:
                raise ValueError(
                    f"cache must hold keys of (N, H, D) = {expected}, got {(n, h, d)}; "
                    "give each layer its own, and keep rows with KVCache.select"
                )

    def _project(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        batch_first: bool,
        cache: KVCache | None,
        rotary: Rotary | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (N, heads, length, D); cached keys and values come before the new ones.

        Normalisation and rotation, if any, are already applied.
        """
        sizes = [self.embed_dim] + 2 * [self.num_kv_heads * self.head_dim]
        if self.in_proj_weight is None:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        else:
            weights = list(self.in_proj_weight.split(sizes))
        biases = [None] * 3 if self.in_proj_bias is None else list(self.in_proj_bias.split(sizes))
        pattern = ("n l" if batch_first else "l n") + " (h d) -> n h l d"

        def heads_of(x: Tensor, norm: nn.RMSNorm | None = None) -> Tensor:
            x = rearrange(x, pattern, d=self.head_dim)
            return x if norm is None else norm(x.to(norm.weight.dtype)).to(x.dtype)

        if cache is not None and cache.complete and cache.key is not None and cache.value is not None:
            q = F.linear(query, weights[0], biases[0])
            return heads_of(q, self.q_norm), cache.key, cache.value
        if self.in_proj_weight is not None and query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        q, k, v = heads_of(q, self.q_norm), heads_of(k, self.k_norm), heads_of(v)
        start = 0 if cache is None else len(cache)
        offset = 0 if cache is None else start + k.shape[-2] - q.shape[-2]
        if self.positions is not None or rotary is not None:
            q, k = turn(q, k, self.positions, rotary, query_start=offset, key_start=start)
        return q, *((k, v) if cache is None else cache.joined(k, v))

    def _extend_keys(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append the extra keys and values of ``add_bias_kv`` and ``add_zero_attn``, which every query sees."""
        extra = []
        if self.bias_k is not None and self.bias_v is not None:
            biases = (self.bias_k, self.bias_v)
            extra.append(
                [rearrange(b, "1 1 (h d) -> 1 h 1 d", d=self.head_dim).expand(k.shape[0], -1, -1, -1) for b in biases]
            )
        if self.add_zero_attn:
            extra.append([torch.zeros_like(k[..., :1, :]), torch.zeros_like(v[..., :1, :])])
        for extra_k, extra_v in extra:
            k, v = torch.cat([k, extra_k], -2), torch.cat([v, extra_v], -2)
        if mask is not None and extra:
            mask = F.pad(mask, (0, len(extra)), value=True if mask.dtype == torch.bool else 0.0)
        return k, v, mask

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bounds: Bounds,
        dropout_p: float,
        *,
        need_weights: bool,
        batched: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The heads' outputs (N, H, L, D), and the weights if they are needed or observed."""
        output, weights = attend(
            *(q, k, v, self.mapping(), mask, dropout_p),
            bounds=bounds,
            need_weights=need_weights or weights_are_observed(),
            enable_gqa=self.num_kv_heads < self.num_heads,
        )
        if weights is not None and weights_are_observed():
            visible = visible_pairs(mask, False, weights)
            if not batched and visible is not None and visible.dim() == 4:
                visible = visible[0]
            report_weights(self, weights if batched else weights[0], visible)
        return output, weights


def _as_batch(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Unbatched input as a batch of size 1, batch first. If all three are the same tensor, the results are too."""
    packed = query is key and key is value
    query, key, value = (query[None],) * 3 if packed else (query[None], key[None], value[None])
    if key_padding_mask is None:
        return query, key, value, None
    check_mask_dtype(key_padding_mask, "key_padding_mask")
    if key_padding_mask.dim() != 1:
        shape = tuple(key_padding_mask.shape)
        raise ValueError(f"key_padding_mask must be 1-D (S,) for unbatched input, got shape {shape}")
    return query, key, value, key_padding_mask[None]
