"""Inputs of the row kernels in C: half precision, strides, masked entries, NaN, infinity, empty tensors."""

from __future__ import annotations

import math

import pytest
import torch
from c_rows import LOWEST, exact, forward, needs_library

from sparse_attn.kernels.cpu import rows

pytestmark = needs_library


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0, 3.0])
def test_half_precision_is_the_float32_result_rounded_once(dtype, alpha, variant):
    a, lowest = alpha - 1, torch.finfo(dtype).min
    for size in (1, 7, 128, 1021):
        x = (torch.randn(4, size) * 3).to(dtype)
        x[1, ::2] = lowest
        x[2] = -math.inf
        p = forward(x, a, lowest, variant)
        assert torch.equal(p, forward(x.float(), a, lowest, variant).to(dtype))
        grad = torch.randn(4, size).to(dtype) * 1000
        grad_scores, grad_a = rows.entmax_backward(p, a, grad, True, variant=variant)
        wide, wide_a = rows.entmax_backward(p.float(), a, grad.float(), True, variant=variant)
        assert grad_a is not None and wide_a is not None
        assert torch.equal(grad_scores, wide.to(dtype))
        assert grad_a.dtype == torch.float32 and torch.equal(grad_a, wide_a)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_finite_half_precision_number_is_converted(dtype, variant):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    # At α = 2 and p = (1/2, 1/2), the gradient of the first score is half of the number: only the conversions round.
    grad = torch.stack([every, torch.zeros_like(every)], -1)
    half = torch.full_like(grad, 0.5)
    grad_scores, _ = rows.entmax_backward(half, 1.0, grad, variant=variant)
    assert torch.equal(grad_scores[:, 0], (every.float() / 2).to(dtype))
    overflow = torch.tensor([[math.inf, math.nan]], dtype=dtype)
    assert rows.entmax_backward(half[:1], 1.0, overflow, variant=variant)[0].isnan().all()


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_strides(alpha, variant):
    a = alpha - 1
    base = torch.randn(7, 34, 5, 11)
    views = [
        base.transpose(1, 3),  # a strided last dimension
        base.permute(3, 0, 2, 1),
        base[:, 3:20, :, 1:8],  # contiguous rows with gaps
        base[::2, :, ::3, ::2],
        base[:, :1].expand(7, 34, 5, 11),
        base[..., :1].expand(7, 34, 5, 11),  # stride 0 in the last dimension
        base[0, 0, 0],  # one row
        torch.randn(3, 1, 2, 1, 5, 1, 2, 19).transpose(0, -1),
    ]
    for x in views:
        p = forward(x, a, variant=variant)
        assert p.shape == x.shape and p.is_contiguous()
        assert torch.equal(p, forward(x.contiguous(), a, variant=variant))
        strided = torch.randn_like(p)[..., :1].expand_as(p)
        for grad in (
            strided,
            torch.randn(x.shape[::-1]).permute(*range(x.dim() - 1, -1, -1)),
            torch.ones(()).expand_as(p),
        ):
            got, got_a = rows.entmax_backward(p, a, grad, True, variant=variant)
            same, same_a = rows.entmax_backward(p, a, grad.contiguous(), True, variant=variant)
            assert torch.equal(got, same)
            assert got_a is not None and same_a is not None and torch.equal(got_a, same_a)
        strided_p = p.transpose(0, -1).contiguous().transpose(0, -1)
        got, _ = rows.entmax_backward(strided_p, a, grad, variant=variant)
        assert torch.equal(got, rows.entmax_backward(p, a, grad, variant=variant)[0])


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.001, 1.5, 1.7, 2.0, 3.0])
@pytest.mark.parametrize("size", [3, 129, 300])
def test_masked_entries_and_rows(alpha, size, variant):
    a = alpha - 1
    x = torch.randn(6, size)
    x[0] = -math.inf
    x[1] = LOWEST
    x[2, 1:] = -math.inf
    x[3, ::2] = LOWEST
    x[4, : size // 2] = -math.inf
    p = forward(x, a, variant=variant)
    assert (p - exact(x, a)).abs().max() <= 4e-7
    assert not p[:2].any() and p[2, 0] == 1 and not p[3, ::2].any()
    for with_alpha in (False, True):
        grad_scores, grad_a = rows.entmax_backward(p, a, torch.randn(6, size), with_alpha, variant=variant)
        assert not grad_scores[:2].any() and not grad_scores[3, ::2].any() and grad_scores.isfinite().all()
        assert grad_a is None or (not grad_a[:2].any() and grad_a.isfinite().all())


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.3, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("size", [1, 5, 128, 300])
def test_nan_and_infinity(alpha, size, variant):
    a = alpha - 1
    x = torch.randn(6, size)
    x[0, -1] = math.nan
    x[1] = -math.inf
    x[1, size // 2] = math.nan
    x[2, 0] = math.inf
    x[3, -1] = -1e30
    x[3, 0] = 3e38
    for dtype in (torch.float32, torch.float64):
        p = forward(x.to(dtype), a, variant=variant)
        torch.testing.assert_close(p.double(), exact(x, a), equal_nan=True, rtol=0, atol=4e-7)
        assert p[:3].isnan().all() and not p[3:].isnan().any()
        grad_scores, grad_a = rows.entmax_backward(p, a, torch.randn_like(p), True, variant=variant)
        assert grad_a is not None
        assert grad_scores[:3].isnan().all() and grad_a[:3].isnan().all()
        assert not grad_scores[3:].isnan().any() and not grad_a[3:].isnan().any()
        assert rows.entmax_backward(p, a, torch.randn_like(p), variant=variant)[0][:3].isnan().all()


def test_empty_tensors(variant):
    for shape in ((0,), (0, 3), (3, 0), (2, 0, 5)):
        x = torch.empty(shape)
        for a in (0.5, torch.full((1,), 0.5)):
            assert forward(x, a, variant=variant).shape == shape
            grad_scores, grad_a = rows.entmax_backward(x, a, x, True, variant=variant)
            assert grad_scores.shape == shape and grad_a is not None
            assert grad_a.shape == (*shape[:-1], 1) and not grad_a.any()
