from __future__ import annotations

import math

import entmax as peer
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from sparse_attn import normmax


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0, 3.0, 10.0])
def test_agrees_with_the_package_entmax(alpha):
    x = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    ours, theirs = normmax(x, alpha), peer.normmax_bisect(x, alpha, n_iter=100)
    torch.testing.assert_close(ours, theirs)
    got, expected = (torch.autograd.grad(y, x, upstream)[0] for y in (ours, theirs))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("alpha", [1.3, 2.0, 5.0])
def test_no_random_point_of_the_simplex_is_better_than_normmax(alpha):
    x = torch.randn(1, 5, dtype=torch.float64)

    def value(p):
        return (p * x).sum(-1) - p.pow(alpha).sum(-1) ** (1 / alpha)

    elsewhere = torch.distributions.Dirichlet(torch.ones(5, dtype=torch.float64)).sample((20000,))
    assert value(normmax(x, alpha)) >= value(elsewhere).max()


def test_limits_of_normmax_for_small_and_large_alpha():
    x = torch.tensor([2.0, 1.5, 1.4, 0.2])
    torch.testing.assert_close(normmax(x, 1.001), torch.tensor([1.0, 0, 0, 0]))
    documented = normmax(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), 1000.0)
    torch.testing.assert_close(documented, torch.tensor([0, 0, 0.3330, 0.3334, 0.3336]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [1.5, 2.0, 4.0])
def test_masked_entries_rows_and_nan(alpha, dtype):
    for masked in (-math.inf, torch.finfo(dtype).min):
        x = torch.randn(4, 7).to(dtype)
        x[0, 2:4] = masked
        x[1] = masked
        x[2, 5] = math.nan
        x.requires_grad_()
        p = normmax(x, alpha)
        assert p.dtype == dtype and (p[0, 2:4] == 0).all() and (p[1] == 0).all() and p[2].isnan().all()
        visible = [0, 1, 4, 5, 6]
        torch.testing.assert_close(p[0, visible], normmax(x.detach()[0, visible], alpha))
        p[[0, 1, 3]].float().square().sum().backward()
        assert x.grad is not None and x.grad[[0, 1, 3]].isfinite().all() and (x.grad[1] == 0).all()


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_any_dim(dim):
    x = torch.randn(3, 5, 7)
    alpha = torch.rand([1 if axis == dim % 3 else size for axis, size in enumerate(x.shape)]) + 1.1
    expected = normmax(x.movedim(dim, -1), alpha.movedim(dim, -1)).movedim(-1, dim)
    torch.testing.assert_close(normmax(x, alpha, dim), expected)


def test_scalars_and_empty_tensors():
    assert normmax(torch.tensor(3.0)).item() == 1.0
    for shape in ((0,), (3, 0), (0, 3)):
        assert normmax(torch.empty(shape)).shape == shape


def test_invalid_input_raises_an_error():
    x = torch.randn(2, 3)
    for alpha in (1.0, 0.5, -1, math.nan, math.inf):
        for given in (alpha, torch.tensor([[2.0], [alpha]])):
            with pytest.raises(ValueError, match=r"alpha must be in \(1, inf\), got"):
                normmax(x, given)
    with pytest.raises(ValueError, match=r"one alpha per entry of dim 0 use alpha.view\(-1, 1\)"):
        normmax(x, torch.full((2,), 2.0))
    with pytest.raises(TypeError, match=r"got a tensor of torch\.int64"):
        normmax(x, torch.tensor(2))
    with pytest.raises(TypeError, match="got str"):
        normmax(x, "2")
    with pytest.raises(TypeError, match=r"x must have a floating dtype .*, got torch.int64"):
        normmax(torch.tensor([1, 2]))
    with pytest.raises(IndexError, match=r"dim must be in \[-2, 1\]"):
        normmax(x, dim=2)


def test_a_wrong_alpha_in_a_trace_gives_nan():
    x, alpha = torch.randn(5, 3), torch.full((5, 1), 2.0)
    traced = make_fx(lambda x, alpha: normmax(x, alpha))(x, alpha)
    alpha = torch.tensor([[2.0], [1.0], [0.3], [math.inf], [math.nan]])
    got = traced(x, alpha)
    assert torch.equal(got.isnan().any(-1), torch.tensor([False, True, True, True, True]))
    torch.testing.assert_close(got[0], normmax(x[0], 2.0))
