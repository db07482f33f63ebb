"""Caches of keys and values: decoding by steps equals the full pass; selected rows, cropping, and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_attn import AdaptiveSparseMultiheadAttention, DecoderCache, KVCache, TopKMultiheadAttention
from sparse_attn.nn.multihead import SparseMultiheadAttention

N, T, S, H, E = 3, 5, 7, 2, 22
F64 = {"dtype": torch.float64, "batch_first": True}
LAYERS: dict[str, Callable[..., SparseMultiheadAttention]] = {
    "softmax": lambda **kwargs: AdaptiveSparseMultiheadAttention(E, H, alpha_init=1.0, **{**F64, **kwargs}),
    "adaptive": lambda **kwargs: AdaptiveSparseMultiheadAttention(E, H, alpha_init=(1.3, 2.0), **{**F64, **kwargs}),
    "topk": lambda **kwargs: TopKMultiheadAttention(E, H, k=2, **{**F64, **kwargs}),
}


def padding(length: int) -> Tensor:
    mask = torch.zeros(N, length, dtype=torch.bool)
    mask[1, 1:3] = True
    return mask


def by_steps(layer: SparseMultiheadAttention, x: Tensor, sizes: list[int], mask: Tensor | None = None) -> list[Any]:
    """Outputs and weights of the causal pass over (N, T, E) in blocks of the given sizes."""
    cache, start, outcomes = KVCache(), 0, []
    for size in sizes:
        block, start = x[:, start : start + size], start + size
        seen = None if mask is None else mask[:, :start]
        outcomes.append(
            layer(block, block, block, key_padding_mask=seen, is_causal=True, average_attn_weights=False, cache=cache)
        )
        assert len(cache) == start
    return outcomes


@pytest.mark.parametrize("masked", [False, True], ids=["", "padding"])
@pytest.mark.parametrize("sizes", [[1] * T, [2, 3], [1, 3, 1], [T]], ids=str)
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_self_attention_by_steps_equals_the_full_pass(
    kind: str, extra: dict[str, bool], sizes: list[int], masked: bool
) -> None:
    layer = LAYERS[kind](**extra)
    x = torch.randn(N, T, E, dtype=torch.float64)
    mask = padding(T) if masked else None
    full, full_weights = layer(x, x, x, key_padding_mask=mask, is_causal=True, average_attn_weights=False)
    outcomes = by_steps(layer, x, sizes, mask)
    torch.testing.assert_close(torch.cat([output for output, _ in outcomes], 1), full, rtol=1e-9, atol=1e-12)
    start = 0
    for size, (_, weights) in zip(sizes, outcomes, strict=True):
        end = start + size
        torch.testing.assert_close(weights[..., :end], full_weights[..., start:end, :end], rtol=1e-9, atol=1e-12)
        start = end


def test_gradients_by_steps_equal_those_of_the_full_pass() -> None:
    # α is inside its range. Far past a bound, the gradient is projected in each call: the sum over calls would differ.
    layer = AdaptiveSparseMultiheadAttention(E, H, alpha_init=(1.3, 1.8), **F64)
    x = torch.randn(N, T, E, dtype=torch.float64)
    upstream = torch.randn(N, T, E, dtype=torch.float64)
    full = layer(x, x, x, is_causal=True)[0]
    steps = torch.cat([output for output, _ in by_steps(layer, x, [1] * T)], 1)
    parameters = list(layer.parameters())
    expected = torch.autograd.grad(full, parameters, upstream)
    torch.testing.assert_close(torch.autograd.grad(steps, parameters, upstream), expected, rtol=1e-9, atol=1e-12)


def test_without_is_causal_a_step_sees_all_cached_keys() -> None:
    layer = LAYERS["adaptive"]()
    x = torch.randn(N, T, E, dtype=torch.float64)
    cache = KVCache()
    layer(x[:, :2], x[:, :2], x[:, :2], cache=cache)
    last = x[:, 2:]
    mask = torch.rand(len(last[0]), T) < 0.3
    output = layer(last, last, last, attn_mask=mask, cache=cache)[0]
    torch.testing.assert_close(output, layer(last, x, x, attn_mask=mask)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_static_cross_attention_by_steps_equals_the_full_pass(kind: str, batch_first: bool) -> None:
    layer = LAYERS[kind](batch_first=batch_first, kdim=13, vdim=17)
    length = 1 if batch_first else 0
    x, key, value = (torch.randn(N, n, e, dtype=torch.float64) for n, e in ((T, E), (S, 13), (S, 17)))
    if not batch_first:
        x, key, value = x.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    full = layer(x, key, value, key_padding_mask=padding(S))[0]
    cache = KVCache(static=True)
    assert not cache.complete
    steps = []
    for step, query in enumerate(x.split(1, length)):
        # From the second step on, the arguments key and value are ignored.
        memory = (key, value) if step == 0 else (torch.full_like(key, torch.nan), torch.full_like(value, torch.nan))
        steps.append(layer(query, *memory, key_padding_mask=padding(S), cache=cache)[0])
        assert cache.complete and len(cache) == S
    torch.testing.assert_close(torch.cat(steps, length), full, rtol=1e-9, atol=1e-12)


def test_a_filled_static_cache_ignores_key_and_value() -> None:
    layer = LAYERS["adaptive"]()
    memory, x = torch.randn(N, S, E, dtype=torch.float64), torch.randn(N, 1, E, dtype=torch.float64)
    cache = KVCache(static=True)
    expected = layer(x, memory, memory, cache=cache)
    torch.testing.assert_close(layer(x, x, x, cache=cache), expected, rtol=0, atol=0)
    assert len(cache) == S


@pytest.mark.parametrize("static", [False, True])
def test_select_keeps_rows_in_the_given_order(static: bool) -> None:
    layer = LAYERS["adaptive"]()
    first, second = torch.randn(N, 2, E, dtype=torch.float64), torch.randn(N, 1, E, dtype=torch.float64)
    rows = torch.tensor([2, 0, 2, 1])
    expected = []
    for row in rows.tolist():
        cache = KVCache(static=static)
        layer(first[row, None], first[row, None], first[row, None], cache=cache)
        expected.append(layer(second[row, None], second[row, None], second[row, None], cache=cache)[0])
    cache = KVCache(static=static)
    cache.select(rows)  # an empty cache has no rows, so every selection is allowed
    assert len(cache) == 0
    layer(first, first, first, cache=cache)
    cache.select(rows)
    output = layer(*[second[rows]] * 3, cache=cache)[0]
    torch.testing.assert_close(output, torch.cat(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_batch_of_another_size_than_the_cache_is_refused(batch_first: bool, static: bool) -> None:
    layer = LAYERS["adaptive"](batch_first=batch_first)
    cache = KVCache(static=static)
    x = torch.randn(1, 1, E, dtype=torch.float64)
    layer(x, x, x, cache=cache)
    more = x.expand(N, 1, E) if batch_first else x.expand(1, N, E)
    message = r"cache must hold keys of \(N, H, D\) = \(3, 2, 11\), got \(1, 2, 11\); .* KVCache\.select"
    with pytest.raises(ValueError, match=message):
        layer(more, more, more, cache=cache)


def test_a_mask_of_a_step_must_cover_all_cached_keys() -> None:
    layer = LAYERS["adaptive"]()
    cache = KVCache()
    x = torch.randn(N, 1, E, dtype=torch.float64)
    layer(x, x, x, cache=cache)
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(N, S\) = \(3, 2\), got \(3, 1\)"):
        layer(x, x, x, key_padding_mask=torch.zeros(N, 1, dtype=torch.bool), cache=cache)


def test_a_refused_call_does_not_change_the_cache() -> None:
    layer = AdaptiveSparseMultiheadAttention(8, 2, batch_first=True)
    cache, x = KVCache(), torch.randn(2, 1, 8)
    layer(x, x, x, cache=cache)
    with pytest.raises(ValueError, match="key_padding_mask must have shape"):
        layer(x, x, x, key_padding_mask=torch.zeros(2, 1, dtype=torch.bool), cache=cache)
    assert len(cache) == 1


def test_is_causal_with_a_static_cache_and_the_cache_of_another_layer_are_refused() -> None:
    layer = AdaptiveSparseMultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match="is_causal must be False with a static cache"):
        layer(x, x, x, is_causal=True, cache=KVCache(static=True))
    cache = KVCache()
    layer(x, x, x, cache=cache)
    with pytest.raises(ValueError, match=r"\(N, H, D\) = \(2, 4, 2\), got \(2, 2, 4\); give each layer its own"):
        AdaptiveSparseMultiheadAttention(8, 4, batch_first=True)(x, x, x, cache=cache)


def test_crop_removes_the_last_positions() -> None:
    layer = LAYERS["adaptive"]()
    x, guess = torch.randn(N, T, E, dtype=torch.float64), torch.randn(N, 2, E, dtype=torch.float64)
    cache = KVCache()
    cache.crop(0)  # an empty cache can be cropped to 0
    layer(x[:, :3], x[:, :3], x[:, :3], is_causal=True, cache=cache)
    layer(guess, guess, guess, is_causal=True, cache=cache)
    cache.crop(5)
    assert len(cache) == 5
    cache.crop(3)
    assert len(cache) == 3 and cache.value is not None and cache.value.shape[-2] == 3
    output = layer(x[:, 3:], x[:, 3:], x[:, 3:], is_causal=True, cache=cache)[0]
    torch.testing.assert_close(output, layer(x, x, x, is_causal=True)[0][:, 3:], rtol=1e-9, atol=1e-12)
    cache.crop(0)
    assert len(cache) == 0 and cache.key is None and cache.value is None
    one_row = x[:1]
    layer(one_row, one_row, one_row, cache=cache)  # an empty cache has no batch size
    assert len(cache) == T


@pytest.mark.parametrize(
    ("length", "error", "message"),
    [
        (-1, ValueError, r"length must be in \[0, 2\], the positions in the cache, got -1"),
        (3, ValueError, r"length must be in \[0, 2\], the positions in the cache, got 3"),
        (1.0, TypeError, "length must be an int, got 1.0"),
        (True, TypeError, "length must be an int, got True"),
    ],
)
def test_crop_to_an_invalid_length_raises_an_error(length: int, error: type[Exception], message: str) -> None:
    cache = KVCache()
    cache.append(torch.randn(N, H, 2, 3), torch.randn(N, H, 2, 3))
    with pytest.raises(error, match=message):
        cache.crop(length)
    assert len(cache) == 2


def test_cropping_a_static_cache_raises_an_error() -> None:
    cache = KVCache(static=True)
    cache.append(torch.randn(N, H, 2, 3), torch.randn(N, H, 2, 3))
    with pytest.raises(ValueError, match="a static cache cannot be cropped"):
        cache.crop(1)


def test_a_filled_static_cache_refuses_more_keys() -> None:
    cache = KVCache(static=True)
    key, value = cache.append(torch.randn(N, H, 2, 3), torch.randn(N, H, 2, 5))
    with pytest.raises(ValueError, match=r"^a static cache is filled only once, and this one holds 2 positions$"):
        cache.append(torch.randn(N, H, 1, 3), torch.randn(N, H, 1, 5))
    assert cache.key is key and cache.value is value


def test_wrong_types_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^static must be True or False, got 'no'$"):
        KVCache(static="no")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^value must be a torch\.Tensor, got list$"):
        KVCache().append(torch.randn(N, H, 2, 3), [1.0])  # type: ignore[arg-type]


def test_a_decoder_cache_holds_both_caches() -> None:
    cache = DecoderCache()
    for part, length in ((cache.self_attention, T), (cache.cross_attention, S)):
        part.append(torch.randn(N, H, length, 3), torch.randn(N, H, length, 3))
    first = cache.cross_attention.key
    assert len(cache) == T and cache.cross_attention.complete and not cache.self_attention.complete
    cache.crop(2)
    assert len(cache) == 2 and len(cache.cross_attention) == S
    cache.select(torch.tensor([2, 2, 0, 1]))
    assert cache.self_attention.key.shape == (4, H, 2, 3)
    torch.testing.assert_close(cache.cross_attention.key, first[[2, 2, 0, 1]], rtol=0, atol=0)


def test_a_call_that_fails_late_does_not_change_the_cache():
    layer = AdaptiveSparseMultiheadAttention(E, H, batch_first=True, dtype=torch.bfloat16)
    cache = KVCache()
    cache.append(torch.randn(N, H, 3, E // H), torch.randn(N, H, 3, E // H))  # float32
    x = torch.randn(N, 1, E, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="one dtype"):
        layer(x, x, x, cache=cache)
    assert len(cache) == 3


@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 1, 9), (1, 4, 1, 8)])
def test_keys_or_values_that_do_not_continue_the_cache_raise_an_error(shape):
    cache = KVCache()
    cache.append(torch.randn(2, 4, 1, 8), torch.randn(2, 4, 1, 8))
    with pytest.raises(ValueError, match=r"key must be \(N, H, L, D\) to continue \(2, 4, 1, 8\)"):
        cache.append(torch.randn(shape), torch.randn(shape))
    with pytest.raises(ValueError, match="value must be"):
        cache.append(torch.randn(2, 4, 1, 8), torch.randn(2, 4, 2, 8))
    assert len(cache) == 1


def test_a_cache_refuses_arguments_of_a_wrong_type():
    with pytest.raises(TypeError, match="static must be True or False, got 'no'"):
        KVCache(static="no")
    for key, value in (([0.0], torch.randn(2, 4, 1, 8)), (torch.randn(2, 4, 1, 8), None)):
        with pytest.raises(TypeError, match=r"must be a torch\.Tensor"):
            KVCache().append(key, value)


@pytest.mark.parametrize(
    ("rows", "error"), [([0], TypeError), (torch.tensor([True]), TypeError), (torch.tensor([[0]]), ValueError)]
)
def test_rows_to_keep_are_checked(rows, error):
    cache = KVCache()
    with pytest.raises(error, match="rows must"):
        cache.select(rows)


@pytest.mark.parametrize("rows", [[0, N], [-1]])
def test_select_of_missing_rows_raises_an_error(rows: list[int]) -> None:
    cache = DecoderCache()
    for part in (cache.self_attention, cache.cross_attention):
        part.append(torch.randn(N, H, 2, 3), torch.randn(N, H, 2, 3))
    with pytest.raises(ValueError, match=rf"rows must be in \[0, {N}\), the rows of the cache, got {rows[-1]}"):
        cache.select(torch.tensor(rows))
    assert cache.self_attention.key.shape[0] == cache.cross_attention.key.shape[0] == N
