"""Fused attention in Triton: output and every gradient equal those of a matrix of weights in float64."""

from __future__ import annotations

import math

import pytest
import torch
from fused import ALPHAS, compare, expected, tensors
from padding import assert_padding_is_ignored

from sparse_attn import entmax_attention
from sparse_attn.kernels.functions.fused import fused_attention
from sparse_attn.kernels.triton.attention import decode, forward, plan
from sparse_attn.kernels.triton.attention.dropout import multipliers


@pytest.fixture(params=["short", "long"])
def length(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the kernel that keeps the scores of all keys on the chip (short), or the kernel for many keys (long)."""
    for name in ("SHORT", "SHORT_IN_FLOAT32"):
        monkeypatch.setattr(plan, name, 1024 if request.param == "short" else 0)
    return request.param


def test_alpha_per_head_grouped_heads_an_offset_and_a_learnt_mask(length, device):
    alpha = torch.tensor(ALPHAS, device=device, requires_grad=True)
    mask = torch.randn(1, 6, 1, 53, device=device)
    mask[..., :3] = -math.inf
    mask[..., 3:5] = torch.finfo(torch.float32).min
    inputs = tensors(device, heads=6, groups=3)
    compare(inputs, alpha, mask=mask.requires_grad_(), offset=7)


@pytest.mark.parametrize("alpha", [1.0001, 1.5, 2.0])
def test_one_alpha_with_key_lengths_and_a_boolean_mask(alpha, length, device):
    mask = torch.rand(1, 2, 37, 53, device=device) < 0.7
    mask[:, 0, 5] = False
    lengths = torch.tensor([53, 11], device=device)
    inputs = tensors(device, batch=2)
    output, grad_query, *_ = compare(inputs, alpha, mask=mask, key_lengths=lengths)
    assert not output[:, 0, 5].any() and not grad_query[:, 0, 5].any()


@pytest.mark.parametrize("shape", [(37, 53), (37, 1)])
def test_a_learnt_mask_that_broadcasts(shape, device):
    mask = torch.randn(1, 1, *shape, device=device, requires_grad=True)
    if shape[1] == 1:  # a number that is the same for all keys of a query does not change the weights
        inputs = tensors(device)
        output = fused_attention(*inputs, 1.5, mask, scale=0.3)
        assert torch.autograd.grad(output, mask, torch.randn_like(output))[0].abs().max() < 1e-5
    else:
        compare(tensors(device, batch=2), 1.5, mask=mask, offset=0)


def test_queries_without_a_visible_key_give_zeros(length, device):
    inputs = tensors(device, queries=13, keys=17)
    alpha = torch.tensor([1.3, 2.0], device=device, requires_grad=True)
    output, *grads = compare(inputs, alpha, offset=-5)
    assert not output[:, :, :5].any() and not grads[0][:, :, :5].any()
    assert all(grad.isfinite().all() for grad in grads)
    nothing = fused_attention(*inputs, alpha, torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device), scale=0.3)
    assert not nothing.any()
    assert not any(grad.any() for grad in torch.autograd.grad(nothing.sum(), (*inputs, alpha)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, length, device):
    alpha = torch.tensor([1.0, 1.7], device=device, requires_grad=True)
    inputs = tuple(x.detach().to(dtype).requires_grad_() for x in tensors(device, queries=131, keys=71))
    got = compare(inputs, alpha, 2e-3 if dtype == torch.float16 else 1.5e-2, offset=11)
    assert [x.dtype for x in got] == [dtype] * 4 + [torch.float32]


def test_the_gradient_of_alpha_keeps_its_digits_in_half_precision(length, device, monkeypatch):
    """In half precision, from α = 1.1 on, `alpha_gradient_of_sums` uses the hardware's logarithm and a rounded δ."""
    monkeypatch.setattr(forward, "_LOOSE", forward._EXACT)
    alphas = (1.02, 1.05, 1.1, 1.3, 1.5, 1.9, 2.0, 2.6)
    alpha = torch.tensor(alphas, device=device, requires_grad=True)
    query, key, value = (torch.randn(1, len(alphas), n, 16, device=device).half() for n in (67, 131, 131))
    output = fused_attention(query, key, value, alpha, scale=0.3)
    upstream = torch.randn(output.shape, device=device).half()  # `randn_like` of float16 depends on torch's version
    (got,) = torch.autograd.grad(output, alpha, upstream)
    wide = alpha.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(
        expected(query.double(), key.double(), value.double(), wide), wide, upstream.double()
    )
    # Errors are relative to the gradient of the head, or absolute if this gradient is below 1: it is then a sum of
    # larger terms that cancel.
    size = torch.stack([x.abs().max() for x in wanted.split(1)]).clamp(min=1.0)
    # For α above 2 the weights rise infinitely steeply at the edge of the support: rounding the scores to float32
    # changes this gradient by up to 2e-4, depending on the data.
    bound = torch.tensor([2e-5 if alpha <= 2 else 5e-4 for alpha in alphas], device=device)
    assert ((got - wanted).abs() <= bound * size).all(), (got - wanted).abs() / size


@pytest.mark.parametrize("scale", [-0.7, 0.0])
@pytest.mark.parametrize("alpha", [1.5, "per head"])
def test_scales_that_are_not_positive(scale, alpha, length, device):
    if alpha == "per head":
        alpha = torch.tensor([1.3, 2.0], device=device, requires_grad=True)
    inputs = tensors(device, queries=7, keys=41)
    output = fused_attention(*inputs, alpha, offset=3, scale=scale)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    wanted = expected(
        *wide, alpha.detach().double() if isinstance(alpha, torch.Tensor) else alpha, offset=3, scale=scale
    )
    upstream = torch.randn_like(output)
    got = (output, *torch.autograd.grad(output, inputs, upstream))
    for x, y in zip(got, (wanted, *torch.autograd.grad(wanted, wide, upstream.double())), strict=True):
        torch.testing.assert_close(x.double(), y, atol=3e-6, rtol=1e-5)


def test_the_short_kernel_with_many_keys(device, monkeypatch):
    monkeypatch.setattr(plan, "SHORT_IN_FLOAT32", 1024)
    alpha = torch.tensor([1.0, 1.6], device=device, requires_grad=True)
    inputs = tensors(device, queries=17, keys=121)
    assert plan.Plan.of(inputs[0], inputs[2]).short(121, 4, 2**17)
    compare(inputs, alpha, offset=90)


@pytest.mark.parametrize("sizes", [(5, 3), (64, 128), (200, 31)])
def test_head_sizes(sizes, device):
    query, key, value = (
        torch.randn(1, 1, length, size, device=device, requires_grad=True)
        for length, size in ((17, sizes[0]), (41, sizes[0]), (41, sizes[1]))
    )
    # The interpreter computes matrix products with NumPy, whose rounding of long sums depends on the BLAS library.
    compare((query, key, value), 1.5, 5e-6, scale=0.1)


def test_dropped_weights_are_the_same_in_every_pass(length, device, monkeypatch):
    seed = torch.tensor([1234567890123], device=device)
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: seed)
    alpha = torch.tensor([1.3, 1.6], device=device, requires_grad=True)
    multiplier = multipliers(torch.empty(1, 2, 37, 53, device=device), seed, 0.3)
    assert abs(multiplier.mean() - 1) < 0.03
    assert multiplier.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    compare(tensors(device), alpha, multiplier=multiplier, dropout_p=0.3)
    assert not fused_attention(*tensors(device), 1.5, dropout_p=1.0, scale=0.3).any()


def test_nan_affects_only_its_row_and_an_invalid_alpha_only_its_head(length, device):
    query, key, value = (x.detach() for x in tensors(device, queries=7))
    query[0, 1, 3] = math.nan
    output = fused_attention(query, key, value, 1.5, scale=0.3)
    assert output[0, 1, 3].isnan().all()
    output[0, 1, 3] = 0
    assert output.isfinite().all()
    for bad in (slice(3, 4), slice(None)):  # NaN in one row of a tile, then in all rows
        query[0, 1, bad] = math.nan
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        output = fused_attention(*inputs, 1.5, scale=0.3)
        for grad in torch.autograd.grad(output.sum(), inputs):
            hit = grad.isnan().all(-1)
            assert not hit[0, 0].any() and hit[0, 1, bad if len(grad[0, 1]) == 7 else slice(None)].all()
    query[0, 1] = 1.0
    wrong = fused_attention(query, key, value, torch.tensor([1.5, -1.0], device=device), scale=0.3)
    assert wrong[:, 1].isnan().all() and wrong[:, 0].isfinite().all()


@pytest.mark.parametrize("alpha", [1.0, 1.5, torch.tensor([1.0, 1.3, 2.0])])
def test_nan_in_padding_changes_nothing(alpha, length, device):
    alpha = alpha.to(device) if isinstance(alpha, torch.Tensor) else alpha

    def attend(query, key, value, mask):
        return entmax_attention(query, key, value, alpha, mask, enable_gqa=True)

    assert_padding_is_ignored(attend, 7, 71, device, groups=3)


def test_nan_in_the_padding_of_a_cache_changes_nothing(device, monkeypatch):
    monkeypatch.setattr(decode, "_MANY", 100)
    query, key, value = (torch.randn(1, 2, n, 11, device=device) for n in (1, 307, 307))
    key[:, :, 251:] = value[:, :, 251:] = math.nan
    key[:, :, :7] = value[:, :, :7] = math.nan
    seen = torch.ones(307, dtype=torch.bool, device=device)
    seen[251:] = seen[:7] = False
    output = entmax_attention(query, key, value, 1.5, seen.view(1, 1, 1, -1))
    torch.testing.assert_close(output, entmax_attention(query, key[:, :, 7:251], value[:, :, 7:251], 1.5))
    # A causal offset also limits the keys that the kernel reads.
    causal = fused_attention(query, key[:, :, 7:], value[:, :, 7:], 1.5, offset=243, scale=11**-0.5)
    torch.testing.assert_close(causal, output)


def test_nan_after_the_last_visible_key_changes_nothing(length, device):
    query, key, value = tensors(device)
    with torch.no_grad():
        key[:, :, 41:] = value[:, :, 41:] = math.nan
    alpha = torch.tensor([1.05, 1.5], device=device, requires_grad=True)
    inputs = (query, key, value, alpha)
    output = fused_attention(*inputs, offset=4, scale=0.3)
    upstream = torch.randn_like(output)
    got = (output, *torch.autograd.grad(output, inputs, upstream))
    expected = fused_attention(query, key[:, :, :41], value[:, :, :41], alpha, offset=4, scale=0.3)
    for x, y in zip(got, (expected, *torch.autograd.grad(expected, inputs, upstream)), strict=True):
        torch.testing.assert_close(x, y)
