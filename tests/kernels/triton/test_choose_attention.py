"""Attention calls that the fused kernels support use them; other calls use another path."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.parallel import DistributedDataParallel

from sparse_attn import (
    AdaptiveSparseMultiheadAttention,
    backends,
    entmax_attention,
    topk_attention,
    use_backend,
)
from sparse_attn.kernels import choose_attention
from sparse_attn.kernels.functions import fused as operator


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The arguments of each call of the fused function."""
    seen: list[tuple] = []

    def recorded(*args, **kwargs):
        seen.append((args, kwargs))
        return operator.fused_attention(*args, **kwargs)

    monkeypatch.setattr(choose_attention, "fused_attention", recorded)
    return seen


def tensors(device: torch.device, *shape: int, queries: int = 5, keys: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(*shape, n, 11, device=device, requires_grad=True) for n in (queries, keys, keys))


def same(function, inputs: tuple[Tensor, ...]) -> Tensor:
    """The output of a call, after output and gradients have been compared with plain torch in float64."""
    output = function(*inputs)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    with use_backend("torch"):
        wanted = function(*wide)
    upstream = torch.randn_like(output)
    got = (output, *torch.autograd.grad(output, inputs, upstream))
    right = (wanted, *torch.autograd.grad(wanted, wide, upstream.double()))
    for actual, reference in zip(got, right, strict=True):
        torch.testing.assert_close(actual.double(), reference, atol=2e-5, rtol=1e-5)
    return output


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3)])
def test_any_number_of_batch_dimensions(shape, device, calls):
    same(lambda *x: entmax_attention(*x, 1.3), tensors(device, *shape))
    mask = torch.randn(*shape[-2:], 5, 7, device=device)
    same(lambda *x: entmax_attention(*x, 1.3, attn_mask=mask.to(x[0].dtype)), tensors(device, *shape))
    assert len(calls) == 2


def test_broadcast_batches_heads_and_alpha(device, calls):
    query, key, value = tensors(device, 2, 3)
    alpha = torch.tensor([1.2, 1.5, 2.0], device=device, requires_grad=True)
    same(lambda *x: entmax_attention(x[0], x[1][:1], x[2][:, :1], x[3]), (query, key, value, alpha))
    one = torch.tensor(1.3, device=device, requires_grad=True)
    same(lambda *x: entmax_attention(*x[:3], x[3], is_causal=True), (query, key, value, one))
    key, value = (x[:, :1].detach().requires_grad_() for x in (key, value))
    same(lambda *x: entmax_attention(*x, 1.5, enable_gqa=True), (query, key, value))
    assert len(calls) == 3 and calls[-1][0][1].shape[1] == 1


@pytest.mark.parametrize("bias", [causal_lower_right, causal_upper_left])
def test_causal_biases_are_passed_as_an_offset(bias, device, calls):
    inputs = tensors(device, 2, 3)
    output = entmax_attention(*inputs, 1.5, attn_mask=bias(5, 7))
    seen = torch.ones(5, 7, dtype=torch.bool, device=device).tril(2 if bias is causal_lower_right else 0)
    torch.testing.assert_close(output, entmax_attention(*inputs, 1.5, attn_mask=seen), atol=1e-6, rtol=1e-5)
    assert calls[0][0][4] is None and calls[0][0][6] == (2 if bias is causal_lower_right else 0)
    with pytest.raises(ValueError, match="attn_mask must broadcast to the scores"):
        entmax_attention(*inputs, 1.5, attn_mask=bias(4, 7))


def test_a_padding_mask_gives_the_number_of_keys_to_read(device, calls):
    inputs = tensors(device, 2, 3)
    seen = torch.tensor([[1, 1, 0, 1, 0, 0, 0], [0] * 7], dtype=torch.bool, device=device)[:, None, None]
    added = torch.zeros(1, 1, 1, 7, device=device).masked_fill(~seen[:1], torch.finfo(torch.float32).min)
    for mask, ends in ((seen, [4, 0]), (seen[0], [4, 4]), (added, [4, 4])):
        same(lambda *x, mask=mask: entmax_attention(*x, 1.3, attn_mask=mask), inputs)
        assert calls[-1][1]["key_lengths"].tolist() == ends
    same(lambda *x: entmax_attention(*x, 1.3, attn_mask=seen.expand(2, 3, 5, 7)), inputs)
    assert calls[-1][1]["key_lengths"] is None


def test_layers_make_no_mask_of_all_pairs(device, calls):
    layer = AdaptiveSparseMultiheadAttention(22, 2, batch_first=True, device=device)
    x = torch.randn(2, 7, 22, device=device)
    how = {"need_weights": False}
    expected = layer(x, x, x, attn_mask=torch.ones(7, 7, dtype=torch.bool, device=device).triu(1), **how)[0]
    torch.testing.assert_close(layer(x, x, x, is_causal=True, **how)[0], expected)
    assert calls[-1][0][4] is None and calls[-1][0][6] == 0
    layer(x, x, x, key_padding_mask=torch.arange(7, device=device).expand(2, 7) > 4, **how)
    assert calls[-1][0][4].shape == (2, 1, 1, 7) and calls[-1][1]["key_lengths"].tolist() == [5, 5]


@pytest.mark.filterwarnings("ignore")  # warnings of torch
def test_gradients_under_ddp(device, calls, tmp_path):
    layer = AdaptiveSparseMultiheadAttention(22, 2, batch_first=True, device=device)
    x = torch.randn(2, 5, 22, device=device)
    layer(x, x, x, need_weights=False)[0].square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        DistributedDataParallel(layer)(x, x, x, need_weights=False)[0].square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert len(calls) == 2
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_attention_at_alpha_one_is_computed_by_torch(device, calls):
    inputs = tensors(device, 2, 3)
    mask = torch.zeros(5, 7, device=device)
    mask[:, 2:5] = torch.finfo(torch.float32).min
    mask[3] = -math.inf
    output = same(lambda *x: entmax_attention(*x, 1.0, attn_mask=mask.to(x[0].dtype)), inputs)
    assert not output[..., 3, :].any()
    torch.testing.assert_close(entmax_attention(*inputs, 1), F.scaled_dot_product_attention(*inputs))
    same(lambda *x: entmax_attention(*x, 1.0, attn_mask=causal_lower_right(5, 7)), inputs)
    assert not calls


def test_autocast_computes_in_half_precision(device, calls):
    inputs = tensors(device, 2, 3)
    with torch.autocast(device.type, torch.bfloat16):
        output = entmax_attention(*inputs, 1.5)
    assert output.dtype == torch.bfloat16 and calls[0][0][0].dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), entmax_attention(*inputs, 1.5), atol=3e-2, rtol=3e-2)
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(output.float().sum(), inputs))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from torch, about its check for forward mode
def test_calls_that_the_kernels_do_not_support_use_another_path(device, calls):
    query, key, value = tensors(device, 2, 3)
    entmax_attention(query.double(), key.double(), value.double())
    topk_attention(query, key, value, 3)
    torch.func.vmap(entmax_attention)(query, key, value)
    torch.func.grad(lambda x: entmax_attention(x, key, value).sum())(query)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query.detach(), torch.ones_like(query))
        assert forward_ad.unpack_dual(entmax_attention(dual, key, value)).tangent is not None
    entmax_attention(*(torch.randn(1, 3, 300, device=device) for _ in range(3)))
    assert entmax_attention(query[:, :, :0], key, value).shape == (2, 3, 0, 11)
    with use_backend("torch"):
        entmax_attention(query, key, value)
    assert not calls
    entmax_attention(query, key, value, 3.5)
    assert len(calls) == 1


def test_wrong_input_raises_an_error_before_a_kernel_is_called(device, calls):
    query, key, value = tensors(device, 2, 3)
    with pytest.raises(ValueError, match=r"alpha must be in \(0, inf\), got -1"):
        entmax_attention(query, key, value, -1.0)
    with pytest.raises(ValueError, match=r"alpha must be a number or have shape \(H,\) = \(3,\), got \(2,\)"):
        entmax_attention(query, key, value, torch.ones(2, device=device))
    with pytest.raises(ValueError, match=r"attn_mask must broadcast to the scores \(2, 3, 5, 7\), got shape \(5, 6\)"):
        entmax_attention(query, key, value, attn_mask=torch.ones(5, 6, dtype=torch.bool, device=device))
    with pytest.raises(TypeError, match="attn_mask must be boolean or floating"):
        entmax_attention(query, key, value, attn_mask=torch.ones(5, 7, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match=r"attn_mask must be on the query's device, .*, got meta"):
        entmax_attention(query, key, value, attn_mask=torch.ones(5, 7, dtype=torch.bool, device="meta"))
    with pytest.raises(TypeError, match="one dtype"):
        entmax_attention(query, key.bfloat16(), value)
    assert not calls


def test_backends_reports_the_forced_backend():
    assert backends()["triton"].startswith(("CUDA tensors: ", "any tensors, slowly"))
    assert backends()["compiled"] == "not used: another is forced"
