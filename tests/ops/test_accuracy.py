"""Accuracy of the mappings and their gradients, against the oracles of ``conftest.py`` or our float64 results."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from sparse_attn import budget_sparsemax, entmax, entmax15, normmax, sparse_softmax, sparsemax, tau, topk_softmax

SIZES = [1, 2, 7, 128, 1024, 32768]
SCALES = [0.01, 1, 10, 100, 1e4]
ALPHAS = [1.0, 1.0001, 1.001, 1.01, 1.1, 1.25, 1.5, 1.75, 2.0]
STEEP = [2.5, 3.0, 4.0]
GRID = [1.0, 1 + 2**-23, 1.000001, 1.00001, 1.0001, 1.0003, 1.001, 1.003, 1.01, 1.03, 1.1, 1.2, 1.25, 1.3, 1.4, 1.5]
GRID += [1.55, 1.6, 1.65, 1.7, 1.75, 1.8, 1.85, 1.9, 1.95, 1.99, 1.999, 1.9999, 1.99999, 2 - 1e-6, 2.0]
# Relative errors are divided by at least this number: the relative rounding error of p grows with -log p.
FLOOR = 1e-20

by_each_backend = pytest.mark.usefixtures("backend")


def in_float32(alpha: float) -> float:
    """α rounded to float32, so that the oracle's result is right for α as a number and as a float32 tensor."""
    return float(torch.tensor(alpha))


def hard_rows(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows (n, size) of all SCALES: random, ties, a slope, one large score, offset by 1e6, masked entries.

    The last two rows are masked. Above size 1024, all other rows are random, with or without the offset.
    """
    repeats = {1: 1, 2: 20, 7: 20, 128: 5, 1024: 2}.get(size, 1)
    rows = []
    for scale, _ in itertools.product(SCALES, range(repeats)):
        random, offset = torch.randn(size) * scale, torch.randn(size) * scale + 1e6
        if size > 1024:
            rows += [random, offset]
            continue
        ties = torch.randint(-3, 4, (size,)) * scale
        slope = -torch.arange(size) * scale / size
        lone = torch.zeros(size).index_fill(0, torch.tensor([size // 2]), scale)
        holes = torch.rand(size) < 0.5
        rows += [random, offset, ties, slope, lone]
        rows += [random.masked_fill(holes, -math.inf), random.flip(0).masked_fill(holes, math.nan)]
    rows.append(torch.full((size,), -math.inf))
    low = torch.finfo(dtype).min
    rows.append(torch.full((size,), low))
    # the largest float16 is 65504
    x = torch.stack(rows).clamp(-6e4, 6e4) if dtype == torch.float16 else torch.stack(rows)
    return x.to(dtype).masked_fill(torch.stack(rows) == -math.inf, -math.inf).nan_to_num(nan=low, neginf=-math.inf)


def assert_sums_to_one(p: Tensor, x: Tensor) -> None:
    """Check that no entry is negative, and that the sum of a row is 1, or 0 if all entries are masked."""
    some = (x > torch.finfo(x.dtype).min).any(-1)
    assert (p >= 0).all() and (p.sum(-1, dtype=torch.float64) - some.double()).abs().max() <= 3e-7


def relative(got: Tensor, exact: Tensor) -> float:
    """The largest absolute error, divided by the largest absolute value of ``exact``."""
    return float((got.double() - exact).abs().max() / exact.abs().max().clamp(min=FLOOR))


def gradients(x: Tensor, alpha: float, upstream: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The gradients for the scores and for one α per row."""
    scores = x.detach().to(dtype).requires_grad_()
    per_row = torch.full((len(x), 1), alpha, dtype=dtype, requires_grad=True)
    return torch.autograd.grad(entmax(scores, per_row), (scores, per_row), upstream.to(dtype))


@by_each_backend
@pytest.mark.parametrize("alpha", [*ALPHAS, *STEEP])
@pytest.mark.parametrize("size", SIZES)
def test_float32(size, alpha, oracle):
    x, alpha = hard_rows(size), in_float32(alpha)
    exact = oracle(x, alpha)
    maps = [entmax(x, alpha), entmax(x, torch.full((len(x), 1), alpha))]
    maps += {1.5: [entmax15(x)], 2.0: [sparsemax(x)]}.get(alpha, [])
    for p in maps:
        assert (p - exact).abs().max() <= (2e-7 if alpha <= 2 else 2e-5)
        assert_sums_to_one(p, x)
        assert (p[x <= torch.finfo(x.dtype).min] == 0).all()


@by_each_backend
@pytest.mark.parametrize("size", [7, 1024])
def test_one_alpha_for_each_row(size, oracle):
    x = hard_rows(size)
    alpha = (1 + torch.rand(len(x), 1)).index_fill(0, torch.tensor([0, 3]), 1.0).index_fill(0, torch.tensor([1]), 2.0)
    alpha[4] = 1.0001
    exact = torch.where(alpha == 1, oracle(x, 1.0), oracle(x, torch.where(alpha == 1, 1.5, alpha)))
    p = entmax(x, alpha)
    assert (p - exact).abs().max() <= 2e-7
    assert_sums_to_one(p, x)


@by_each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [2, 7, 128, 1024])
def test_half_precision_is_float32_rounded_once(size, dtype, oracle):
    x = hard_rows(size, dtype)
    wide = x.float().masked_fill(x <= torch.finfo(dtype).min, -math.inf)
    for alpha in (1.0, 1.001, 1.25, 1.5, 2.0, 3.0):
        alpha = in_float32(alpha)
        exact = oracle(x, alpha)
        half_a_step = torch.finfo(dtype).eps / 2 * exact + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        for given in (alpha, torch.full((len(x), 1), alpha)):
            p = entmax(x, given)
            assert p.dtype == dtype and torch.equal(p, entmax(wide, given).to(dtype))
            assert ((p - exact).abs() <= half_a_step + (2e-7 if alpha <= 2 else 2e-5)).all()


@by_each_backend
@pytest.mark.parametrize("alpha", GRID)
def test_gradients_agree_with_eighty_digit_arithmetic(alpha, eighty_digits):
    alpha = in_float32(alpha)
    for scale in (0.01, 1, 10, 30):
        x, upstream = torch.randn(5, 11) * scale, torch.randn(5, 11)
        p, *exact = eighty_digits(x, alpha, upstream)
        assert (entmax(x, alpha) - p).abs().max() <= 2e-7 and (entmax(x.double(), alpha) - p).abs().max() <= 1e-12
        for dtype, bounds in ((torch.float64, (1e-10, 1e-10)), (torch.float32, (1e-5, 1e-4))):
            for got, wanted, bound in zip(gradients(x, alpha, upstream, dtype), exact, bounds, strict=True):
                assert relative(got, wanted) <= bound, (scale, dtype, tuple(wanted.shape))


def both_maps(x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Probabilities in float32, and in float64."""
    return entmax(x, alpha), entmax(x.double(), alpha)


@by_each_backend
@pytest.mark.parametrize("alpha", GRID)
def test_float32_gradients_agree_with_float64(alpha):
    alpha = in_float32(alpha)
    for size, scale in itertools.product([2, 7, 128, 1024, 32768], [0.01, 1, 10, 100]):
        rows = {2: 32, 7: 32, 128: 16, 1024: 4}.get(size, 3)
        x, upstream = torch.randn(rows, size) * scale, torch.randn(rows, size)
        (scores, per_row), exact = (gradients(x, alpha, upstream, dtype) for dtype in (torch.float32, torch.float64))
        # In float32, the tiny gradient of an entry on the edge of the support loses its digits. This matters in rows
        # with few non-zero entries: the bound of the batch allows for it from scale 10 on, the bounds of the rows from
        # scale 1 on.
        lost = 2e-7 * upstream.abs().amax()
        edge = [lost if alpha > 1.001 and scale >= least else FLOOR for least in (10, 1)]
        # The closer α is to 2, the more steeply the gradient changes where an entry enters the support; there, the
        # rounding of p decides the gradient. Above α = 1.5, all bounds allow for this.
        slopes = [torch.where(p > 0, p.double().clamp(min=1e-300) ** (2 - alpha), 0.0) for p in both_maps(x, alpha)]
        jumps = (slopes[0] - slopes[1]).abs().sum(-1) * upstream.abs().amax() if alpha > 1.5 else torch.zeros(rows)
        edge = [edge[0] + jumps.max(), edge[1] + jumps]
        error = (scores - exact[0]).abs().amax(-1)
        assert error.max() <= 1e-5 * exact[0].abs().max() + edge[0], (size, scale)
        assert (error <= 1e-5 * exact[0].abs().amax(-1) + edge[1]).all(), (size, scale)
        assert relative(per_row, exact[1]) <= 1e-4, (size, scale)
        if size > 1024:
            continue
        # In the gradient for α, terms of both signs cancel, and p in float32 cannot distinguish nearly equal scores:
        # therefore the error of a row is compared with the sum of the absolute terms of this row.
        slope = (entmax(x.double(), alpha + 1e-6) - entmax(x.double(), alpha - 1e-6)) / 2e-6
        terms = (slope * upstream).abs().sum(-1, keepdim=True)
        assert ((per_row - exact[1]).abs() <= 1e-4 * terms + lost).all(), (size, scale)


@by_each_backend
@pytest.mark.parametrize("alpha", [*ALPHAS, 1.9])
def test_gradients_of_hard_rows_are_finite_and_zero_where_masked(alpha):
    for size in (1, 2, 7, 128):
        x = hard_rows(size)
        grads = gradients(x, in_float32(alpha), torch.randn_like(x), torch.float32)
        assert all(grad.isfinite().all() for grad in grads)
        assert all((grad[-2:] == 0).all() for grad in grads)
        assert (grads[0][x <= torch.finfo(x.dtype).min] == 0).all()


@by_each_backend
def test_gradient_for_alpha_at_softmax_is_the_published_limit():
    x, upstream = torch.randn(7, 101), torch.randn(7, 101)
    _, grad = gradients(x, 1.0, upstream, torch.float32)
    p, log_p = torch.softmax(x.double(), -1), torch.log_softmax(x.double(), -1)
    slope = p / 2 * ((p * log_p**2).sum(-1, keepdim=True) - log_p**2)
    assert relative(grad, (slope * upstream).sum(-1, keepdim=True)) <= 1e-4


@by_each_backend
@pytest.mark.parametrize("alpha", GRID)
def test_bfloat16_gradient_for_alpha(alpha):
    for size in (7, 128, 1024):
        x, upstream = torch.randn(20, size).bfloat16(), torch.randn(20, size).bfloat16()
        # In bfloat16, some entries are exactly on the edge of the support, where the gradient at α = 2 jumps.
        # Rows with such entries are omitted.
        off_edge = ((alpha - 1) * x.double() - tau(x.double(), alpha)).abs().amin(-1) > 1e-6
        x, upstream = x[off_edge][:16], upstream[off_edge][:16]
        exact = gradients(x, in_float32(alpha), upstream, torch.float64)[1]
        shared = torch.tensor(alpha, requires_grad=True)
        (got,) = torch.autograd.grad(entmax(x, shared), shared, upstream)
        assert got.dtype == torch.float32 and got * exact.sum() > 0
        assert abs(float(got / exact.sum()) - 1) <= 1e-2
        per_row = torch.full((16, 1), alpha, requires_grad=True)
        (rows,) = torch.autograd.grad(entmax(x, per_row), per_row, upstream)
        assert ((rows > 0) == (exact > 0)).all()
        assert ((rows - exact).abs() <= 1e-2 * exact.abs()).all()


@by_each_backend
@pytest.mark.parametrize("size", SIZES)
def test_topk_maps(size, oracle):
    x = hard_rows(size)
    # sorted() is stable: of equal scores, the first are kept
    order = torch.tensor([sorted(range(size), key=lambda i, row=row: -row[i]) for row in x.tolist()])
    for k in sorted({1, 5, 37, size // 2} & set(range(1, size + 1))):
        kept = torch.full_like(x, -math.inf).scatter(-1, order[:, :k], x.gather(-1, order[:, :k]))
        for got, alpha in ((topk_softmax(x, k), 1.0), (sparse_softmax(x, k), 2.0)):
            assert (got - oracle(kept, alpha)).abs().max() <= 2e-7
            assert ((got != 0).sum(-1) <= k).all()
            assert_sums_to_one(got, x)


@by_each_backend
@pytest.mark.parametrize("alpha", [1.01, 1.5, 2.0, 5.0])
@pytest.mark.parametrize("size", SIZES)
def test_normmax(size, alpha, normmax_oracle):
    x, alpha = hard_rows(size), in_float32(alpha)
    exact = normmax_oracle(x, alpha)
    for p in (normmax(x, alpha), normmax(x, torch.full((len(x), 1), alpha)))[: 2 if size <= 1024 else 1]:
        assert (p - exact).abs().max() <= (2e-7 if alpha <= 2 else 2e-5)
        assert_sums_to_one(p, x)
        assert (p[-2:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_normmax_and_budget_in_half_precision(dtype, normmax_oracle, budget_oracle):
    x = hard_rows(128, dtype)
    for p, exact in (
        (normmax(x, 2.0), normmax_oracle(x, 2.0)),
        (budget_sparsemax(x, 3.0), budget_oracle(x, 3.0)),
    ):
        assert p.dtype == dtype
        steps = (p.view(torch.int16).int() - exact.to(dtype).view(torch.int16).int()).abs()
        assert ((steps <= 1) | ((p - exact).abs() <= 1e-15)).all() and (steps == 0).float().mean() > 0.999


@pytest.mark.parametrize("size", SIZES)
def test_budget_sparsemax(size, budget_oracle):
    x = hard_rows(size)
    visible = (x > torch.finfo(x.dtype).min).sum(-1)
    for budget in sorted({0.3, 1.0, 2.0, 5.7, size / 2, float(size)}):
        budget = in_float32(budget)
        if budget > size:
            continue
        exact = budget_oracle(x, budget)
        for p in (budget_sparsemax(x, budget), budget_sparsemax(x, torch.full((len(x), 1), budget))):
            assert (p - exact).abs().max() <= 2e-7
            spent = visible.double().clamp(max=budget)
            assert ((p.sum(-1, dtype=torch.float64) - spent).abs() <= 3e-7 * budget).all()
            assert (p >= 0).all() and (p <= 1).all()


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("name", ["normmax", "budget_sparsemax"])
def test_gradients_agree_with_finite_differences_of_the_oracle(name, scale, normmax_oracle, budget_oracle):
    ours, theirs, values = {
        "normmax": (normmax, normmax_oracle, (1.3, 2.0, 3.0)),
        "budget_sparsemax": (budget_sparsemax, budget_oracle, (0.7, 2.3, 4.6)),
    }[name]
    step = 1e-6
    for value in values:
        x, upstream = torch.randn(3, 7) * scale, torch.randn(3, 7)
        wide, value = x.double(), in_float32(value)

        def along(low: Tensor, high: Tensor, upstream: Tensor = upstream) -> Tensor:
            return ((high - low) * upstream).sum(-1) / (2 * step)

        exact_scores = torch.stack(
            [along(theirs(wide - step * e, value), theirs(wide + step * e, value)) for e in torch.eye(7)], -1
        )
        exact_value = along(theirs(wide, value - step), theirs(wide, value + step))
        for dtype in (torch.float64, torch.float32):
            scores = x.detach().to(dtype).requires_grad_()
            per_row = torch.full((3, 1), value, dtype=dtype, requires_grad=True)
            got = torch.autograd.grad(ours(scores, per_row), (scores, per_row), upstream.to(dtype))
            assert (got[0] - exact_scores).abs().max() <= 1e-6 * exact_scores.abs().max().clamp(min=1)
            assert (got[1].squeeze(-1) - exact_value).abs().max() <= 1e-6 * exact_value.abs().max().clamp(min=1)
