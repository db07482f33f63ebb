"""Attention over blocks of queries equals attention with one large matrix, including gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import sparse_attn.kernels.choose_attention as ops
import sparse_attn.kernels.functions.blockwise as blocks
from sparse_attn import entmax_attention, topk_attention
from sparse_attn.ops import attention


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_QUERIES", 11)
    monkeypatch.setattr(attention, "attend_directly", lambda *_: None)
    monkeypatch.setattr(ops, "_is_native", lambda _: False)


def with_gradients(blockwise: bool, attend, inputs: tuple[Tensor, ...], monkeypatch) -> list[Tensor]:
    monkeypatch.setattr(ops, "_LARGE", 1 if blockwise else 2**60)
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    output = attend(*inputs)
    upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).sin().view_as(output)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


def compare(attend, inputs: tuple[Tensor, ...], monkeypatch) -> None:
    for got, expected in zip(*(with_gradients(b, attend, inputs, monkeypatch) for b in (True, False)), strict=True):
        close = {"atol": 1e-11, "rtol": 1e-9} if got.dtype == torch.float64 else {"atol": 2e-5, "rtol": 1e-5}
        torch.testing.assert_close(got, expected, **close)


def tensors(queries: int, keys: int, dtype: torch.dtype, kv_heads: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(2, 3, queries, 5, dtype=dtype),
        torch.randn(2, kv_heads, keys, 5, dtype=dtype),
        torch.randn(2, kv_heads, keys, 7, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("queries", "keys"), [(37, 41), (41, 13), (11, 11), (1, 23)])
@pytest.mark.parametrize("mask", [None, "causal", "boolean", "float", "one for each head"])
@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0, "per head", "top-k"])
def test_blocks_equal_one_large_matrix(alpha, mask, queries, keys, dtype, monkeypatch):
    attn_mask = {
        "boolean": torch.rand(2, 1, queries, keys) > 0.3,
        "float": torch.randn(queries, keys, dtype=dtype),
        "one for each head": torch.rand(3, queries, 1) > 0.2,
    }.get(mask)
    settings = {"attn_mask": attn_mask, "is_causal": mask == "causal"}
    inputs = tensors(queries, keys, dtype)
    if alpha == "per head":
        per_head = torch.tensor([1.0, 1.3, 2.0], dtype=dtype)
        compare(lambda q, k, v, alpha: entmax_attention(q, k, v, alpha, **settings), (*inputs, per_head), monkeypatch)
    elif alpha == "top-k":
        compare(lambda *qkv: topk_attention(*qkv, k=5, normalizer="sparsemax", **settings), inputs, monkeypatch)
    else:
        compare(lambda *qkv: entmax_attention(*qkv, alpha, **settings), inputs, monkeypatch)


def test_grouped_heads_with_a_scale_and_broadcast_batches_and_no_batch(monkeypatch):
    query, key, value = tensors(37, 41, torch.float64, kv_heads=1)
    compare(lambda *qkv: entmax_attention(*qkv, enable_gqa=True, scale=0.3), (query, key, value), monkeypatch)
    compare(lambda *qkv: entmax_attention(*qkv), (query, key[:1], value[:1]), monkeypatch)
    compare(lambda *qkv: entmax_attention(*qkv), (query[0, 0], key[0, 0], value[0, 0]), monkeypatch)


def test_half_precision(monkeypatch):
    inputs = tensors(37, 41, torch.bfloat16)
    runs = [with_gradients(b, lambda *qkv: entmax_attention(*qkv), inputs, monkeypatch) for b in (True, False)]
    for got, expected in zip(*runs, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, expected, atol=5e-2, rtol=5e-2)


def test_derivatives_of_first_and_second_order(monkeypatch):
    monkeypatch.setattr(ops, "_LARGE", 1)
    monkeypatch.setattr(blocks, "_QUERIES", 3)
    qkv = torch.randn(3, 1, 2, 7, 3, dtype=torch.float64).requires_grad_().unbind()
    alpha = torch.tensor([1.2, 1.6], dtype=torch.float64, requires_grad=True)
    for dropout_p in (0.0, 0.4):

        def attend(*inputs: Tensor, dropout_p: float = dropout_p) -> Tensor:
            torch.manual_seed(1)
            return entmax_attention(*inputs, dropout_p=dropout_p)

        assert torch.autograd.gradcheck(attend, (*qkv, alpha)) and torch.autograd.gradgradcheck(attend, (*qkv, alpha))


def test_dropout_changes_the_weights_and_keeps_their_mean(monkeypatch):
    monkeypatch.setattr(ops, "_LARGE", 1)
    query, key, _ = tensors(37, 200, torch.float64)
    ones = torch.ones(2, 3, 200, 1, dtype=torch.float64)
    output = entmax_attention(query, key, ones, 1.0, dropout_p=0.3)
    assert abs(output.mean().item() - 1) < 0.02 and output.std() > 0.01
    assert (entmax_attention(query, key, ones, 1.0, dropout_p=1.0) == 0).all()


def test_causal_blocks_do_not_use_later_keys(monkeypatch):
    monkeypatch.setattr(ops, "_LARGE", 1)
    seen = []
    scores = blocks._scores
    monkeypatch.setattr(blocks, "_scores", lambda *args: seen.append(scores(*args)) or seen[-1])
    query, key, value = tensors(37, 37, torch.float32)
    entmax_attention(query, key, value, is_causal=True)
    assert sorted({x.shape[-1] for x, _ in seen}) == [11, 22, 33, 37]


@pytest.mark.filterwarnings("ignore:Lower right causal bias:UserWarning")  # a warning of torch for queries without keys
@pytest.mark.parametrize(("queries", "keys"), [(37, 41), (41, 13), (1, 23), (13, 2)])
@pytest.mark.parametrize("bias", [causal_lower_right, causal_upper_left])
def test_a_causal_bias_of_torch_is_not_converted_to_a_tensor(bias, queries, keys, monkeypatch):
    seen = []
    attend = ops.blockwise_attention
    monkeypatch.setattr(ops, "blockwise_attention", lambda *args: seen.append(args) or attend(*args))
    inputs = tensors(queries, keys, torch.float64)
    compare(lambda *qkv: entmax_attention(*qkv, 1.3, attn_mask=bias(queries, keys)), inputs, monkeypatch)
    assert seen[0][4] is None and seen[0][5].offset == (keys - queries if bias is causal_lower_right else 0)


def test_a_learnt_mask_gets_a_gradient_and_vmap_works(monkeypatch):
    monkeypatch.setattr(ops, "_LARGE", 1)
    query, key, value = tensors(13, 17, torch.float64)
    mask = torch.zeros(13, 17, dtype=torch.float64, requires_grad=True)
    entmax_attention(query, key, value, attn_mask=mask).square().sum().backward()
    assert mask.grad is not None and (mask.grad != 0).any()
    mapped = torch.func.vmap(entmax_attention)(query, key, value)
    torch.testing.assert_close(mapped, entmax_attention(query, key, value))


def test_invalid_input_raises_an_error(monkeypatch):
    monkeypatch.setattr(ops, "_LARGE", 1)
    query, key, value = tensors(13, 17, torch.float32)
    with pytest.raises(ValueError, match=r"alpha must be in \(0, inf\), got -1"):
        entmax_attention(query, key, value, alpha=torch.tensor([1.5, -1.0, 2.0]))
    with pytest.raises(ValueError, match=r"alpha must be in \(0, inf\), got 0"):
        entmax_attention(query, key, value, alpha=0)
    with pytest.raises(ValueError, match="attn_mask must broadcast to the scores"):
        entmax_attention(query, key, value, attn_mask=torch.ones(13, 16, dtype=torch.bool))


def test_a_mask_that_changed_before_the_backward_raises_an_error(monkeypatch):
    monkeypatch.setattr(ops, "_LARGE", 1)
    query, key, value = (x.requires_grad_() for x in tensors(13, 17, torch.float64))
    mask = torch.rand(13, 17) > 0.3
    output = entmax_attention(query, key, value, 1.5, mask)
    mask.fill_(True)  # as if the mask were filled again for the next batch
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("empty", ["batch", "depth", "values"])
def test_empty_tensors_in_a_call_large_enough_for_blocks(empty, monkeypatch):
    monkeypatch.setattr(ops, "_LARGE", 1)
    batch, depth, values = (
        0 if empty == name else size for name, size in {"batch": 2, "depth": 5, "values": 7}.items()
    )
    query, key = torch.randn(batch, 3, 13, depth), torch.randn(batch, 3, 17, depth)
    value = torch.randn(batch, 3, 17, values, requires_grad=True)
    output = entmax_attention(query, key, value, scale=1.0)
    assert output.shape == (batch, 3, 13, values)
    output.sum().backward()
    assert value.grad is not None and value.grad.shape == value.shape
