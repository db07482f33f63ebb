"""Attention in C in every variant that this processor has; products of pairs of bfloat16 equal those in float32."""

from __future__ import annotations

import pytest
import torch
from c_rows import needs_library
from native_attention import SPECIAL_NUMBERS, compare, compare_special_numbers, force, run, tensors

from sparse_attn import entmax_attention
from sparse_attn.kernels.cpu import rows

pytestmark = needs_library


@pytest.mark.parametrize("variant", rows.variants())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 1), (16, 16), (33, 40), (64, 128), (256, 3)])
def test_every_variant_at_several_head_sizes(sizes, dtype, variant, monkeypatch):
    force(variant, monkeypatch)
    alpha = torch.tensor([1.0, 1.1, 1.4, 1.5, 1.7, 2.0], dtype=torch.float64)
    inputs = [*tensors(dtype, 71, 73, heads=6, kv_heads=2, sizes=sizes), alpha]
    compare(lambda q, k, v, a: entmax_attention(q, k, v, a, enable_gqa=True, is_causal=True), inputs, monkeypatch)
    compare(lambda q, k, v, a: entmax_attention(q, k, v, a, enable_gqa=True, scale=0.3), inputs, monkeypatch)


NEEDS_PAIRS = pytest.mark.skipif("avx512_bf16" not in rows.variants(), reason="no AVX512-BF16")

PLACEMENTS = {  # how numbers lie in memory; only "whole" is read in place
    "whole": lambda *shape: torch.empty(*shape, 64, dtype=torch.bfloat16),
    "odd size": lambda *shape: torch.empty(*shape, 61, dtype=torch.bfloat16),
    "odd start": lambda *shape: torch.empty(*shape, 128, dtype=torch.bfloat16)[..., 1:65],
    "odd rows": lambda *shape: torch.empty(*shape, 65, dtype=torch.bfloat16)[..., :64],
    "every second": lambda *shape: torch.empty(*shape, 128, dtype=torch.bfloat16)[..., ::2],
}


@NEEDS_PAIRS
@pytest.mark.parametrize(("queries", "keys"), [(1, 37), (4, 300), (61, 67), (53, 401)])
@pytest.mark.parametrize("placement", list(PLACEMENTS))
def test_pairs_of_bfloat16_equal_widening_to_float32(placement, queries, keys, monkeypatch):
    inputs = [PLACEMENTS[placement](2, 3, n).normal_().requires_grad_() for n in (queries, keys, keys)]
    results = []
    for variant in ("avx512", "avx512_bf16"):
        with monkeypatch.context() as patch:
            force(variant, patch)
            results.append(run(lambda *qkv: entmax_attention(*qkv, is_causal=True, scale=0.3), inputs))
    for widened, paired in zip(*results, strict=True):
        # Sums in another order may differ in the last digit of bfloat16.
        torch.testing.assert_close(paired, widened, rtol=2**-7, atol=1e-3)
        assert (paired == widened).float().mean() > 0.97


@NEEDS_PAIRS
@pytest.mark.parametrize("keys", [37, 401])
@pytest.mark.parametrize("place", ["query", "key", "both"])
@pytest.mark.parametrize("number", SPECIAL_NUMBERS)
def test_pairs_of_bfloat16_with_special_numbers(number, place, keys, monkeypatch):
    compare_special_numbers(number, place, keys, ("avx512", "avx512_bf16"), monkeypatch)
