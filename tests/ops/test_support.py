from __future__ import annotations

import math

import pytest
import torch

from sparse_attn import entmax, entmax15, sparsemax, support_size, tau


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0, 3.0, 0.5])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_tau_is_the_threshold(alpha, dim):
    x = torch.randn(5, 7, dtype=torch.float64) * 2 + 3
    for given in (alpha, torch.tensor(alpha, dtype=torch.float64)):
        threshold = tau(x, given, dim)
        assert threshold.shape == ((1, 7) if dim == 0 else (5, 1))
        rebuilt = ((alpha - 1) * x - threshold).clamp(min=0) ** (1 / (alpha - 1))
        torch.testing.assert_close(rebuilt, entmax(x, alpha, dim))


def test_tau_is_differentiable_and_minus_one_at_softmax():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tau(x, 1.5), (x,))
    assert (tau(x, 1.0) == -1).all()


@pytest.mark.parametrize("alpha", [1.0, 1.25, 2.5])
def test_second_derivatives_of_tau(alpha):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    given = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(tau, (x, given))


def test_rows_with_one_or_no_visible_score():
    x = torch.full((2, 3), -math.inf)
    x[0, 1] = 0.5
    assert tau(x, 2.0).tolist() == [[-0.5], [math.inf]]
    assert support_size(sparsemax(x)).tolist() == [1, 0]
    assert tau(torch.tensor(2.0), 2.0).item() == 1.0


def test_support_size_counts_along_a_dim_and_refuses_wrong_arguments():
    p = entmax15(torch.randn(3, 5, 7) * 3, dim=1)
    assert torch.equal(support_size(p, 1), (p > 0).sum(1)) and support_size(p, 1).dtype == torch.int64
    with pytest.raises(IndexError, match=r"dim must be in \[-3, 2\] for p of shape"):
        support_size(p, 3)
    with pytest.raises(TypeError, match="p must have a floating dtype"):
        support_size(p > 0)
    with pytest.raises(TypeError, match="alpha must be a number"):
        tau(p, "2")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [0.5, 1.5, 2.0, 3.0])
def test_half_precision_is_rounded_once(dtype, alpha):
    x = torch.randn(5, 1000).to(dtype)
    assert torch.equal(tau(x, alpha), tau(x.float(), alpha).to(dtype))
    x[0], x[1, 7:] = torch.finfo(dtype).min, torch.finfo(dtype).min
    assert tau(x, alpha)[0].item() == math.inf
    assert torch.equal(tau(x, alpha)[1], tau(x[1, :7].float(), alpha).to(dtype))


def test_an_empty_row_has_an_infinite_threshold():
    alpha = torch.tensor([[1.5], [2.0], [1.25]], requires_grad=True)
    threshold = tau(torch.randn(3, 0), alpha)
    assert threshold.tolist() == [[math.inf]] * 3
    threshold.sum().backward()
    assert alpha.grad.tolist() == [[0.0]] * 3
