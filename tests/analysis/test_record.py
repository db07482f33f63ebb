"""The content of a record: statistics of every head over all passes, α and weights of the last pass."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from encoders import layer_of_four_heads
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_attn import KVCache, TopKMultiheadAttention, replace_attention
from sparse_attn.analysis import AttentionRecord, density, entropy, record_attention

N, L, S, E, H = 2, 5, 7, 12, 4


def weights_of(layer: nn.MultiheadAttention, *args: Any, **kwargs: Any) -> Tensor:
    weights = layer(*args, **kwargs, need_weights=True, average_attn_weights=False)[1]
    assert weights is not None
    return weights


def test_passes_of_different_sizes_are_summed_over_queries(assert_statistics: Callable[..., None]) -> None:
    layer = layer_of_four_heads(E)
    passes = []
    with record_attention(layer) as record:
        for batch, queries, keys in ((2, 5, 7), (3, 1, 11), (1, 13, 2)):
            query, key = 3 * torch.randn(batch, queries, E), torch.randn(batch, keys, E)
            layer(query, key, key, need_weights=False)
            with torch.no_grad():
                passes.append((query, key))
    heads = record[""]
    everywhere = torch.tensor(True)
    assert_statistics(heads, [(weights_of(layer, q, k, k), everywhere) for q, k in passes])
    assert heads.alpha is not None and heads.alpha.tolist() == [1.0, 1.25, 1.5, 2.0]
    assert heads.rows.tolist() == [2 * 5 + 3 + 13] * H
    assert heads.density[0] == 1.0 and heads.density[3] < 0.9
    assert heads.weights is None


def test_statistics_of_one_pass_equal_density_and_entropy_of_the_weights() -> None:
    layer = layer_of_four_heads(E)
    x = torch.randn(N, L, E)
    with record_attention(layer, weights=True) as record:
        layer(x, x, x)
    weights = record[""].weights
    assert weights is not None and not weights.requires_grad
    torch.testing.assert_close(weights, weights_of(layer, x, x, x))
    torch.testing.assert_close(record[""].density, density(weights))
    torch.testing.assert_close(record[""].entropy, entropy(weights).mean((0, 2)))


MASKS: dict[str, dict[str, Any]] = {
    "bool padding": {"key_padding_mask": torch.arange(L).expand(N, L) >= torch.tensor([[3], [5]])},
    "float padding": {
        "key_padding_mask": torch.zeros(N, L).masked_fill(torch.arange(L) >= torch.tensor([[3], [4]]), -math.inf)
    },
    "causal": {"attn_mask": torch.ones(L, L, dtype=torch.bool).triu(1)},
    "causal, float": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(L), "is_causal": True},
    "per head": {"attn_mask": torch.arange(L) > torch.arange(N * H)[:, None, None].expand(N * H, L, 1) % 3 + 1},
    "both": {
        "attn_mask": torch.ones(L, L, dtype=torch.bool).triu(1),
        "key_padding_mask": torch.arange(L).expand(N, L) >= torch.tensor([[2], [5]]),
    },
    "finite bias": {"attn_mask": torch.linspace(-2, 2, L * L).view(L, L)},
}


def visible_of(masks: dict[str, Any]) -> Tensor:
    visible = torch.ones(N, H, L, L, dtype=torch.bool)
    for name, shape in (("attn_mask", (-1, H, L, L)), ("key_padding_mask", (N, 1, 1, L))):
        if name in masks:
            mask = masks[name]
            shown = ~mask if mask.dtype == torch.bool else mask > -math.inf
            visible = visible & (shown if shown.shape == (L, L) else shown.view(shape))
    return visible


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kind", ["sparse", "torch's", "extra keys"])
def test_density_counts_only_pairs_that_the_masks_leave_visible(
    kind: str, masks: dict[str, Any], assert_statistics: Callable[..., None]
) -> None:
    layer: nn.MultiheadAttention = layer_of_four_heads(
        E, add_bias_kv=kind == "extra keys", add_zero_attn=kind == "extra keys"
    )
    if kind == "torch's":
        layer = nn.MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(N, L, E)
    with record_attention(layer) as record:
        layer(x, x, x, **masks)
    visible = visible_of(masks)
    if kind == "extra keys":
        visible = F.pad(visible, (0, 2), value=True)
    assert_statistics(record[""], [(weights_of(layer, x, x, x, **masks), visible)])
    assert record[""].density[0] == 1.0  # softmax


def test_is_causal_without_a_mask_hides_pairs_also_with_cached_keys() -> None:
    layer, cache = layer_of_four_heads(E, alpha_range=(0.5, 2.0)), KVCache()
    nn.init.constant_(layer.raw_alpha, 1.0)
    x = torch.randn(N, L, E)
    with record_attention(layer) as record:
        layer(x[:, :2], x[:, :2], x[:, :2], is_causal=True, cache=cache)
        layer(x[:, 2:], x[:, 2:], x[:, 2:], is_causal=True, cache=cache)
    assert record[""].density.tolist() == [1.0] * H
    assert record[""].support_size.tolist() == [(1 + 2 + 3 + 4 + 5) / 5] * H


def test_pairs_outside_a_window_are_not_visible() -> None:
    layer = layer_of_four_heads(E, alpha_range=(0.5, 2.0), window=(1, 0), num_kv_heads=2, add_bias_kv=True)
    nn.init.constant_(layer.raw_alpha, 1.0)
    x, cache = torch.randn(N, L, E), KVCache()
    with record_attention(layer) as record:
        layer(x, x, x)
        layer(x[:, :2], x[:, :2], x[:, :2], cache=cache)
        layer(x[:, 2:], x[:, 2:], x[:, 2:], cache=cache)
    assert record[""].density.tolist() == [1.0] * H
    # The key of add_bias_kv is always visible.
    assert record[""].support_size.tolist() == pytest.approx([1 + (1 + 4 * 2) / 5] * H)


def test_pairs_hidden_by_a_position_bias_are_not_visible() -> None:
    layer = layer_of_four_heads(E, alpha_range=(0.5, 2.0), add_bias_kv=True)
    nn.init.constant_(layer.raw_alpha, 1.0)
    x = torch.randn(N, L, E)
    bias = torch.randn(H, L, L).masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -math.inf)
    padding = torch.arange(L).expand(N, L) >= torch.tensor([[L], [3]])
    with record_attention(layer) as record:
        layer(x, x, x, position_bias=bias, key_padding_mask=padding)
        layer(x[1], x[1], x[1], position_bias=bias, key_padding_mask=padding[1])
    assert record[""].density.tolist() == [1.0] * H
    whole, padded = 1 + 2 + 3 + 4 + 5, 1 + 2 + 3 + 3 + 3
    assert record[""].support_size.tolist() == pytest.approx([1 + (whole + 2 * padded) / (3 * L)] * H)


@pytest.mark.parametrize("kind", ["sparse", "torch's"])
def test_queries_without_visible_keys_do_not_count(kind: str, assert_statistics: Callable[..., None]) -> None:
    layer = layer_of_four_heads(E) if kind == "sparse" else nn.MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(N, L, E)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[1] = True
    with record_attention(layer) as record:
        layer(x, x, x, key_padding_mask=padding)
    assert record[""].rows.tolist() == [L] * H
    assert_statistics(record[""], [(weights_of(layer, x[:1], x[:1], x[:1]), torch.tensor(True))])
    with record_attention(layer) as record:
        layer(x, x, x, key_padding_mask=torch.ones_like(padding))
    assert record[""].rows.tolist() == [0] * H and bool(record[""].density.isnan().all())


def test_statistics_of_unbatched_input(assert_statistics: Callable[..., None]) -> None:
    layer = layer_of_four_heads(E)
    query, key = torch.randn(L, E), torch.randn(S, E)
    mask = torch.rand(H, L, S) < 0.3
    mask[..., 0] = False
    with record_attention(layer, weights=True) as record:
        layer(query, key, key, attn_mask=mask, key_padding_mask=torch.arange(S) > 5)
    assert record[""].weights is not None and record[""].weights.shape == (H, L, S)
    weights = weights_of(layer, query, key, key, attn_mask=mask, key_padding_mask=torch.arange(S) > 5)
    assert_statistics(record[""], [(weights[None], ~mask[None] & (torch.arange(S) <= 5))])


@pytest.mark.parametrize("batch_first", [False, True])
def test_recorded_weights_are_batch_first_also_if_the_layer_is_not(batch_first: bool) -> None:
    layer = nn.MultiheadAttention(E, H, batch_first=batch_first)
    query, key = torch.randn(N, L, E), torch.randn(N, S, E)
    if not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    with record_attention(layer, weights=True) as record:
        layer(query, key, key, need_weights=False)
    assert record[""].weights is not None and record[""].weights.shape == (N, H, L, S)
    torch.testing.assert_close(record[""].weights, weights_of(layer, query, key, key))


def test_a_layer_called_twice_in_a_pass_counts_twice_under_its_first_name(
    assert_statistics: Callable[..., None],
) -> None:
    shared = layer_of_four_heads(E)
    model = nn.ModuleDict({"a": shared, "b": shared})
    x, y = torch.randn(N, L, E), torch.randn(N, 3, E)
    with record_attention(model) as record:
        model["a"](x, x, x)
        model["b"](y, x, x)
    assert list(record) == ["a"]
    passes = [(weights_of(shared, q, x, x), torch.tensor(True)) for q in (x, y)]
    assert_statistics(record["a"], passes)


def test_only_layers_that_were_called_are_in_the_record() -> None:
    model = nn.ModuleDict({"a": layer_of_four_heads(E), "b": layer_of_four_heads(E)})
    x = torch.randn(N, L, E)
    with record_attention(model) as record:
        assert len(record) == 0
        model["b"](x, x, x)
    assert list(record) == ["b"]
    with pytest.raises(KeyError):
        record["a"]


def test_recorded_alpha_is_the_alpha_of_the_last_pass() -> None:
    model = nn.ModuleDict(
        {
            "own": layer_of_four_heads(E),
            "torch's": nn.MultiheadAttention(E, H),
            "top": TopKMultiheadAttention(E, H, k=2),
        }
    )
    x = torch.randn(N, L, E)
    with record_attention(model) as record:
        for layer in model.values():
            layer(x, x, x)
        nn.init.constant_(model["own"].raw_alpha, 1.75)
        model["own"](x, x, x)
        nn.init.constant_(model["own"].raw_alpha, 1.5)
    assert record["own"].alpha is not None and record["own"].alpha.tolist() == [1.75] * H
    assert record["torch's"].alpha is None and record["top"].alpha is None
    assert record["top"].support_size.tolist() == [2.0] * H


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_summed_in_float32_or_wider(dtype: torch.dtype) -> None:
    layer = nn.MultiheadAttention(E, H, dtype=dtype)
    with torch.no_grad():
        layer.in_proj_weight.zero_()
        layer.in_proj_bias.zero_()
    x = torch.randn(101, 3, E, dtype=dtype)
    with record_attention(layer) as record:
        layer(x, x, x)
    tolerance = 1e-6 if dtype == torch.float64 else 5e-3  # the rounding error of a weight
    torch.testing.assert_close(record[""].entropy, torch.full((H,), math.log(101)), rtol=tolerance, atol=0)
    assert record[""].support_size.tolist() == [101.0] * H


def test_passes_in_inference_mode_under_autocast_and_in_training_are_added_up() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 17, batch_first=True), 2).eval()
    replace_attention(model, alpha_init=2.0)
    x = torch.randn(N, L, E)
    with record_attention(model) as record:
        with torch.inference_mode():
            model(x)
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        model.train()(x).sum().backward()
    for heads in record.values():
        assert heads.rows.sum() == 3 * N * L * H  # at dropout 0.1 no query has lost all its weights
        assert not heads.density.is_inference()


def test_a_record_keeps_the_weights_of_one_pass_or_none() -> None:
    def large() -> int:
        gc.collect()
        return sum(type(t) is Tensor and t.numel() >= N * 61 * 61 for t in gc.get_objects())

    layer = layer_of_four_heads(E)
    x = torch.randn(N, 61, E)
    before = large()  # memory that other tests still use
    for keep, expected in ((False, 0), (True, 1)):
        with record_attention(layer, weights=keep) as record:
            for _ in range(3):
                layer(x, x, x)
            assert large() - before == expected, record


def test_a_record_prints_as_a_table() -> None:
    model = nn.ModuleDict({"first": layer_of_four_heads(E), "second": nn.MultiheadAttention(E, H)})
    x = torch.randn(N, L, E)
    with record_attention(model) as record:
        model["first"](x, x, x)
        model["second"](x, x, x)
    head, *lines = str(record).splitlines()
    assert head.split() == ["layer", "head", "alpha", "density", "entropy", "support", "max", "rows"]
    assert [line.split()[:3] for line in lines] == [
        *(["first", str(i), f"{a:.3f}"] for i, a in enumerate((1.0, 1.25, 1.5, 2.0))),
        *(["second", str(i), "-"] for i in range(H)),
    ]
    assert {len(line) for line in lines} == {len(head)}
    assert lines[3].split()[3:] == [
        f"{float(getattr(record['first'], name)[3]):{form}}"
        for name, form in (
            ("density", ".3f"),
            ("entropy", ".3f"),
            ("support_size", ".2f"),
            ("max_weight", ".2f"),
            ("rows", ".0f"),
        )
    ]


def test_calls_inside_a_transform_are_left_out() -> None:
    layer, x = layer_of_four_heads(E), torch.randn(N, 3, L, E)
    with record_attention(layer) as record:
        with pytest.warns(UserWarning, match="a call of '' is not recorded: RuntimeError: inside a transform of torch"):
            torch.func.vmap(lambda x: layer(x, x, x)[0])(x)
        layer(x[0], x[0], x[0])
    assert record[""].rows.tolist() == [3 * L] * H


def test_a_call_without_keys_has_no_rows() -> None:
    record = AttentionRecord()
    record.add("cross", torch.zeros(2, 3, 5, 0))
    assert record["cross"].rows.tolist() == [0, 0, 0]
    record.add("cross", torch.full((2, 3, 5, 4), 0.25))
    assert record["cross"].rows.tolist() == [10, 10, 10] and record["cross"].max_weight.tolist() == [0.25] * 3
