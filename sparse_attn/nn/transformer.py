"""Transformer encoder and decoder layers for new models, with the parameter names of torch's layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_attn.checks import check_floating
from sparse_attn.nn.adaptive import AdaptiveSparseMultiheadAttention
from sparse_attn.nn.cache import DecoderCache, KVCache, contents, set_back
from sparse_attn.nn.multihead import SparseMultiheadAttention
from sparse_attn.nn.positions import Rotary
from sparse_attn.nn.residual import (
    Activation,
    NormKind,
    ResidualLayer,
    batched_form,
    check_attention,
    check_masks,
    given,
    make_norm,
)
from sparse_attn.transforms import leaf


class TransformerEncoderLayer(ResidualLayer):
    """Self-attention and a feed-forward block. With ``is_causal=True`` and a cache: a layer of a language model.

    Further keyword arguments, such as ``alpha_init=1.0``, ``num_kv_heads=2`` or ``positions=RotaryPositions(64)``, are
    passed on to ``attention``. To stack layers, use
    ``nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)``. A state dict of
    ``nn.TransformerEncoderLayer`` loads.

    Args:
        d_model: Embedding size E.
        nhead: Number of heads H.
        dim_feedforward: Width of the feed-forward block; ``4 * d_model`` by default.
        dropout: Dropout probability of attention weights, activations and both branches.
        activation: Activation of the feed-forward block.
        layer_norm_eps: Epsilon of the norms.
        batch_first: (N, L, E) if True, the default here but not in torch; otherwise (L, N, E).
        norm_first: Normalise before the branches if True, the default here but not in torch; otherwise after.
        bias: Whether linear layers and norms have biases.
        norm: "layer" for LayerNorm, "rms" for RMSNorm.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        attention: Class or function that makes the attention layer, called with the arguments of
            ``nn.MultiheadAttention``.
        **attention_kwargs: Further arguments of ``attention``.

    Raises:
        TypeError: ``attention`` is not a class or a function, ``activation`` not a function, a size not an int, or
            ``norm_first`` not a bool.
        ValueError: A size, ``dropout`` or ``norm`` is not allowed.

    Shape:
        ``src`` (N, L, E) -> (N, L, E), or (L, N, E) -> (L, N, E) without ``batch_first``; unbatched (L, E) -> (L, E).

    Example:
        >>> from sparse_attn import NAPE
        >>> layer = TransformerEncoderLayer(16, 4, num_kv_heads=2, positions=NAPE(4), length_scaling=True)
        >>> layer(torch.randn(3, 5, 16), is_causal=True).shape
        torch.Size([3, 5, 16])

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need"; pre-norm after Xiong et al. 2020 (ICML).
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        *,
        dim_feedforward: int | None = None,
        dropout: float = 0.1,
        activation: Activation = F.gelu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = True,
        norm_first: bool = True,
        bias: bool = True,
        norm: NormKind = "layer",
        device: Any = None,
        dtype: torch.dtype | None = None,
        attention: Callable[..., nn.MultiheadAttention] = AdaptiveSparseMultiheadAttention,
        **attention_kwargs: Any,
    ) -> None:
        factory: Any = {"bias": bias, "device": device, "dtype": dtype}
        super().__init__(d_model, dim_feedforward, dropout, activation, norm_first, factory)
        factory_of_attention = {"dropout": dropout, "batch_first": batch_first, **factory}
        check_attention(attention)
        self.self_attn = attention(d_model, nhead, **factory_of_attention, **attention_kwargs)
        self.norm1, self.norm2 = (make_norm(norm, d_model, layer_norm_eps, factory) for _ in range(2))

    @leaf
    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        cache: KVCache | None = None,
        rotary: Rotary | None = None,
        position_bias: Tensor | None = None,
    ) -> Tensor:
        """Attend and transform.

        Args:
            src: (N, L, E).
            src_mask: (L, S) or (N * nhead, L, S): True = masked, or a float added to the scores.
            src_key_padding_mask: (N, S): True = ignore this key.
            is_causal: Without ``src_mask``, position ``i`` sees positions up to ``i``.
            cache: Keys and values of earlier calls, to which this call appends its own.
            rotary: As in :meth:`SparseMultiheadAttention.forward`.
            position_bias: As in :meth:`SparseMultiheadAttention.forward`.

        Returns:
            (N, L, E).
        """
        self._check_input(src, "src")
        names = ("src_mask", "src_key_padding_mask")
        check_masks(self.self_attn, src, src, cache, src_mask, src_key_padding_mask, names)
        extra = given(cache=cache, rotary=rotary, position_bias=position_bias)

        def attend(x: Tensor) -> Tensor:
            arguments = (src_key_padding_mask, False, src_mask, True, is_causal)
            return self.self_attn(x, x, x, *arguments, **extra)[0]

        before = contents(cache)
        try:
            x = self._add(src, self.norm1, attend)
            return self._add(x, self.norm2, self._feed_forward)
        except Exception:
            set_back(before)
            raise


class TransformerDecoderLayer(ResidualLayer):
    """Self-attention, attention to an encoder's output, and a feed-forward block.

    Further keyword arguments are passed on to both attention layers, or only to the self-attention if
    ``cross_attention`` is given. Only the self-attention gets ``positions`` and ``window``: a position in the target
    does not correspond to a position in the source. To stack layers, use ``nn.TransformerDecoder(layer, num_layers)``.
    A state dict of ``nn.TransformerDecoderLayer`` loads.

    Args:
        d_model: Embedding size E.
        nhead: Number of heads H.
        dim_feedforward: Width of the feed-forward block; ``4 * d_model`` by default.
        dropout: Dropout probability of attention weights, activations and the three branches.
        activation: Activation of the feed-forward block.
        layer_norm_eps: Epsilon of the norms.
        batch_first: (N, L, E) if True, the default here but not in torch; otherwise (L, N, E).
        norm_first: Normalise before the branches if True, the default here but not in torch; otherwise after.
        bias: Whether linear layers and norms have biases.
        norm: "layer" for LayerNorm, "rms" for RMSNorm.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        attention: Class or function that makes the attention layers, called with the arguments of
            ``nn.MultiheadAttention``.
        cross_attention: Class or function that makes the attention to the memory, if it differs from ``attention``.
            It is called with the arguments of ``nn.MultiheadAttention`` only; use ``functools.partial`` for others.
        **attention_kwargs: Further arguments of ``attention``.

    Raises:
        TypeError: ``attention`` or ``cross_attention`` is not a class or a function, ``activation`` not a function, a
            size not an int, or ``norm_first`` not a bool.
        ValueError: A size, ``dropout`` or ``norm`` is not allowed.

    Shape:
        ``tgt`` (N, L, E), ``memory`` (N, S, E) -> (N, L, E). Without ``batch_first``, ``tgt`` (L, N, E), ``memory``
        (S, N, E) -> (L, N, E). Unbatched: ``tgt`` (L, E), ``memory`` (S, E) -> (L, E).

    Example:
        >>> layer = TransformerDecoderLayer(16, 2, norm="rms", qk_norm=True, window=(3, 0))
        >>> layer(torch.randn(3, 5, 16), torch.randn(3, 7, 16), tgt_is_causal=True).shape
        torch.Size([3, 5, 16])
        >>> from functools import partial
        >>> from sparse_attn import TopKMultiheadAttention
        >>> layer = TransformerDecoderLayer(16, 2, cross_attention=partial(TopKMultiheadAttention, k=3))
        >>> type(layer.self_attn).__name__, type(layer.multihead_attn).__name__
        ('AdaptiveSparseMultiheadAttention', 'TopKMultiheadAttention')

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need"; pre-norm after Xiong et al. 2020 (ICML).
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        *,
        dim_feedforward: int | None = None,
        dropout: float = 0.1,
        activation: Activation = F.gelu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = True,
        norm_first: bool = True,
        bias: bool = True,
        norm: NormKind = "layer",
        device: Any = None,
        dtype: torch.dtype | None = None,
        attention: Callable[..., nn.MultiheadAttention] = AdaptiveSparseMultiheadAttention,
        cross_attention: Callable[..., nn.MultiheadAttention] | None = None,
        **attention_kwargs: Any,
    ) -> None:
        factory: Any = {"bias": bias, "device": device, "dtype": dtype}
        super().__init__(d_model, dim_feedforward, dropout, activation, norm_first, factory)
        factory_of_attention = {"dropout": dropout, "batch_first": batch_first, **factory}
        of_cross = {name: value for name, value in attention_kwargs.items() if name not in ("positions", "window")}
        if cross_attention is not None:
            check_attention(cross_attention, "cross_attention")
            of_cross = {}
        check_attention(attention)
        self.self_attn = attention(d_model, nhead, **factory_of_attention, **attention_kwargs)
        self.multihead_attn = (cross_attention or attention)(d_model, nhead, **factory_of_attention, **of_cross)
        self.norm1, self.norm2, self.norm3 = (make_norm(norm, d_model, layer_norm_eps, factory) for _ in range(3))

    def _check_memory(self, memory: Tensor, tgt: Tensor) -> None:
        check_floating(memory, "memory")
        size = getattr(self.multihead_attn, "kdim", self.d_model)
        if memory.dim() != tgt.dim() or memory.shape[-1] != size:
            form = "(S, E)" if tgt.dim() == 2 else batched_form(self.multihead_attn, "S")
            raise ValueError(
                f"memory must be {form} with E = {size}, and have {tgt.dim()} dimensions like tgt, "
                f"got shape {tuple(memory.shape)}"
            )
        if tgt.dim() == 3 and isinstance(self.multihead_attn, SparseMultiheadAttention):
            axis = 0 if self.multihead_attn.batch_first else 1
            if memory.shape[axis] != tgt.shape[axis]:
                raise ValueError(
                    f"memory must have the batch size of tgt, {tgt.shape[axis]}, in axis {axis}, "
                    f"got shape {tuple(memory.shape)}"
                )

    @leaf
    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        cache: DecoderCache | None = None,
        rotary: Rotary | None = None,
        position_bias: Tensor | None = None,
    ) -> Tensor:
        """Attend to the target, to the memory, and transform.

        Args:
            tgt: (N, L, E).
            memory: (N, S, E).
            tgt_mask: (L, T) or (N * nhead, L, T), where T includes past positions: True = masked, or a float added to
                the scores.
            memory_mask: (L, S) or (N * nhead, L, S): True = masked, or a float added to the scores.
            tgt_key_padding_mask: (N, T): True = ignore this key.
            memory_key_padding_mask: (N, S): True = ignore this key.
            tgt_is_causal: Without ``tgt_mask``, position ``i`` sees positions up to ``i``.
            memory_is_causal: Without ``memory_mask``, position ``i`` sees the memory up to ``i``. Not with a cache.
            cache: Keys and values of earlier calls. Each call appends those of ``tgt``; the first call adds those of
                ``memory``.
            rotary: For the self-attention, as in :meth:`SparseMultiheadAttention.forward`.
            position_bias: For the self-attention, as in :meth:`SparseMultiheadAttention.forward`.

        Returns:
            (N, L, E).
        """
        self._check_input(tgt, "tgt")
        self._check_memory(memory, tgt)
        extra = given(rotary=rotary, position_bias=position_bias)
        of_cross = {}
        if cache is not None:
            if not isinstance(cache, DecoderCache):
                raise TypeError(f"cache must be a sparse_attn.DecoderCache, got {type(cache).__name__}")
            extra["cache"], of_cross["cache"] = cache.self_attention, cache.cross_attention
            if memory_is_causal:
                raise ValueError(
                    "memory_is_causal must be False with a cache: tgt then holds only the newest positions, whose "
                    "numbers the cache of the memory does not know"
                )
        names = ("tgt_mask", "tgt_key_padding_mask")
        check_masks(self.self_attn, tgt, tgt, extra.get("cache"), tgt_mask, tgt_key_padding_mask, names)
        names = ("memory_mask", "memory_key_padding_mask")
        of_memory = (memory_mask, memory_key_padding_mask)
        check_masks(self.multihead_attn, tgt, memory, of_cross.get("cache"), *of_memory, names)

        def attend(x: Tensor) -> Tensor:
            arguments = (tgt_key_padding_mask, False, tgt_mask, True, tgt_is_causal)
            return self.self_attn(x, x, x, *arguments, **extra)[0]

        def attend_to_memory(x: Tensor) -> Tensor:
            arguments = (memory_key_padding_mask, False, memory_mask, True, memory_is_causal)
            return self.multihead_attn(x, memory, memory, *arguments, **of_cross)[0]

        before = [] if cache is None else contents(cache.self_attention) + contents(cache.cross_attention)
        try:
            x = self._add(tgt, self.norm1, attend)
            x = self._add(x, self.norm2, attend_to_memory)
            return self._add(x, self.norm3, self._feed_forward)
        except Exception:
            set_back(before)
            raise
