"""Decoding step by step with a cache, with grouped heads, windows, norms, positions and scaling."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from blocks import ALONE, MAKE_POSITIONS, TOGETHER, D, E, H, N, S, T, layer_of, short
from torch import Tensor

from sparse_attn import (
    AdaptiveSparseMultiheadAttention,
    KVCache,
    RotaryPositions,
    TopKMultiheadAttention,
)
from sparse_attn.nn import SparseMultiheadAttention

OPTIONS = [
    {"num_kv_heads": heads, "window": window, "qk_norm": norm, "positions": positions, "length_scaling": scaling}
    for heads, window, norm, positions, scaling in product(
        (H, 3, 1), (None, (2, 0)), (False, True), MAKE_POSITIONS, (False, True)
    )
]


def steps(layer: SparseMultiheadAttention, x: Tensor, sizes: list[int], padding: Tensor | None) -> tuple[Tensor, Any]:
    """The output of the causal pass over (N, T, E) in blocks of the given sizes, and the cache."""
    cache, outputs = KVCache(), []
    for block in x.split(sizes, 1):
        seen = None if padding is None else padding[:, : len(cache) + block.shape[1]]
        masks = {"key_padding_mask": seen, "is_causal": True}
        outputs.append(layer(block, block, block, need_weights=len(outputs) % 2 == 0, cache=cache, **masks)[0])
    return torch.cat(outputs, 1), cache


@pytest.mark.parametrize("sizes", [[1] * T, [4, 1, 2]], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=short)
def test_step_by_step_decoding_equals_the_full_pass(options: dict[str, Any], sizes: list[int]) -> None:
    x = torch.randn(N, T, E, dtype=torch.float64)
    left_padding = torch.zeros(N, T, dtype=torch.bool)
    left_padding[1, :2] = True
    for kind, padding in ((AdaptiveSparseMultiheadAttention, left_padding), (TopKMultiheadAttention, None)):
        layer = layer_of(options, kind)
        full = layer(x, x, x, key_padding_mask=padding, is_causal=True)[0]
        output, cache = steps(layer, x, sizes, padding)
        torch.testing.assert_close(output, full, rtol=1e-9, atol=1e-11)
        assert cache.key.shape == cache.value.shape == (N, options["num_kv_heads"], T, D)


@pytest.mark.parametrize("options", [*ALONE, {**TOGETHER, "window": (2, 0)}], ids=short)
def test_cache_rows_are_reordered_and_steps_undone(options: dict[str, Any]) -> None:
    layer = layer_of(options)
    x = torch.randn(N, T, E, dtype=torch.float64)
    rows = torch.tensor([1, 0, 1])
    new = torch.randn(3, T - 4, E, dtype=torch.float64)
    reordered = torch.cat([x[rows, :4], new], 1)
    expected = layer(reordered, reordered, reordered, is_causal=True)[0][:, 4:]
    _, cache = steps(layer, x, [T], None)
    cache.crop(4)
    cache.select(rows)
    guess = torch.randn_like(new)
    layer(guess, guess, guess, is_causal=True, cache=cache)
    cache.crop(4)
    outputs = [layer(step, step, step, is_causal=True, cache=cache)[0] for step in new.split(1, 1)]
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "options", [{"num_kv_heads": 2}, {"qk_norm": True}, {"num_kv_heads": 3, "qk_norm": True, "length_scaling": True}]
)
def test_steps_with_a_static_cache_equal_the_full_pass(options: dict[str, Any]) -> None:
    layer = layer_of(options)
    x, memory = torch.randn(N, T, E, dtype=torch.float64), torch.randn(N, S, E, dtype=torch.float64)
    cache = KVCache(static=True)
    outputs = [layer(step, memory, memory, cache=cache)[0] for step in x.split([1, 2, 4], 1)]
    torch.testing.assert_close(torch.cat(outputs, 1), layer(x, memory, memory)[0], rtol=1e-9, atol=1e-11)
    assert cache.key.shape == (N, options.get("num_kv_heads", H), S, D)


@pytest.mark.parametrize(
    ("options", "kwargs", "name"),
    [
        ({"positions": "rotary"}, {}, "positions"),
        ({"positions": "alibi"}, {}, "positions"),
        ({"window": 3}, {}, "window"),
        ({}, {"rotary": (torch.ones(1, D // 2), torch.zeros(1, D // 2))}, "rotary"),
    ],
)
def test_arguments_that_need_query_positions_are_refused_with_a_static_cache(
    options: dict[str, Any], kwargs: dict[str, Any], name: str
) -> None:
    x, cache = torch.randn(N, 1, E, dtype=torch.float64), KVCache(static=True)
    with pytest.raises(ValueError, match=f"{name} must be None with a static cache"):
        layer_of(options)(x, x, x, cache=cache, **kwargs)
    assert len(cache) == 0


def test_rotary_and_bias_tensors_by_steps_equal_the_full_pass() -> None:
    layer = layer_of({"num_kv_heads": 2})
    x = torch.randn(N, T, E, dtype=torch.float64)
    cos, sin = RotaryPositions(D).rotary(torch.arange(T, dtype=torch.float64))
    bias = torch.randn(H, T, T, dtype=torch.float64)
    full = layer(x, x, x, is_causal=True, rotary=(cos, sin), position_bias=bias)[0]
    cache, outputs = KVCache(), []
    for start, end in ((0, 3), (3, 4), (4, 7)):
        block, at = x[:, start:end], slice(start, end)
        given = {"rotary": (cos[at], sin[at]), "position_bias": bias[:, at, :end]}
        outputs.append(layer(block, block, block, is_causal=True, cache=cache, **given)[0])
    torch.testing.assert_close(torch.cat(outputs, 1), full, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_each_step_compiles_into_one_graph() -> None:
    layer = layer_of({**TOGETHER, "window": (3, 0)})
    x = torch.randn(N, T, E, dtype=torch.float64)

    def step(x: Tensor, cache: KVCache) -> Tensor:
        return layer(x, x, x, is_causal=True, cache=cache)[0]

    torch._dynamo.reset()
    compiled, cache = torch.compile(step, fullgraph=True, backend="aot_eager"), KVCache()
    with torch.no_grad():
        output = torch.cat([compiled(block, cache) for block in x.split([6, 1], 1)], 1)
        torch.testing.assert_close(output, layer(x, x, x, is_causal=True)[0], rtol=1e-9, atol=1e-11)


def test_a_cache_with_another_number_of_heads_is_refused_and_not_changed() -> None:
    cache, x = KVCache(), torch.randn(N, 1, E, dtype=torch.float64)
    layer_of({"num_kv_heads": 3})(x, x, x, cache=cache)
    with pytest.raises(ValueError, match=r"\(N, H, D\) = \(2, 2, 10\), got \(2, 3, 10\); give each layer its own"):
        layer_of({"num_kv_heads": 2})(x, x, x, cache=cache)
    assert cache.key.shape == (N, 3, 1, D)
