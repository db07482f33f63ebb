from __future__ import annotations

import math

import entmax as peer
import pytest
import torch

from sparse_attn import budget_sparsemax, sparsemax


@pytest.mark.parametrize("budget", [0.3, 1.0, 2.0, 3.7, 5.0, 11.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_agrees_with_the_package_entmax(budget, scale):
    x = torch.randn(7, 11, dtype=torch.float64) * scale
    exact = torch.tensor(budget, dtype=torch.float64)  # the package entmax rounds a number to float32
    ours, theirs = budget_sparsemax(x, budget), peer.budget_bisect(x, exact, n_iter=100)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(ours.sum(-1), torch.full((7,), budget, dtype=torch.float64))


def test_documented_examples():
    x = torch.tensor([0, 0.25, 0.5, 0.75, 1])
    torch.testing.assert_close(budget_sparsemax(x, 2), torch.tensor([0, 0.125, 0.375, 0.625, 0.875]))
    torch.testing.assert_close(budget_sparsemax(2 * x, 3), torch.tensor([0, 0.25, 0.75, 1, 1]))


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_a_budget_of_one_is_sparsemax(scale):
    x = torch.randn(13, 17, dtype=torch.float64) * scale
    torch.testing.assert_close(budget_sparsemax(x, 1), sparsemax(x))


def test_only_entries_between_0_and_1_grow_with_the_budget():
    x = torch.tensor([[3.0, 0.4, 0.1, -5.0]], dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda b: budget_sparsemax(x, b))(torch.tensor(1.7, dtype=torch.float64))
    assert jacobian.tolist() == [[0, 0.5, 0.5, 0]]


def test_long_rows_of_float32():
    x = torch.randn(5, 32768)
    for budget in (0.5, 7.3, 1000.0, 32768.0):
        p = budget_sparsemax(x, budget).double()
        exact = budget_sparsemax(x.double(), budget)
        assert (p - exact).abs().max() <= 6e-8 and (exact.sum(-1) - budget).abs().max() <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_masked_entries_rows_and_nan(dtype):
    for masked in (-math.inf, torch.finfo(dtype).min):
        x = torch.randn(5, 7).to(dtype)
        x[0, 2:4] = masked
        x[1] = masked
        x[2, 5] = math.nan
        x[3, 2:] = masked  # two entries left for a budget of three
        x.requires_grad_()
        p = budget_sparsemax(x, 3)
        assert p.dtype == dtype and (p[0, 2:4] == 0).all() and (p[1] == 0).all() and p[2].isnan().all()
        assert p[3].tolist() == [1, 1, 0, 0, 0, 0, 0]
        visible = [0, 1, 4, 5, 6]
        torch.testing.assert_close(p[0, visible], budget_sparsemax(x.detach()[0, visible], 3))
        p[[0, 1, 3, 4]].float().square().sum().backward()
        assert x.grad is not None and x.grad[[0, 1, 3, 4]].isfinite().all() and (x.grad[1] == 0).all()


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_any_dim(dim):
    x = torch.randn(3, 5, 7)
    budget = torch.rand([1 if axis == dim % 3 else size for axis, size in enumerate(x.shape)]) * 2.5 + 0.1
    expected = budget_sparsemax(x.movedim(dim, -1), budget.movedim(dim, -1)).movedim(-1, dim)
    assert torch.equal(budget_sparsemax(x, budget, dim), expected)
    assert budget_sparsemax(x, budget, dim).is_contiguous()


def test_ties_scalars_and_empty_tensors():
    assert budget_sparsemax(torch.zeros(8), 2).tolist() == [0.25] * 8
    assert budget_sparsemax(torch.tensor(3.0), 0.5).item() == 0.5
    for shape in ((0,), (3, 0), (0, 3)):
        assert budget_sparsemax(torch.empty(shape)).shape == shape
    budget = torch.tensor(1.5, requires_grad=True)
    budget_sparsemax(torch.empty(0, 3), budget).sum().backward()
    assert budget.grad is not None and budget.grad.item() == 0


def test_invalid_input_raises_an_error():
    x = torch.randn(2, 3)
    for budget in (0, -1.0, 3.1, math.nan, math.inf):
        for given in (budget, torch.tensor([[1.0], [budget]])):
            with pytest.raises(ValueError, match=r"budget must be in \(0, 3\], got"):
                budget_sparsemax(x, given)
    with pytest.raises(ValueError, match=r"one budget per entry of dim 0 use budget.view\(-1, 1\)"):
        budget_sparsemax(x, torch.full((2,), 2.0))
    with pytest.raises(TypeError, match="budget must be a number or a floating tensor, got bool"):
        budget_sparsemax(x, True)
    with pytest.raises(TypeError, match=r"got torch\.complex64"):
        budget_sparsemax(torch.randn(2, dtype=torch.complex64))
    with pytest.raises(IndexError, match=r"dim must be in \[-2, 1\]"):
        budget_sparsemax(x, dim=-3)
