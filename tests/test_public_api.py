"""The public names of `sparse_attn`, `nn` and `ops`, and the promised signatures.

A change of these, also an extension, needs a change of this test.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from inspect import Parameter, signature
from types import ModuleType
from typing import Any

import pytest
from torch import nn

import sparse_attn
import sparse_attn.nn
import sparse_attn.ops

NN = [
    *("AdaptiveSparseMultiheadAttention", "KVCache", "SparseAttention", "TopKMultiheadAttention", "alpha_per_head"),
    *("BudgetSparsemax", "Entmax", "Entmax15", "Normmax", "SparseSoftmax", "Sparsemax", "TopkSoftmax"),
    *("Entmax15Loss", "EntmaxLoss", "SparsemaxLoss"),
    *("ALiBi", "NAPE", "Positions", "RotaryPositions", "LengthScaling"),
    *("DecoderCache", "TransformerDecoderLayer", "TransformerEncoderLayer"),
]
OPS = [
    *("budget_sparsemax", "entmax", "entmax15", "normmax", "sparse_softmax", "sparsemax", "topk_softmax"),
    *("entmax15_loss", "entmax_loss", "sparsemax_loss"),
    *("entmax_attention", "entmax_attention_varlen", "topk_attention", "support_size", "tau"),
]
OTHERS = ["backends", "calibrate", "record_attention", "replace_attention", "restore_attention", "use_backend"]


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (sparse_attn, [*NN, *OPS, *OTHERS]),
        (sparse_attn.nn, [*NN, "SparseMultiheadAttention"]),
        (sparse_attn.ops, OPS),
    ],
    ids=["sparse_attn", "sparse_attn.nn", "sparse_attn.ops"],
)
def test_public_names(module: ModuleType, names: list[str]) -> None:
    assert sorted(module.__all__) == sorted(names)
    for name in names:
        assert getattr(sparse_attn, name, getattr(module, name)) is getattr(module, name)
        assert inspect.getdoc(getattr(module, name))


def test_the_version_has_three_parts() -> None:
    assert sparse_attn.__version__.count(".") == 2


def arguments(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    """Name, kind and default of every parameter but `self`."""
    parameters = signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in parameters if p.name != "self"]


class Contract:
    """Each method has the signature that is promised for the public name."""

    def sparsemax(self, x, dim=-1): ...
    def entmax15(self, x, dim=-1): ...
    def entmax(self, x, alpha=1.5, dim=-1): ...
    def normmax(self, x, alpha=2.0, dim=-1): ...
    def budget_sparsemax(self, x, budget=2.0, dim=-1): ...
    def topk_softmax(self, x, k, dim=-1): ...
    def sparse_softmax(self, x, k=3, dim=-1): ...
    def entmax_attention(
        self,
        query,
        key,
        value,
        alpha=1.5,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        *,
        scale=None,
        enable_gqa=False,
        softcap=None,
        sinks=None,
    ): ...
    def entmax_attention_varlen(
        self,
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        alpha=1.5,
        *,
        is_causal=False,
        scale=None,
        dropout_p=0.0,
        enable_gqa=False,
        softcap=None,
        sinks=None,
    ): ...
    def topk_attention(
        self,
        query,
        key,
        value,
        k,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        *,
        scale=None,
        enable_gqa=False,
        normalizer="softmax",
        softcap=None,
        sinks=None,
    ): ...
    def SparseAttention(
        self, k=None, *, alpha=None, scale=None, dropout=0.0, learn_alpha=False, alpha_range=(1.0, 2.0)
    ): ...
    def alpha_per_head(self, model): ...
    def KVCache(self, *, static=False): ...
    def DecoderCache(self): ...
    def RotaryPositions(self, head_dim, *, base=10000.0): ...
    def ALiBi(self, num_heads): ...
    def NAPE(self, num_heads): ...
    def LengthScaling(self, embed_dim, num_heads, unscaled_heads=0, device=None, dtype=None): ...
    def replace_attention(
        self, model, layer=sparse_attn.AdaptiveSparseMultiheadAttention, *, filter_fn=None, **layer_kwargs
    ): ...


@pytest.mark.parametrize("name", [name for name in vars(Contract) if not name.startswith("_")])
def test_signature(name: str) -> None:
    assert arguments(getattr(sparse_attn, name)) == arguments(getattr(Contract, name))


@pytest.mark.parametrize(
    ("layer", "own"),
    [
        (
            sparse_attn.AdaptiveSparseMultiheadAttention,
            {"alpha_init": 1.5, "alpha_range": (1.0, 2.0), "learn_alpha": True},
        ),
        (sparse_attn.TopKMultiheadAttention, {"k": Parameter.empty, "normalizer": "softmax"}),
    ],
)
def test_layers_take_torchs_arguments_in_torchs_order_and_their_own_by_name(
    layer: type[nn.MultiheadAttention], own: dict[str, Any]
) -> None:
    assert issubclass(layer, nn.MultiheadAttention)
    shared = {"num_kv_heads": None, "window": None, "qk_norm": False, "positions": None, "length_scaling": False}
    keywords = [(name, Parameter.KEYWORD_ONLY, default) for name, default in (own | shared).items()]
    assert arguments(layer.__init__) == arguments(nn.MultiheadAttention.__init__) + keywords
    tensors = [(name, Parameter.KEYWORD_ONLY, None) for name in ("cache", "rotary", "position_bias")]
    assert arguments(layer.forward) == arguments(nn.MultiheadAttention.forward) + tensors


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_our_transformer_layers_take_torchs_arguments_by_name(name: str) -> None:
    ours, torchs = getattr(sparse_attn, name), getattr(nn, name)
    assert {argument for argument, _, _ in arguments(torchs.__init__)} <= {name for name, _, _ in arguments(ours)}
    assert [argument for argument, kind, _ in arguments(ours) if kind is Parameter.POSITIONAL_OR_KEYWORD] == [
        *("d_model", "nhead")  # some other arguments have other defaults than in torch
    ]
    tensors = [(name, Parameter.KEYWORD_ONLY, None) for name in ("cache", "rotary", "position_bias")]
    assert arguments(ours.forward) == arguments(torchs.forward) + tensors


def test_forward_of_sparse_attention() -> None:
    def forward(query, key, value, attn_mask=None, is_causal=False): ...

    assert arguments(sparse_attn.SparseAttention.forward) == arguments(forward)


def test_the_adaptive_layer_has_the_property_alpha_and_the_top_k_layer_has_not() -> None:
    assert isinstance(vars(sparse_attn.AdaptiveSparseMultiheadAttention)["alpha"], property)
    assert not hasattr(sparse_attn.TopKMultiheadAttention(6, 3, k=2), "alpha")
