"""Attention to the k keys with the largest scores: the kept keys, their weights, and rows with fewer keys."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_attn import TopKMultiheadAttention

N, L, S, H, D = 2, 5, 7, 3, 11
E = H * D


def layer_of(**kwargs: Any) -> TopKMultiheadAttention:
    return TopKMultiheadAttention(E, H, **{"batch_first": True, "dtype": torch.float64, **kwargs})


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(N, L, E, dtype=torch.float64), torch.randn(N, S, E, dtype=torch.float64)


def row_weights(scores: list[float], k: int, normalizer: str) -> list[float]:
    """The weights of one query, with Python's sort: softmax or sparsemax of the k largest scores."""
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
    kept = [scores[i] for i in best]
    if normalizer == "softmax":
        powers = [math.exp(score - kept[0]) for score in kept]
        weights = [power / sum(powers) for power in powers]
    else:
        support = max(r for r in range(1, k + 1) if 1 + r * kept[r - 1] > sum(kept[:r]))
        threshold = (sum(kept[:support]) - 1) / support
        weights = [max(score - threshold, 0.0) for score in kept]
    row = [0.0] * len(scores)
    for index, weight in zip(best, weights, strict=True):
        row[index] = weight
    return row


@pytest.mark.parametrize("normalizer", ["softmax", "sparsemax"])
@pytest.mark.parametrize("k", [1, 2, 5, S])
def test_weights_and_output_equal_the_formula(k: int, normalizer: str) -> None:
    layer = layer_of(k=k, normalizer=normalizer)
    query, memory = inputs()
    output, weights = layer(query, memory, memory, average_attn_weights=False)
    wq, wk, wv = (w.detach().view(H, D, E) for w in layer.in_proj_weight.chunk(3))
    q, keys, v = (
        torch.einsum("nle,hde->nhld", x, w) for x, w in ((query, wq), (memory, wk), (memory, wv))
    )  # the initial biases are zero
    scores = q @ keys.transpose(-2, -1) / math.sqrt(D)
    rows = [row_weights(row, k, normalizer) for row in scores.view(-1, S).tolist()]
    expected = torch.tensor(rows, dtype=torch.float64).view(N, H, L, S)
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12)
    merged = (expected @ v).transpose(1, 2).reshape(N, L, E)
    torch.testing.assert_close(output, merged @ layer.out_proj.weight.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k", [S, S + 1, 100])
def test_k_of_at_least_all_keys_equals_dense_attention(k: int) -> None:
    layer, dense = layer_of(k=k), nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    dense.load_state_dict(layer.state_dict())
    query, memory = inputs()
    actual, expected = layer(query, memory, memory), dense(query, memory, memory)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_a_query_keeps_k_keys_or_all_that_it_sees() -> None:
    layer = layer_of(k=3)
    x, _ = inputs()
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[1, 2:] = True
    weights = layer(x, x, x, key_padding_mask=padding, is_causal=True, average_attn_weights=False)[1]
    kept = (weights > 0).sum(-1)
    assert kept[0].tolist() == [[1, 2, 3, 3, 3]] * H
    assert kept[1].tolist() == [[1, 2, 2, 2, 2]] * H
    torch.testing.assert_close(weights.sum(-1), torch.ones(N, H, L).double())


def test_ties_go_to_the_first_keys_so_that_k_keys_are_kept() -> None:
    layer = layer_of(k=2)
    query, memory = inputs()
    memory = torch.zeros_like(memory)  # the projection of equal, non-zero keys could differ in the last bits
    weights = layer(query, memory, memory, average_attn_weights=False)[1]
    expected = torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0], dtype=torch.float64).expand(N, H, L, S)
    torch.testing.assert_close(weights, expected)


def test_extra_keys_count_among_the_k_largest() -> None:
    layer = layer_of(k=1, add_bias_kv=True, add_zero_attn=True)
    query, memory = inputs()
    nn.init.constant_(layer.bias_k, 0.0)
    far = torch.full((L, S), -1e3, dtype=torch.float64)
    weights = layer(query, memory, memory, attn_mask=far, average_attn_weights=False)[1]
    assert weights.shape == (N, H, L, S + 2)
    assert weights[..., S].unique().tolist() == [1.0]  # the zero key has the same score, but comes later


@pytest.mark.parametrize("normalizer", ["softmax", "sparsemax"])
def test_gradients_equal_finite_differences(normalizer: str) -> None:
    layer = layer_of(k=3, normalizer=normalizer)
    query, memory = inputs()

    def run(query: Tensor, memory: Tensor, in_proj_weight: Tensor) -> Tensor:
        parameters = {"in_proj_weight": in_proj_weight}
        return torch.func.functional_call(layer, parameters, (query, memory, memory))[0]

    leaves = (query.requires_grad_(), memory.requires_grad_(), layer.in_proj_weight)
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_bfloat16_forward_and_backward() -> None:
    layer = layer_of(k=3, dtype=torch.bfloat16)
    x = torch.randn(N, S, E, dtype=torch.bfloat16)
    output, weights = layer(x, x, x)
    assert (output.dtype, weights.dtype) == (torch.bfloat16, torch.bfloat16)
    output.float().square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())


def test_the_state_dict_has_torchs_names_and_shapes() -> None:
    dense = nn.MultiheadAttention(E, H, batch_first=True)
    layer = layer_of(k=3, dtype=torch.float32)
    assert list(layer.state_dict()) == list(dense.state_dict())
    layer.load_state_dict(dense.state_dict(), strict=True)


def test_copies_keep_k_and_the_normalizer() -> None:
    layer = layer_of(k=3, normalizer="sparsemax")
    query, memory = inputs()
    expected = layer(query, memory, memory)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(query, memory, memory), expected, rtol=0, atol=0)
    assert "k=3, normalizer='sparsemax'" in repr(layer)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": -3}, ValueError, "k must be at least 1, got -3"),
        ({"k": 2.0}, TypeError, "k must be an int, got float"),
        ({"k": True}, TypeError, "k must be an int, got bool"),
        ({"k": 2, "normalizer": "max"}, ValueError, "normalizer must be one of softmax, sparsemax, got 'max'"),
    ],
)
def test_an_invalid_argument_raises_an_error(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layer_of(**kwargs)


def test_k_must_be_given_by_name() -> None:
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'k'"):
        TopKMultiheadAttention(E, H)  # type: ignore[call-arg]
