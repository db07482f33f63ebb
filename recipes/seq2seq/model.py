"""A pre-norm encoder-decoder transformer. Encoder, decoder and cross-attention can use different attention kinds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_attn import (
    NAPE,
    ALiBi,
    DecoderCache,
    Positions,
    RotaryPositions,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)
from sparse_attn.checks import check_alpha, check_dropout, check_k
from sparse_attn.nn.dropout import Dropout

from .attention import ATTENTION_KINDS, attention_factory
from .output import output_alpha as alpha_of_output
from .tokenizer import PAD

POSITIONS = ("sinusoidal", "rotary", "alibi", "nape")
_OF_HEADS: dict[str, Callable[[int], Positions]] = {"alibi": ALiBi, "nape": NAPE}


class Seq2SeqTransformer(nn.Module):
    """An encoder-decoder transformer from token ids to logits.

    Args:
        source_size: Number of source token ids; 0 is padding.
        target_size: Number of target token ids; 0 is padding.
        dim: Embedding size, a multiple of ``num_heads``.
        num_heads: Heads of every attention layer.
        ff_dim: Width of the feed-forward blocks.
        encoder_layers: Number of encoder layers.
        decoder_layers: Number of decoder layers.
        dropout: Dropout on embeddings, attention weights, feed-forward activations and residual branches.
        encoder_attention: Kind of the encoder's self-attention; see ``attention_factory``.
        decoder_attention: Kind of the decoder's self-attention.
        cross_attention: Kind of the decoder's attention to the encoder's output.
        alpha: The fixed α of "entmax", or the initial α of "adaptive".
        k: Number of keys that "topk" keeps.
        feature_ids: The source token ids of features.
        language_dim: Number of entries of every source embedding, out of ``dim``, that embed the language. The language
            is the first token. 0: none.
        feature_positions: With False, feature tokens have position 0, and the positions of all other source tokens are
            counted from 1 without the features (Wu et al. 2021). Only for sinusoidal positions.
        positions: Position encoding: "sinusoidal" (added to the embeddings), or only in self-attention "rotary",
            "alibi" or "nape".
        length_scaling: Whether attention scores grow with the number of visible keys, by a learnt factor.
        output: Distribution of the next token: "softmax", "sparsemax", "entmax15" or "entmax".
        output_alpha: The α of the output "entmax".
        share_embeddings: Whether source, target and output have one matrix of weights, a row per token of their common
            vocabulary (Press & Wolf 2017; Vaswani et al. 2017, 3.4).

    Attributes:
        output_alpha: The α of the output of any kind.

    Raises:
        ValueError: An argument is outside its range.

    Shape:
        ``source`` (N, S), ``target`` (N, T) -> (N, T, target_size).

    Example:
        >>> model = Seq2SeqTransformer(11, 13, dim=16, num_heads=2, ff_dim=32)
        >>> source, target = torch.randint(1, 11, (3, 7)), torch.randint(1, 13, (3, 5))
        >>> model(source, target).shape
        torch.Size([3, 5, 13])

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need"; pre-norm after Xiong et al. 2020 (ICML); positions of features
        after Wu, Cotterell & Hulden 2021 (EACL), "Applying the Transformer to Character-level Transduction".
    """

    def __init__(
        self,
        source_size: int,
        target_size: int,
        *,
        dim: int = 128,
        num_heads: int = 4,
        ff_dim: int = 512,
        encoder_layers: int = 2,
        decoder_layers: int = 2,
        dropout: float = 0.1,
        encoder_attention: str = "adaptive",
        decoder_attention: str = "adaptive",
        cross_attention: str = "adaptive",
        alpha: float = 1.5,
        k: int = 4,
        feature_ids: Sequence[int] = (),
        language_dim: int = 0,
        feature_positions: bool = True,
        positions: str = "sinusoidal",
        length_scaling: bool = False,
        output: str = "softmax",
        output_alpha: float = 1.5,
        share_embeddings: bool = False,
    ) -> None:
        super().__init__()
        counts = {
            "source_size": source_size,
            "target_size": target_size,
            "dim": dim,
            "num_heads": num_heads,
            "ff_dim": ff_dim,
            "encoder_layers": encoder_layers,
            "decoder_layers": decoder_layers,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got dim={dim} and num_heads={num_heads}")
        if not 0 <= language_dim < dim:
            raise ValueError(f"language_dim must be from 0 to dim - 1 = {dim - 1}, got {language_dim}")
        if share_embeddings and source_size != target_size:
            raise ValueError(
                f"share_embeddings needs one vocabulary for source and target, got {source_size} and {target_size} "
                "tokens"
            )
        if share_embeddings and language_dim:
            raise ValueError(f"share_embeddings needs language_dim=0, got language_dim={language_dim}")
        check_dropout(dropout)
        kinds = {"encoder": encoder_attention, "decoder": decoder_attention, "cross": cross_attention}
        for place, kind in kinds.items():
            if kind not in ATTENTION_KINDS:
                raise ValueError(f"{place}_attention must be one of {', '.join(ATTENTION_KINDS)}, got {kind!r}")

        check_alpha(alpha)
        if "adaptive" in kinds.values() and not 1.0 <= alpha <= 2.0:
            raise ValueError(f"alpha must be in [1, 2], the range in which adaptive attention learns α, got {alpha}")
        check_k(k)
        self.output_alpha = alpha_of_output(output, output_alpha)

        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, got {positions!r}")
        if not feature_positions and positions != "sinusoidal":
            raise ValueError(f"feature_positions=False needs positions='sinusoidal', got {positions!r}")
        make = {
            place: attention_factory(kind, alpha=alpha, k=k, length_scaling=length_scaling)
            for place, kind in kinds.items()
        }

        def in_attention() -> Positions | None:
            if positions == "sinusoidal":
                return None
            return RotaryPositions(dim // num_heads) if positions == "rotary" else _OF_HEADS[positions](num_heads)

        options: dict[str, Any] = {"dim_feedforward": ff_dim, "dropout": dropout, "activation": F.relu}

        def encoder_layer() -> TransformerEncoderLayer:
            return TransformerEncoderLayer(
                dim, num_heads, attention=make["encoder"], positions=in_attention(), **options
            )

        def decoder_layer() -> TransformerDecoderLayer:
            places = {"positions": in_attention(), **options}
            return TransformerDecoderLayer(
                dim, num_heads, attention=make["decoder"], cross_attention=make["cross"], **places
            )

        unplaced = () if feature_positions else feature_ids
        self.source_embedding = Embedding(source_size, dim, dropout, language_dim, positions == "sinusoidal", unplaced)
        self.target_embedding = Embedding(target_size, dim, dropout, 0, positions == "sinusoidal")
        self.encoder = Encoder([encoder_layer() for _ in range(encoder_layers)], dim)
        self.decoder = Decoder([decoder_layer() for _ in range(decoder_layers)], dim)
        self.output = nn.Linear(dim, target_size)
        if share_embeddings:
            shared = self.target_embedding.tokens.weight
            self.source_embedding.tokens.weight = self.output.weight = shared

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits of each next target token, given the target so far (teacher forcing).

        Args:
            source: (N, S) ids, 0 = padding.
            target: (N, T) ids, beginning-of-sequence first, 0 = padding on the right.

        Returns:
            (N, T, target_size) logits.
        """
        return self.decode(target, self.encode(source), source == PAD)

    def encode(self, source: Tensor) -> Tensor:
        """The encoder's output (N, S, dim) for source ids (N, S)."""
        return self.encoder(self.source_embedding(source), source == PAD)

    def decode(
        self, target: Tensor, memory: Tensor, source_padding: Tensor, caches: list[DecoderCache] | None = None
    ) -> Tensor:
        """Logits for target ids, given the encoder's output.

        Args:
            target: (N, T) ids; with caches, only the ids after the cached positions.
            memory: (N, S, dim), the result of :meth:`encode`.
            source_padding: (N, S), True = padding.
            caches: The result of :meth:`new_caches`. Each call appends keys and values of ``target``; the first call
                also adds keys and values of ``memory``. None: nothing is cached, and ``target`` is complete.

        Returns:
            (N, T, target_size) logits.
        """
        start = len(caches[0]) if caches else 0
        hidden = self.decoder(self.target_embedding(target, start), memory, source_padding, caches)
        return self.output(hidden)

    def new_caches(self) -> list[DecoderCache]:
        """Empty caches, one per decoder layer, for :meth:`decode`."""
        return [DecoderCache() for _ in self.decoder.layers]


class Embedding(nn.Module):
    """Token embeddings, with sinusoidal positions of any length unless attention encodes positions.

    The last ``language_dim`` entries at every position embed the first token, which is the language (Peters & Martins
    2020, "One-Size-Fits-All Multilingual Models"). If there are tokens in ``unplaced``, they have position 0, and
    the positions of the other tokens are counted from 1.
    """

    unplaced: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        dropout: float,
        language_dim: int = 0,
        sinusoidal: bool = True,
        unplaced: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size, dim - language_dim, padding_idx=PAD)
        nn.init.normal_(self.tokens.weight, std=dim**-0.5)
        with torch.no_grad():
            self.tokens.weight[PAD] = 0.0
        self.language = nn.Embedding(size, language_dim) if language_dim else None
        if self.language is not None:
            nn.init.normal_(self.language.weight, std=dim**-0.5)
        self.sinusoidal = sinusoidal
        self.register_buffer("unplaced", torch.tensor(unplaced, dtype=torch.long), persistent=False)
        self.dropout = Dropout(dropout)

    def forward(self, ids: Tensor, start: int = 0) -> Tensor:
        """(N, T) ids at positions ``start``, ``start + 1``, ... -> (N, T, dim)."""
        embedded = self.tokens(ids)
        if self.language is not None:
            embedded = torch.cat([embedded, self.language(ids[:, :1]).expand(-1, ids.shape[1], -1)], -1)
        dim = embedded.shape[-1]
        embedded = embedded * math.sqrt(dim)
        if self.sinusoidal:
            if self.unplaced.numel():
                unplaced = torch.isin(ids, self.unplaced)
                places = (~unplaced).cumsum(1).masked_fill(unplaced, 0)
                encoded = sinusoids(0, ids.shape[1] + 1, dim, ids.device)[places]
            else:
                encoded = sinusoids(start, ids.shape[1], dim, ids.device)
            embedded = embedded + encoded.to(embedded.dtype)
        return self.dropout(embedded)


def sinusoids(start: int, length: int, dim: int, device: torch.device | None = None) -> Tensor:
    """(length, dim) position encodings: sines in the first half, cosines in the second (Vaswani et al. 2017, 3.5)."""
    position = torch.arange(start, start + length, device=device)[:, None]
    half = (dim + 1) // 2
    angle = position * torch.exp(torch.arange(half, device=device) * (-math.log(10000.0) / half))
    return torch.cat([angle.sin(), angle.cos()], -1)[:, :dim]


class Encoder(nn.Module):
    """Layers, then a final norm."""

    def __init__(self, layers: list[TransformerEncoderLayer], dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """(N, S, dim) -> (N, S, dim); ``padding`` (N, S) marks the keys that no query may see."""
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return self.norm(x)


class Decoder(nn.Module):
    """Layers, then a final norm."""

    def __init__(self, layers: list[TransformerDecoderLayer], dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, memory: Tensor, source_padding: Tensor, caches: list[DecoderCache] | None = None
    ) -> Tensor:
        """(N, T, dim) -> (N, T, dim). The causal mask also hides target padding, which is on the right."""
        for index, layer in enumerate(self.layers):
            cache = caches[index] if caches else None
            x = layer(x, memory, memory_key_padding_mask=source_padding, tgt_is_causal=True, cache=cache)
        return self.norm(x)
