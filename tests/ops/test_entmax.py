from __future__ import annotations

import itertools
import math

import entmax as peer
import pytest
import torch
from oracles import bisect_entmax

from sparse_attn import entmax, entmax15, sparsemax, topk_softmax

ALPHAS = [1.0, 1.001, 1.01, 1.1, 1.25, 1.5, 1.75, 2.0]
STEEP = [2.5, 3.0, 4.0]


def test_documented_examples():
    x = torch.tensor([-2, 0, 0.5])
    torch.testing.assert_close(entmax(x, 1.0), torch.tensor([0.0486, 0.3592, 0.5922]), atol=5e-5, rtol=0)
    torch.testing.assert_close(sparsemax(x), torch.tensor([0, 0.25, 0.75]))
    torch.testing.assert_close(entmax15(x), torch.tensor([0, 0.3260, 0.6740]), atol=5e-5, rtol=0)
    rows = torch.tensor([[-1, 0, 0.5], [1, 2, 3.5]])
    alpha = torch.full((2, 1), 1.33, requires_grad=True)
    p = entmax(rows, alpha)
    expected = torch.tensor([[0.0460, 0.3276, 0.6264], [0.0026, 0.1012, 0.8963]])
    torch.testing.assert_close(p, expected, atol=5e-5, rtol=0)
    p[0, 0].backward()
    assert alpha.grad is not None
    torch.testing.assert_close(alpha.grad, torch.tensor([[-0.2562], [0.0]]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("alpha", [0.5, 0.9, *ALPHAS, *STEEP])
def test_float32_stays_within_rounding_of_a_float64_oracle(alpha, oracle):
    bound = 4e-7 if alpha < 1 else 2e-7
    for size, scale in itertools.product([1, 2, 7, 128, 1021], [0.01, 1, 10, 100, 1e4]):
        x = torch.randn(5, size) * scale
        x[0] = x[0, 0]  # a row of ties
        for given in (alpha, torch.full((5, 1), alpha)):
            # A tensor holds α rounded to float32.
            exact = alpha if given is alpha else float(given[0])
            p = entmax(x, given).double()
            assert (p - oracle(x, exact)).abs().max() <= bound, (size, scale, given is alpha)
            assert (p.sum(-1) - 1).abs().max() <= 5e-7


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0])
def test_long_rows(alpha, oracle):
    x = torch.randn(2, 32768) * torch.tensor([[0.01], [1.0]])
    assert (entmax(x, alpha) - oracle(x, alpha)).abs().max() <= 2e-7


@pytest.mark.parametrize("alpha", [0.7, 1.0, 1.0001, 1.3, 1.5, 2.0, 2.7])
def test_derivatives_of_first_and_second_order(alpha, backend):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    per_row = torch.full((3, 1), alpha, dtype=torch.float64, requires_grad=True)
    inputs = (x, per_row)
    assert torch.autograd.gradcheck(entmax, inputs)
    assert torch.autograd.gradgradcheck(entmax, inputs)
    assert torch.autograd.gradcheck(lambda x: entmax(x, alpha), (x,))
    assert torch.autograd.gradgradcheck(lambda x: entmax(x, alpha), (x,))


def by_newton(x, alpha):
    """α-entmax by two steps of Newton's method that start at the solution; autograd differentiates the steps."""
    a = alpha - 1
    with torch.no_grad():
        p = bisect_entmax(x, alpha)
        tau = a * x.amax(-1, keepdim=True) - p.amax(-1, keepdim=True) ** a
    for _ in range(2):
        w = torch.where(p > 0, a * x - tau, 1.0)
        excess = torch.where(p > 0, w ** (1 / a), 0.0).sum(-1, keepdim=True) - 1
        tau = tau + excess / (torch.where(p > 0, w ** (1 / a - 1), 0.0) / a).sum(-1, keepdim=True)
    return torch.where(p > 0, torch.where(p > 0, a * x - tau, 1.0) ** (1 / a), 0.0)


@pytest.mark.parametrize("size", [2, 31, 257])
def test_second_derivatives_of_rows_of_several_lengths(size, backend):
    # Near the edge of the support, second derivatives and their errors for α > 1.5 grow without bound: omit such rows.
    alpha = torch.tensor([1.1, 1.25, 1.5, 1.75, 2.0, 2.5], dtype=torch.float64).repeat_interleave(97)[:, None]
    x = torch.randn(len(alpha), size, dtype=torch.float64)
    weight = bisect_entmax(x, alpha) ** (alpha - 1)  # the distance from the edge of the support
    clear = ((weight == 0) | (weight > 1e-2)).all(-1)
    assert len(alpha[clear].unique()) == 6
    x, alpha = x[clear].requires_grad_(), alpha[clear].requires_grad_()
    grad, direction = torch.randn(2, *x.shape, dtype=torch.float64)
    grad.requires_grad_()
    results = []
    for mapping in (entmax, by_newton):
        first = torch.autograd.grad(mapping(x, alpha), (x, alpha), grad, create_graph=True)
        along = (first[0] * direction).sum() + 0.7 * first[1].sum()
        results.append(torch.autograd.grad(along, (x, alpha, grad)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("alpha", [1.0, 1.0001, 1.001, 1.01, 1.1, 1.5, 1.75, 2.0])
@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_float32_gradients_keep_their_digits_from_softmax_to_sparsemax(alpha, scale):
    grads = {}
    scores, upstream = torch.randn(7, 31) * scale, torch.randn(7, 31)
    for dtype in (torch.float32, torch.float64):
        x = scores.to(dtype).requires_grad_()
        per_row = torch.full((7, 1), alpha).to(dtype).requires_grad_()  # rounded to float32 for both dtypes
        grads[dtype] = torch.autograd.grad(entmax(x, per_row), (x, per_row), upstream.to(dtype))
    for got, exact, bound in zip(grads[torch.float32], grads[torch.float64], (1e-5, 1e-4), strict=True):
        assert (got - exact).abs().max() <= bound * exact.abs().max()


def test_gradient_for_alpha_at_softmax_is_the_limit():
    x, upstream = torch.randn(3, 11, dtype=torch.float64), torch.randn(3, 11, dtype=torch.float64)
    alpha = torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(entmax(x, alpha), alpha, upstream)
    p, log_p = torch.softmax(x, -1), torch.log_softmax(x, -1)
    dp = p / 2 * ((p * log_p**2).sum(-1, keepdim=True) - log_p**2)
    torch.testing.assert_close(grad, (dp * upstream).sum(-1, keepdim=True))


def test_one_alpha_per_head():
    scores = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor([1.0, 1.4, 2.0], dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(scores)
    together = torch.autograd.grad(entmax(scores, alpha.view(-1, 1, 1)), (scores, alpha), upstream)
    for head in range(3):
        one = alpha[head].detach().requires_grad_()
        alone = torch.autograd.grad(entmax(scores[:, head], one), (scores, one), upstream[:, head])
        torch.testing.assert_close(together[0][:, head], alone[0][:, head])
        torch.testing.assert_close(together[1][head], alone[1])


@pytest.mark.parametrize("alpha", [0.7, 1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_masked_entries_and_rows(alpha, as_tensor, dtype):
    for masked in (-math.inf, torch.finfo(dtype).min):
        x = torch.randn(3, 7).to(dtype)
        x[0, 2:4] = masked
        x[1] = masked
        x[2, 1:] = masked
        x.requires_grad_()
        given = torch.tensor(alpha, requires_grad=True) if as_tensor else alpha
        p = entmax(x, given)
        assert (p[0, 2:4] == 0).all() and (p[1] == 0).all() and p[2].tolist() == [1, 0, 0, 0, 0, 0, 0]
        visible = x.detach()[0, [0, 1, 4, 5, 6]]
        torch.testing.assert_close(p[0, [0, 1, 4, 5, 6]], entmax(visible, alpha), atol=1e-7, rtol=1e-6)
        p.backward(torch.randn_like(p))
        assert x.grad is not None and x.grad.isfinite().all()
        assert (x.grad[1] == 0).all() and (x.grad[0, 2:4] == 0).all()
        if as_tensor:
            assert given.grad.isfinite()


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0, 3.0])
def test_nan_stays_in_its_row(alpha):
    x = torch.randn(3, 5)
    x[1, 2] = math.nan
    x.requires_grad_()
    p = entmax(x, torch.full((3, 1), alpha))
    assert p[1].isnan().all() and p[[0, 2]].isfinite().all()
    p.sum().backward()
    assert x.grad is not None and x.grad[1].isnan().all() and x.grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("alpha", [1.0, 1.2, 1.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_result_rounded_once(alpha, dtype):
    x = (torch.randn(5, 127) * 3).to(dtype)
    p = entmax(x, alpha)
    assert p.dtype == dtype
    assert torch.equal(p, entmax(x.float(), alpha).to(dtype))


def test_autocast_gives_the_same_dtype_as_softmax(monkeypatch):
    x = torch.randn(3, 5, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert entmax15(x).dtype == torch.softmax(x, -1).dtype == torch.bfloat16
        # On a GPU, autocast computes softmax in float32. The replaced softmax imitates this on the CPU.
        softmax = torch.softmax
        monkeypatch.setattr(torch, "softmax", lambda x, dim: softmax(x.float(), dim))
        assert entmax15(x).dtype == topk_softmax(x, 2).dtype == torch.float32


@pytest.mark.parametrize("alpha", [1.01, 1.5, 2.0])
def test_large_scores_and_offsets(alpha):
    x = torch.randint(-3, 4, (4, 17)).float()
    torch.testing.assert_close(entmax(x + 1e6, alpha), entmax(x, alpha))
    assert entmax(torch.tensor([3e7, 0.0]), alpha).tolist() == [1.0, 0.0]
    assert entmax(torch.tensor([60000.0, 4096.0], dtype=torch.float16), alpha).tolist() == [1.0, 0.0]


def test_agrees_with_the_package_entmax():
    x = torch.randn(13, 101, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    for ours, theirs in ((sparsemax, peer.sparsemax), (entmax15, peer.entmax15)):
        torch.testing.assert_close(ours(x), theirs(x))
        got, expected = (torch.autograd.grad(f(x), x, upstream)[0] for f in (ours, theirs))
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(entmax(x, 1.7), peer.entmax_bisect(x, 1.7, n_iter=100))


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_any_dim(dim):
    x = torch.randn(3, 5, 7)
    alpha = torch.rand([1 if axis == dim % 3 else size for axis, size in enumerate(x.shape)]) + 1
    expected = entmax(x.movedim(dim, -1), alpha.movedim(dim, -1)).movedim(-1, dim)
    assert torch.equal(entmax(x, alpha, dim), expected)
    torch.testing.assert_close(entmax(x, alpha, dim).sum(dim), torch.ones_like(expected).mean(dim))


def test_scalars_and_empty_tensors():
    assert entmax(torch.tensor(3.0)).item() == 1.0
    for shape in ((0,), (3, 0), (0, 3)):
        assert entmax(torch.empty(shape)).shape == shape


def test_support_shrinks_as_alpha_grows():
    x = torch.randn(11, 53)
    sizes = [(entmax(x, alpha) > 0).sum(-1) for alpha in (1.0, 1.2, 1.5, 2.0, 3.0)]
    assert (sizes[0] == 53).all()
    assert all((after <= before).all() for before, after in itertools.pairwise(sizes))
    assert (sizes[-1] < sizes[0]).all()


@pytest.mark.parametrize("alpha", [0, -1.5, math.nan, math.inf])
def test_alpha_outside_its_range_raises_an_error(alpha):
    for given in (alpha, torch.tensor([[1.5], [alpha]])):
        with pytest.raises(ValueError, match=r"alpha must be in \(0, inf\), got"):
            entmax(torch.randn(2, 3), given)


def test_invalid_input_raises_an_error():
    x = torch.randn(2, 8, 5, 5)
    with pytest.raises(ValueError, match=r"got shape \(8,\); .* use alpha.view\(-1, 1, 1\)"):
        entmax(x, torch.full((8,), 1.5))
    with pytest.raises(ValueError, match="with size 1 along dim 3"):
        entmax(x, torch.full((5,), 1.5))
    with pytest.raises(ValueError, match="with size 1 along dim 3"):
        entmax(x, torch.full((1, 1, 1, 1, 1), 1.5))
    with pytest.raises(TypeError, match=r"x must have a floating dtype .*, got torch.int64"):
        sparsemax(torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="complex64"):
        entmax15(torch.randn(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got list"):
        entmax15([1.0, 2.0])
    with pytest.raises(TypeError, match="alpha must be a number or a floating tensor, got str"):
        entmax(x, "1.5")
    with pytest.raises(IndexError, match=r"dim must be in \[-4, 3\] .*, got 4"):
        entmax(x, dim=4)


def test_the_error_shows_every_axis_that_alpha_could_belong_to():
    with pytest.raises(ValueError, match=r"dim 0 use alpha.view\(-1, 1, 1, 1\); .* dim 1 use alpha.view\(-1, 1, 1\)"):
        entmax(torch.randn(4, 4, 5, 5), torch.full((4,), 1.5))


def test_an_empty_batch_gives_alpha_a_gradient_of_zero():
    alpha = torch.tensor(1.5, requires_grad=True)
    y = entmax(torch.empty(0, 3, dtype=torch.bfloat16), alpha)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert alpha.grad is not None and alpha.grad.item() == 0


def test_the_result_is_contiguous_as_for_softmax():
    assert entmax(torch.randn(3, 5).T).is_contiguous() and entmax(torch.randn(3, 5), dim=0).is_contiguous()


def test_steep_alpha_and_tiny_scores(oracle):
    x = torch.randn(3, 129) * 1e-3
    assert (entmax(x, 4.0) - oracle(x.double(), 4.0)).abs().max() <= 2e-7


def test_equal_scores_get_equal_weights_at_large_alpha(backend):
    for size, alpha in itertools.product((2, 29, 59, 100, 2000), (4.0, 7.0, 9.0, 12.0, 60.0)):
        x = torch.stack([torch.full((size,), score) for score in (0.0, -5.0, 7.3)])
        assert (entmax(x, alpha) * size - 1).abs().max() <= 1e-6, (size, alpha)


def test_float8_is_refused():
    with pytest.raises(TypeError, match=r"bfloat16, float32, float64\), got torch.float8_e4m3fn"):
        entmax(torch.zeros(3).to(torch.float8_e4m3fn))
