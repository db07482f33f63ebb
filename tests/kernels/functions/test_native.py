"""Attention in C equals attention with one matrix of scores in float64, including gradients."""

from __future__ import annotations

import math

import pytest
import torch
from c_rows import needs_library
from native_attention import BOUNDS, compare, run, tensors
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

import sparse_attn.kernels.choose_attention as choose
from sparse_attn import entmax_attention, topk_attention, use_backend
from sparse_attn.kernels.cpu import attention
from sparse_attn.kernels.functions import native
from sparse_attn.kernels.setting import Setting

pytestmark = needs_library


def plain_attention(*qkv: Tensor, setting: Setting, seed: Tensor | None = None) -> Tensor:
    return native.plain_attention(native.Tensors(*qkv, None, None, seed, None, None), setting)


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list with an entry for each call of attention in C. This fixture lets small calls with dropout use C, too."""
    calls: list[int] = []
    forward = attention.forward
    monkeypatch.setattr(choose, "_LARGE", 1)
    monkeypatch.setattr(attention, "forward", lambda *args, **options: calls.append(1) or forward(*args, **options))
    return calls


def masks(queries: int, keys: int) -> dict[str, Tensor | None]:
    lengths = torch.tensor([keys, keys // 2 + 1]).view(2, 1, 1, 1)
    holes = torch.rand(2, 1, 1, keys) > 0.3
    return {
        "none": None,
        "causal": None,
        "padding": torch.arange(keys) < lengths,
        "padding in front": torch.arange(keys) >= keys - lengths,
        "holes": holes,
        "boolean": torch.rand(2, 1, queries, keys) > 0.3,
        "one for each query": torch.rand(3, queries, 1) > 0.2,
        "float": torch.randn(queries, keys, dtype=torch.float64),
        "float for each key": torch.randn(keys, dtype=torch.float64),
    }


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize(("queries", "keys"), [(61, 67), (67, 13), (1, 1), (3, 131), (29, 331)])
@pytest.mark.parametrize("mask", list(masks(2, 2)))
@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0, "per head", "top-k"])
def test_native_attention_equals_one_matrix(alpha, mask, queries, keys, dtype, monkeypatch):
    inputs = tensors(dtype, queries, keys)
    attn_mask = masks(queries, keys)[mask]
    if attn_mask is not None and attn_mask.is_floating_point():
        inputs.append(attn_mask.to(dtype))
    if alpha == "per head":
        inputs.append(torch.tensor([1.0, 1.3, 2.0], dtype=torch.float64))

    def attend(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> Tensor:
        options: dict = {"is_causal": mask == "causal", "attn_mask": attn_mask}
        if attn_mask is not None and attn_mask.is_floating_point():
            options["attn_mask"] = rest[0]
        if alpha == "top-k":
            return topk_attention(query, key, value, 5, normalizer="sparsemax", **options)
        return entmax_attention(query, key, value, rest[-1] if alpha == "per head" else alpha, **options)

    compare(attend, inputs, monkeypatch)


@pytest.mark.parametrize("alpha", [0.6, 1 + 1e-9, 1.001, 1.95, 3.0])
def test_alpha_outside_1_to_2_or_close_to_a_bound(alpha, monkeypatch):
    inputs = [*tensors(torch.float32), torch.tensor(alpha, dtype=torch.float64)]
    with monkeypatch.context() as patch:
        patch.setitem(BOUNDS, torch.float32, 3e-4 if alpha > 2 else 1e-4)
        compare(lambda q, k, v, a: entmax_attention(q, k, v, a), inputs, monkeypatch)


def test_weights_beyond_the_kept_memory_are_recomputed(monkeypatch):
    # The scores are nearly equal, so far more keys have weight than the 64 per query that the forward keeps on average.
    inputs, causal = [x / 10 for x in tensors(torch.float32, 53, 401)], causal_lower_right(53, 401)
    for attend in (entmax_attention, lambda *qkv: entmax_attention(*qkv, 2.0, attn_mask=causal)):
        compare(attend, inputs, monkeypatch)


@pytest.mark.parametrize("left", [None, 0, 11])
@pytest.mark.parametrize("offset", [None, -7, 0, 5, 100])
@pytest.mark.parametrize("keys", [37, 301])
def test_causal_offset_and_window_equal_masks(keys, offset, left, monkeypatch):
    query, key, value = (x.requires_grad_() for x in tensors(torch.float64, 61, keys))
    i, j = torch.arange(61)[:, None], torch.arange(keys)
    seen = torch.ones(61, keys, dtype=torch.bool)
    seen &= j <= i + (1000 if offset is None else offset)
    seen &= j >= i - (1000 if left is None else left)
    setting = Setting(0.5, 0.4, 0.0, offset, None, left)
    inputs = (query, key, value)
    bounded = run(lambda *qkv: native.native_attention(*qkv, None, None, setting), inputs)
    masked = run(
        lambda *qkv: native.native_attention(*qkv, None, seen[None, None], Setting(0.5, 0.4, 0.0, None)), inputs
    )
    plain = run(lambda *qkv: plain_attention(*qkv, setting=setting), inputs)
    for x, y, z in zip(bounded, masked, plain, strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(x, z, atol=1e-10, rtol=1e-10)


def test_strides_batches_and_heads_that_broadcast(monkeypatch):
    query, key, value = tensors(torch.float32, 41, 43)
    sequence_first = [x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in (query, key, value)]
    got = compare(entmax_attention, sequence_first, monkeypatch)
    assert all(x.stride() == y.stride() for x, y in zip(got[1:], sequence_first, strict=True))
    transposed = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (query, key, value)]
    compare(entmax_attention, transposed, monkeypatch)
    compare(entmax_attention, [query, key[:1], value[:1]], monkeypatch)
    compare(entmax_attention, [query, key[:, :1], value[:, :1]], monkeypatch)
    compare(entmax_attention, [query[0, 0], key[0, 0], value[0, 0]], monkeypatch)
    compare(entmax_attention, [x[None] for x in (query, key, value)], monkeypatch)
    compare(lambda *qkv: entmax_attention(*qkv, attn_mask=causal_lower_right(41, 43)), [query, key, value], monkeypatch)
    every_second, mask = [x[..., ::2, :] for x in (query, key, value)], (torch.rand(21, 44) > 0.3)[:, ::2]
    compare(lambda *qkv: entmax_attention(*qkv, attn_mask=mask), every_second, monkeypatch)


@pytest.mark.parametrize("alpha", [1.0, 1.5, 1.2, "top-k"])
@pytest.mark.parametrize(("queries", "keys"), [(23, 29), (61, 307)])
def test_nan_in_padding_changes_nothing(queries, keys, alpha):
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen = torch.arange(keys) < keys - 7
        if alpha == "top-k":
            return topk_attention(query, key, value, 5, attn_mask=seen)
        return entmax_attention(query, key, value, alpha, attn_mask=seen)

    inputs = [x.requires_grad_() for x in tensors(torch.float32, queries, keys)]
    clean = run(attend, inputs)
    spoilt = [x.detach().clone() for x in inputs]
    spoilt[1][..., -7:, :], spoilt[2][..., -7:, :] = math.nan, math.inf
    for got, wanted in zip(run(attend, [x.requires_grad_() for x in spoilt]), clean, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("keys", [29, 307])
def test_a_query_without_visible_keys_gets_zeros_and_a_nan_query_gets_nan(keys):
    query, key, value = (x.requires_grad_() for x in tensors(torch.float32, 23, keys))
    for mask in (torch.zeros(23, keys, dtype=torch.bool), torch.full((keys,), torch.finfo(torch.float32).min)):
        for x in run(lambda *qkv, mask=mask: entmax_attention(*qkv, attn_mask=mask), [query, key, value]):
            assert (x == 0).all()
    spoilt = query.detach().clone()
    spoilt[0, 1, 5] = math.nan
    output = entmax_attention(spoilt, key, value)
    assert output[0, 1, 5].isnan().all()
    output[0, 1, 5] = 0
    assert not output.isnan().any()
    spoilt[0, 1, 5] = 1e30
    spoilt_key = key.detach().clone()
    spoilt_key[0, 1, 3] = 1e30
    assert entmax_attention(spoilt, spoilt_key, value)[0, 1, 5].isnan().all()  # a score of +inf


@pytest.mark.parametrize("keys", [29, 300])
def test_ties_go_to_the_first_keys(keys):
    query, key = torch.zeros(1, 1, 19, 5), torch.randn(1, 1, keys, 5)
    value = torch.eye(keys)[None, None]
    assert (topk_attention(query, key, value, 7)[..., :7] == 1 / 7).all()
    query = torch.randint(-1, 2, (1, 1, 19, 1)).float()  # ties in some rows, and at several places
    key = torch.randint(-9, 10, (1, 1, keys, 1)).float()
    with use_backend("torch"):
        wanted = topk_attention(query, key, value, 7)
    torch.testing.assert_close(topk_attention(query, key, value, 7), wanted)


def test_dropout_agrees_with_the_plain_path_and_the_backward(native_calls):
    inputs = [x.requires_grad_() for x in tensors(torch.float64, 31, 300)]
    seed, setting = torch.tensor(12345), Setting(0.5, 0.3, 0.4, None)
    plain = run(lambda *qkv: plain_attention(*qkv, seed=seed, setting=setting), inputs)
    plan = attention.plan_of(native.Tensors(*inputs), setting)
    ours = run(lambda *qkv: native.planned_attention(*qkv, None, None, seed, None, None, plan), inputs)
    for x, y in zip(ours, plain, strict=True):
        torch.testing.assert_close(x, y, atol=1e-10, rtol=1e-10)
    native_calls.clear()
    query, key, _ = inputs
    ones = torch.ones(2, 3, 300, 1, dtype=torch.float64)
    output = entmax_attention(query, key, ones, 1.0, dropout_p=0.3)
    assert abs(output.mean().item() - 1) < 0.05 and output.std() > 0.01
    assert (entmax_attention(query, key, ones, 1.0, dropout_p=1.0) == 0).all()
    torch.manual_seed(3)
    first = entmax_attention(query, key, ones, dropout_p=0.3)
    assert not torch.equal(entmax_attention(query, key, ones, dropout_p=0.3), first)
    torch.manual_seed(3)
    assert torch.equal(entmax_attention(query, key, ones, dropout_p=0.3), first)
    assert len(native_calls) == 5


def test_derivatives_of_first_and_second_order(native_calls):
    qkv = [x.requires_grad_() for x in torch.randn(3, 1, 2, 7, 3, dtype=torch.float64)]
    alpha = torch.tensor([1.2, 1.6], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, 7, dtype=torch.float64, requires_grad=True)
    for dropout_p in (0.0, 0.4):

        def attend(*inputs: Tensor, dropout_p: float = dropout_p) -> Tensor:
            torch.manual_seed(1)
            return entmax_attention(*inputs, dropout_p=dropout_p)

        native_calls.clear()
        assert torch.autograd.gradcheck(attend, (*qkv, alpha, bias))
        assert torch.autograd.gradgradcheck(attend, (*qkv, alpha, bias))
        assert native_calls


def test_invalid_input_raises_an_error():
    query, key, value = tensors(torch.float32)
    with pytest.raises(ValueError, match=r"alpha must be in \(0, inf\), got -1"):
        entmax_attention(query, key, value, alpha=torch.tensor([1.5, -1.0, 2.0]))
    with pytest.raises(ValueError, match=r"alpha must be in \(0, inf\), got 0"):
        entmax_attention(query, key, value, alpha=0)
    with pytest.raises(ValueError, match="attn_mask must broadcast to the scores"):
        entmax_attention(query, key, value, attn_mask=torch.ones(13, 16, dtype=torch.bool))
