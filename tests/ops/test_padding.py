"""Padding takes no part in the computation: NaN or infinity in padding changes neither an output nor a gradient."""

from __future__ import annotations

import math

import pytest
import torch
from padding import ALPHAS, assert_padding_is_ignored

from sparse_attn import backends, entmax_attention, topk_attention, use_backend
from sparse_attn.ops.attention import attend, entmax_mapping

CPU = torch.device("cpu")


@pytest.fixture(params=["torch", "compiled"], autouse=True)
def backend(request):
    if backends()[request.param].startswith("not available"):
        pytest.skip(backends()[request.param])
    with use_backend(request.param):
        yield


@pytest.mark.parametrize("alpha", [1.0, 1.5, ALPHAS])
@pytest.mark.parametrize("sizes", [(7, 31), (521, 509)])
def test_nan_in_padding_changes_nothing(alpha, sizes):
    assert_padding_is_ignored(lambda q, k, v, mask: entmax_attention(q, k, v, alpha, mask), *sizes, CPU)


def test_infinity_in_padding_with_grouped_heads_changes_nothing():
    def grouped(q, k, v, mask):
        return entmax_attention(q, k, v, 1.3, mask, enable_gqa=True)

    assert_padding_is_ignored(grouped, 7, 31, CPU, heads=6, groups=3, fill=math.inf)


def test_nan_in_padding_changes_neither_top_k_nor_a_call_that_also_returns_weights():
    assert_padding_is_ignored(lambda q, k, v, mask: topk_attention(q, k, v, 5, mask), 7, 31, CPU)
    assert_padding_is_ignored(lambda q, k, v, mask: attend(q, k, v, entmax_mapping(1.5, 3), mask)[0], 7, 31, CPU)


def test_a_mask_of_one_dimension_and_one_for_each_head():
    query, key, value = (torch.randn(2, 5, n, 11) for n in (3, 7, 7))
    seen = torch.arange(7) < 4
    expected = entmax_attention(query, key[..., :4, :], value[..., :4, :])
    key[..., 4:, :] = value[..., 4:, :] = math.nan
    torch.testing.assert_close(entmax_attention(query, key, value, attn_mask=seen), expected)
    masked = entmax_attention(query, key, value, attn_mask=seen.expand(5, 1, 7))
    torch.testing.assert_close(masked, expected)
