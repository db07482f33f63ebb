"""Encoder and decoder layers with caches: steps equal the full pass, and errors leave the caches unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformer_layers import F64, E, H, L, N, S, padding, randn, short

from sparse_attn import (
    NAPE,
    DecoderCache,
    KVCache,
    RotaryPositions,
    TopKMultiheadAttention,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)

BLOCKS: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 2, "positions": RotaryPositions(E // H), "norm": "rms", "qk_norm": True, "bias": False},
    {"num_kv_heads": 1, "positions": NAPE(H), "length_scaling": True, "window": (3, 0)},
    {"attention": TopKMultiheadAttention, "k": 2, "norm_first": False},
]


@pytest.mark.parametrize("options", BLOCKS, ids=short)
def test_an_encoder_layer_by_steps_equals_the_full_pass(options: dict[str, Any]) -> None:
    layer = TransformerEncoderLayer(E, H, **F64, **options)
    x = randn(N, L, E)
    full = layer(x, is_causal=True)
    cache = KVCache()
    steps = [layer(step, is_causal=True, cache=cache) for step in x.split([2, 1, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", BLOCKS, ids=short)
def test_a_decoder_layer_by_steps_equals_the_full_pass(options: dict[str, Any]) -> None:
    layer = TransformerDecoderLayer(E, H, **F64, **options)
    x, memory = randn(N, L, E), randn(N, S, E)
    masks = {"memory_key_padding_mask": padding(S), "tgt_is_causal": True}
    full = layer(x, memory, **masks)
    cache = DecoderCache()
    steps = [layer(step, memory, cache=cache, **masks) for step in x.split([2, 1, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-9, atol=1e-10)
    cache.crop(3)
    cache.select(torch.tensor([1, 1]))
    masks["memory_key_padding_mask"] = padding(S)[[1, 1]]
    again = layer(x[[1, 1], 3:], memory[[1, 1]], cache=cache, **masks)
    torch.testing.assert_close(again, full[[1, 1], 3:], rtol=1e-9, atol=1e-10)


def test_errors_of_masks_count_the_positions_in_a_cache() -> None:
    encoder, decoder = TransformerEncoderLayer(E, H), TransformerDecoderLayer(E, H)
    x, memory = torch.randn(N, L, E), torch.randn(N, S, E)
    bad = torch.zeros(3, 3, dtype=torch.bool)
    cache, decoder_cache = KVCache(), DecoderCache()
    encoder(x, cache=cache)
    decoder(x, memory, cache=decoder_cache)
    with pytest.raises(ValueError, match=rf"^src_mask must have shape \(L, S\) = \(1, {L + 1}\) or "):
        encoder(x[:, :1], bad, cache=cache)
    with pytest.raises(ValueError, match=rf"^tgt_mask must have shape \(L, S\) = \(1, {L + 1}\) or "):
        decoder(x[:, :1], memory, bad, cache=decoder_cache)
    with pytest.raises(ValueError, match=rf"^memory_mask must have shape \(L, S\) = \(1, {S}\) or "):
        decoder(x[:, :1], memory[:, :1], memory_mask=bad, cache=decoder_cache)
    with pytest.raises(ValueError, match=r"^memory_is_causal must be False with a cache: "):
        decoder(x[:, :1], memory, memory_is_causal=True, cache=decoder_cache)


def test_a_refused_step_does_not_change_the_caches() -> None:
    layer = TransformerDecoderLayer(E, H).double().eval()
    x, memory = torch.randn(N, 3, E, dtype=torch.double), torch.randn(N, 5, E, dtype=torch.double)
    cache = DecoderCache()
    steps = [layer(x[:, :2], memory, tgt_is_causal=True, cache=cache)]
    with pytest.raises(ValueError, match="key_padding_mask must have shape"):
        padding = torch.zeros(N, 4, dtype=torch.bool)
        layer(x[:, 2:], memory, tgt_is_causal=True, memory_key_padding_mask=padding, cache=cache)
    assert len(cache) == 2
    cache.cross_attention = KVCache(static=True)
    with pytest.raises(RuntimeError, match="dtype"):  # an error of torch itself
        layer(x[:, 2:], memory.float(), tgt_is_causal=True, cache=cache)
    assert len(cache) == 2 and len(cache.cross_attention) == 0
    steps.append(layer(x[:, 2:], memory, tgt_is_causal=True, cache=cache))
    torch.testing.assert_close(torch.cat(steps, 1), layer(x, memory, tgt_is_causal=True))


def test_a_cache_of_another_kind_raises_an_error() -> None:
    x = torch.randn(N, L, E)
    with pytest.raises(TypeError, match=r"cache must be a sparse_attn\.KVCache, got DecoderCache"):
        TransformerEncoderLayer(E, H)(x, cache=DecoderCache())
    with pytest.raises(TypeError, match=r"cache must be a sparse_attn\.DecoderCache, got KVCache"):
        TransformerDecoderLayer(E, H)(x, x, cache=KVCache())


class LanguageModel(nn.Module):
    def __init__(self, size: int, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, E)
        self.layers = nn.ModuleList(TransformerEncoderLayer(E, H, dropout=0.0, **options) for _ in range(2))
        self.output = nn.Linear(E, size)

    def forward(self, ids: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        x = self.embedding(ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, is_causal=True, cache=None if caches is None else caches[i])
        return self.output(x)


def test_a_language_model_of_our_layers_learns_and_generates() -> None:
    """The second half of a sequence repeats the first: a head must attend to the key a fixed distance back."""
    size, half = 7, 5
    options = {"num_kv_heads": 2, "norm": "rms", "qk_norm": True, "length_scaling": True, "alpha_init": 1.5}
    model = LanguageModel(size, positions=RotaryPositions(E // H), **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(100):
        start = torch.randint(size, (32, half))
        ids = torch.cat([start, start], 1)
        loss = F.cross_entropy(model(ids[:, :-1])[:, half - 1 :].flatten(0, 1), start.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    start = torch.randint(size, (13, half))
    caches = [KVCache() for _ in model.layers]
    with torch.no_grad():
        ids, new = start, start
        for _ in range(half):
            logits = model(new, caches)
            torch.testing.assert_close(logits[:, -1], model(ids)[:, -1], rtol=1e-4, atol=1e-4)
            new = logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, new], 1)
    assert (ids[:, half:] == start).double().mean() > 0.95


def test_an_error_in_the_feed_forward_block_leaves_the_caches_unchanged() -> None:
    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    x, memory = torch.randn(N, 3, E), torch.randn(N, S, E)
    for layer, cache, inputs, causal in (
        (TransformerEncoderLayer(E, H).eval(), KVCache(), (), {"is_causal": True}),
        (TransformerDecoderLayer(E, H).eval(), DecoderCache(), (memory,), {"tgt_is_causal": True}),
    ):
        expected = layer(x, *inputs, **causal)
        layer.activation = fail
        with pytest.raises(RuntimeError, match="out of memory"):
            layer(x[:, :1], *inputs, **causal, cache=cache)
        assert len(cache) == 0 and len(getattr(cache, "cross_attention", cache)) == 0
        layer.activation = F.gelu
        steps = [layer(x[:, :2], *inputs, **causal, cache=cache)]
        layer.activation = fail
        with pytest.raises(RuntimeError, match="out of memory"):
            layer(x[:, 2:], *inputs, **causal, cache=cache)
        assert len(cache) == 2
        layer.activation = F.gelu
        steps.append(layer(x[:, 2:], *inputs, **causal, cache=cache))
        torch.testing.assert_close(torch.cat(steps, 1), expected)
