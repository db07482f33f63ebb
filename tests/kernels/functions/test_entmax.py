"""The three forms of α-entmax: the autograd function, the custom operator, the plain operations."""

from __future__ import annotations

import math

import pytest
import torch

from sparse_attn.kernels.functions.entmax import _entmax, entmax_rows
from sparse_attn.kernels.reference.entmax import entmax_forward
from sparse_attn.kernels.reference.unrolled import entmax_unrolled

LOWEST = torch.finfo(torch.float32).min
ALPHAS = torch.tensor([[0.7], [1.0], [1.0001], [1.5], [2.0], [2.7]])


@pytest.mark.filterwarnings("ignore")  # warnings of `opcheck`
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_the_custom_operator_passes_opcheck(dtype, per_row, grad):
    x = torch.randn(6, 5, dtype=dtype, requires_grad=grad)
    alpha = ALPHAS.to(dtype).requires_grad_(grad) if per_row else None
    torch.library.opcheck(_entmax, (x, alpha, 0.3, LOWEST))
    torch.library.opcheck(_entmax, (torch.randn(5, 6, dtype=dtype).T, alpha, 0.3, LOWEST))


def test_the_custom_operator_differentiates_like_the_autograd_function():
    x, alpha = torch.randn(6, 5, requires_grad=True), ALPHAS.clone().requires_grad_()
    upstream = torch.randn(6, 5)
    operator = torch.autograd.grad(_entmax(x, alpha, 0.0, LOWEST), (x, alpha), upstream)
    function = torch.autograd.grad(entmax_rows(x, alpha, LOWEST), (x, alpha), upstream)
    for got, expected in zip(operator, function, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.0001, 1.3, 1.5, 2.0, 2.5, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_operations_equal_the_solver(alpha, dtype):
    for size in (1, 2, 7, 129, 1021):
        x = (
            torch.randn(7, size, dtype=dtype)
            * torch.tensor([0.0, 1e-3, 0.1, 1.0, 10.0, 1e4, 1.0], dtype=dtype)[:, None]
        )
        x[3, size // 2 :] = -math.inf
        x[6] = -math.inf
        for a in (alpha - 1, torch.full((7, 1), alpha, dtype=torch.float64).sub(1).to(dtype)):
            got, expected = entmax_unrolled(x, a, LOWEST), entmax_forward(x, a, LOWEST)
            assert (got - expected).abs().max() <= (4e-7 if dtype == torch.float32 else 1e-12), size
            assert torch.equal(got == 0, expected == 0) or alpha > 2


def test_plain_operations_have_correct_derivatives_close_to_softmax():
    x = torch.randn(5, 7)
    upstream = torch.randn(5, 7)
    for alpha in (1.0, 1.0 + 1e-6, 1.0001, 1.01):
        a = torch.full((5, 1), alpha - 1, requires_grad=True)
        (got,) = torch.autograd.grad(entmax_unrolled(x, a, LOWEST), a, upstream)
        per_row = torch.full((5, 1), alpha, dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad(entmax_rows(x.double(), per_row, LOWEST), per_row, upstream.double())
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


def test_nan_stays_in_its_row():
    x = torch.randn(3, 5)
    x[1, 2] = math.nan
    for a in (0.0, 0.3, 0.5, 1.0, 2.0):
        p = entmax_unrolled(x, a, LOWEST)
        assert p[1].isnan().all() and p[[0, 2]].isfinite().all()
