"""Properties that hold for every row of scores, checked on many difficult rows.

SPARSE_ATTN_EXAMPLES=5000 pytest tests/ops/test_properties.py      5,000 new random examples per test
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_attn import budget_sparsemax, entmax, entmax15, normmax, sparse_softmax, sparsemax, tau, topk_softmax
from sparse_attn.kernels.reference.unrolled import entmax_unrolled

MORE = int(os.environ.get("SPARSE_ATTN_EXAMPLES", "0"))
# Every run has the same examples, unless more are requested.
examples = settings(
    max_examples=MORE or 120,
    derandomize=not MORE,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

pytestmark = pytest.mark.usefixtures("backend")

WIDE = (torch.float32, torch.float64)
DTYPES = (*WIDE, torch.bfloat16, torch.float16)
SCALES = [1e-30, 1e-8, 0.01, 0.3, 1.0, 3.0, 30.0, 1e4, 1e30]
ALPHAS = [1.0, 1 + 2**-23, 1.000001, 1.0001, 1.01, 1.25, 1.5, 1.75, 1.999, 2.0, 2.5, 3.0, 4.0]


def _free(draw: st.DrawFn, size: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor(draw(st.lists(st.floats(-1, 1, width=32), min_size=size, max_size=size)), dtype=torch.float64)


def _ties(draw: st.DrawFn, size: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-2, 3, (size,), generator=_generator(draw)) / 2.0


def _nearly_equal(draw: st.DrawFn, size: int, dtype: torch.dtype) -> Tensor:
    steps = torch.randint(-4, 5, (size,), generator=_generator(draw))
    return draw(st.sampled_from([1.0, -1.0, 0.75])) * (1 + steps * torch.finfo(dtype).eps)


def _geometric(draw: st.DrawFn, size: int, dtype: torch.dtype) -> Tensor:
    """Scores for which a pass of Newton's or Michelot's method can remove as little as one entry from the support."""
    ratio = draw(st.sampled_from([0.3, 0.5, 0.9, 0.99, 1.1, 2.0]))
    return draw(st.sampled_from([-1.0, 1.0])) * ratio ** torch.arange(size, dtype=torch.float64)


def _plateau(draw: st.DrawFn, size: int, dtype: torch.dtype) -> Tensor:
    size *= draw(st.sampled_from([1, 1, 30]))
    x = torch.zeros(size, dtype=torch.float64)
    x[: draw(st.integers(1, 3))] = draw(st.sampled_from([1e-3, 0.0625, 0.5, 1.0, 2.0]))
    return x


def _slope(draw: st.DrawFn, size: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(size, dtype=torch.float64) / size


def _random(draw: st.DrawFn, size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, generator=_generator(draw), dtype=torch.float64)


def _subnormal(draw: st.DrawFn, size: int, dtype: torch.dtype) -> Tensor:
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return torch.randint(-9, 10, (size,), generator=_generator(draw)) * torch.tensor(least, dtype=torch.float64)


def _generator(draw: st.DrawFn) -> torch.Generator:
    return torch.Generator().manual_seed(draw(st.integers(0, 2**16)))


KINDS = (_free, _ties, _nearly_equal, _geometric, _plateau, _slope, _random, _subnormal)


@st.composite
def rows(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, masked: bool = True) -> Tensor:
    """One row of difficult scores."""
    dtype, kind = draw(st.sampled_from(dtypes)), draw(st.sampled_from(KINDS))
    x = kind(draw, draw(st.integers(1, 40)), dtype)
    if kind is not _subnormal:
        x = x * draw(st.sampled_from(SCALES)) + draw(st.sampled_from([0.0, 0.0, 0.0, 1000.0, -1e6]))
    largest = 6e4 if dtype == torch.float16 else 1e38
    x = x.clamp(-largest, largest).to(dtype)
    mask = draw(st.sampled_from([None, None, -math.inf, torch.finfo(dtype).min])) if masked else None
    if mask is not None:
        x[torch.rand(len(x), generator=_generator(draw)) < draw(st.sampled_from([0.3, 0.9]))] = mask
    return x


def alphas(low: float = 1.0, high: float = 4.0) -> st.SearchStrategy[float]:
    return st.sampled_from([a for a in ALPHAS if low <= a <= high]) | st.floats(low, high)


def tolerance(x: Tensor, alpha: float) -> float:
    """The allowed error of a probability: rounding, which infinite slopes enlarge above α = 2."""
    wide = 1e-13 if x.dtype == torch.float64 else (2e-7 if alpha >= 1 else 4e-7)
    steep = 2 * 2e-15 ** (1 / (alpha - 1)) if alpha > 2 else 0.0
    half = torch.finfo(x.dtype).eps / 2 if x.dtype in (torch.bfloat16, torch.float16) else 0.0
    return wide + steep + half


def visible(x: Tensor) -> Tensor:
    return x > torch.finfo(x.dtype).min


def total(p: Tensor) -> float:
    return float(p.sum(dtype=torch.float64))


def rounding_of_a_sum(p: Tensor) -> float:
    """The error of the sum of ``p`` if every entry is rounded to the dtype of ``p``."""
    info = torch.finfo(p.dtype)
    return (
        1e-13 + 3e-7 * (p.dtype != torch.float64) + info.eps / 2 * total(p) + len(p) * info.smallest_normal * info.eps
    )


@examples
@given(x=rows(), alpha=st.just(1.0) | alphas(low=1.0001))
@example(x=torch.tensor([15.0, 0, 0, 0, 0, 0, 0, 0]), alpha=1.0)  # torch.softmax itself is off by 3.6e-7
def test_agrees_with_bisection(x, alpha, oracle):
    assert (entmax(x, alpha).double() - oracle(x, alpha)).abs().max() <= tolerance(x, alpha) + tolerance(
        x.double(), alpha
    )


@examples
@given(x=rows(), alpha=alphas(low=0.3))
@example(x=torch.tensor([-math.inf, -1e35, -1e35]), alpha=2.0)  # the visible scores are far below zero
def test_probabilities_sum_to_one_and_masked_entries_are_exactly_zero(x, alpha):
    for given_alpha in (alpha, torch.tensor(alpha, dtype=torch.float64)):
        p = entmax(x, given_alpha)
        assert (p[~visible(x)] == 0).all() and (p >= 0).all()
        assert abs(total(p) - bool(visible(x).any())) <= rounding_of_a_sum(p)
        # removing masked entries does not change the result
        alone = entmax(x[visible(x)], given_alpha)
        assert ((p[visible(x)] - alone).abs() <= 2 * tolerance(x, alpha)).all()


@examples
@given(x=rows(), alpha=alphas(low=0.3), seed=st.integers(0, 2**16))
def test_permuted_scores_give_permuted_probabilities(x, alpha, seed):
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    assert (entmax(x[order], alpha) - entmax(x, alpha)[order]).abs().max() <= 2 * tolerance(x, alpha)


@examples
@given(x=rows(), alpha=alphas(low=0.3), shift=st.sampled_from([-1e6, -300.0, 0.1, 1.0, 77.0, 1e4, 1e7]))
def test_a_shift_of_all_scores_changes_nothing(x, alpha, shift):
    moved = (x.double() + shift).to(x.dtype)
    assume(moved[visible(x)].isfinite().all())
    moved = torch.where(visible(x), moved, x)
    back = torch.where(visible(x), moved.double() - shift, -math.inf)  # the scores after rounding, without the shift
    wanted = entmax(back, alpha)
    assert (entmax(moved, alpha) - wanted).abs().max() <= tolerance(x, alpha) + tolerance(back, alpha)


@examples
@given(x=rows(), alpha=alphas(low=0.3))
def test_a_larger_score_has_no_smaller_probability(x, alpha):
    for p in (entmax(x, alpha), entmax(x, torch.tensor([alpha], dtype=torch.float64)), topk_softmax(x, len(x))):
        ordered = p.double()[x.argsort()]
        # A vectorised exp is not always monotone in the last bit.
        assert (ordered.diff() >= -4 * torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps * ordered[1:]).all()


@examples
@given(x=rows(), alpha=alphas(low=0.3), at=st.integers(0, 2**16), step=st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 100.0]))
def test_raising_a_score_does_not_lower_its_probability(x, alpha, at, step):
    at %= len(x)
    assume(visible(x)[at])
    raised = x.clone()
    raised[at] += step * max(1.0, abs(float(x[at])))
    assume(raised[at].isfinite())
    before, after = entmax(x, alpha), entmax(raised, alpha)
    slack = 2 * tolerance(x, alpha)
    assert after[at] >= before[at] - slack
    others = torch.arange(len(x)) != at
    assert (after[others] <= before[others] + slack).all()


@examples
@given(x=rows(), alpha=alphas(low=1.001), more=st.floats(1.0001, 2.0))
def test_the_support_shrinks_as_alpha_grows(x, alpha, more):
    less, larger = entmax(x, alpha), entmax(x, 1 + (alpha - 1) * more)
    # An entry on the edge of the support can be rounded to either side, and a small probability to zero.
    assert (less[larger > tolerance(x, 1 + (alpha - 1) * more)] > 0).all()
    assert larger.double().amax() >= less.double().amax() - 2 * tolerance(x, 1 + (alpha - 1) * more)


@examples
@given(x=rows(), named=st.sampled_from([(entmax15, 1.5), (sparsemax, 2.0), (lambda x: topk_softmax(x, len(x)), 1.0)]))
def test_the_named_mappings_equal_entmax(x, named):
    mapping, alpha = named
    general = entmax(x, torch.tensor([alpha]))
    assert (mapping(x) - general).abs().max() <= 2 * tolerance(x, alpha)
    assert torch.equal(mapping(x), entmax(x, alpha))


@examples
@given(x=rows(dtypes=(torch.bfloat16, torch.float16)), alpha=alphas(low=0.3))
def test_half_precision_is_float32_rounded_once(x, alpha):
    wide = torch.where(visible(x), x.float(), -math.inf)
    assert torch.equal(entmax(x, alpha), entmax(wide, alpha).to(x.dtype))


@examples
@given(x=rows(), k=st.integers(1, 2000))
def test_topk_maps_keep_the_k_largest_and_no_more(x, k):
    k = min(k, len(x))
    for mapping, alpha in ((topk_softmax, 1.0), (sparse_softmax, 2.0)):
        p, dense = mapping(x, k), entmax(x, alpha)
        assert (p != 0).sum() <= k
        assert abs(total(p) - bool(visible(x).any())) <= rounding_of_a_sum(p)
        kept = sorted(range(len(x)), key=lambda i: -float(x[i]))[:k]
        assert set(p.nonzero().flatten().tolist()) <= set(kept)
        assert ((p[kept] - entmax(x[kept], alpha)).abs() <= 2 * tolerance(x, alpha)).all()
        if k == len(x) or (mapping is sparse_softmax and (dense != 0).sum() <= k):
            assert (p - dense).abs().max() <= 2 * tolerance(x, alpha)


@examples
@given(x=rows(), alpha=alphas(), dim=st.integers(-3, 2), seed=st.integers(0, 2**16))
def test_any_dim_equals_the_last_dim(x, alpha, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    block = torch.stack([x[torch.randperm(len(x), generator=generator)] for _ in range(6)]).view(2, 3, -1)
    moved = block.movedim(-1, dim)
    per_row = (1 + torch.rand(2, 3, 1, generator=generator)).double()
    k = 1 + seed % len(x)
    for mapping, slack in (
        (lambda x, dim: entmax(x, alpha, dim), tolerance(x, alpha)),
        (lambda x, dim: entmax(x, per_row.movedim(-1, dim), dim), tolerance(x, 2.0)),
        (lambda x, dim: topk_softmax(x, k, dim), tolerance(x, 1.0)),
        (lambda x, dim: sparse_softmax(x, k, dim), tolerance(x, 2.0)),
        (lambda x, dim: normmax(x, 1.5, dim), tolerance(x, 1.5)),
        (lambda x, dim: budget_sparsemax(x, float(k), dim), tolerance(x, 2.0)),
    ):
        got = mapping(moved, dim % 3)
        assert got.shape == moved.shape and got.dtype == x.dtype
        assert torch.equal(got, mapping(moved, dim % 3 - 3))
        assert (got.movedim(dim, -1) - mapping(block, -1)).abs().max() <= 2 * slack


@examples
@given(x=rows(), alpha=alphas(), seed=st.integers(0, 2**16))
def test_gradients_are_finite_and_sum_to_zero(x, alpha, seed):
    assume(alpha <= 2 or x.dtype != torch.float16)  # p^(2-α) can be larger than 65504
    upstream = torch.randn(len(x), generator=torch.Generator().manual_seed(seed)).to(x.dtype)
    scores, per_row = x.clone().requires_grad_(), torch.tensor([alpha], dtype=torch.float64, requires_grad=True)
    for given_alpha in (alpha, per_row):
        p = entmax(scores, given_alpha)
        inputs = (scores, per_row) if given_alpha is per_row else (scores,)
        grads = torch.autograd.grad(p, inputs, upstream)
        assert all(grad.isfinite().all() for grad in grads)
        assert (grads[0][~visible(x)] == 0).all()
        # dp/dz is symmetric, and a shift of all scores has no effect: the gradient sums to zero
        exact = p.detach().double()
        slopes = torch.where(exact > 0, exact, 1.0) ** (2 - alpha) * (exact > 0)
        eps = 1e-13 if x.dtype == torch.float64 else 1e-6
        rounded = torch.finfo(x.dtype).eps / 2 * total(grads[0].abs()) + len(x) * torch.finfo(x.dtype).smallest_normal
        assert abs(total(grads[0])) <= eps * total(slopes) * float(upstream.abs().max()) + rounded


@examples
@given(x=rows(dtypes=WIDE), alpha=alphas())
def test_the_unrolled_form_equals_eager_code(x, alpha):
    lowest = torch.finfo(x.dtype).min
    for a in (alpha - 1, torch.tensor([alpha - 1], dtype=torch.float64)):
        assert (entmax_unrolled(x, a, lowest) - entmax(x, alpha)).abs().max() <= 2 * tolerance(x, alpha)


@examples
@given(x=rows(dtypes=(torch.float64,)), alpha=alphas(high=2.0), seed=st.integers(0, 2**16))
def test_the_unrolled_form_has_the_gradients_of_eager_code(x, alpha, seed):
    # On the edge of the support the gradient jumps or has infinite slope.
    assume(((alpha - 1) * (x - tau(x, alpha) / (alpha - 1 or 1.0))).abs().min() > 1e-6 or alpha == 1)
    upstream = torch.randn(len(x), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores = x.clone().requires_grad_()
    per_row = torch.tensor([alpha], dtype=torch.float64, requires_grad=True)
    lowest = torch.finfo(x.dtype).min
    wanted = torch.autograd.grad(entmax(scores, per_row), (scores, per_row), upstream)
    got = torch.autograd.grad(entmax_unrolled(scores, per_row - 1, lowest), (scores, per_row), upstream)
    assert (got[0] - wanted[0]).abs().max() <= 1e-8
    assert (got[1] - wanted[1]).abs().max() <= 1e-6 * max(1.0, float(wanted[1].abs()))


@examples
@given(x=rows(), alpha=st.sampled_from([1.05, 1.5, 2.0, 3.0]) | st.floats(1.05, 4.0), seed=st.integers(0, 2**16))
@example(x=torch.tensor([1e9 + 0.25, 1e9], dtype=torch.float64), alpha=1.05, seed=0)
def test_normmax(x, alpha, seed, normmax_oracle):
    p = normmax(x, alpha)
    assert (p[~visible(x)] == 0).all() and (p >= 0).all()
    assert abs(total(p) - bool(visible(x).any())) <= rounding_of_a_sum(p)
    assert (p - normmax_oracle(x, alpha)).abs().max() <= tolerance(x, alpha) + tolerance(x.double(), alpha)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    assert (normmax(x[order], alpha) - p[order]).abs().max() <= 2 * tolerance(x, alpha)
    assert (p[x.argsort()].diff() >= -tolerance(x, alpha)).all()


@examples
@given(x=rows(), part=st.floats(0.01, 1.0), whole=st.booleans(), seed=st.integers(0, 2**16))
@example(x=torch.tensor([-0.96, -0.41, 0.32], dtype=torch.float64), part=1.0, whole=True, seed=0)
def test_budget_sparsemax(x, part, whole, seed, budget_oracle):
    budget = max(1.0, float(math.floor(part * len(x)))) if whole else part * len(x)
    # If scores differ by 1e30, values between 0 and 1 have no correct digits.
    assume(x[visible(x)].double().abs().sum() < 1e7)
    p = budget_sparsemax(x, budget)
    assert (p[~visible(x)] == 0).all() and (p >= 0).all() and (p <= 1).all()
    spent = min(budget, float(visible(x).sum()))
    lost = 1e-15 * float(x[visible(x)].double().abs().sum() + 1)
    assert abs(total(p) - spent) <= rounding_of_a_sum(p) + len(x) * lost
    slack = tolerance(x, 2.0) + lost
    assert (p - budget_oracle(x, budget)).abs().max() <= slack
    assert (budget_sparsemax(x, torch.tensor([budget], dtype=torch.float64)) - p).abs().max() <= 2 * slack
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    assert (budget_sparsemax(x[order], budget) - p[order]).abs().max() <= 2 * slack
    assert (p[x.argsort()].diff() >= 0).all()
    if len(x) > 1 or budget == 1:
        assert (budget_sparsemax(x, 1.0) - sparsemax(x)).abs().max() <= 2 * slack
