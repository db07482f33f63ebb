"""Keys and values with fewer heads than queries: the parameters, and the equivalent layer without grouping."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_attn import AdaptiveSparseMultiheadAttention, TopKMultiheadAttention, entmax

N, T, S, H, D = 2, 7, 5, 6, 10
E = H * D


def grouped_layer(num_kv_heads: int, **kwargs: Any) -> AdaptiveSparseMultiheadAttention:
    options = {"batch_first": True, "dtype": torch.float64, **kwargs}
    layer = AdaptiveSparseMultiheadAttention(E, H, num_kv_heads=num_kv_heads, **options)
    for name, parameter in layer.named_parameters():
        if name != "raw_alpha":  # biases of zero would hide errors
            nn.init.normal_(parameter, std=0.2)
    return layer


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 13, "vdim": 17}], ids=str)
def test_grouped_heads_equal_heads_with_repeated_keys_and_values(kv_heads: int, extra: dict[str, Any]) -> None:
    grouped = grouped_layer(kv_heads, **extra)
    full = AdaptiveSparseMultiheadAttention(E, H, batch_first=True, dtype=torch.float64, **extra)

    def repeated(rows: Tensor, dim: int = 0) -> Tensor:
        heads = rows.movedim(dim, 0).unflatten(0, (kv_heads, D)).repeat_interleave(H // kv_heads, 0)
        return heads.flatten(0, 1).movedim(0, dim)

    state = grouped.state_dict()
    k, v = repeated(state.pop("k_proj_weight")), repeated(state.pop("v_proj_weight"))
    b_q, b_k, b_v = state["in_proj_bias"].split([E, kv_heads * D, kv_heads * D])
    state["in_proj_bias"] = torch.cat([b_q, repeated(b_k), repeated(b_v)])
    if extra.get("add_bias_kv"):
        state |= {name: repeated(state[name], 2) for name in ("bias_k", "bias_v")}
    if "kdim" in extra:
        state |= {"k_proj_weight": k, "v_proj_weight": v}
    else:
        state["in_proj_weight"] = torch.cat([state.pop("q_proj_weight"), k, v])
    full.load_state_dict(state)
    query = torch.randn(N, T, E, dtype=torch.float64)
    key, value = (torch.randn(N, S, extra.get(size, E), dtype=torch.float64) for size in ("kdim", "vdim"))
    torch.testing.assert_close(grouped(query, key, value), full(query, key, value), rtol=1e-12, atol=1e-12)


def test_shapes_and_names_of_grouped_parameters() -> None:
    layer = AdaptiveSparseMultiheadAttention(
        E, H, num_kv_heads=2, add_bias_kv=True, kdim=13, qk_norm=True, learn_alpha=False
    )
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "in_proj_bias": (E + 4 * D,),
        "q_proj_weight": (E, E),
        "k_proj_weight": (2 * D, 13),
        "v_proj_weight": (2 * D, E),
        "bias_k": (1, 1, 2 * D),
        "bias_v": (1, 1, 2 * D),
        "out_proj.weight": (E, E),
        "out_proj.bias": (E,),
        "q_norm.weight": (D,),
        "k_norm.weight": (D,),
    }
    assert all(bool(value.isfinite().all()) for value in layer.state_dict().values())
    assert layer.in_proj_bias.eq(0).all() and not layer.k_proj_weight.eq(0).any()
    as_many = AdaptiveSparseMultiheadAttention(E, H, num_kv_heads=H)
    assert list(as_many.state_dict()) == list(AdaptiveSparseMultiheadAttention(E, H).state_dict())
    assert list(dict(TopKMultiheadAttention(E, H, bias=False, num_kv_heads=3, k=2).named_parameters())) == [
        *("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
    ]
    on_meta = AdaptiveSparseMultiheadAttention(E, H, num_kv_heads=2, qk_norm=True, length_scaling=True, device="meta")
    assert all(parameter.is_meta for name, parameter in on_meta.named_parameters() if name != "raw_alpha")


def test_a_grouped_layer_has_one_alpha_per_query_head() -> None:
    alphas = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
    layer = grouped_layer(2, alpha_init=alphas, bias=False)
    x = torch.randn(N, T, E, dtype=torch.float64)
    q = (x @ layer.q_proj_weight.T).view(N, T, H, D).transpose(1, 2)
    k = (x @ layer.k_proj_weight.T).view(N, T, 2, D).transpose(1, 2)
    weights = layer(x, x, x, average_attn_weights=False)[1]
    for head, alpha in enumerate(alphas):
        expected = entmax(q[:, head] @ k[:, head // 3].transpose(-2, -1) / math.sqrt(D), alpha)
        torch.testing.assert_close(weights[:, head], expected, rtol=1e-9, atol=1e-12)
