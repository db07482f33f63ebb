"""Gradients of the row kernels in C, for the scores and for α."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from c_rows import SIZES, exact, exact_gradients, forward, needs_library

from sparse_attn.kernels.cpu import rows

pytestmark = needs_library
ALPHAS = [0.5, 0.9, 1.0, 1.0001, 1.001, 1.01, 1.1, 1.25, 1.5, 1.75, 1.99, 2.0, 2.5, 4.0]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradients_equal_the_reference(alpha, variant):
    a = alpha - 1
    for size, scale in itertools.product(SIZES, [0.1, 3.0]):
        x, grad = torch.randn(3, size) * scale, torch.randn(3, size) + 5
        for dtype, bound, bound_a in ((torch.float32, 3e-6, 3e-5), (torch.float64, 1e-12, 1e-11)):
            p = forward(x.to(dtype), a, variant=variant)
            upstream = grad.to(dtype)
            grad_scores, grad_a = rows.entmax_backward(p, a, upstream, True, variant=variant)
            alone, none = rows.entmax_backward(p, a, upstream, variant=variant)
            expected, expected_a = exact_gradients(p, a, upstream)
            assert grad_a is not None and none is None
            assert grad_scores.dtype == grad_a.dtype == dtype
            bound *= 1 + float(expected.abs().max())
            assert (grad_scores - expected).abs().max() <= bound, (size, scale, dtype)
            assert (alone - expected).abs().max() <= bound, (size, scale, dtype)
            assert (grad_a - expected_a).abs().max() <= bound_a * (1 + expected_a.abs().max()), (size, scale, dtype)


@pytest.mark.parametrize("alpha", [0.9, 1.0, 1.0001, 1.3, 1.5, 1.9])
def test_gradients_of_nearly_one_hot_rows_keep_their_digits(alpha, variant):
    a = alpha - 1
    rest = torch.logspace(-9, -2, 43)[:, None]  # the sum of all entries but the largest
    p = torch.cat([1 - rest, rest * torch.tensor([0.5, 0.3, 0.2])], -1).repeat(3, 1)
    grad = torch.randn(len(p), 4)
    expected, expected_a = exact_gradients(p, a, grad)
    for size in (4, 4096):  # packed rows, and rows that are read in place
        wide, wide_grad = (torch.nn.functional.pad(x, (0, size - 4)) for x in (p, grad))
        for with_alpha in (False, True):
            grad_scores, grad_a = rows.entmax_backward(wide, a, wide_grad, with_alpha, variant=variant)
            error = (grad_scores[:, :4] - expected).abs().amax(-1) / expected.abs().amax(-1)
            assert error.max() <= 5e-6, (size, with_alpha)
            if grad_a is not None:
                assert ((grad_a - expected_a).abs() / expected_a.abs()).max() <= 5e-6, size


def test_every_row_uses_its_own_alpha(variant):
    alpha = torch.tensor([1.0, 1.5, 2.0, 1.2, 0.7, 3.0, 1.0 + 1e-7, 1.9])
    x, grad = torch.randn(3, 8, 5, 67), torch.randn(3, 8, 5, 67)
    a = (alpha - 1).view(8, 1, 1)
    p = forward(x, a, variant=variant)
    grad_scores, grad_a = rows.entmax_backward(p, a, grad, True, variant=variant)
    for head, number in enumerate((alpha - 1).tolist()):
        assert (p[:, head] - exact(x[:, head], number)).abs().max() <= 4e-7
    expected, expected_a = exact_gradients(p, a, grad)
    assert grad_a is not None and grad_a.shape == (3, 8, 5, 1)
    assert (grad_scores - expected).abs().max() <= 2e-6
    assert (grad_a - expected_a).abs().max() <= 2e-6
    expanded = a.expand(3, 8, 5, 1)
    for same in (expanded, expanded.contiguous(), a.double()):
        torch.testing.assert_close(forward(x, same, variant=variant), p, rtol=0, atol=0)


def test_upstream_gradients_outside_the_support_are_ignored(variant):
    for a, with_alpha, size in itertools.product([0.0, 0.3, 0.5, 1.0], [False, True], [16, 17]):
        p = torch.zeros(1, size)
        p[0, :2] = 0.5
        grad = torch.full((1, size), math.nan)
        grad[0, :2] = torch.tensor([1.0, 2.0])
        grad_scores, _ = rows.entmax_backward(p, a, grad, with_alpha, variant=variant)
        torch.testing.assert_close(grad_scores[0, 0], -grad_scores[0, 1])
        assert grad_scores[0, 0] < 0 and not grad_scores[0, 2:].any()
